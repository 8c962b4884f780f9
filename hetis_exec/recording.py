"""CUDA graphs of steps: work that is the same each time, on other numbers in the same places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hetis_exec.backend import Asked
from hetis_exec.kernels.cuda import RECORDING, URGENT, CudaKernels, new_stream
from hetis_exec.messages import Tokens
from hetis_exec.models.sampling import Sampling

COMPUTED = "computed"
Outputs = tuple[torch.Tensor, torch.Tensor]
"""Logits and likeliest tokens."""


@dataclass(slots=True)
class Step:
    """A step of some size.

    Attributes:
        inputs: on the device, all numbers that it goes by, one after the other.
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


class Recorder:
    """Records graphs that share their memory: no two of them may run at a time.

    Args:
        graphs: record; otherwise the same work is started kernel by kernel.

    Attributes:
        stopwatch: of the work of the last step, without its host's part.
    """

    def __init__(self, kernels: CudaKernels, graphs: bool) -> None:
        self.kernels = kernels
        self.graphs = graphs
        self.stopwatch = kernels.stopwatch()
        self._memory: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._generation = kernels.tables.generation

    def outdated(self) -> bool:
        """Whether tables have moved to another array since graphs were recorded, which read the old one.

        All of them are then to be forgotten.
        """
        if self.kernels.tables.generation == self._generation:
            return False
        self._generation = self.kernels.tables.generation
        self._memory = None
        return True

    def step(self, inputs: torch.Tensor, results: int, compute: Callable[[], Outputs]) -> Step:
        """Buffers for inputs and so many results and, where wanted, the graph of what lies between."""
        found = host_numbers(results, self.kernels)
        step = Step(inputs, host_numbers(len(inputs), self.kernels), found, found, found, None)
        if self.graphs:
            step.graph, (step.logits, step.likeliest) = self.record(compute)
        return step

    def run(self, step: Step, compute: Callable[[], Outputs], number: int, sampling: Sampling,
            asked: Asked) -> Tokens:
        """Compute a step on what its host side holds: the first so many of the next tokens."""
        step.inputs.copy_(step.host, non_blocking=True)
        self.stopwatch.start()
        if step.graph is not None:
            step.graph.replay()
        else:
            step.logits, step.likeliest = compute()
        self.stopwatch.lap(COMPUTED)
        if not sampling.greedy(asked):
            return sampling.choose(step.logits[:number], asked)
        step.found.copy_(step.likeliest, non_blocking=True)
        self.kernels.wait()
        found: Tokens = step.found.numpy()[:number].copy()
        return found

    def record(self, compute: Callable[[], Outputs]) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        """A graph of some work and where it leaves its results.

        The work is done once before, so that all kernels are compiled and loaded.
        """
        compute()
        self.kernels.wait()
        graph: Any = torch.cuda.CUDAGraph()
        if self._stream is None:
            # One for all: matrix libraries keep memory to work in for each stream.
            self._stream = new_stream(self.kernels.device, URGENT)
        memory = () if self._memory is None else (self._memory,)
        # Not by torch.cuda.graph, which gives all free memory back to the device every time.
        with RECORDING, torch.cuda.stream(self._stream):
            graph.capture_begin(*memory, capture_error_mode="thread_local")
            try:
                outputs = compute()
            finally:
                graph.capture_end()
        self._memory = graph.pool()
        return graph, outputs


def host_numbers(size: int, kernels: CudaKernels) -> torch.Tensor:
    """Whole numbers on this side, in memory that a device can read by itself."""
    return torch.zeros(size, dtype=torch.int64, pin_memory=kernels.device.type == "cuda")
