"""Attention to parts of a request's tokens, and the joining of these.

Softmax over all tokens is a mean of that over each part, weighted by the parts' sums of exponents
(Milakov and Gimelshein 2018; Dao et al. 2023, Flash-Decoding). Sums are kept as logarithms.
"""

from __future__ import annotations

import torch

from hetis_exec.backend import Part


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
           mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the logarithm of its sums, both in float32.

    Shapes: queries (rows, r, d), keys and values (rows, tokens, d), mask (rows, 1, tokens), added to
    scores; the results are (rows, r, d) and (rows, r).
    """
    q, k, v = queries.float(), keys.float(), values.float()
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
    if mask is not None:
        scores += mask
    sums = torch.logsumexp(scores, -1)
    return torch.matmul(scores.sub_(sums[..., None]).exp_(), v), sums


class TorchJoining:
    """See :class:`hetis_exec.backend.Joining`; what has been joined so far is kept in float32."""

    def __init__(self, number: int, queries: torch.Tensor) -> None:
        shape = (number, *queries.shape[-2:])
        self._dtype = queries.dtype
        self._values = torch.zeros(shape, dtype=torch.float32, device=queries.device)
        self._sums = torch.full(shape[:2], -torch.inf, dtype=torch.float32, device=queries.device)

    def add(self, at: tuple[torch.Tensor, ...], part: Part) -> None:
        values, sums = part
        before = self._sums[at]
        after = torch.logaddexp(before, sums)
        old, new = (before - after).exp()[..., None], (sums - after).exp()[..., None]
        self._values[at] = self._values[at] * old + values.float() * new
        self._sums[at] = after

    def result(self) -> torch.Tensor:
        return self._values.to(self._dtype)
