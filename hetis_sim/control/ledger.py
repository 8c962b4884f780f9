"""The cache ledger of one instance: free plus used equals capacity on every device.

Cache is counted in units of (block_tokens x one KV group x one layer), so that stages of
different depth share an attention worker's memory exactly. A block of one group at a stage
takes as many units as the stage has layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import add, gt

from hetis_sim.spec.errors import HetisError

Units = Iterable[tuple[int, int]]
"""(local device, units) pairs."""


class LedgerError(HetisError):
    """The books do not balance: a defect of the program, never of its input."""


class KvLedger:
    """Free and used units per local device of one instance, and the most ever used."""

    __slots__ = ("_highs", "capacity", "used")

    def __init__(self, capacity: Sequence[int]) -> None:
        self.capacity = tuple(capacity)
        self.used = [0] * len(self.capacity)
        self._highs = [0] * len(self.capacity)

    @property
    def peak(self) -> list[int]:
        """The most units that each device has ever held."""
        return list(map(max, self._highs, self.used))

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
        capacity, used = self.capacity, self.used
        for d, u in units:
            if u:
                total = used[d] + u * times
                if total > capacity[d]:
                    raise LedgerError(f"device {d} of the instance would hold {total} of {capacity[d]} units")
                used[d] = total

    def take_of_each(self, units: Iterable[int]) -> None:
        """Use units of every device, given in order: what :meth:`take` does, where most are concerned.

        Raises:
            LedgerError: a device would hold more than its capacity.
        """
        used = list(map(add, self.used, units))
        if any(map(gt, used, self.capacity)):
            raise LedgerError(f"the devices of the instance would hold {used} of {list(self.capacity)} units")
        self.used = used

    def short_device(self, units: Iterable[int]) -> int | None:
        """The first device without room for its part of ``units``, given for all in order."""
        full = list(map(gt, map(add, self.used, units), self.capacity))
        return full.index(True) if True in full else None

    def give(self, units: Units, times: int = 1) -> None:
        """Return ``times`` of the units.

        Raises:
            LedgerError: more is returned than was in use.
        """
        used, highs = self.used, self._highs
        for d, u in units:
            held = used[d]
            if held > highs[d]:  # between two returns, what is in use only grows
                highs[d] = held
            if u * times > held:
                raise LedgerError(f"device {d} of the instance returned {u * times - held} units more than "
                                  "it held")
            used[d] = held - u * times
