"""Whole steps of a worker that holds a whole model, replayed from CUDA graphs.

A step of plain decoding is the same work each time, on other tokens, positions and tables, and so is one of
prompts that are not too long. It is recorded once for each size: what differs comes in one array that is
copied to where the graph reads it, and a graph computes some rows more than it was asked for, which touch no
cache. Tables on the device change only when a request gets a block, comes or goes.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hetis_exec.backend import Asked
from hetis_exec.kernels.cuda import CudaKernels, DecodePlan
from hetis_exec.kvcache import KvPool, Table, TableKey
from hetis_exec.messages import Tokens
from hetis_exec.models.decoder import DecoderShard
from hetis_exec.prompt_steps import PromptSteps
from hetis_exec.recording import COMPUTED, Outputs, Recorder, Step

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Rows of the recorded batches."""

NO_TABLE = -1
LONG = 1 << 30
"""More than any context."""


class WholeSteps:
    """See :class:`hetis_exec.backend.WholeSteps`.

    Args:
        shard: the whole model.
        pool: with the cache of all of its groups.
        graphs: record and replay; otherwise the same work is started kernel by kernel, for as many rows
            as are asked for.
    """

    def __init__(self, shard: DecoderShard, pool: KvPool, graphs: bool = True) -> None:
        assert isinstance(pool.kernels, CudaKernels)
        self._shard = shard
        self._pool = pool
        self._kernels = pool.kernels
        self._groups = len(shard.groups)
        self._recorder = Recorder(pool.kernels, graphs)
        self._prompts = PromptSteps(shard, self._recorder)
        self._steps: dict[int, Step] = {}
        self._tables: dict[int, list[Table]] = {}
        self._version = -1

    @property
    def rows_max(self) -> int:
        return SIZES[-1]

    @property
    def computed_s(self) -> float:
        return self._recorder.stopwatch.read()[COMPUTED]

    def takes_prompts(self, request_ids: Sequence[int], news: Sequence[int]) -> bool:
        return self._prompts.takes(news) and all(
            TableKey(request_id, 0, g) in self._pool.tables
            for request_id in request_ids for g in self._shard.groups)

    def run(self, request_ids: Sequence[int], positions: Sequence[int], tokens: Tokens,
            asked: Asked) -> Tokens:
        number = len(request_ids)
        spans = self._spans(request_ids)
        size = SIZES[bisect_left(SIZES, number)] if self._recorder.graphs else number
        step = self._steps.get(size)
        if step is None:
            step = self._steps[size] = self._make(size)
        host = step.host.numpy()
        host[:number] = tokens
        host[size:size + number] = positions
        host[2 * size:2 * size + spans.size] = spans.ravel()
        host[2 * size + spans.size:] = NO_TABLE
        *_, runs, pieces = self._parts(host, size)
        pieces[:], found = self._kernels.cut(host[size:size + number], self._groups, len(pieces))
        runs[:len(found)] = found
        return self._recorder.run(step, lambda: self._compute(step.inputs, size, max(positions)), number,
                                  self._shard.sampling, asked)

    def run_prompts(self, request_ids: Sequence[int], positions: Sequence[int], news: Sequence[int],
                    tokens: Tokens, sampled: Sequence[int], asked: Asked) -> Tokens:
        return self._prompts.run(self._spans(request_ids), positions, news, tokens, sampled, asked)

    def warm_up(self, rows_max: int, tokens_max: int, until_s: float) -> None:
        """Record what steps up to these sizes need, while there is time (:func:`time.monotonic`).

        The largest come first: the others find room in their memory.
        """
        if not self._recorder.graphs:
            return
        largest = bisect_left(SIZES, min(rows_max, SIZES[-1]))
        self._prompts.warm_up(tokens_max, until_s)
        for size in reversed(SIZES[:largest + 1]):
            if size not in self._steps and time.monotonic() < until_s:
                self._steps[size] = self._make(size)

    def _spans(self, request_ids: Sequence[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """Where the tables of all groups are, request by request."""
        spans = self._kernels.tables.spans(self._tables_of(request_ids))
        if self._recorder.outdated():
            self._steps.clear()
            self._prompts.forget()
        return spans

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
        """For a size of batch."""
        inputs = torch.zeros(2 * size * (2 + self._groups) + 3 * self._kernels.pieces_max(size, self._groups),
                             dtype=torch.int64, device=self._kernels.device)
        inputs[2 * size:] = NO_TABLE
        return self._recorder.step(inputs, size, lambda: self._compute(inputs, size, LONG))

    def _parts(self, numbers: Any, size: int) -> tuple[Any, ...]:
        """Of the inputs: tokens, positions, spans of the rows' tables, runs and pieces of attention."""
        spans_end = 2 * size * (1 + self._groups)
        runs_end = spans_end + 2 * size
        return (numbers[:size], numbers[size:2 * size], numbers[2 * size:spans_end].reshape(-1, 2),
                numbers[spans_end:runs_end].reshape(-1, 2), numbers[runs_end:].reshape(-1, 3))

    def _compute(self, inputs: torch.Tensor, size: int, longest: int) -> Outputs:
        """Start a step on what the inputs hold: logits and likeliest tokens."""
        kernels = self._kernels
        tokens, positions, spans, runs, pieces = self._parts(inputs, size)
        plan = DecodePlan(spans, positions, longest, pieces, runs)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return kernels.attend(plan, layer, q, k, v)

        logits = self._shard.whole_step(tokens, positions, attend)
        return logits, logits.argmax(dim=-1)
