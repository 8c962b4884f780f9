"""Head-granular paged cache of one worker.

The unit of memory is the ledger's: block_tokens of one KV group in one layer. A table lists
the units of one (request, stage, group), a row for each layer of the stage, so that stages of
different depth share an attention worker's memory and no unit lies idle in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetis_exec.backend import Kernels, Leaving, Spots, Tensor
from hetis_exec.errors import CacheError


class TableKey(NamedTuple):
    """Which cache: one KV group of one request at one stage."""

    request_id: int
    stage: int
    group: int


@dataclass(slots=True)
class Table:
    """Units of one key, shape (layers, blocks).

    Attributes:
        tag: marks the data that is meant for this table; later ones of the same key differ.
        ready: False while tokens that attention needs are still on their way.
        slot: see :class:`hetis_exec.backend.CacheTable`.
    """

    units: NDArray[np.int64]
    tag: int
    ready: bool = True
    slot: int = -1


class KvPool:
    """Keys and values of one device, in units that are allocated one by one.

    Attributes:
        tables: the units of every key.
        version: changes whenever a table is opened or closed.
    """

    def __init__(self, capacity_units: int, block_tokens: int, kernels: Kernels) -> None:
        self.block_tokens = block_tokens
        self.capacity_units = capacity_units
        self.kernels = kernels
        self.tables: dict[TableKey, Table] = {}
        self.version = 0
        # A stack, in an array: a list of millions of numbers would take five times the memory.
        self._free = np.arange(capacity_units - 1, -1, -1, dtype=np.int64)
        self._free_units = capacity_units

    def scatter(self, seed: int) -> None:
        """Hand free units out in an order without order, as those of a pool that has long been in use."""
        np.random.default_rng(seed).shuffle(self._free)

    @property
    def used_units(self) -> int:
        """Units in use."""
        return self.capacity_units - self._free_units

    def open(self, key: TableKey, layers: int, blocks: int, tag: int) -> None:
        """Allocate a table.

        Raises:
            CacheError: the key has one already, or there is no room.
        """
        if key in self.tables:
            raise CacheError(f"{key} is open already")
        self.tables[key] = Table(self._take(layers, blocks), tag)
        self.version += 1

    def grow(self, key: TableKey, blocks: int) -> None:
        """Extend a table to ``blocks``.

        Raises:
            CacheError: there is no room, or it would shrink.
        """
        table = self.table(key)
        layers, now = table.units.shape
        if blocks < now:
            raise CacheError(f"{key} would shrink from {now} to {blocks} blocks")
        if blocks > now:
            table.units = np.concatenate((table.units, self._take(layers, blocks - now)), axis=1)

    def close(self, key: TableKey) -> None:
        """Free a table."""
        table = self.table(key)
        del self.tables[key]
        self.version += 1
        self.kernels.clear(table)
        begin, end = self._free_units, self._free_units + table.units.size
        self._free[begin:end] = table.units.ravel()[::-1]
        self._free_units = end

    def table(self, key: TableKey) -> Table:
        """The table of a key.

        Raises:
            CacheError: it is not open.
        """
        table = self.tables.get(key)
        if table is None:
            raise CacheError(f"{key} holds no cache here")
        return table

    def keys_of(self, request_id: int) -> list[TableKey]:
        """Tables of a request."""
        return [key for key in self.tables if key.request_id == request_id]

    def _take(self, layers: int, blocks: int) -> NDArray[np.int64]:
        number = layers * blocks
        end = self._free_units
        if number > end:
            raise CacheError(f"{number} units are asked for, {end} of {self.capacity_units} are free")
        self._free_units = end - number
        return self._free[end - number:end][::-1].reshape(layers, blocks).copy()

    # -- tokens ------------------------------------------------------------------------------

    def write(self, key: TableKey, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store tokens from position ``start`` on; shapes (tokens, head_dim)."""
        self.write_groups(self.spots((key,), start, len(keys), (layer,)), 0, keys, values)

    def spots(self, keys: Sequence[TableKey], start: int, tokens: int,
              layers: Sequence[int] | None = None) -> Spots:
        """Where tokens from position ``start`` on are stored in the tables of several keys.

        ``layers`` picks some of the layers; those of the result are counted from 0.
        """
        blocks, offsets = np.divmod(np.arange(start, start + tokens), self.block_tokens)
        units = np.concatenate([self.table(key).units[:, blocks] for key in keys], axis=1)
        if layers is not None:
            units = units[list(layers)]
        return self.kernels.spots(units, np.tile(offsets, len(keys)))

    def write_groups(self, spots: Spots, layer: int | slice, keys: Tensor, values: Tensor) -> None:
        """Store tokens, one key's after the other's, of one layer or of several; shapes (..., head_dim)."""
        self.kernels.write(spots, layer, keys.reshape(-1, keys.shape[-1]),
                           values.reshape(-1, values.shape[-1]))

    def read(self, request_id: int, stage: int, groups: Sequence[int], layer: int, first: int,
             last: int) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens ``first .. last - 1``, shapes (groups, tokens, head_dim)."""
        keys, values = self._read(request_id, stage, groups, slice(layer, layer + 1), first, last)
        return keys[0], values[0]

    def read_layers(self, request_id: int, stage: int, groups: Sequence[int], first: int, last: int,
                    layers: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The same of several layers, shapes (layers, groups, tokens, head_dim)."""
        return self._read(request_id, stage, groups, layers, first, last)

    def leave(self, request_id: int, stage: int, groups: Sequence[int], first: int, last: int,
              layers: slice) -> Leaving:
        """The same as arrays of messages, on their way out of the device's memory."""
        units, here = self._where(request_id, stage, groups, layers, first, last)
        return self.kernels.leave(units, here)

    def _read(self, request_id: int, stage: int, groups: Sequence[int], layers: slice, first: int,
              last: int) -> tuple[Tensor, Tensor]:
        units, here = self._where(request_id, stage, groups, layers, first, last)
        keys, values = self.kernels.read(units)
        return keys[:, :, here], values[:, :, here]

    def _where(self, request_id: int, stage: int, groups: Sequence[int], layers: slice, first: int,
               last: int) -> tuple[NDArray[np.int64], slice]:
        """Units (layers, groups, blocks) that hold some tokens, and which tokens of them."""
        begin, end = first // self.block_tokens, -(-last // self.block_tokens)
        tables = [self.table(TableKey(request_id, stage, g)).units[layers, begin:end] for g in groups]
        return np.stack(tables, axis=1), slice(first - begin * self.block_tokens,
                                               last - begin * self.block_tokens)
