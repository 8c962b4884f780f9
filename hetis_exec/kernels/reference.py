"""Attention written down plainly, for other kernels to be compared with."""

from __future__ import annotations

import torch


def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last tokens of a text to all of it, in float64.

    Shapes: queries (new tokens, G, r, d), keys and values (G, tokens, d); the result is shaped like
    the queries.
    """
    new, total = len(queries), keys.shape[1]
    q, k, v = queries.double(), keys.double(), values.double()
    scores = torch.einsum("ngrd,gtd->ngrt", q, k) * q.shape[-1] ** -0.5
    at = torch.arange(total - new, total)
    scores = scores.masked_fill((torch.arange(total) > at[:, None])[:, None, None], -torch.inf)
    return torch.einsum("ngrt,gtd->ngrd", scores.softmax(dim=-1), v).to(queries.dtype)
