"""Products of many small matrices in float32: a few query heads of a row with all of its tokens.

Torch hands them to MKL, which takes two to three times as long for them, on an AMD processor, as NumPy's
OpenBLAS, called once for each row. That computes on one thread, so torch has them where there are many.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

THREADS_MAX = 2
"""Of torch, up to which NumPy on one thread is faster."""

SCORES_MOST = 48 << 10
"""Multiplications of a product of queries and keys: above some 60,000 OpenBLAS takes ten times as long."""

MIXED_MOST = 192 << 10
"""Those of weights and values: from 256 Ki on OpenBLAS begins threads of its own."""


def scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Products of queries (rows, r, d) and keys (rows, tokens, d), shape (rows, r, tokens)."""
    turned = keys.transpose(1, 2)
    if torch.get_num_threads() > THREADS_MAX:
        return torch.bmm(queries, turned)
    found = torch.empty((*queries.shape[:2], keys.shape[1]), dtype=torch.float32)
    q, k, out = queries.numpy(), turned.numpy(), found.numpy()
    for a, b in _pieces(queries.shape[1] * queries.shape[2], keys.shape[1], SCORES_MOST):
        np.matmul(q, k[:, :, a:b], out=out[:, :, a:b])
    return found


def mixed(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Products of weights (rows, r, tokens) and values (rows, tokens, d), shape (rows, r, d)."""
    if torch.get_num_threads() > THREADS_MAX:
        return torch.bmm(weights, values)
    w, v = weights.numpy(), values.numpy()
    (_, first), *others = _pieces(weights.shape[1] * values.shape[2], values.shape[1], MIXED_MOST)
    found = np.matmul(w[:, :, :first], v[:, :first])
    for a, b in others:
        found += np.matmul(w[:, :, a:b], v[:, a:b])
    return torch.from_numpy(found)


def _pieces(of_token: int, tokens: int, most: int) -> list[tuple[int, int]]:
    """Tokens in pieces of at most so many multiplications, given those of each token."""
    size = max(16, most // of_token // 16 * 16)
    return list(pairwise([*range(0, tokens, size), tokens]))
