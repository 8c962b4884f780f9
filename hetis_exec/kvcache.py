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

from hetis_exec.errors import CacheError
from hetis_exec.messages import Array
from hetis_sim.spec.errors import InfeasibleError

POOL_BYTES_MAX = 1 << 30


def check_pool(capacity_units: int, block_tokens: int, head_dim: int) -> None:
    """Check that a pool fits in the memory that one worker may take.

    Raises:
        InfeasibleError: it does not.
    """
    size_bytes = 2 * 8 * capacity_units * block_tokens * head_dim
    if size_bytes > POOL_BYTES_MAX:
        raise InfeasibleError(f"a worker would take {size_bytes} bytes of this host for its cache, at most "
                              f"{POOL_BYTES_MAX} are allowed; use devices with less memory")


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
    """

    units: NDArray[np.int64]
    tag: int
    ready: bool = True


class KvPool:
    """Keys and values of one device, in units that are allocated one by one.

    Freed memory is filled with nan, so that whoever reads what was never written is found out.
    """

    def __init__(self, capacity_units: int, block_tokens: int, head_dim: int) -> None:
        self.block_tokens = block_tokens
        self.capacity_units = capacity_units
        self.tables: dict[TableKey, Table] = {}
        self._keys = np.full((capacity_units, block_tokens, head_dim), np.nan)
        self._values = np.full((capacity_units, block_tokens, head_dim), np.nan)
        self._free = list(range(capacity_units - 1, -1, -1))

    @property
    def used_units(self) -> int:
        """Units in use."""
        return self.capacity_units - len(self._free)

    def open(self, key: TableKey, layers: int, blocks: int, tag: int) -> None:
        """Allocate a table.

        Raises:
            CacheError: the key has one already, or there is no room.
        """
        if key in self.tables:
            raise CacheError(f"{key} is open already")
        self.tables[key] = Table(self._take(layers, blocks), tag)

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
        units = self.table(key).units.ravel()
        del self.tables[key]
        self._keys[units] = np.nan
        self._values[units] = np.nan
        self._free.extend(units[::-1].tolist())

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
        if number > len(self._free):
            raise CacheError(f"{number} units are asked for, {len(self._free)} of {self.capacity_units} "
                             "are free")
        taken = [self._free.pop() for _ in range(number)]
        return np.array(taken, dtype=np.int64).reshape(layers, blocks)

    # -- tokens ------------------------------------------------------------------------------

    def write(self, key: TableKey, layer: int, start: int, keys: Array, values: Array) -> None:
        """Store tokens from position ``start`` on; shapes (tokens, head_dim)."""
        positions = np.arange(start, start + len(keys))
        units = self.table(key).units[layer][positions // self.block_tokens]
        self._keys[units, positions % self.block_tokens] = keys
        self._values[units, positions % self.block_tokens] = values

    def read(self, request_id: int, stage: int, groups: Sequence[int], layer: int, first: int,
             last: int) -> tuple[Array, Array]:
        """Keys and values of tokens ``first .. last - 1``, shapes (groups, tokens, head_dim)."""
        blocks = -(-last // self.block_tokens)
        units = np.stack([self.table(TableKey(request_id, stage, g)).units[layer, :blocks] for g in groups])
        shape = (len(groups), blocks * self.block_tokens, self._keys.shape[-1])
        keys, values = self._keys[units].reshape(shape), self._values[units].reshape(shape)
        return keys[:, first:last], values[:, first:last]
