"""Links as shared resources: cache transfers as fluid flows over the wires they cross.

Flows of cache have low priority: decode's head traffic takes what it needs first, and the
flows of a wire share the rest evenly. A flow runs at the rate of its tightest wire.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hetis_sim.control.step import Transfer
from hetis_sim.cost.model import CostModel
from hetis_sim.sim.clock import Clock
from hetis_sim.spec.cluster import ClusterSpec, LinkSpec

Wire = tuple[str, int]
"""(kind, device or host id); the two directions of a link are two wires."""

# However busy decode keeps a wire, transfers get this share: they must end.
BACKGROUND_SHARE = 0.05


@dataclass(slots=True, eq=False)
class _Stream:
    """One flow under way."""

    wires: tuple[Wire, ...]
    left_bytes: float
    latency_s: float
    transfer: _Pending
    rate: float = 0.0


@dataclass(slots=True, eq=False)
class _Pending:
    """A transfer and the number of its flows that have not ended."""

    transfer: Transfer
    flows_left: int
    begun_s: float
    latency_s: float = 0.0
    not_before_s: float = 0.0


class Network:
    """Carries out transfers.

    Args:
        foreground: bytes per second that decode puts on each wire at the moment.
        arrived: called with each transfer, and when it began, once its last flow has ended.

    Attributes:
        under_way: transfers that have not ended.
    """

    def __init__(self, clock: Clock, cluster: ClusterSpec, cost: CostModel,
                 foreground: Callable[[], dict[Wire, float]],
                 arrived: Callable[[Transfer, float], None]) -> None:
        self._clock = clock
        self._cluster = cluster
        self._cost = cost
        self._foreground = foreground
        self._arrived = arrived
        self._streams: list[_Stream] = []
        self.under_way = 0
        self._updated_s = 0.0
        self._generation = 0
        self._paths: dict[tuple[int, int], tuple[tuple[Wire, ...], float]] = {}
        self._bandwidth: dict[Wire, float] = {}

    def start(self, transfer: Transfer, step_ends_s: float = 0.0) -> None:
        """Begin a transfer now.

        One that streams with a step ends no sooner than the step's end and the time that its
        tail takes on idle wires.
        """
        self._progress()
        self.under_way += 1
        pending = _Pending(transfer, len(transfer.flows), self._clock.now)
        for flow in transfer.flows:
            wires, latency = self.path(flow.source, flow.target)
            tail_s = max([flow.tail_bytes / self._bandwidth[wire] for wire in wires])
            pending.not_before_s = max(pending.not_before_s, step_ends_s + tail_s)
            self._streams.append(_Stream(wires, flow.size_bytes, latency, pending))
        self.update_rates()

    def update_rates(self) -> None:
        """Share the wires anew; called when flows begin or end and when decode's traffic changes."""
        if not self._streams:
            return
        self._progress()
        flows: dict[Wire, int] = {}
        for stream in self._streams:
            for wire in stream.wires:
                flows[wire] = flows.get(wire, 0) + 1
        taken = self._foreground()
        share = {wire: self._residual(wire, taken.get(wire, 0.0)) / count for wire, count in flows.items()}
        for stream in self._streams:
            stream.rate = min([share[wire] for wire in stream.wires])
        self._schedule()

    def _residual(self, wire: Wire, taken: float) -> float:
        bandwidth = self._bandwidth[wire]
        return max(bandwidth - taken, BACKGROUND_SHARE * bandwidth)

    def _progress(self) -> None:
        elapsed = self._clock.now - self._updated_s
        self._updated_s = self._clock.now
        if elapsed > 0:
            for stream in self._streams:
                stream.left_bytes -= stream.rate * elapsed

    def _schedule(self) -> None:
        self._generation += 1
        generation = self._generation
        first = min(self._clock.now + max(0.0, s.left_bytes) / s.rate for s in self._streams)
        self._clock.call(first, lambda: self._end_flows(generation), priority=1)

    def _end_flows(self, generation: int) -> None:
        if generation != self._generation:
            return
        self._progress()
        ended = [s for s in self._streams if self._over(s)]
        self._streams = [s for s in self._streams if not self._over(s)]
        for stream in ended:
            self._flow_ended(stream)
        if self._streams:
            self.update_rates()

    def _over(self, stream: _Stream) -> bool:
        """Whether nothing is left but rounding: a byte, or less than the clock can tell from no time."""
        now = self._clock.now
        return stream.left_bytes <= 1.0 or now + stream.left_bytes / stream.rate <= now

    def _flow_ended(self, stream: _Stream) -> None:
        pending = stream.transfer
        pending.flows_left -= 1
        pending.latency_s = max(pending.latency_s, stream.latency_s)
        if pending.flows_left == 0:
            self._clock.call(max(self._clock.now, pending.not_before_s) + pending.latency_s,
                             lambda: self._transfer_arrived(pending), priority=1)

    def _transfer_arrived(self, pending: _Pending) -> None:
        self.under_way -= 1
        self._arrived(pending.transfer, pending.begun_s)

    # -- wires -----------------------------------------------------------------------------

    def bandwidth(self, wire: Wire) -> float:
        """Bytes per second of a wire that some path crosses."""
        return self._bandwidth[wire]

    def path(self, source: int, target: int) -> tuple[tuple[Wire, ...], float]:
        """Wires that a flow crosses, and the latency of its last byte."""
        key = (source, target)
        if key not in self._paths:
            self._paths[key] = self._make_path(source, target)
        return self._paths[key]

    def _make_path(self, source: int, target: int) -> tuple[tuple[Wire, ...], float]:
        devices, hosts = self._cluster.devices, self._cluster.hosts
        source_host = -1 - source if source < 0 else devices[source].host_id
        target_host = -1 - target if target < 0 else devices[target].host_id
        if source_host == target_host and source >= 0 and target >= 0:
            link = hosts[source_host].link
            return ((self._wire("peer_out", source, link), self._wire("peer_in", target, link)),
                    self._cost.transfer(link).beta_s)
        wires: list[Wire] = []
        latency = 0.0
        if source >= 0:
            wires.append(self._host_wire("out", source))
        if source_host != target_host:
            link = self._cluster.host_link(source_host, target_host)
            if link is self._cluster.network:
                wires += [self._wire("nic_out", source_host, link), self._wire("nic_in", target_host, link)]
            else:
                # A link of two hosts is none of the others' business.
                wires.append(self._wire("pair", source_host * len(hosts) + target_host, link))
            latency = self._cost.transfer(link).beta_s
        elif source < 0 or target < 0:
            latency = self._cost.host_copy(devices[max(source, target)].gpu).beta_s
        if target >= 0:
            wires.append(self._host_wire("in", target))
        return tuple(wires), latency

    def _wire(self, kind: str, index: int, link: LinkSpec) -> Wire:
        wire = (kind, index)
        gamma_s_per_byte = self._cost.transfer(link).gamma_s_per_byte
        self._bandwidth[wire] = 1.0 / gamma_s_per_byte if gamma_s_per_byte > 0.0 else math.inf
        return wire

    def _host_wire(self, direction: str, device: int) -> Wire:
        """The wire between a GPU and its host; the peer wire itself where peers talk over PCIe."""
        spec = self._cluster.devices[device]
        link = self._cluster.hosts[spec.host_id].link
        if link.name.startswith("pcie"):
            return self._wire(f"peer_{direction}", device, link)
        wire = (f"host_{direction}", device)
        gamma_s_per_byte = self._cost.host_copy(spec.gpu).gamma_s_per_byte
        self._bandwidth[wire] = 1.0 / gamma_s_per_byte if gamma_s_per_byte > 0.0 else math.inf
        return wire
