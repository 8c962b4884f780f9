"""A short piece of work that tells how fast a device is: some steps of a batch that decodes.

It is the code that serves, on weights and cache that are read from memory. A calibration takes it between
its samples and keeps it in the profile; whoever takes it again later sees the pace of the machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from hetis_exec.calibrate.bench import BenchSpec, Job, StepBench, tables_of
from hetis_exec.calibrate.loops import Clock, LayerBench, LoopSpec
from hetis_exec.calibrate.samples import PREFIX, Point, Sample, Samples
from hetis_exec.throttle import NONE

PARTS = ("dense", "attention")
REQUESTS, CONTEXT = 8, 256
SPAN_S = 0.25
"""A measurement goes on for about so long."""

STEPS_MIN, STEPS_MAX = 3, 200

Measure = Callable[[], dict[str, float]]
"""Seconds by part, of one step (or one pass through a few layers) as the median of several."""


@dataclass(frozen=True)
class ReferenceSpec:
    """Where and on what the work is done.

    Attributes:
        kind: type of the device.
        bench: of a worker that computes with the host's processor, or of a device of its own.
    """

    kind: str
    bench: BenchSpec | LoopSpec

    def job(self) -> Job:
        """The batch; no context is longer than the model allows."""
        return Job(decode=(min(CONTEXT, self.bench.model.context_limit_tokens - 1),) * REQUESTS)

    def made(self) -> Measure:
        """Weights and cache in place, warmed up.

        A throttle is left out: it stretches what the core gives, whatever that is.
        """
        if isinstance(self.bench, BenchSpec):
            return _of_steps(StepBench(replace(self.bench, throttle=NONE, tp=1), tables_of([self.job()])),
                             self.job())
        return _of_loops(self.bench, self.job())

    def samples(self, measured: dict[str, float]) -> Samples:
        """One measurement, as samples of a calibration."""
        point = Point("", self.kind, self.bench.model.name, 1, tokens=REQUESTS)
        return [Sample(replace(point, module=f"{PREFIX}{part}"), seconds)
                for part, seconds in measured.items()]


def _of_steps(bench: StepBench, job: Job) -> Measure:
    bench.step(job)

    def measure() -> dict[str, float]:
        until_s = time.perf_counter() + SPAN_S
        found: list[tuple[float, float]] = []
        while len(found) < STEPS_MAX and (len(found) < STEPS_MIN or time.perf_counter() < until_s):
            times = bench.step(job).times
            found.append((times.dense_s, times.attention_s))
        return {part: statistics.median(column)
                for part, column in zip(PARTS, zip(*found, strict=True), strict=True)}
    return measure


def _of_loops(spec: LoopSpec, job: Job) -> Measure:
    bench = LayerBench(replace(spec, split_head=False), 1, tables_of([job]))
    clock = Clock(bench.kernels.synchronize, spec.graphs)
    works = [clock.prepared(bench.dense(REQUESTS)), clock.prepared(bench.decode(job.decode))]

    def measure() -> dict[str, float]:
        until_s = time.perf_counter() + SPAN_S
        found: list[tuple[float, ...]] = []
        while len(found) < STEPS_MAX and (len(found) < STEPS_MIN or time.perf_counter() < until_s):
            found.append(tuple(clock.seconds(work) for work in works))
        return {part: statistics.median(column)
                for part, column in zip(PARTS, zip(*found, strict=True), strict=True)}
    return measure
