"""Paged decode attention in Triton, for all cards from Pascal on.

A row is one KV group of one request: G query heads share its keys and values. Its table lies in an
array that all rows share, layer after layer; ``spans`` says where each row's begins, and how many
blocks each layer has room for. A program computes a row, or a piece of it, and a second kernel joins the
pieces (Dao et al. 2023, Flash-Decoding). Pieces have as many tokens in every row, so that long rows take
more programs and not more time. They are listed on the device, since a recorded step serves batches of all
kinds. The new token's keys and values are stored on the way: no program reads them back.

Scores are products of matrix units where those take the type: even for a single head, padded to 16
rows, they leave the loop to wait for memory alone. Otherwise each place of a tile has a running softmax
of its own, and places are joined at the end: the loop then needs no exchange between threads but the
sums of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

STARTING = Lock()
"""Workers may be threads of one process; a kernel that is started for the first time is compiled then."""

WAVES = 1
"""So many programs, for each that a card holds at a time, are there for pieces of long rows."""
SHARES = np.array((2, 3, 4, 6, 8))
"""Tiles of a piece."""
JOINED = 16
"""Pieces that are joined at a time."""

Numbers = NDArray[np.int64]

REGISTERS = 1 << 16
"""Of one multiprocessor, from Kepler on."""

NO_SCORE = tl.constexpr(-1e30)
"""Less than any score, and yet a number: its difference to itself is 0."""

LOG2_E = 1.4426950408889634
DOT_FROM = (8, 0)
DOT_ROWS = 16
"""Matrix units are used from this compute capability on, and take this many rows."""


@triton.jit
def one_tile(q, k, v, seen, scale, top, total, mixed, PRECISE: tl.constexpr):
    """Go on with a running softmax by the keys of a tile."""
    if PRECISE:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    else:
        scores = tl.dot(q, tl.trans(k)) * scale
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    kept = tl.exp2(top - higher)
    total = total * kept + tl.sum(weights, 1)
    if PRECISE:
        mixed = tl.dot(weights.to(v.dtype), v, mixed * kept[:, None], input_precision="ieee")
    else:
        mixed = tl.dot(weights.to(v.dtype), v, mixed * kept[:, None])
    return higher, total, mixed


@triton.jit
def plain_tile(wide, k, v, inside, scale, tops_at, sums_at, mixed_at):
    """The same without matrix units: each place of a tile has a softmax of its own."""
    scores = tl.sum(wide[:, None, :] * k.to(tl.float32)[None, :, :], 2) * scale
    scores = tl.where(inside[None, :], scores, float("-inf"))
    higher = tl.maximum(tops_at, scores)
    weights = tl.exp2(scores - higher)
    kept = tl.exp2(tops_at - higher)
    mixed_at = mixed_at * kept[:, :, None] + weights[:, :, None] * v.to(tl.float32)[None, :, :]
    return higher, sums_at * kept + weights, mixed_at


@triton.jit
def joined_places(tops_at, sums_at, mixed_at):
    """One softmax of those of the places."""
    top = tl.max(tops_at, 1)
    joined = tl.exp2(tops_at - top[:, None])
    return top, tl.sum(sums_at * joined, 1), tl.sum(mixed_at * joined[:, :, None], 1)


@triton.jit
def one_token(q, k, v, scale, top, total, mixed):
    """Go on with a running softmax by a single key."""
    score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
    top_new = tl.maximum(top, score)
    weight = tl.exp2(score - top_new)
    old = tl.exp2(top - top_new)
    return top_new, total * old + weight, mixed * old[:, None] + weight[:, None] * v.to(tl.float32)[None, :]


@triton.jit
def store_token(key_pool, value_pool, table, position, k, v, d, in_head, D: tl.constexpr,
                BLOCK: tl.constexpr):
    """Keep the key and the value of a new token."""
    unit = tl.load(table + position // BLOCK).to(tl.int64)
    at = (unit * BLOCK + position % BLOCK) * D
    tl.store(key_pool + at + d, k, mask=in_head)
    tl.store(value_pool + at + d, v, mask=in_head)


@triton.jit(do_not_specialize=["layer", "groups"])
def decode_rows(queries, new_keys, new_values, out, parts, tops, sums,  # noqa: PLR0915 - one kernel
                key_pool, value_pool, arena, spans, positions, pieces, query_token, query_group, key_token,
                key_group, value_token, value_group, layer, groups, scale, G: tl.constexpr,
                G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
                TILE: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr):
    """A piece of a row; strides are in elements, ``scale`` is that of base-2 exponents."""
    group = tl.program_id(0).to(tl.int64)  # the fastest: programs without a piece come last
    piece = tl.program_id(1)
    token = tl.load(pieces + 3 * piece)
    row = tl.maximum(token, 0) * groups + group
    begin = tl.load(spans + 2 * row)
    if (token >= 0) & (begin >= 0):
        table = arena + begin + layer * tl.load(spans + 2 * row + 1)
        position = tl.load(positions + token).to(tl.int32)
        first = tl.load(pieces + 3 * piece + 1).to(tl.int32)
        last = tl.load(pieces + 3 * piece + 2).to(tl.int32)
        stores = first == 0
        if PARTS:  # a position of -1 - n stands for n tokens without a new one
            stores = stores & (position >= 0)
        g, d = tl.arange(0, G_PAD), tl.arange(0, D_PAD)
        in_head = d < D
        q = tl.load(queries + token * query_token + group * query_group + g[:, None] * D + d[None, :],
                    mask=(g < G)[:, None] & in_head[None, :], other=0.0)

        if DOT:
            top = tl.full([G_PAD], NO_SCORE, tl.float32)
            total = tl.zeros([G_PAD], tl.float32)
            mixed = tl.zeros([G_PAD, D_PAD], tl.float32)
        else:
            wide = q.to(tl.float32)
            tops_at = tl.full([G_PAD, TILE], NO_SCORE, tl.float32)
            sums_at = tl.zeros([G_PAD, TILE], tl.float32)
            mixed_at = tl.zeros([G_PAD, TILE, D_PAD], tl.float32)

        for start in tl.range(first, last, TILE, num_stages=STAGES):
            t = start + tl.arange(0, TILE)
            inside = t < last
            unit = tl.load(table + t // BLOCK, mask=inside, other=0).to(tl.int64)
            at = (unit * BLOCK + t % BLOCK) * D
            wanted = inside[:, None] & in_head[None, :]
            k = tl.load(key_pool + at[:, None] + d[None, :], mask=wanted, other=0.0)
            v = tl.load(value_pool + at[:, None] + d[None, :], mask=wanted, other=0.0)
            if DOT:
                top, total, mixed = one_tile(q, k, v, inside[None, :], scale, top, total, mixed, False)
            else:
                tops_at, sums_at, mixed_at = plain_tile(wide, k, v, inside, scale, tops_at, sums_at, mixed_at)

        if not DOT:
            top, total, mixed = joined_places(tops_at, sums_at, mixed_at)

        if stores:
            k_new = tl.load(new_keys + token * key_token + group * key_group + d, mask=in_head, other=0.0)
            v_new = tl.load(new_values + token * value_token + group * value_group + d, mask=in_head,
                            other=0.0)
            store_token(key_pool, value_pool, table, position, k_new, v_new, d, in_head, D, BLOCK)
            top, total, mixed = one_token(q, k_new, v_new, scale, top, total, mixed)

        heads = g[:, None] * D + d[None, :]
        stored = (g < G)[:, None] & in_head[None, :]
        alone = (first == 0) & (last == position)
        if PARTS:  # its logarithm is wanted as well
            alone = last < 0
        if alone:
            result = mixed / total[:, None]
            tl.store(out + row * (G * D) + heads, result.to(out.dtype.element_ty), mask=stored)
        else:
            at = piece * groups + group
            tl.store(tops + at * G + g, top, mask=g < G)
            tl.store(sums + at * G + g, total, mask=g < G)
            tl.store(parts + at * (G * D) + heads, mixed, mask=stored)


@triton.jit(do_not_specialize=["groups"])
def join_pieces(parts, tops, sums, out, logs, spans, runs, groups, log_2, G: tl.constexpr, D: tl.constexpr,
                D_PAD: tl.constexpr, JOINED: tl.constexpr, PARTS: tl.constexpr):
    """One head of a row with several pieces, which lie one after the other, weighted by their sums.

    With PARTS of all rows, and also the natural logarithm of its sum of exponents; ``log_2`` is that of 2.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token, group = row // groups, row % groups
    begin, number = tl.load(runs + 2 * token), tl.load(runs + 2 * token + 1).to(tl.int32)
    joins = number > 1
    if PARTS:
        joins = number > 0
    if joins & (tl.load(spans + 2 * row) >= 0):
        d = tl.arange(0, D_PAD)
        top = tl.full([1], NO_SCORE, tl.float32)
        whole = tl.zeros([1], tl.float32)
        mixed = tl.zeros([D_PAD], tl.float32)
        for start in range(0, number, JOINED):
            n = start + tl.arange(0, JOINED)
            at = ((begin + n) * groups + group) * G + head
            tops_here = tl.load(tops + at, mask=n < number, other=NO_SCORE)
            sums_here = tl.load(sums + at, mask=n < number, other=0.0)
            higher = tl.maximum(top, tl.max(tops_here, 0))
            weights = tl.where(sums_here > 0.0, tl.exp2(tops_here - higher), 0.0)
            here = tl.load(parts + at[:, None] * D + d[None, :],
                           mask=(sums_here > 0.0)[:, None] & (d < D)[None, :], other=0.0)
            kept = tl.exp2(top - higher)
            whole = whole * kept + tl.sum(weights * sums_here, 0)
            mixed = mixed * kept + tl.sum(here * weights[:, None], 0)
            top = higher
        result = mixed / whole
        tl.store(out + (row * G + head) * D + d, result.to(out.dtype.element_ty), mask=d < D)
        if PARTS:
            tl.store(logs + row * G + head + tl.arange(0, 1), (top + tl.log2(whole)) * log_2)


@dataclass(frozen=True, slots=True)
class Launch:
    """How a row is computed.

    Attributes:
        dot: by matrix units.
        tile: tokens at a time.
        warps: of a program.
        stages: tiles on their way at a time.
    """

    dot: bool
    tile: int
    warps: int
    stages: int


def power_of_two(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << max(0, number - 1).bit_length()


def padded_heads(heads: int, launch: Launch) -> int:
    """Rows that a group's query heads take."""
    return max(DOT_ROWS if launch.dot else 1, power_of_two(heads))


def choose_launch(heads: int, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Launch:
    """For G query heads of a group; matrix units take 16-bit types only."""
    wide = power_of_two(head_dim)
    if capability >= DOT_FROM and dtype != torch.float32 and wide >= DOT_ROWS:
        return Launch(True, 64 if wide <= 128 else 32, 4, 3)
    # Each thread keeps its share of (heads, tile, head_dim) in registers.
    tile = max(4, min(32, 4096 // (power_of_two(heads) * wide)))
    return Launch(False, tile, 4, 2)


def pieces_max(tokens: int, groups: int, resident: int) -> int:
    """Pieces that a step lists at most: one for each token, and as many more as make some waves of rows."""
    return tokens + -(-WAVES * resident // max(1, groups))


def choose_share(cached: Numbers, groups: int, number: int, launch: Launch, resident: int) -> int:
    """Tokens of a piece, for requests with so many cached tokens, each of which has a row for every group.

    Programs come in waves of as many as the card holds at a time. A wave takes as long as a piece, and a
    tile more for what programs begin and end with; so few waves of long pieces or many of short ones may
    be best. No more than ``number`` pieces may come out.
    """
    longest, shares = int(cached.max()), SHARES * launch.tile
    counts = np.maximum(1, -(-cached[:, None] // shares)).sum(axis=0)
    if counts[-1] > number:
        # One more for each request than if all were cut from one.
        return -(-int(cached.sum()) // (max(1, number - len(cached)) * launch.tile)) * launch.tile
    costs = -(-groups * counts // resident) * (np.minimum(shares, longest) + launch.tile)
    return int(shares[np.argmin(np.where(counts <= number, costs, np.inf))])


def cut(cached: Numbers, share: int, number: int) -> tuple[Numbers, Numbers]:
    """Pieces of requests with so many cached tokens: (token, first, end) of each, and where each token's are.

    Shapes (number, 3), where -1 stands for no piece, and (tokens, 2): the first, and how many.
    """
    counts = np.maximum(1, -(-cached // share))
    begins = np.cumsum(counts) - counts
    token = np.repeat(np.arange(len(cached)), counts)
    first = (np.arange(len(token)) - begins[token]) * share
    pieces = np.full((number, 3), -1, dtype=np.int64)
    pieces[:len(token)] = np.stack((token, first, np.minimum(cached[token], first + share)), axis=1)
    return pieces, np.stack((begins, counts), axis=1)


def resident_programs(launch: Launch, head_dim: int, dtype: torch.dtype, processors: int,
                      shared_bytes: int) -> int:
    """Programs that a card holds at a time, by the registers and the shared memory that each takes.

    What the compiler takes for capability 8.0 and 9.0: 71, 128 and 166 registers of a thread for head
    dimensions of 64, 128 and 256, and room for one tile of keys and of values beside some for exchange.
    """
    if not launch.dot:
        return 4 * processors
    wide = power_of_two(head_dim)
    program_bytes = 2 * launch.tile * wide * dtype.itemsize + (8 << 10)
    registers = 32 * launch.warps * max(72, min(wide, 168))
    return processors * max(1, min(shared_bytes // program_bytes, REGISTERS // registers))


def decode(launch: Launch, pieces: torch.Tensor, runs: torch.Tensor, queries: torch.Tensor,
           keys: torch.Tensor, values: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor,
           arena: torch.Tensor, spans: torch.Tensor, positions: torch.Tensor, layer: int) -> torch.Tensor:
    """Store each row's new token and attend to all of its tokens.

    Shapes: queries (tokens, groups, G, d), keys and values (tokens, groups, d), each with d (and G before
    it) contiguous; spans (tokens x groups, 2), positions (tokens,); pieces and runs as :func:`cut` has them;
    pools (units, block_tokens, d). The result has the shape of the queries, contiguous. Rows whose span
    begins below 0, and tokens without a piece, are left out.
    """
    return _decode(launch, pieces, runs, queries, keys, values, key_pool, value_pool, arena, spans, positions,
                   layer, None)


def decode_parts(launch: Launch, pieces: torch.Tensor, runs: torch.Tensor, queries: torch.Tensor,
                 keys: torch.Tensor, values: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor,
                 arena: torch.Tensor, spans: torch.Tensor, positions: torch.Tensor,
                 layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for rows of which only some tokens are here, and the logarithms of their sums.

    A position of ``-1 - n`` is that of a row of n tokens without a new one; these rows come last, and have no
    keys and values. The logarithms are float32, shape (tokens, groups, G).
    """
    logs = torch.empty(queries.shape[:3], dtype=torch.float32, device=queries.device)
    out = _decode(launch, pieces, runs, queries, keys, values, key_pool, value_pool, arena, spans, positions,
                  layer, logs)
    return out, logs


def _decode(launch: Launch, pieces: torch.Tensor, runs: torch.Tensor, queries: torch.Tensor,
            keys: torch.Tensor, values: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor,
            arena: torch.Tensor, spans: torch.Tensor, positions: torch.Tensor, layer: int,
            logs: torch.Tensor | None) -> torch.Tensor:
    tokens, groups, heads, d = queries.shape
    number, d_pad = len(pieces), power_of_two(d)
    out = torch.empty((tokens, groups, heads, d), dtype=queries.dtype, device=queries.device)
    parts = torch.empty(number * groups * heads * d, dtype=torch.float32, device=queries.device)
    tops, sums = torch.empty((2, number * groups * heads), dtype=torch.float32, device=queries.device)
    with STARTING:
        decode_rows[groups, number](
            queries, keys, values, out, parts, tops, sums, key_pool, value_pool, arena, spans, positions,
            pieces, queries.stride(0), queries.stride(1), keys.stride(0), keys.stride(1), values.stride(0),
            values.stride(1), layer, groups, d ** -0.5 * LOG2_E, G=heads, G_PAD=padded_heads(heads, launch),
            D=d, D_PAD=d_pad, BLOCK=key_pool.shape[1], TILE=launch.tile, DOT=launch.dot, STAGES=launch.stages,
            PARTS=logs is not None, num_warps=launch.warps)
        if number > tokens or logs is not None:
            join_pieces[tokens * groups, heads](
                parts, tops, sums, out, out if logs is None else logs, spans, runs, groups, 1 / LOG2_E,
                G=heads, D=d, D_PAD=d_pad, JOINED=JOINED, PARTS=logs is not None, num_warps=4)
    return out
