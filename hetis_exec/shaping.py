"""Slow links on fast ones: each message is held back until a link of some latency and bandwidth had it.

The sender says when a message is due, the receiver holds it until then. Both read the monotonic clock,
so this works between threads and processes of one host, which is where links are emulated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from hetis_exec.messages import CacheData, Message
from hetis_exec.resident import Resident
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.errors import require_finite

GIGABIT_BYTES = 1e9 / 8
HEAD_BYTES = 64
"""What a message takes on the wire besides its arrays, roughly."""


@dataclass(frozen=True, slots=True)
class LinkShape:
    """One direction of a link."""

    latency_s: float = 0.0
    bandwidth_bytes_per_s: float = float("inf")


Shapes = Mapping[tuple[int, int], LinkShape]
"""By (sender, target); other links are left as they are."""


@dataclass
class NetworkConfig:
    """Links that are emulated on one host.

    Attributes:
        from_cluster: links between devices are as slow as the cluster file says.
        latency_ms, bandwidth_gbps: of links between hosts of the cluster, in each direction and for
            each pair of devices; they go before those of the cluster file.
    """

    from_cluster: bool = False
    latency_ms: float | None = None
    bandwidth_gbps: float | None = None

    def __post_init__(self) -> None:
        if self.latency_ms is not None:
            require_finite("executor.network.latency_ms", self.latency_ms, 0.0, 1e5)
        if self.bandwidth_gbps is not None:
            require_finite("executor.network.bandwidth_gbps", self.bandwidth_gbps, 0.0, open_low=True)

    @property
    def emulates(self) -> bool:
        """Whether any link is to be emulated."""
        return self.from_cluster or self.latency_ms is not None or self.bandwidth_gbps is not None

    def shapes(self, cluster: ClusterSpec) -> Shapes:
        """The links between all devices of a cluster; those that are to be left alone are not among them."""
        return {(a.device_id, b.device_id): shape for a in cluster.devices for b in cluster.devices
                if a is not b and (shape := self._shape(cluster, a.device_id, b.device_id)) != LinkShape()}

    def _shape(self, cluster: ClusterSpec, a: int, b: int) -> LinkShape:
        shape = LinkShape()
        if self.from_cluster:
            link = cluster.link(a, b)
            shape = LinkShape(link.latency_s, link.bandwidth_bytes_per_s)
        if cluster.devices[a].host_id == cluster.devices[b].host_id:
            return shape
        return LinkShape(
            shape.latency_s if self.latency_ms is None else self.latency_ms / 1e3,
            shape.bandwidth_bytes_per_s if self.bandwidth_gbps is None
            else self.bandwidth_gbps * GIGABIT_BYTES)


def is_bulk(message: Message) -> bool:
    """Whether a message gives way to others: cache on its way."""
    return isinstance(message, CacheData)


def size_bytes(message: Message) -> int:
    """What a message takes on the wire, roughly."""
    return HEAD_BYTES + sum(part.nbytes for part in message if isinstance(part, np.ndarray | Resident))


@dataclass
class Shaper:
    """The links that lead away from one party.

    Cache gives way: it takes what other messages leave of a link's bandwidth, and holds none of them up.
    """

    sender: int
    shapes: Shapes = field(default_factory=dict)
    _free_s: dict[tuple[int, bool], float] = field(default_factory=dict)

    def due_s(self, target: int, message: Message) -> float:
        """When a message that is sent now has arrived; 0 where nothing is emulated."""
        shape = self.shapes.get((self.sender, target))
        if shape is None:
            return 0.0
        bulk = is_bulk(message)
        begin_s = max(time.monotonic(), self._free_s.get((target, False), 0.0),
                      self._free_s.get((target, bulk), 0.0))
        end_s = begin_s + size_bytes(message) / shape.bandwidth_bytes_per_s
        self._free_s[target, bulk] = end_s
        return end_s + shape.latency_s
