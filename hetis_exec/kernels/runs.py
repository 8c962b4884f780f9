"""Tables that lie in one piece in each layer, and such rows of them as one strided view can show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetis_exec.backend import CacheTable

Units = NDArray[np.int64]


class Run(NamedTuple):
    """Rows of equal length whose first units lie at equal distances, in each layer.

    Attributes:
        first, last: the rows, ``last`` one past them.
        begins: unit of the first row's first block, by layer.
        strides: units from one row to the next, by layer.
    """

    first: int
    last: int
    begins: list[int]
    strides: list[int]


class Pieces:
    """Remembers whether open tables lie in one piece: a step changes few of them, which only grow."""

    def __init__(self) -> None:
        self._blocks: list[int] = []
        self._begins: list[Units | None] = []
        self._free: list[int] = []

    def forget(self, table: CacheTable) -> None:
        """A table is closed."""
        if table.slot >= 0:
            self._free.append(table.slot)
            table.slot = -1

    def begins(self, table: CacheTable) -> Units | None:
        """The first unit of each layer, if the others of that layer follow on it."""
        slot = table.slot
        if slot < 0:
            slot = table.slot = self._slot()
        units = table.units
        known, blocks = self._blocks[slot], units.shape[1]
        if known > blocks:
            known = 0
        if known != blocks:
            begins = units[:, 0] if known == 0 else self._begins[slot]
            if begins is not None and (units[:, known:] != begins[:, None] + np.arange(known, blocks)).any():
                begins = None
            self._blocks[slot], self._begins[slot] = blocks, begins
        return self._begins[slot]

    def _slot(self) -> int:
        if self._free:
            slot = self._free.pop()
            self._blocks[slot], self._begins[slot] = 0, None
            return slot
        self._blocks.append(0)
        self._begins.append(None)
        return len(self._blocks) - 1

    def runs(self, tables: Sequence[CacheTable], lengths: Units) -> Iterator[Run]:
        """Runs of rows, one after the other, with rows between them that are in none."""
        begins = [self.begins(table) for table in tables]
        first = 0
        while first < len(begins):
            last, strides = first + 1, None
            at = begins[first]
            while at is not None and last < len(begins) and lengths[last] == lengths[first]:
                after = begins[last]
                apart = None if after is None else after - at
                if apart is None or (apart < 0 if strides is None else apart != strides).any():
                    break
                strides = apart
                last, at = last + 1, after
            begin = begins[first]
            if begin is not None:
                apart = np.zeros_like(begin) if strides is None else strides
                yield Run(first, last, begin.tolist(), apart.tolist())
            first = last
