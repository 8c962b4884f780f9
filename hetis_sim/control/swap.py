"""Host memory that holds swapped-out cache."""

from __future__ import annotations

from collections.abc import Sequence

from hetis_sim.spec.cluster import ClusterSpec


class HostMemory:
    """Free and used bytes of each host, shared by all instances."""

    def __init__(self, cluster: ClusterSpec) -> None:
        self.cluster = cluster
        self.capacity_bytes = [float(host.memory_bytes) for host in cluster.hosts]
        self.used_bytes = [0.0] * len(cluster.hosts)

    def host(self, device: int) -> int:
        """The host of a device."""
        return self.cluster.devices[device].host_id

    def take(self, host_bytes: Sequence[tuple[int, float]]) -> bool:
        """Use memory on several hosts, all or nothing."""
        if any(self.used_bytes[h] + size > self.capacity_bytes[h] for h, size in host_bytes):
            return False
        for h, size in host_bytes:
            self.used_bytes[h] += size
        return True

    def give(self, host_bytes: Sequence[tuple[int, float]]) -> None:
        """Return memory."""
        for h, size in host_bytes:
            self.used_bytes[h] -= size
