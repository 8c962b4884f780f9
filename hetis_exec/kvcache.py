"""Head-granular paged cache of one worker.

The unit of memory is the ledger's: block_tokens of one KV group in one layer. A table lists
the units of one (request, stage, group), a row for each layer of the stage, so that stages of
different depth share an attention worker's memory and no unit lies idle in between. Of a request whose
tokens are divided it has some blocks only, one after the other, and knows which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetis_exec.backend import Kernels, Leaving, Spots, Tensor
from hetis_exec.errors import CacheError
from hetis_exec.units import NO_PLACES, Allocator


class TableKey(NamedTuple):
    """Which cache: one KV group of one request at one stage; what is copied aside for it has a table too."""

    request_id: int
    stage: int
    group: int
    aside: bool = False


@dataclass(slots=True)
class Table:
    """Units of one key, shape (layers, blocks).

    Attributes:
        tag: marks the data that is meant for this table; later ones of the same key differ.
        before: earlier tags of which final pieces are still on their way.
        awaited: final pieces of tokens that attention needs which are still on their way.
        slot: see :class:`hetis_exec.backend.CacheTable`.
        skipped: layers at the beginning that have no units; what is written there has no meaning.
        places: name of the places that it grows into; see :class:`hetis_exec.units.Allocator`.
        where: for each block of the text its place in the units, -1 where it is not here; None where all
            of them are here.
    """

    units: NDArray[np.int64]
    tag: int
    awaited: int = 0
    slot: int = -1
    where: NDArray[np.int64] | None = None
    before: frozenset[int] = frozenset()
    skipped: int = 0
    places: int = NO_PLACES

    @property
    def taken(self) -> NDArray[np.int64]:
        """The units that it really has."""
        return self.units[self.skipped:]

    def takes(self, tag: int) -> bool:
        """Whether data with a tag is meant for it."""
        return tag == self.tag or tag in self.before

    @property
    def ready(self) -> bool:
        """Whether all tokens that attention needs are here."""
        return self.awaited == 0

    @property
    def end(self) -> int:
        """One past the last block of the text that may be here."""
        return self.units.shape[1] if self.where is None else len(self.where)

    def here(self, blocks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which blocks of the text are here."""
        if self.where is None:
            found: NDArray[np.bool_] = blocks < self.units.shape[1]
            return found
        found = blocks < len(self.where)
        found[found] = self.where[blocks[found]] >= 0
        return found

    def of_blocks(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Units of some blocks of the text, shape (layers, blocks).

        Raises:
            CacheError: some are not here.
        """
        if self.where is None:
            return self.units[:, blocks]
        if not self.here(blocks).all():
            raise CacheError(f"blocks {blocks[~self.here(blocks)].tolist()} are not here")
        return self.units[:, self.where[blocks]]


def places(blocks: int, absent: Sequence[int]) -> NDArray[np.int64] | None:
    """See :attr:`Table.where`, for all blocks up to a number but for some."""
    if not absent:
        return None
    here = np.ones(blocks, dtype=np.int64)
    here[list(absent)] = 0
    found: NDArray[np.int64] = np.where(here > 0, np.cumsum(here) - 1, -1)
    return found


def _behind(skipped: int, units: NDArray[np.int64]) -> NDArray[np.int64]:
    """Units of layers, behind some without any."""
    return np.concatenate((np.zeros((skipped, units.shape[1]), dtype=np.int64), units)) if skipped else units


class KvPool:
    """Keys and values of one device, in units that are allocated one by one.

    Args:
        growing: tables get places to grow into; see :class:`hetis_exec.units.Allocator`.

    Attributes:
        tables: the units of every key.
        version: changes whenever a table is opened or closed.
    """

    def __init__(self, capacity_units: int, block_tokens: int, kernels: Kernels,
                 growing: bool = True) -> None:
        self.block_tokens = block_tokens
        self.capacity_units = capacity_units
        self.kernels = kernels
        self.tables: dict[TableKey, Table] = {}
        self.version = 0
        self._units = Allocator(capacity_units, growing)

    @property
    def used_units(self) -> int:
        """Units in use."""
        return self.capacity_units - self._units.free

    def open(self, key: TableKey, layers: int, blocks: int, tag: int, absent: Sequence[int] = (),
             skipped: int = 0) -> None:
        """Allocate a table of all blocks up to a number, but for some; ``skipped`` layers come before it.

        Raises:
            CacheError: the key has one already, or there is no room.
        """
        if key in self.tables:
            raise CacheError(f"{key} is open already")
        self._check(layers * (blocks - len(absent)))
        units, room = self._units.take(layers, blocks - len(absent))
        self.tables[key] = Table(_behind(skipped, units), tag, where=places(blocks, absent), skipped=skipped,
                                 places=room)
        self.version += 1

    def grow(self, key: TableKey, blocks: int) -> None:
        """Extend a table to ``blocks``.

        Raises:
            CacheError: there is no room, or it would shrink.
        """
        table = self.table(key)
        layers, held = table.units.shape
        now = table.end
        if blocks < now:
            raise CacheError(f"{key} would shrink from {now} to {blocks} blocks")
        if blocks > now:
            more = blocks - now
            layers -= table.skipped
            self._check(layers * more)
            new, table.places = self._units.grow(layers, more, table.places)
            table.units = np.concatenate((table.units, _behind(table.skipped, new)), axis=1)
            if table.where is not None:
                table.where = np.concatenate((table.where, np.arange(held, held + more)))

    def shed(self, key: TableKey, blocks: Sequence[int]) -> None:
        """Free some blocks of a table.

        Raises:
            CacheError: they are not here.
        """
        table = self.table(key)
        gone = table.of_blocks(np.array(blocks, dtype=np.int64))
        every = np.arange(table.end)
        stays = table.here(every) & ~np.isin(every, blocks)
        kept = table.of_blocks(every[stays])
        self._give(Table(gone, table.tag, slot=table.slot))
        table.units, table.slot = kept, -1
        table.where = places(len(every), every[~stays].tolist())

    def join(self, key: TableKey, layers: int, blocks: int, tag: int, absent: Sequence[int]) -> None:
        """Have all blocks up to a number but for some: those here, those aside, and newly allocated ones.

        Raises:
            CacheError: there is no room, or there are others.
        """
        parts = [table for name in (key, key._replace(aside=True))
                 if (table := self.tables.pop(name, None)) is not None]
        wanted = places(blocks, absent)
        units = np.full((layers, blocks - len(absent)), -1, dtype=np.int64)
        for part in parts:
            held = np.arange(part.end)
            held = held[part.here(held)]
            at = held if wanted is None else wanted[held]
            if (at < 0).any() or (units[:, at] >= 0).any():
                raise CacheError(f"{key} has blocks {held.tolist()}, of {blocks} blocks {list(absent)} are "
                                 "to be absent")
            units[:, at] = part.of_blocks(held)
            self.kernels.clear(Table(units[:, :0], part.tag, slot=part.slot))
            self._units.release(part.places)
        lacking = units[0] < 0 if layers else np.zeros(0, dtype=np.bool_)
        self._check(layers * int(lacking.sum()))
        units[:, lacking], room = self._units.take(layers, int(lacking.sum()))
        self.tables[key] = Table(units, tag, sum(part.awaited for part in parts), -1, wanted, frozenset(
            n for part in parts if part.awaited for n in (part.tag, *part.before)), places=room)
        self.version += 1

    def close(self, key: TableKey) -> None:
        """Free a table."""
        table = self.table(key)
        del self.tables[key]
        self._give(table)

    def _give(self, table: Table) -> None:
        """Free the units of a table that is no longer in use."""
        self.version += 1
        table.units = table.taken
        self.kernels.clear(table)
        self._units.give(table.units, table.places)

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

    def _check(self, number: int) -> None:
        if number > self._units.free:
            raise CacheError(f"{number} units are asked for, {self._units.free} of {self.capacity_units} are "
                             "free")

    # -- tokens ------------------------------------------------------------------------------

    def position_in(self, table: Table, position: int) -> int:
        """The place of a token among those of its table; -1 gives how many there are, as -1 - number."""
        if position < 0:
            return -1 - int(table.units.shape[1]) * self.block_tokens
        if table.where is None:
            return position
        block, offset = divmod(position, self.block_tokens)
        return int(table.where[block]) * self.block_tokens + offset

    def tokens_here(self, key: TableKey, first: int, last: int) -> NDArray[np.int64]:
        """Which of some tokens have a place in a table."""
        tokens = np.arange(first, last)
        return tokens[self.table(key).here(tokens // self.block_tokens)]

    def write(self, key: TableKey, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store tokens from position ``start`` on; shapes (tokens, head_dim)."""
        self.write_groups(self.spots((key,), start, len(keys), (layer,)), 0, keys, values)

    def spots(self, keys: Sequence[TableKey], start: int, tokens: int,
              layers: Sequence[int] | None = None) -> Spots:
        """Where tokens from position ``start`` on are stored in the tables of several keys.

        ``layers`` picks some of the layers; those of the result are counted from 0.
        """
        return self.spots_of(keys, np.arange(start, start + tokens), layers)

    def spots_of(self, keys: Sequence[TableKey], tokens: NDArray[np.int64],
                 layers: Sequence[int] | None = None) -> Spots:
        """The same for any tokens."""
        blocks, offsets = np.divmod(tokens, self.block_tokens)
        units = np.concatenate([self.table(key).of_blocks(blocks) for key in keys], axis=1)
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
              layers: slice, stay: bool = False) -> Leaving:
        """The same as arrays of messages, on their way out; they may be tensors if they are to ``stay``."""
        units, here = self._where(request_id, stage, groups, layers, first, last)
        return self.kernels.leave(units, here, stay)

    def leave_all(self, request_id: int, stage: int, groups: Sequence[int],
                  tokens: int) -> tuple[Leaving, NDArray[np.int64]]:
        """The same of all that is here of the first tokens, and the blocks that this is."""
        blocks = np.arange(-(-tokens // self.block_tokens))
        blocks = blocks[self.table(TableKey(request_id, stage, groups[0])).here(blocks)]
        tables = [self.table(TableKey(request_id, stage, g)).of_blocks(blocks) for g in groups]
        lacking = self.block_tokens - tokens % self.block_tokens if tokens % self.block_tokens else 0
        whole = len(blocks) * self.block_tokens
        last = whole - lacking if len(blocks) and tokens < (blocks[-1] + 1) * self.block_tokens else whole
        return self.kernels.leave(np.stack(tables, axis=1), slice(0, last)), blocks

    def _read(self, request_id: int, stage: int, groups: Sequence[int], layers: slice, first: int,
              last: int) -> tuple[Tensor, Tensor]:
        units, here = self._where(request_id, stage, groups, layers, first, last)
        keys, values = self.kernels.read(units)
        return keys[:, :, here], values[:, :, here]

    def _where(self, request_id: int, stage: int, groups: Sequence[int], layers: slice, first: int,
               last: int) -> tuple[NDArray[np.int64], slice]:
        """Units (layers, groups, blocks) that hold some tokens, and which tokens of them."""
        begin, end = first // self.block_tokens, -(-last // self.block_tokens)
        blocks = np.arange(begin, end)
        tables = [self.table(TableKey(request_id, stage, g)).of_blocks(blocks)[layers] for g in groups]
        return np.stack(tables, axis=1), slice(first - begin * self.block_tokens,
                                               last - begin * self.block_tokens)
