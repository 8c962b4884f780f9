"""Paged decode attention with torch alone, for machines where Triton is not installed.

Blocks of some rows at a time are gathered into a buffer that stays, and attended to by torch's fused
kernel, with the query heads of a group folded into the query length of one attention head.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from hetis_exec.kernels.parts import attend

CHUNK_BYTES = 256 << 20
"""Keys and values that are gathered at a time."""


class GatheredDecode:
    """See :func:`hetis_exec.kernels.paged.decode`, whose arguments these are."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._buffers = torch.empty(0), torch.empty(0)

    def decode(self, longest: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
               key_pool: torch.Tensor, value_pool: torch.Tensor, arena: torch.Tensor, spans: torch.Tensor,
               positions: torch.Tensor, layer: int) -> torch.Tensor:
        """Store each row's new token and attend to all of its tokens; ``longest`` is the highest position."""
        tokens, groups, heads, d = queries.shape
        at = positions.repeat_interleave(groups)
        begins = spans[:, 0] + layer * spans[:, 1]
        _store(keys, values, key_pool, value_pool, arena, begins, at)
        blocks = longest // key_pool.shape[1] + 1
        folded = queries.reshape(-1, 1, heads, d)
        out = [scaled_dot_product_attention(
                   folded[here], *self._cached(begins[here], at[here], key_pool, value_pool, arena, blocks))
               for here in self._pieces(len(folded), blocks, key_pool)]
        return torch.cat(out).view(tokens, groups, heads, d)

    def decode_parts(self, longest: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                     key_pool: torch.Tensor, value_pool: torch.Tensor, arena: torch.Tensor,
                     spans: torch.Tensor, positions: torch.Tensor,
                     layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See :func:`hetis_exec.kernels.paged.decode_parts`; shapes are those of one group."""
        begins = spans[:, 0] + layer * spans[:, 1]
        _store(keys, values, key_pool, value_pool, arena, begins[:len(keys)], positions[:len(keys)])
        # Of n tokens without a new one the last lies at n - 1.
        at = torch.where(positions < 0, -2 - positions, positions)
        blocks = longest // key_pool.shape[1] + 1
        found = []
        for here in self._pieces(len(queries), blocks, key_pool):
            k, v, seen = self._cached(begins[here], at[here], key_pool, value_pool, arena, blocks)
            mask = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)
            found.append(attend(queries[here, 0], k[:, 0], v[:, 0], mask[:, 0]))
        out, sums = (torch.cat(parts)[:, None] for parts in zip(*found, strict=True))
        return out.to(queries.dtype), sums

    def _pieces(self, rows: int, blocks: int, pool: torch.Tensor) -> list[slice]:
        """Rows that are gathered together."""
        size = 2 * blocks * pool.shape[1] * pool.shape[2] * pool.element_size()
        step = max(1, self._chunk_bytes // size)
        return [slice(first, first + step) for first in range(0, rows, step)]

    def _cached(self, begins: torch.Tensor, positions: torch.Tensor, key_pool: torch.Tensor,
                value_pool: torch.Tensor, arena: torch.Tensor,
                blocks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values (rows, 1, tokens, d), and which of them are seen, (rows, 1, 1, tokens)."""
        block, d = key_pool.shape[1:]
        number = torch.arange(blocks, device=arena.device)
        used = number <= (positions // block)[:, None]
        units = arena[torch.where(used, begins[:, None] + number, 0)]
        units = torch.where(used, units, 0).flatten()
        k, v = (self._gather(pool.view(len(pool), -1), which, units).view(len(begins), 1, blocks * block, d)
                for which, pool in enumerate((key_pool, value_pool)))
        seen = torch.arange(blocks * block, device=arena.device) <= positions[:, None]
        return k, v, seen[:, None, None]

    def _gather(self, pool: torch.Tensor, which: int, units: torch.Tensor) -> torch.Tensor:
        size = len(units) * pool.shape[1]
        if len(self._buffers[which]) < size:
            self._buffers = (pool.new_empty(size * 5 // 4), pool.new_empty(size * 5 // 4))
        gathered = self._buffers[which][:size].view(len(units), -1)
        torch.index_select(pool, 0, units, out=gathered)
        return gathered


def _store(keys: torch.Tensor, values: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor,
           arena: torch.Tensor, begins: torch.Tensor, positions: torch.Tensor) -> None:
    """Store the new token of each row."""
    block, d = key_pool.shape[1:]
    newest = arena[begins + positions // block].long() * block + positions % block
    for pool, new in ((key_pool, keys), (value_pool, values)):
        pool.view(-1, d).index_copy_(0, newest, new.reshape(-1, d))
