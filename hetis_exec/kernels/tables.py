"""Tables of many rows in one array on a device, kept up to date piece by piece.

Each table has a segment of the array: the units of its first layer, then those of the next, each with
room for as many blocks. What changes is the least that can: a table that grows sends its new blocks, one
that has outgrown its segment moves to another of twice the size. Nothing is sent twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hetis_exec.backend import CacheTable

Numbers = NDArray[np.int64]

BLOCKS_AT_LEAST = 8
SIZE_AT_LEAST = 1 << 16
FREE = -1


class DeviceTables:
    """The tables that kernels have been asked about.

    Attributes:
        arena: all units, int32.
        generation: changes whenever ``arena`` is another array.
    """

    def __init__(self, device: torch.device, size: int = SIZE_AT_LEAST) -> None:
        self._device = device
        self.arena = torch.zeros(size, dtype=torch.int32, device=device)
        self.generation = 0
        self._used = 0
        self._free: dict[int, list[int]] = {}
        self._slots: list[int] = []
        self._layers = np.zeros(64, dtype=np.int64)
        self._spans = np.full((64, 2), FREE, dtype=np.int64)
        self._blocks: list[int] = []
        self._rooms: list[int] = []
        self._number = 0
        self._changes: list[tuple[Numbers, Numbers]] = []

    def spans(self, tables: Sequence[CacheTable]) -> Numbers:
        """For each table where its segment begins, and the room of a layer in it; shape (tables, 2).

        The array on the device is up to date for whatever is computed there from now on.
        """
        grown: list[CacheTable] = []
        known = self._blocks
        for table in tables:
            slot, blocks = table.slot, table.units.shape[1]
            if slot < 0 or known[slot] != blocks:
                if slot >= 0 and known[slot] == blocks - 1 < self._rooms[slot]:
                    grown.append(table)
                else:
                    self._follow(table)
        if grown:
            self._extend(grown)
        if self._changes:
            self._send()
        found: Numbers = self._spans[[table.slot for table in tables]]
        return found

    def forget(self, table: CacheTable) -> None:
        """A table is closed."""
        slot = table.slot
        if slot < 0:
            return
        table.slot = -1
        self._give_back(slot)
        self._slots.append(slot)

    # -- segments ------------------------------------------------------------------------------------

    def _follow(self, table: CacheTable) -> None:
        """Take in a new table, or the new blocks of one."""
        layers, blocks = table.units.shape
        if table.slot < 0:
            table.slot = self._slot()
            self._layers[table.slot] = layers
        slot = table.slot
        known = self._blocks[slot]
        if blocks > self._spans[slot, 1]:
            self._give_back(slot)
            room = max(BLOCKS_AT_LEAST, 1 << (blocks - 1).bit_length())
            self._spans[slot] = self._segment(layers * room), room
            self._rooms[slot] = room
            known = 0
        begin, room = self._spans[slot].tolist()
        at = begin + np.arange(layers)[:, None] * room + np.arange(known, blocks)
        self._changes.append((at.ravel(), table.units[:, known:].ravel()))
        self._blocks[slot] = blocks

    def _extend(self, tables: Sequence[CacheTable]) -> None:
        """Take in the one new block of each of several tables that have room for it."""
        by_layers: dict[int, list[CacheTable]] = {}
        for table in tables:
            by_layers.setdefault(len(table.units), []).append(table)
        for layers, alike in by_layers.items():
            slots = [table.slot for table in alike]
            begins, rooms = self._spans[slots].T
            blocks = np.array([self._blocks[slot] for slot in slots])
            at = (begins + blocks)[:, None] + np.arange(layers) * rooms[:, None]
            units = np.concatenate([table.units[:, -1] for table in alike])
            self._changes.append((at.ravel(), units))
            for slot in slots:
                self._blocks[slot] += 1

    def _slot(self) -> int:
        if self._slots:
            return self._slots.pop()
        slot = self._number
        self._number += 1
        self._blocks.append(0)
        self._rooms.append(0)
        if slot == len(self._layers):
            self._layers = np.concatenate((self._layers, np.zeros_like(self._layers)))
            self._spans = np.concatenate((self._spans, np.full_like(self._spans, FREE)))
        return slot

    def _segment(self, size: int) -> int:
        """Where a free segment begins."""
        given_back = self._free.get(size)
        if given_back:
            return given_back.pop()
        begin = self._used
        self._used += size
        if self._used > len(self.arena):
            self._send()
            larger = torch.zeros(max(2 * len(self.arena), self._used), dtype=torch.int32, device=self._device)
            larger[:begin] = self.arena[:begin]
            self.arena = larger
            self.generation += 1
        return begin

    def _give_back(self, slot: int) -> None:
        begin, room = self._spans[slot].tolist()
        if begin != FREE:
            self._free.setdefault(int(self._layers[slot]) * room, []).append(begin)
        self._spans[slot] = FREE
        self._blocks[slot] = self._rooms[slot] = 0

    def _send(self) -> None:
        """Bring what has changed to the device."""
        if not self._changes:
            return
        both = np.stack((np.concatenate([at for at, _ in self._changes]),
                         np.concatenate([units for _, units in self._changes])))
        self._changes = []
        sent = to_device(both, self._device)
        self.arena.index_copy_(0, sent[0], sent[1].to(torch.int32))


def to_device(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A copy of an array on a device, without waiting for it; on the CPU the array itself."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
