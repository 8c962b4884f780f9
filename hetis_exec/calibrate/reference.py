"""A short piece of work that tells how fast a device is: steps of a batch that decodes, and of a prompt.

It is the code that serves, on weights and cache that are read from memory. A calibration takes it between
its samples, holds them against it, and keeps it in the profile; whoever takes it again later sees the pace of
the machine.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from hetis_exec.calibrate.bench import BenchSpec, Job, StepBench, tables_of
from hetis_exec.calibrate.loops import Clock, LayerBench, LoopSpec
from hetis_exec.calibrate.samples import PREFIX, Point, Sample, Samples
from hetis_exec.throttle import NONE
from hetis_sim.cost.paced import FEW_TOKENS, PROMPT_TOKENS
from hetis_sim.spec.gpu import MIB
from hetis_sim.spec.model import ModelSpec

PARTS = ("dense", "attention", "prompt", "prompt_attention")
REQUESTS, PROMPT, CONTEXT = FEW_TOKENS, PROMPT_TOKENS, 256
SPAN_S = 0.4
"""A measurement goes on for about so long."""

STEPS_MIN, STEPS_MAX = 3, 200
WEIGHTS_BYTES = 256 * MIB
"""Of a model, layers with so many bytes of weights are enough. With hardly more than a processor keeps of
them, the work would notice less of whoever else reads from memory than the whole model does."""


def layers_of(model: ModelSpec) -> int:
    """Layers of a model that the work is done on."""
    return min(model.layers, math.ceil(WEIGHTS_BYTES / model.layer_bytes))


class Pace(Protocol):
    """Tells how fast a device is: seconds by part, of one step (or one pass through a few layers).

    ``dense`` and ``attention`` are of a batch that decodes, the others of a prompt.
    """

    def long(self) -> dict[str, float]:
        """Means of glances over a while, as latencies are sums of what steps take."""

    def glance(self) -> dict[str, float]:
        """Both steps once, after what brings their code into the caches."""


class Measure:
    """See :class:`Pace`.

    Args:
        once: computes both steps, and gives the seconds of each part.
        warm: brings their code into the caches.
    """

    def __init__(self, once: Callable[[], tuple[float, ...]], warm: Callable[[], object]) -> None:
        self._once = once
        self._warm = warm

    def long(self) -> dict[str, float]:
        until_s = time.perf_counter() + SPAN_S
        found: list[dict[str, float]] = []
        while len(found) < STEPS_MAX and (len(found) < STEPS_MIN or time.perf_counter() < until_s):
            found.append(self.glance())
        return {part: statistics.fmean(one[part] for one in found) for part in found[0]}

    def glance(self) -> dict[str, float]:
        self._warm()
        return dict(zip(PARTS, self._once(), strict=True))


@dataclass(frozen=True)
class ReferenceSpec:
    """Where and on what the work is done.

    Attributes:
        kind: type of the device.
        bench: of a worker that computes with the host's processor, or of a device of its own.
        layers: of the model that are computed, 0 for all; a device of its own computes as few as its loops.
    """

    kind: str
    bench: BenchSpec | LoopSpec
    layers: int = 0

    def jobs(self) -> tuple[Job, Job]:
        """The batch and the prompt; none is longer than the model allows."""
        most = self.bench.model.context_limit_tokens - 1
        return Job(decode=(min(CONTEXT, most),) * REQUESTS), Job(prompts=((min(PROMPT, most), 0),))

    def made(self) -> Measure:
        """Weights and cache in place, warmed up.

        A throttle is left out: it stretches what the core gives, whatever that is.
        """
        if isinstance(self.bench, BenchSpec):
            most = self.bench.model.layers
            model = replace(self.bench.model, layers=min(self.layers or most, most))
            bench = StepBench(replace(self.bench, model=model, throttle=NONE, tp=1), tables_of(self.jobs()))
            return _of_steps(bench, self.jobs())
        return _of_loops(self.bench, self.jobs())


def reference_samples(measured: Mapping[str, Mapping[str, float]], model: str, at_s: float) -> Samples:
    """One measurement of some types of devices, as samples of a calibration; 0 s is at no moment."""
    return [Sample(Point(f"{PREFIX}{part}", kind, model, 1, tokens=REQUESTS), seconds, at_s)
            for kind, parts in measured.items() for part, seconds in parts.items()]


def _of_steps(bench: StepBench, jobs: Sequence[Job]) -> Measure:
    def once() -> tuple[float, ...]:
        times = [bench.step(job).times for job in jobs]
        return tuple(seconds for one in times for seconds in (one.dense_s, one.attention_s))

    once()
    return Measure(once, lambda: bench.step(jobs[0]))


def _of_loops(spec: LoopSpec, jobs: tuple[Job, Job]) -> Measure:
    bench = LayerBench(replace(spec, split_head=False), 1, tables_of(jobs))
    clock = Clock(bench.kernels.synchronize, spec.graphs)
    batch, ((new, context),) = jobs[0].decode, jobs[1].prompts
    with bench.kernels.working():
        works = [clock.prepared(work) for work in (
            bench.dense(len(batch)), bench.decode(batch), bench.dense(new), bench.prompt(new, context))]

    def once() -> tuple[float, ...]:
        with bench.kernels.working():
            return tuple(clock.seconds(work) for work in works)

    return Measure(once, once)
