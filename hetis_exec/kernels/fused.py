"""What lies between a decoder's matrix products, in Triton: one kernel for each stretch of it.

All of them compute in float32 and store the type they were given.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hetis_exec.kernels.paged import STARTING, power_of_two

HEADS_AT_ONCE = 4
COLUMNS_AT_ONCE = 1024
WIDTH_MAX = 1 << 15
"""Widest row that one program norms."""


@triton.jit
def add_norm_rows(hidden, change, normal, weight, bias, epsilon, width, WIDTH_PAD: tl.constexpr,
                  ADDS: tl.constexpr, LAYER_NORM: tl.constexpr):
    """One token: its activations, plus a change if there is one, and their norm."""
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, WIDTH_PAD)
    inside = at < width
    x = tl.load(hidden + row + at, mask=inside, other=0.0)
    if ADDS:
        x = x + tl.load(change + row + at, mask=inside, other=0.0)
        tl.store(hidden + row + at, x, mask=inside)
    x = x.to(tl.float32)
    if LAYER_NORM:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    x = x * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if LAYER_NORM:
        x = x + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normal + row + at, x.to(normal.dtype.element_ty), mask=inside)


@triton.jit
def turn_heads(heads, cos, sin, query_norm, key_norm, epsilon, token_stride, queries, number,
               HALF: tl.constexpr, HALF_PAD: tl.constexpr, AT_ONCE: tl.constexpr, NORMS: tl.constexpr):
    """Some heads of one token, in place: their norm where there is one, then the rotation."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    d = tl.arange(0, HALF_PAD)
    inside = (head < number)[:, None] & (d < HALF)[None, :]
    at = heads + token * token_stride + head[:, None] * (2 * HALF) + d[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        length = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + epsilon)
        is_query = (head < queries)[:, None]
        of = d[None, :] + tl.zeros([AT_ONCE, 1], tl.int32)
        first = tl.where(is_query, tl.load(query_norm + of, mask=inside, other=0.0),
                         tl.load(key_norm + of, mask=inside, other=0.0)).to(tl.float32)
        second = tl.where(is_query, tl.load(query_norm + HALF + of, mask=inside, other=0.0),
                          tl.load(key_norm + HALF + of, mask=inside, other=0.0)).to(tl.float32)
        a = a * length[:, None] * first
        b = b * length[:, None] * second
    c = tl.load(cos + token * HALF + d, mask=d < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + d, mask=d < HALF, other=0.0)[None, :]
    tl.store(at, (a * c - b * s).to(heads.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (b * c + a * s).to(heads.dtype.element_ty), mask=inside)


@triton.jit
def gate_columns(inner, out, width, COLUMNS: tl.constexpr):
    """Some columns of one token: silu of the gate's half times the other half."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(inner + token * 2 * width + at, mask=at < width, other=0.0).to(tl.float32)
    up = tl.load(inner + token * 2 * width + width + at, mask=at < width, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * width + at, result.to(out.dtype.element_ty), mask=at < width)


def add_norm(hidden: torch.Tensor, change: torch.Tensor | None, weight: torch.Tensor,
             bias: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """Add ``change`` to ``hidden`` in place, and norm the sum: by LayerNorm if there is a bias, else RMSNorm.

    Shapes: (tokens, width), contiguous.
    """
    normal = torch.empty_like(hidden)
    tokens, width = hidden.shape
    padded = power_of_two(width)
    with STARTING:
        add_norm_rows[tokens,](hidden, hidden if change is None else change, normal, weight,
                               weight if bias is None else bias, epsilon, width, WIDTH_PAD=padded,
                               ADDS=change is not None, LAYER_NORM=bias is not None,
                               num_warps=max(1, min(16, padded // 512)))
    return normal


def turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, queries: int, number: int,
         norms: tuple[torch.Tensor, torch.Tensor] | None, epsilon: float) -> None:
    """Rotate the first ``number`` heads of each token in place, of which ``queries`` are query heads.

    Shapes: heads (tokens, at least number x d), cos and sin (tokens, d / 2) in float32, and the norms of
    queries and keys (d,).
    """
    half = cos.shape[-1]
    query_norm, key_norm = norms or (cos, cos)
    with STARTING:
        turn_heads[len(heads), triton.cdiv(number, HEADS_AT_ONCE)](
            heads, cos, sin, query_norm, key_norm, epsilon, heads.stride(0), queries, number, HALF=half,
            HALF_PAD=power_of_two(half), AT_ONCE=HEADS_AT_ONCE, NORMS=norms is not None, num_warps=2)


def gate(inner: torch.Tensor) -> torch.Tensor:
    """silu(first half) x second half of each row, shape (tokens, width) of (tokens, 2 x width)."""
    tokens, width = inner.shape[0], inner.shape[1] // 2
    out = torch.empty((tokens, width), dtype=inner.dtype, device=inner.device)
    with STARTING:
        gate_columns[tokens, triton.cdiv(width, COLUMNS_AT_ONCE)](inner, out, width, COLUMNS=COLUMNS_AT_ONCE,
                                                                  num_warps=4)
    return out
