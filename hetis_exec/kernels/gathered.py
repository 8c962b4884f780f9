"""Paged decode attention with torch alone, for machines where Triton is not installed.

Blocks of some rows at a time are gathered into a buffer that stays, and attended to by torch's fused
kernel, with the query heads of a group folded into the query length of one attention head.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

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
        block = key_pool.shape[1]
        at = positions.repeat_interleave(groups)
        begins = spans[:, 0] + layer * spans[:, 1]
        newest = arena[begins + at // block].long() * block + at % block
        for pool, new in ((key_pool, keys), (value_pool, values)):
            pool.view(-1, d).index_copy_(0, newest, new.reshape(-1, d))
        blocks = longest // block + 1
        size = 2 * blocks * block * d * key_pool.element_size()
        rows = max(1, self._chunk_bytes // size)
        folded = queries.reshape(-1, 1, heads, d)
        out = [self._attend(folded[here], begins[here], at[here], key_pool, value_pool, arena, blocks)
               for first in range(0, len(folded), rows) for here in (slice(first, first + rows),)]
        return torch.cat(out).view(tokens, groups, heads, d)

    def _attend(self, queries: torch.Tensor, begins: torch.Tensor, positions: torch.Tensor,
                key_pool: torch.Tensor, value_pool: torch.Tensor, arena: torch.Tensor,
                blocks: int) -> torch.Tensor:
        block, d = key_pool.shape[1:]
        number = torch.arange(blocks, device=arena.device)
        used = number <= (positions // block)[:, None]
        units = arena[torch.where(used, begins[:, None] + number, 0)]
        units = torch.where(used, units, 0).flatten()
        k, v = (self._gather(pool.view(len(pool), -1), which, units).view(len(queries), 1, blocks * block, d)
                for which, pool in enumerate((key_pool, value_pool)))
        seen = torch.arange(blocks * block, device=arena.device) <= positions[:, None]
        return scaled_dot_product_attention(queries, k, v, seen[:, None, None])

    def _gather(self, pool: torch.Tensor, which: int, units: torch.Tensor) -> torch.Tensor:
        size = len(units) * pool.shape[1]
        if len(self._buffers[which]) < size:
            self._buffers = (pool.new_empty(size * 5 // 4), pool.new_empty(size * 5 // 4))
        gathered = self._buffers[which][:size].view(len(units), -1)
        torch.index_select(pool, 0, units, out=gathered)
        return gathered
