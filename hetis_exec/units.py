"""Which units of a pool are free, and where a table's units lie.

Where cache lies does not matter for what is computed, but for how fast it is read: memory that follows on is
fetched ahead. So units are handed out in runs where there are any, and behind the blocks of each layer a
table has places for some more, such that those which a text grows by lie next to each other. Places are free
units all the same, for whoever lacks any.
"""

from __future__ import annotations

from itertools import count

import numpy as np
from numpy.typing import NDArray

Units = NDArray[np.int64]

WINDOW = 1 << 14
"""Free units among which a run is looked for."""

PLACES_LEAST = 8
"""Blocks that a table has places for beyond those that it holds; half as many as these if that is more."""

NO_PLACES = -1


class FreeUnits:
    """A stack of free units, in an array: a list of millions of numbers would take five times the memory.

    Attributes:
        number: of free units.
    """

    def __init__(self, capacity: int) -> None:
        self._stack = np.arange(capacity - 1, -1, -1, dtype=np.int64)
        self.number = capacity
        self._searched = False

    def take(self, number: int) -> Units:
        """So many units, no more than there are; one after the other if there is such a run near the top."""
        end = self.number
        taken = self._stack[end - number:end][::-1]
        if not (self._searched or (np.diff(taken) == 1).all()):
            self._bring_up(number)
            taken = self._stack[end - number:end][::-1]
        self.number = end - number
        return taken.copy()

    def give(self, units: Units) -> None:
        """Take back units, in an order in which they are to be handed out again; all of them in line."""
        end = self.number + units.size
        self._stack[self.number:end] = units[::-1]
        self.number = end
        self._searched = False
        if end == len(self._stack):
            self._stack[:] = np.arange(end - 1, -1, -1, dtype=np.int64)

    def _bring_up(self, number: int) -> None:
        """Put the window's units in order, and its first run of so many on top.

        Where there is none, none is looked for again before units have been given back.
        """
        window = self._stack[max(0, self.number - WINDOW):self.number]
        units = np.sort(window)
        ends = np.append(np.flatnonzero(np.diff(units) != 1) + 1, len(units))
        long = np.flatnonzero(np.diff(ends, prepend=0) >= number)
        self._searched = not len(long)
        if len(long):
            begin, end = ends[long[0] - 1] if long[0] else 0, ends[long[0]]
            units = np.concatenate((units[begin:end], units[:begin], units[end:]))
        window[:] = units[::-1]


class Allocator:
    """Units of tables, shape (layers, blocks), and places that these grow into.

    Args:
        growing: tables get such places.
    """

    def __init__(self, capacity: int, growing: bool = True) -> None:
        self._free = FreeUnits(capacity)
        self._growing = growing
        self._places: dict[int, Units] = {}
        self._places_units = 0
        self._names = count()

    @property
    def free(self) -> int:
        """Units that may be taken, places among them."""
        return self._free.number + self._places_units

    def take(self, layers: int, blocks: int) -> tuple[Units, int]:
        """Units, no more than are free, and the name of places behind them, if there is room for such."""
        more = max(PLACES_LEAST, blocks // 2) if self._growing else 0
        if layers * (blocks + more) > self._free.number:
            more = 0
        while layers * blocks > self._free.number:
            self.release(next(iter(self._places)))
        taken = self._free.take(layers * (blocks + more)).reshape(layers, blocks + more)
        return taken[:, :blocks], self._keep(taken[:, blocks:])

    def grow(self, layers: int, blocks: int, places: int) -> tuple[Units, int]:
        """Units for more blocks of a table: from its places, or others, with places of their own."""
        kept = self._places.get(places)
        if kept is None or kept.shape[1] < blocks:
            self.release(places)
            return self.take(layers, blocks)
        del self._places[places]
        self._places_units -= kept.size
        return kept[:, :blocks], self._keep(kept[:, blocks:])

    def give(self, units: Units, places: int) -> None:
        """Take back the units of a table, and its places."""
        kept = self._places.pop(places, None)
        if kept is not None:
            self._places_units -= kept.size
            units = np.concatenate((units, kept), axis=1)
        self._free.give(units.ravel())

    def release(self, places: int) -> None:
        """A table does not grow into its places any more."""
        kept = self._places.pop(places, None)
        if kept is not None:
            self._places_units -= kept.size
            self._free.give(kept.ravel())

    def _keep(self, units: Units) -> int:
        if not units.size:
            return NO_PLACES
        name = next(self._names)
        self._places[name] = units
        self._places_units += units.size
        return name
