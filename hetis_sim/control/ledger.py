"""The cache ledger of one instance: free plus used equals capacity on every device.

Cache is counted in units of (block_tokens x one KV group x one layer), so that stages of
different depth share an attention worker's memory exactly. A block of one group at a stage
takes as many units as the stage has layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hetis_sim.spec.errors import HetisError

Units = Iterable[tuple[int, int]]
"""(local device, units) pairs."""


class LedgerError(HetisError):
    """The books do not balance: a defect of the program, never of its input."""


class KvLedger:
    """Free and used units per local device of one instance, and the most ever used."""

    __slots__ = ("capacity", "peak", "used")

    def __init__(self, capacity: Sequence[int]) -> None:
        self.capacity = tuple(capacity)
        self.used = [0] * len(self.capacity)
        self.peak = [0] * len(self.capacity)

    def free(self, device: int) -> int:
        """Units not in use on a local device."""
        return self.capacity[device] - self.used[device]

    def fits(self, units: Units, times: int = 1) -> bool:
        """Whether ``times`` of the units can be taken."""
        capacity, used = self.capacity, self.used
        return all(used[d] + u * times <= capacity[d] for d, u in units)

    def take(self, units: Units, times: int = 1) -> None:
        """Use ``times`` of the units.

        Raises:
            LedgerError: a device would hold more than its capacity.
        """
        capacity, used, peak = self.capacity, self.used, self.peak
        for d, u in units:
            total = used[d] + u * times
            if total > capacity[d]:
                raise LedgerError(f"device {d} of the instance would hold {total} of {capacity[d]} units")
            used[d] = total
            if total > peak[d]:
                peak[d] = total

    def give(self, units: Units, times: int = 1) -> None:
        """Return ``times`` of the units.

        Raises:
            LedgerError: more is returned than was in use.
        """
        used = self.used
        for d, u in units:
            total = used[d] - u * times
            if total < 0:
                raise LedgerError(f"device {d} of the instance returned {-total} units more than it held")
            used[d] = total
