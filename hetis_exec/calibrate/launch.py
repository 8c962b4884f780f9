"""Host time to queue the kernels of a layer on a device that works by itself, and which steps need none.

Steps of a worker that serves, layer by layer, on so few tokens that its device waits for its host. What a
step takes for all layers alike is told from what it takes once by models of different depth.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from hetis_exec.calibrate.bench import BenchSpec, Job, StepBench, tables_of
from hetis_exec.calibrate.loops import LoopSpec
from hetis_exec.calibrate.samples import GRAPH_BATCH, GRAPH_PROMPT, Point, Sample, Samples
from hetis_exec.kernels.cuda import CudaKernels
from hetis_exec.prompt_steps import PROMPTS_MAX, TOKENS
from hetis_exec.throttle import NONE
from hetis_exec.torch_backend import TorchBackend
from hetis_exec.whole_steps import SIZES

LAYERS = (2, 8)
PROMPT, CONTEXT = 16, 64
JOBS = (*(Job(prompts=((PROMPT, 0),) * number) for number in (1, 2, 4, 8)),
        Job(prompts=((PROMPT, CONTEXT),)), Job(decode=(CONTEXT,) * 8))
VOCAB = 1024
STEPS = 5
"""A sample is the median of so many."""


@dataclass(frozen=True)
class LaunchSpec:
    """What is measured.

    Attributes:
        loop: device and model shape.
        graphs: steps are recorded where they can be.
    """

    loop: LoopSpec
    graphs: bool

    def bench(self, layers: int) -> StepBench:
        """A worker with so many layers."""
        loop = self.loop
        backend = loop.backend(layers, VOCAB)
        model = backend.architecture.spec
        spec = BenchSpec(loop.device, model, backend, NONE, loop.dtype, loop.block_tokens, 1, 1 << 20)
        return StepBench(spec, tables_of(JOBS))

    def graph_points(self, backend: TorchBackend) -> list[Point]:
        """Sizes of the steps that are recorded where one device has the whole model: facts, no durations."""
        kernels = backend.kernels(self.loop.device, 1, self.loop.block_tokens)
        if not self.graphs or not isinstance(kernels, CudaKernels):
            return []
        found = [Point(GRAPH_BATCH, "host", self.loop.model.name, tokens=size) for size in SIZES]
        if kernels.prompt_launch(self.loop.model.heads_per_group) is None:
            return found
        return found + [Point(GRAPH_PROMPT, "host", self.loop.model.name, tokens=size, rows=PROMPTS_MAX)
                        for size in TOKENS]


def measure_launch(spec: LaunchSpec, repeats: int, tick: Callable[[], None]) -> Samples:
    """Seconds of a layer by the number of prompts in the step, which the point gives as tokens.

    With them, as samples of no duration, the sizes that are recorded.
    """
    point = Point("host_launch", "host", spec.loop.model.name)
    few, many = (spec.bench(layers) for layers in LAYERS)
    samples: Samples = [Sample(size, 0.0) for size in spec.graph_points(spec.loop.backend(1, VOCAB))]
    for _ in range(repeats):
        for job in JOBS:
            took_s = [statistics.median(bench.step(job).whole_s for _ in range(STEPS))
                      for bench in (few, many)]
            each_s = (took_s[1] - took_s[0]) / (LAYERS[1] - LAYERS[0])
            samples.append(Sample(replace(point, tokens=len(job.prompts)), max(1e-9, each_s)))
            tick()
    return samples
