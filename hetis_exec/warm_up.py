"""What a worker does before it says that it is there, so that no request pays for what happens only once.

On a CUDA device libraries load their kernels when they are first used, Triton compiles, memory is taken from
the driver, and graphs are recorded. So each kind of work is done once in several sizes, on no request:
tables are not touched, and where a place of the cache must be written to, it is given what it held. The
largest come first, for smaller ones then find memory that is free.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hetis_exec.backend import Wanted
from hetis_exec.kernels.cuda import CudaKernels, DecodePlan
from hetis_exec.messages import Sample
from hetis_exec.models.decoder import DecoderShard
from hetis_exec.whole_steps import NO_TABLE, WholeSteps

TIME_S = 45.0
"""What has not been done by then is done when it is first asked for."""

SAMPLED = (64, 8, 1)
ROWS = (64, 8, 1)


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Prepares one worker.

    Attributes:
        shard: of a primary worker; None for an attention worker.
        steps: its whole steps, if it has any.
        heads: query heads that share a KV group.
        rows_max, tokens_max: requests and tokens of the largest step.
    """

    kernels: CudaKernels
    shard: DecoderShard | None
    steps: WholeSteps | None
    heads: int
    rows_max: int
    tokens_max: int

    def __call__(self) -> None:
        """Do all of it; returns when the device is done."""
        until_s = time.monotonic() + TIME_S
        if self.steps is not None:
            self.steps.warm_up(self.rows_max, self.tokens_max, until_s)
        if self.shard is not None:
            for tokens in sizes_up_to(self.tokens_max):
                if time.monotonic() < until_s:
                    self._layers(self.shard, tokens)
        for rows in ROWS:
            if rows <= self.rows_max:
                self._decode(rows)
        self.kernels.wait()

    def _layers(self, shard: DecoderShard, tokens: int) -> None:
        """A layer of a step of the general path, as far as the stage has such work."""
        kernels = self.kernels
        prepared = shard.prepare(np.zeros(tokens, dtype=np.int64))
        hidden = (shard.embed(np.zeros(tokens, dtype=np.int64), prepared) if shard.first
                  else kernels.from_wire(kernels.to_wire(shard.nothing(tokens))))
        q, k, v = shard.qkv(0, hidden, prepared)
        attended = kernels.empty_like(q)
        attended[:] = kernels.causal(q, k.swapaxes(0, 1), v.swapaxes(0, 1))
        plan = kernels.plan_prompts([None] * q.shape[1], [0], [tokens], [0], self.heads)
        if plan is not None:
            attended = kernels.attend_prompts(plan, 0, q, k, v)
        hidden = hidden + shard.project(0, attended)
        hidden = hidden + shard.mlp(0, hidden)
        self._cache(k, v)
        for sampled in SAMPLED if shard.last else ():
            if sampled <= tokens:
                for how in (None, Sample(1.0, 0.5, 0)):
                    shard.sample(hidden[kernels.index(range(sampled))], [Wanted(0, 1, how)] * sampled)

    def _cache(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Read and write the first place of the cache, which keeps what it holds."""
        kernels, first = self.kernels, np.zeros((1, 1), dtype=np.int64)
        held_k, held_v = kernels.read(first)
        kernels.write(kernels.spots(first, np.zeros(1, dtype=np.int64)), 0, held_k[0, :1], held_v[0, :1])
        # Remote heads and cache are picked from the batch before they are sent.
        at = kernels.index((0,), (0,))
        kernels.pack([keys[at], values[at]])

    def _decode(self, rows: int) -> None:
        """Decode attention of rows that have no table, as it comes from a layer and from a message."""
        kernels = self.kernels
        if kernels.paged is None:
            return
        shape = (rows, 1, kernels.head_dim)
        k, v = (torch.zeros(shape, dtype=kernels.dtype, device=kernels.device) for _ in range(2))
        q = k[:, :, None].expand(rows, 1, self.heads, kernels.head_dim).contiguous()
        q, k, v = (kernels.from_wire(part) for part in kernels.pack((q, k, v)))
        positions = torch.zeros(rows, dtype=torch.int64, device=kernels.device)
        spans = torch.full((rows, 2), NO_TABLE, dtype=torch.int64, device=kernels.device)
        for number in (rows, rows + 1):  # without pieces to be joined, and with some
            pieces = torch.full((number, 3), NO_TABLE, dtype=torch.int64, device=kernels.device)
            kernels.attend(DecodePlan(spans, positions, 0, pieces, torch.zeros_like(spans)), 0, q, k, v)


def sizes_up_to(tokens_max: int) -> Iterator[int]:
    """Numbers of tokens, from the largest that a step may have to 1: some of each order of magnitude."""
    tokens = tokens_max
    while tokens > 16:
        yield tokens
        tokens = tokens * 3 // 4
    yield from (size for size in (16, 8, 4, 2, 1) if size <= tokens_max)


def warm_up_for(kernels: Any, shard: Any, steps: Any, heads: int, rows_max: int,
                tokens_max: int) -> WarmUp | None:
    """The preparation of a worker; None where everything is there from the first step on."""
    if not isinstance(kernels, CudaKernels):
        return None
    return WarmUp(kernels, shard, steps, heads, rows_max, tokens_max)
