"""Causal attention of prompts in Triton, over a paged cache: all prompts of a step in one kernel.

A program computes the query heads of one KV group for some tokens of one prompt. It goes through what of
the prompt is in the cache, by its table, and through the new tokens where their projections lie, and it
stores the new keys and values of its tokens on the way. What it reads of the cache are tokens before this
step, what it writes are tokens of this step: no program waits for another. Prompts, their lengths and
tables are read from the device, so a recorded kernel serves any prompts that are not too many.

The running softmax is that of Dao 2023 (FlashAttention-2). Query heads of a group lie in the rows of a tile
side by side, so that every key is loaded once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from hetis_exec.kernels.paged import DOT_FROM, DOT_ROWS, LOG2_E, NO_SCORE, STARTING, one_tile, power_of_two

NOTHING = -1
"""A block that is left out."""


@triton.jit(do_not_specialize=["layer", "groups"])
def prompt_rows(queries, new_keys, new_values, out, key_pool, value_pool, arena, spans, prompts, blocks,
                query_token, query_group, key_token, key_group, value_token, value_group, layer, groups,
                scale, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
                TOKENS: tl.constexpr, TOKENS_PAD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
                STAGES: tl.constexpr, PRECISE: tl.constexpr):
    """Some tokens of one prompt, one KV group; strides are in elements, ``scale`` is of base-2 exponents."""
    prompt = tl.load(blocks + 2 * tl.program_id(0))
    group = tl.program_id(1)
    if prompt >= 0:
        first = tl.load(blocks + 2 * tl.program_id(0) + 1).to(tl.int32)
        row = tl.load(prompts + 3 * prompt)
        new = tl.load(prompts + 3 * prompt + 1).to(tl.int32)
        context = tl.load(prompts + 3 * prompt + 2).to(tl.int32)
        begin = tl.load(spans + 2 * (prompt * groups + group))
        table = arena + begin + layer * tl.load(spans + 2 * (prompt * groups + group) + 1)
        d = tl.arange(0, D_PAD)
        in_head = d < D
        r = tl.arange(0, ROWS)
        token = first + r // G
        own = (r < TOKENS * G) & (token < new)
        q = tl.load(queries + (row + token)[:, None] * query_token + group * query_group
                    + (r % G)[:, None] * D + d[None, :], mask=own[:, None] & in_head[None, :], other=0.0)
        top = tl.full([ROWS], NO_SCORE, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, D_PAD], tl.float32)

        for start in tl.range(0, context, TILE, num_stages=STAGES):
            t = start + tl.arange(0, TILE)
            inside = t < context
            unit = tl.load(table + t // BLOCK, mask=inside, other=0).to(tl.int64)
            at = ((unit * BLOCK + t % BLOCK) * D)[:, None] + d[None, :]
            wanted = inside[:, None] & in_head[None, :]
            k = tl.load(key_pool + at, mask=wanted, other=0.0)
            v = tl.load(value_pool + at, mask=wanted, other=0.0)
            top, total, mixed = one_tile(q, k, v, inside[None, :], scale, top, total, mixed, PRECISE)

        last = tl.minimum(new, first + TOKENS)
        for start in tl.range(0, last, TILE, num_stages=STAGES):
            t = start + tl.arange(0, TILE)
            wanted = (t < last)[:, None] & in_head[None, :]
            k = tl.load(new_keys + (row + t)[:, None] * key_token + group * key_group + d[None, :],
                        mask=wanted, other=0.0)
            v = tl.load(new_values + (row + t)[:, None] * value_token + group * value_group + d[None, :],
                        mask=wanted, other=0.0)
            seen = (t[None, :] <= token[:, None]) & (t < last)[None, :]
            top, total, mixed = one_tile(q, k, v, seen, scale, top, total, mixed, PRECISE)

        result = mixed / total[:, None]
        heads = ((row + token) * groups + group)[:, None] * (G * D) + (r % G)[:, None] * D + d[None, :]
        tl.store(out + heads, result.to(out.dtype.element_ty), mask=own[:, None] & in_head[None, :])

        if begin >= 0:
            t = first + tl.arange(0, TOKENS_PAD)
            mine = (t < last)[:, None] & in_head[None, :]
            at = context + t
            unit = tl.load(table + at // BLOCK, mask=t < last, other=0).to(tl.int64)
            spot = ((unit * BLOCK + at % BLOCK) * D)[:, None] + d[None, :]
            k = tl.load(new_keys + (row + t)[:, None] * key_token + group * key_group + d[None, :],
                        mask=mine, other=0.0)
            v = tl.load(new_values + (row + t)[:, None] * value_token + group * value_group + d[None, :],
                        mask=mine, other=0.0)
            tl.store(key_pool + spot, k, mask=mine)
            tl.store(value_pool + spot, v, mask=mine)


@dataclass(frozen=True, slots=True)
class PromptLaunch:
    """How prompts are cut up.

    Attributes:
        tokens: of a prompt that a program computes.
        rows: of a tile of queries: as many tokens as have room with all query heads of a group.
        tile: keys at a time.
        warps: of a program.
        stages: tiles on their way at a time.
    """

    tokens: int
    rows: int
    tile: int
    warps: int
    stages: int


def choose_prompt_launch(heads: int, head_dim: int, dtype: torch.dtype,
                         capability: tuple[int, int]) -> PromptLaunch | None:
    """For G query heads of a group; None where matrix units do not take the type."""
    wide = power_of_two(head_dim)
    if capability < DOT_FROM or dtype == torch.float32 or wide < DOT_ROWS:
        return None
    rows = max(64, power_of_two(heads))
    return PromptLaunch(rows // heads, rows, 64 if wide <= 128 else 32, 4, 2)


def blocks_of(launch: PromptLaunch, news: Sequence[int]) -> NDArray[np.int64]:
    """(prompt, first token) of every block, those with the most keys first; shape (blocks, 2)."""
    found = [(prompt, first) for prompt, new in enumerate(news) for first in range(0, new, launch.tokens)]
    return np.array(sorted(found, key=lambda block: -block[1]), dtype=np.int64).reshape(-1, 2)


def attend(launch: PromptLaunch, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
           key_pool: torch.Tensor, value_pool: torch.Tensor, arena: torch.Tensor, spans: torch.Tensor,
           prompts: torch.Tensor, blocks: torch.Tensor, layer: int) -> torch.Tensor:
    """Store the new tokens of prompts, and attend to all tokens of each prompt up to itself.

    Shapes: queries (tokens, groups, G, d), keys and values (tokens, groups, d), each with d (and G before
    it) contiguous; spans (prompts x groups, 2), below 0 where nothing is to be stored; prompts (prompts, 3):
    row of the first new token, new tokens, tokens before them; blocks (any number, 2), those below 0 are
    left out; pools (units, block_tokens, d). The result has the shape of the queries, contiguous; rows that
    belong to no prompt are of no meaning.
    """
    tokens, groups, heads, d = queries.shape
    out = torch.empty((tokens, groups, heads, d), dtype=queries.dtype, device=queries.device)
    with STARTING:
        prompt_rows[len(blocks), groups](
            queries, keys, values, out, key_pool, value_pool, arena, spans, prompts, blocks,
            queries.stride(0), queries.stride(1), keys.stride(0), keys.stride(1), values.stride(0),
            values.stride(1), layer, groups, d ** -0.5 * LOG2_E, G=heads, D=d, D_PAD=power_of_two(d),
            BLOCK=key_pool.shape[1], TOKENS=launch.tokens, TOKENS_PAD=power_of_two(launch.tokens),
            ROWS=launch.rows, TILE=launch.tile, STAGES=launch.stages,
            PRECISE=queries.dtype == torch.float32, num_warps=launch.warps)
    return out
