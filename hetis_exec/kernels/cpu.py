"""Cache and attention of one worker on a CPU.

Rows of decode attention are (request, KV group) pairs, and are computed some at a time: the keys of such a
chunk are multiplied with the query heads of each row, then weights with its values. Rows of equal length
that lie in one piece each, at equal distances, are read where they are; all others are gathered into a
buffer that is allocated once. A new allocation for each gather would cost several times the attention
itself, in page faults. Scores and weights are of float32 whatever the cache's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from hetis_exec.backend import Arrived, CacheTable
from hetis_exec.kernels.parts import TorchJoining
from hetis_exec.kernels.runs import Pieces, Run
from hetis_exec.kernels.small import mixed, scores
from hetis_exec.kernels.wire import array_of, in_place, resident_of, tensor_of
from hetis_exec.messages import Array
from hetis_exec.resident import Resident
from hetis_exec.rows import in_rows
from hetis_exec.stopwatch import HostStopwatch

CHUNK_BYTES = 8 << 20
"""Keys and values that are gathered at a time, each half of it: what a core's share of the caches holds."""

FILL_BYTES = 128 << 10
"""Keys and values of no use that are read rather than begin another piece: that costs about as much."""

RUN_BYTES = 512 << 10
"""Keys and values from which rows are read where they are, if that takes another piece."""

Units = NDArray[np.int64]

TOUCHED_BYTES = 256 << 20
"""Of the pool, so much is taken from the system before the first request."""

PAGE_BYTES = 4096

CPU = torch.device("cpu")


class Chunk(NamedTuple):
    """Rows of a plan that are computed together.

    Attributes:
        rows: of the plan's order.
        units: numbers of their units, shape (layers, rows x blocks); too short tables are filled up. None
            where they need not be gathered.
        tokens: of the longest row.
        run: where the rows lie, if they need not be gathered.
        mask: what to add to the scores, shape (rows, 1, tokens); None where all are equally long.
    """

    rows: slice
    units: torch.Tensor | None
    tokens: int
    run: Run | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Decode attention of a batch, for all layers.

    Attributes:
        slots: where the new tokens go, as numbers of a pool of tokens, shape (layers, rows with one).
        order, inverse: rows by length, and back; None where they are so already.
    """

    slots: torch.Tensor
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    chunks: Sequence[Chunk]


class CpuKernels:
    """See :class:`hetis_exec.backend.Kernels`.

    Args:
        capacity_units, block_tokens, head_dim: the pool, of shape (units, block_tokens, head_dim) for
            keys and for values. Its memory is taken as it is written to, unless :meth:`touch` does so before.
        poison: written over what is freed, so that tests find out who reads it.
        chunk_bytes: keys and values that are gathered at a time.
        dtype: of queries, keys and values.
    """

    def __init__(self, capacity_units: int, block_tokens: int, head_dim: int, poison: float | None = None,
                 chunk_bytes: int = CHUNK_BYTES, dtype: torch.dtype = torch.float32) -> None:
        self._block_tokens = block_tokens
        self._head_dim = head_dim
        self._poison = poison
        self._dtype = dtype
        self._block_bytes = 2 * dtype.itemsize * block_tokens * head_dim
        self._chunk_bytes = chunk_bytes
        shape = (max(1, capacity_units), block_tokens, head_dim * dtype.itemsize)
        # Zeros, because masked places are read as well: 0 times nan would be nan. Those of NumPy cost
        # nothing until they are written to.
        self._keys, self._values = (torch.from_numpy(np.zeros(shape, dtype=np.uint8)).view(dtype)
                                    for _ in range(2))
        self._buffer = self._wide = torch.empty(0)
        self._pieces = Pieces()

    # -- arrays --------------------------------------------------------------------------------------

    def from_wire(self, array: Any) -> torch.Tensor:
        return in_place(array, CPU) if isinstance(array, Resident) else tensor_of(array)

    def to_wire(self, tensor: torch.Tensor) -> Array:
        return array_of(tensor)

    def pack(self, tensors: Sequence[torch.Tensor]) -> list[Array]:
        return [array_of(tensor) for tensor in tensors]

    def host(self, tensors: Sequence[torch.Tensor]) -> list[Array]:
        return [array_of(tensor) for tensor in tensors]

    def keep(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        return [resident_of(tensor) for tensor in tensors]

    def concatenate(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors))

    def index(self, *axes: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor(axis, dtype=torch.int64) for axis in axes)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    def stopwatch(self) -> HostStopwatch:
        return HostStopwatch()

    def enter(self) -> None:
        """Any thread will do."""

    def working(self) -> AbstractContextManager[object]:
        """Without an account of what gradients would need every call of torch is a little shorter."""
        return torch.inference_mode()

    def synchronize(self) -> None:
        """A processor has done what it was asked to do when the call returns."""

    def wait(self) -> None:
        """See :meth:`synchronize`."""

    def touch(self) -> None:
        """Take the memory of the first units from the system; they keep what they hold.

        Those are the first to be handed out. On a virtual machine it may take milliseconds until a page is
        there that the machine has never used.
        """
        for pool in (self._keys, self._values):
            first = pool.view(torch.uint8).view(-1)[:TOUCHED_BYTES // 2:PAGE_BYTES]
            first.add_(0)

    # -- cache ---------------------------------------------------------------------------------------

    def clear(self, table: CacheTable) -> None:
        self._pieces.forget(table)
        if self._poison is not None:
            at = torch.from_numpy(table.units)
            self._keys[at] = self._poison
            self._values[at] = self._poison

    def spots(self, units: Units, offsets: Units) -> torch.Tensor:
        return torch.from_numpy(units * self._block_tokens + offsets)

    def write(self, spots: torch.Tensor, layer: int | slice, keys: torch.Tensor,
              values: torch.Tensor) -> None:
        self._store(spots[layer].flatten(), keys, values)

    def _store(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._keys.view(-1, self._head_dim).index_copy_(0, slots, in_rows(keys, 1))
        self._values.view(-1, self._head_dim).index_copy_(0, slots, in_rows(values, 1))

    def read(self, units: Units) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.from_numpy(np.ascontiguousarray(units))
        return self._keys[at].flatten(-3, -2), self._values[at].flatten(-3, -2)

    def leave(self, units: Units, tokens: slice, stay: bool = False) -> Arrived:
        parts = [part[..., tokens, :] for part in self.read(units)]
        return Arrived(self.keep(parts) if stay else [array_of(part) for part in parts])

    # -- decode attention ----------------------------------------------------------------------------

    def plan(self, tables: Sequence[CacheTable], positions: Sequence[int]) -> DecodePlan:
        at = np.array(positions)
        return self._plan(self._newest(tables, at), tables, at)

    def plan_parts(self, tables: Sequence[CacheTable], positions: Sequence[int]) -> DecodePlan:
        at = np.array(positions)
        fresh = int((at >= 0).sum())
        # Of n tokens without a new one the last lies at n - 1.
        return self._plan(self._newest(tables[:fresh], at[:fresh]), tables, np.where(at < 0, -2 - at, at))

    def _newest(self, tables: Sequence[CacheTable], positions: Units) -> torch.Tensor:
        """Where new tokens go."""
        if not len(positions):
            return torch.empty((len(tables), 0), dtype=torch.int64)
        where, offsets = np.divmod(positions, self._block_tokens)
        newest = np.stack([table.units[:, n] for table, n in zip(tables, where.tolist(), strict=True)],
                          axis=1)
        return torch.from_numpy(newest * self._block_tokens + offsets)

    def _plan(self, slots: torch.Tensor, tables: Sequence[CacheTable], at: Units) -> DecodePlan:
        order: list[int] = np.argsort(-at, kind="stable").tolist()
        sorted_already = order == list(range(len(order)))
        return DecodePlan(
            slots=slots,
            order=None if sorted_already else torch.tensor(order),
            inverse=None if sorted_already else torch.from_numpy(np.argsort(order)),
            chunks=self._chunks([tables[n] for n in order], at[order] + 1))

    def _chunks(self, tables: Sequence[CacheTable], tokens: Units) -> list[Chunk]:
        """Rows from the longest to the shortest: runs that are large or all there is, and those between."""
        chunks: list[Chunk] = []
        done, token_bytes = 0, self._block_bytes // self._block_tokens
        for run in self._pieces.runs(tables, tokens):
            length, rows = int(tokens[run.first]), run.last - run.first
            if rows < len(tables) and rows * length * token_bytes < RUN_BYTES:
                continue
            chunks += self._gathered(tables, tokens, done, run.first)
            chunks += self._read_in_place(run, length)
            done = run.last
        return chunks + self._gathered(tables, tokens, done, len(tables))

    def _read_in_place(self, run: Run, tokens: int) -> list[Chunk]:
        """One piece, or several of at most chunk_bytes where they are to be widened."""
        rows = run.last - run.first
        if self._dtype != torch.float32:
            rows = max(1, self._chunk_bytes // (-(-tokens // self._block_tokens) * self._block_bytes))
        return [Chunk(slice(at, min(at + rows, run.last)), None, tokens, run)
                for at in range(run.first, run.last, rows)]

    def _gathered(self, tables: Sequence[CacheTable], tokens: Units, first: int, last: int) -> list[Chunk]:
        """Some rows in pieces of at most chunk_bytes, one row at least.

        A piece ends where filling its short rows up would cost more than another piece.
        """
        begins, blocks = [first], -(-tokens // self._block_tokens)
        while (begin := begins[-1]) < last:
            longest = int(blocks[begin])
            end = min(last, begin + max(1, self._chunk_bytes // (longest * self._block_bytes)))
            filled = np.cumsum(longest - blocks[begin:end]) * self._block_bytes
            begins.append(begin + int(np.searchsorted(filled, FILL_BYTES, side="right")))
        return [self._chunk(slice(a, b), tables[a:b], tokens[a:b]) for a, b in pairwise(begins)]

    def _chunk(self, rows: slice, tables: Sequence[CacheTable], tokens: Units) -> Chunk:
        longest = int(tokens[0])
        blocks = -(-longest // self._block_tokens)
        units = np.zeros((len(tables[0].units), len(tables), blocks), dtype=np.int64)
        for n, table in enumerate(tables):
            used = table.units[:, :blocks]
            units[:, n, :used.shape[1]] = used
        mask: torch.Tensor | None = None
        if int(tokens[-1]) < longest:
            beyond = torch.arange(longest) >= torch.from_numpy(tokens)[:, None]
            mask = torch.zeros(beyond.shape).masked_fill_(beyond, -torch.inf)[:, None]
        return Chunk(rows, torch.from_numpy(units.reshape(len(units), -1)), longest, mask=mask)

    def decode(self, plan: DecodePlan, layer: int, queries: torch.Tensor, keys: torch.Tensor,
               values: torch.Tensor) -> torch.Tensor:
        self._store(plan.slots[layer], keys, values)
        ordered = self._ordered(plan, queries)
        found = [self._mixed(self._scores(chunk, layer, ordered).softmax(-1), chunk, layer)
                 for chunk in plan.chunks]
        out = (found[0] if len(found) == 1 else torch.cat(found)).to(queries.dtype)
        return out if plan.inverse is None else out[plan.inverse]

    def _ordered(self, plan: DecodePlan, queries: torch.Tensor) -> torch.Tensor:
        """Queries in the plan's order, such that their products with keys are scores."""
        wide = in_rows(queries.float() * self._head_dim ** -0.5, 2)
        return wide if plan.order is None else torch.index_select(wide, 0, plan.order)

    def _scores(self, chunk: Chunk, layer: int, ordered: torch.Tensor) -> torch.Tensor:
        found = scores(ordered[chunk.rows], self._rows(self._keys, chunk, layer))
        if chunk.mask is not None:
            found += chunk.mask
        return found

    def _mixed(self, weights: torch.Tensor, chunk: Chunk, layer: int) -> torch.Tensor:
        return mixed(weights, self._rows(self._values, chunk, layer))

    def decode_parts(self, plan: DecodePlan, layer: int, queries: torch.Tensor, keys: torch.Tensor,
                     values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(keys):
            self._store(plan.slots[layer], keys, values)
        ordered = self._ordered(plan, queries)
        out, sums = torch.empty(queries.shape, dtype=queries.dtype), torch.empty(queries.shape[:2])
        for chunk in plan.chunks:
            found = self._scores(chunk, layer, ordered)
            total = sums[chunk.rows] = torch.logsumexp(found, -1)
            weights = found.sub_(total[..., None]).exp_()
            out[chunk.rows] = self._mixed(weights, chunk, layer)
        return (out, sums) if plan.inverse is None else (out[plan.inverse], sums[plan.inverse])

    def joining(self, number: int, queries: torch.Tensor) -> TorchJoining:
        return TorchJoining(number, queries)

    def _rows(self, pool: torch.Tensor, chunk: Chunk, layer: int) -> torch.Tensor:
        """A chunk's rows of a pool in float32, for as long as no others are; shape (rows, tokens, d)."""
        rows, d, run = chunk.rows.stop - chunk.rows.start, self._head_dim, chunk.run
        if run is not None:
            width, stride = self._block_tokens * d, run.strides[layer]
            begin = run.begins[layer] + (chunk.rows.start - run.first) * stride
            found = pool.as_strided((rows, chunk.tokens, d), (stride * width, d, 1), begin * width)
        else:
            found = self._gather(pool, chunk, layer).view(rows, -1, d)[:, :chunk.tokens]
        if self._dtype == torch.float32:
            return found
        size = found.numel()
        if len(self._wide) < size:
            self._wide = torch.empty(max(size * 5 // 4, self._room))
        return self._wide[:size].view(found.shape).copy_(found)

    @property
    def _room(self) -> int:
        """Numbers that a buffer has room for at least."""
        return self._chunk_bytes // (2 * self._dtype.itemsize)

    def _gather(self, pool: torch.Tensor, chunk: Chunk, layer: int) -> torch.Tensor:
        """A chunk's units of a pool, in a buffer that the next gather uses again."""
        assert chunk.units is not None
        units, width = chunk.units[layer], self._block_tokens * self._head_dim
        size = len(units) * width
        if len(self._buffer) < size:
            # Pieces of a batch grow by a block at a time: leave room for some more.
            self._buffer = torch.empty(max(size * 5 // 4, self._room), dtype=self._dtype)
        gathered = self._buffer[:size].view(len(units), width)
        torch.index_select(pool.view(len(pool), width), 0, units, out=gathered)
        return gathered

    # -- prefill -------------------------------------------------------------------------------------

    def plan_prompts(self, tables: Sequence[CacheTable | None], begins: Sequence[int], news: Sequence[int],
                     contexts: Sequence[int], heads: int) -> None:
        return None

    def attend_prompts(self, plan: Any, layer: int, queries: torch.Tensor, keys: torch.Tensor,
                       values: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("plan_prompts has said that prompts are computed one by one")

    def causal(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        new, groups, r, d = queries.shape
        total = keys.shape[1]
        k, v = (x[:, None].expand(groups, r, total, d) for x in (keys, values))
        options: dict[str, Any] = {"is_causal": new == total}
        if 1 < new < total:
            options["attn_mask"] = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        return scaled_dot_product_attention(queries.permute(1, 2, 0, 3), k, v, **options).permute(2, 0, 1, 3)
