"""Where a launcher of ranks (torchrun, srun, ssh) has put this process: the environment it has left.

A rank is a device of the cluster, in its order; a node is one of its hosts, or stands in for several.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.errors import HetisError, SpecError, require

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOOPBACK = "127.0.0.1"
SIOCGIFADDR = 0x8915
"""Linux: ask for the IPv4 address of a network interface."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher has said to this rank.

    Attributes:
        local_rank: among the ranks of this node; None where the launcher does not say.
        local_world_size: ranks of this node; None where the launcher does not say.
        agent_store: whether the launcher has opened the store at the master's address itself.
        run: tells this run from others and from earlier tries, the same on all ranks.
        interface: of the network, if the user has chosen one.
    """

    rank: int
    world_size: int
    master_addr: str
    master_port: int
    local_rank: int | None = None
    local_world_size: int | None = None
    agent_store: bool = False
    run: str = "run"
    interface: str = ""

    @property
    def ranks_here(self) -> range:
        """Ranks of this node, as far as the launcher says; else this one."""
        if self.local_rank is None or self.local_world_size is None:
            return range(self.rank, self.rank + 1)
        first = self.rank - self.local_rank
        return range(first, first + self.local_world_size)

    @property
    def leads_node(self) -> bool:
        """Whether this rank looks after what concerns its node as a whole."""
        return self.local_rank in (None, 0)

    @property
    def alone(self) -> bool:
        """Whether all ranks are known to be on this node."""
        return len(self.ranks_here) == self.world_size

    @property
    def one_host(self) -> bool:
        """Whether all ranks are known to be on this host, as one node or as several."""
        return self.alone or self.master_addr == "localhost" or _is_loopback(self.master_addr)

    def bind(self) -> str:
        """The address of this node that the other ranks can reach.

        Raises:
            HetisError: it cannot be told.
        """
        if self.interface:
            return _address_of(self.interface)
        try:
            family, _, _, _, place = socket.getaddrinfo(self.master_addr, self.master_port,
                                                        type=socket.SOCK_DGRAM)[0]
            # No packet is sent: this asks for the way there.
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(place)
                address: str = probe.getsockname()[0]
        except OSError as error:
            raise HetisError(f"rank {self.rank}: there is no way to MASTER_ADDR={self.master_addr}: "
                             f"{error}") from error
        if _is_loopback(address):
            if not self.one_host:
                raise HetisError(
                    f"rank {self.rank}: MASTER_ADDR={self.master_addr} is a loopback address on this node, "
                    "which other nodes cannot reach: give the master's address in the network they share "
                    "(torchrun --master-addr or --rdzv-endpoint), or name its interface in "
                    "GLOO_SOCKET_IFNAME")
            return LOOPBACK
        return address


def _is_loopback(address: str) -> bool:
    """Whether an address, not a name, is of the loopback interface."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def launched(environment: Mapping[str, str] | None = None) -> Launch | None:
    """What the environment says; None where no launcher has started this process.

    Raises:
        SpecError: a variable that is missing or makes no sense.
    """
    env = os.environ if environment is None else environment
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return None
    for name in NAMES:
        require(bool(env.get(name)), name, env.get(name), f"set, as launchers do, like {', '.join(NAMES)}")
    size = _number(env, "WORLD_SIZE", 1, 1 << 20)
    local = _number(env, "LOCAL_RANK", 0, size - 1) if "LOCAL_RANK" in env else None
    local_size = _number(env, "LOCAL_WORLD_SIZE", 1, size) if "LOCAL_WORLD_SIZE" in env else None
    run = "/".join(("run", env.get("TORCHELASTIC_RUN_ID", ""), env.get("TORCHELASTIC_RESTART_COUNT", "0")))
    return Launch(
        _number(env, "RANK", 0, size - 1), size, env["MASTER_ADDR"], _number(env, "MASTER_PORT", 1, 65535),
        local, local_size, agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True", run=run,
        interface=env.get("GLOO_SOCKET_IFNAME", "").split(",")[0])


def check_place(launch: Launch, cluster: ClusterSpec) -> None:
    """Look whether this rank runs where the cluster has its device.

    Raises:
        SpecError: there are more or fewer ranks than devices, or a host of the cluster is cut in two.
    """
    devices = cluster.devices
    shape = ", ".join(f"{len(host.gpus)} on host {n}" for n, host in enumerate(cluster.hosts))
    _require(launch, launch.world_size == len(devices), "WORLD_SIZE", launch.world_size,
             f"{len(devices)}, one rank for each device of cluster {cluster.name!r} ({shape})")
    if launch.local_rank is None:
        return
    here = launch.ranks_here
    first = launch.rank - launch.local_rank
    starts = [devices[n].host_id != devices[n - 1].host_id for n in range(1, len(devices))]
    ends = {0, len(devices)} | {n for n, start in enumerate(starts, start=1) if start}
    allowed = f"as the cluster's hosts have devices ({shape}), node by node in their order"
    _require(launch, first in ends, "LOCAL_RANK", launch.local_rank, allowed)
    if launch.local_world_size is not None:
        _require(launch, here.stop in ends, "LOCAL_WORLD_SIZE", launch.local_world_size, allowed)


def _require(launch: Launch, condition: bool, key: str, value: object, allowed: str) -> None:
    require(condition, f"rank {launch.rank}: {key}", value, allowed)


def _number(env: Mapping[str, str], name: str, low: int, high: int) -> int:
    try:
        value = int(env[name])
    except ValueError:
        raise SpecError(name, env[name], "a whole number") from None
    require(low <= value <= high, name, value, f"in {low}..{high}")
    return value


def _address_of(interface: str) -> str:
    """The IPv4 address of an interface of this host.

    Raises:
        HetisError: there is none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise HetisError(f"GLOO_SOCKET_IFNAME={interface!r} has no IPv4 address on this host: "
                             f"{error.strerror}; there are {names}") from error
    return socket.inet_ntoa(answer[20:24])
