"""Whole decode steps of a worker that holds a whole model, replayed from CUDA graphs.

A step of plain decoding is the same work each time, on other tokens, positions and tables. It is captured
once for each size of batch: what differs comes in one array that is copied to where the graph reads
it, and a graph computes some rows more than it was asked for, which touch no cache. Tables on the device
change only when a request gets a block, comes or goes.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hetis_exec.backend import Asked, Wanted
from hetis_exec.kernels.cuda import URGENT, CudaKernels, DecodePlan, new_stream
from hetis_exec.kvcache import KvPool, Table, TableKey
from hetis_exec.messages import Tokens
from hetis_exec.models.decoder import DecoderShard

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Rows of the captured batches."""

NO_TABLE = -1
LONG = 1 << 30
"""Pieces of rows are chosen as for the longest of contexts: a graph serves all of them."""


WARM_TOKENS = (1, 16, 128, 1024)


def warm(shard: DecoderShard, kernels: CudaKernels) -> None:
    """Compute one layer for prompts of some lengths: kernels are compiled, loaded and chosen then."""
    for tokens in WARM_TOKENS:
        prepared = shard.prepare(np.arange(tokens))
        hidden = torch.zeros(tokens, shard.width, dtype=kernels.dtype, device=kernels.device)
        q, k, v = shard.qkv(0, hidden, prepared)
        keys, values = k.swapaxes(0, 1), v.swapaxes(0, 1)
        shard.project(0, kernels.causal(q, keys, values))
        if tokens > 1:
            kernels.causal(q[1:], keys, values)
        shard.mlp(0, hidden)
        if shard.has_head:
            shard.sample(hidden[-1:], [Wanted(0, 0)])
    kernels.synchronize()


@dataclass(slots=True)
class Step:
    """A step for one size of batch.

    Attributes:
        inputs: on the device: tokens, positions, and the spans of the rows' tables, one after the other.
        host: the same on this side, in pinned memory.
        graph: None where steps are computed anew each time.
        logits, likeliest: what comes out.
        found: the likeliest tokens on this side, in pinned memory.
    """

    inputs: torch.Tensor
    host: torch.Tensor
    found: torch.Tensor
    logits: torch.Tensor
    likeliest: torch.Tensor
    graph: torch.cuda.CUDAGraph | None


class WholeSteps:
    """Computes decode steps for requests of one stage with one rank.

    Args:
        shard: the whole model.
        pool: with the cache of all of its groups.
        graphs: capture and replay; otherwise the same work is started kernel by kernel, for as many rows
            as are asked for.
        rows_max: largest batch.
    """

    def __init__(self, shard: DecoderShard, pool: KvPool, graphs: bool = True,
                 rows_max: int = SIZES[-1]) -> None:
        assert isinstance(pool.kernels, CudaKernels)
        self._shard = shard
        self._pool = pool
        self._kernels = pool.kernels
        self._graphs = graphs
        self._sizes = [size for n, size in enumerate(SIZES) if n == 0 or SIZES[n - 1] < rows_max]
        self._groups = len(shard.groups)
        self._steps: dict[int, Step] = {}
        self._memory: Any = None
        self._generation = -1
        self._tables: dict[int, list[Table]] = {}
        self._version = -1

    @property
    def rows_max(self) -> int:
        return self._sizes[-1]

    def run(self, request_ids: Sequence[int], positions: Sequence[int], tokens: Tokens,
            asked: Asked) -> Tokens:
        """The next token of each request, after one new token each at the given positions."""
        kernels, number = self._kernels, len(request_ids)
        spans = kernels.tables.spans(self._tables_of(request_ids))
        if kernels.tables.generation != self._generation:
            # Graphs would read the old array.
            self._steps.clear()
            self._memory = None
            self._generation = kernels.tables.generation
        size = self._sizes[bisect_left(self._sizes, number)] if self._graphs else number
        step = self._steps.get(size)
        if step is None:
            step = self._steps[size] = self._make(size)
        host = step.host.numpy()
        host[:number] = tokens
        host[size:size + number] = positions
        host[2 * size:2 * size + spans.size] = spans.ravel()
        host[2 * size + spans.size:] = NO_TABLE
        step.inputs.copy_(step.host, non_blocking=True)
        if step.graph is not None:
            step.graph.replay()
        else:
            step.logits, step.likeliest = self._compute(step.inputs, size, max(positions))
        if not self._shard.sampling.greedy(asked):
            return self._shard.sampling.choose(step.logits[:number], asked)
        step.found.copy_(step.likeliest, non_blocking=True)
        kernels.wait()
        found: Tokens = step.found.numpy()[:number].copy()
        return found

    def prepare(self, limit_s: float) -> None:
        """Capture all sizes, the largest first: smaller ones make do with its memory."""
        if not self._graphs:
            return
        until_s = time.monotonic() + limit_s
        self._generation = self._kernels.tables.generation
        for size in reversed(self._sizes):
            if time.monotonic() < until_s:
                self._steps[size] = self._make(size)

    def _tables_of(self, request_ids: Sequence[int]) -> list[Table]:
        """Those of all groups, request by request."""
        pool, groups = self._pool, self._shard.groups
        if pool.version != self._version:
            self._tables.clear()
            self._version = pool.version
        found: list[Table] = []
        for request_id in request_ids:
            tables = self._tables.get(request_id)
            if tables is None:
                tables = self._tables[request_id] = [pool.table(TableKey(request_id, 0, g)) for g in groups]
            found += tables
        return found

    def _make(self, size: int) -> Step:
        """Buffers and, where wanted, the graph of a size of batch."""
        kernels, numbers = self._kernels, 2 * size + 2 * size * self._groups
        inputs = torch.zeros(numbers, dtype=torch.int64, device=kernels.device)
        inputs[2 * size:] = NO_TABLE
        pinned = kernels.device.type == "cuda"
        host = torch.zeros(numbers, dtype=torch.int64, pin_memory=pinned)
        found = torch.zeros(size, dtype=torch.int64, pin_memory=pinned)
        step = Step(inputs, host, found, found, found, None)
        if self._graphs:
            self._capture(step, size)
        return step

    def _capture(self, step: Step, size: int) -> None:
        """Record a step. Before, it is computed once, so that all kernels are compiled and loaded."""
        self._compute(step.inputs, size, LONG)
        torch.cuda.synchronize(self._kernels.device)
        step.graph = torch.cuda.CUDAGraph()
        stream = new_stream(self._kernels.device, URGENT)
        with torch.cuda.graph(step.graph, self._memory, stream, capture_error_mode="thread_local"):
            step.logits, step.likeliest = self._compute(step.inputs, size, LONG)
        self._memory = step.graph.pool()

    def _compute(self, inputs: torch.Tensor, size: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Start a step on what the inputs hold: logits and likeliest tokens."""
        kernels = self._kernels
        tokens, positions = inputs[:size], inputs[size:2 * size]
        spans = inputs[2 * size:].view(size * self._groups, 2)
        plan = DecodePlan(spans, positions, longest, kernels.splits(len(spans), longest))

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return kernels.attend(plan, layer, q, k, v)

        logits = self._shard.whole_step(tokens, positions, attend)
        return logits, logits.argmax(dim=-1)
