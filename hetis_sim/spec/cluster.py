"""Hosts, links and the cluster they form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hetis_sim.spec.errors import require, require_finite
from hetis_sim.spec.gpu import GpuSpec


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """One direction of a link; both directions carry traffic at once.

    Attributes:
        name: kind of the link (``nvlink3``, ``pcie4x16``, ``ethernet-100g``); the key
            under which measured profiles are stored.
        bandwidth_bytes_per_s: peak of one direction.
        latency_s: time of an empty message on the wire and in the adapters, without the
            software that sends it.
        source: where the numbers come from.
    """

    name: str
    bandwidth_bytes_per_s: float
    latency_s: float
    source: str = ""

    def __post_init__(self) -> None:
        require_finite(f"link.{self.name}.bandwidth_bytes_per_s", self.bandwidth_bytes_per_s, 0.0,
                       open_low=True)
        require_finite(f"link.{self.name}.latency_s", self.latency_s, 0.0)


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU of the cluster. ``device_id`` counts from 0 over the cluster in host order."""

    device_id: int
    host_id: int
    gpu: GpuSpec

    @property
    def label(self) -> str:
        """Short name for people: ``3:a100-80gb@host0``."""
        return f"{self.device_id}:{self.gpu.name}@host{self.host_id}"


@dataclass(frozen=True)
class HostSpec:
    """GPUs in one box, joined by ``link``; ``memory_bytes`` holds swapped-out cache."""

    gpus: tuple[GpuSpec, ...]
    link: LinkSpec
    memory_bytes: int = 256 * 1024**3

    def __post_init__(self) -> None:
        require(len(self.gpus) >= 1, "host.gpus", self.gpus, "at least one GPU")
        require(self.memory_bytes >= 0, "host.memory_bytes", self.memory_bytes, ">= 0")


@dataclass(frozen=True)
class ClusterSpec:
    """Hosts and the network between them.

    Attributes:
        name: how users call it.
        hosts: in the order that numbers hosts and devices.
        network: the link between any two hosts.
        host_links: (host, host, link) for pairs that another link joins, each pair once.
    """

    name: str
    hosts: tuple[HostSpec, ...]
    network: LinkSpec
    host_links: tuple[tuple[int, int, LinkSpec], ...] = ()

    def __post_init__(self) -> None:
        require(len(self.hosts) >= 1, "cluster.hosts", self.hosts, "at least one host")
        seen: set[tuple[int, int]] = set()
        for a, b, _ in self.host_links:
            pair = (min(a, b), max(a, b))
            require(0 <= pair[0] < pair[1] < len(self.hosts), "cluster.links.hosts", [a, b],
                    f"two different hosts of 0..{len(self.hosts) - 1}")
            require(pair not in seen, "cluster.links.hosts", [a, b], "named once")
            seen.add(pair)

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """All GPUs in host order; ``devices[i].device_id == i``."""
        found: list[Device] = []
        for host_id, host in enumerate(self.hosts):
            for gpu in host.gpus:
                found.append(Device(len(found), host_id, gpu))
        return tuple(found)

    def link(self, source: int, target: int) -> LinkSpec:
        """The link between two different devices, by device id."""
        a, b = self.devices[source].host_id, self.devices[target].host_id
        if a == b:
            return self.hosts[a].link
        return self.host_link(a, b)

    def host_link(self, source: int, target: int) -> LinkSpec:
        """The link between two different hosts, by number."""
        return self._link_of_pair.get((source, target), self.network) if self.host_links else self.network

    @cached_property
    def _link_of_pair(self) -> dict[tuple[int, int], LinkSpec]:
        return {pair: link for a, b, link in self.host_links for pair in ((a, b), (b, a))}

    def slowest_link(self, device_ids: Sequence[int]) -> LinkSpec | None:
        """The link that bounds a collective over these devices; None for a single device."""
        links = [self.link(a, b) for n, a in enumerate(device_ids) for b in device_ids[n + 1:]]
        return min(links, key=lambda link: (link.bandwidth_bytes_per_s, -link.latency_s), default=None)

    @cached_property
    def gpu_counts(self) -> dict[str, int]:
        """Number of cards of each kind, in order of appearance."""
        counts: dict[str, int] = {}
        for device in self.devices:
            counts[device.gpu.name] = counts.get(device.gpu.name, 0) + 1
        return counts
