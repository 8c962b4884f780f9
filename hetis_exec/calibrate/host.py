"""Host time of a step: what a run takes besides what its workers account for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle

import pandas as pd

from hetis_exec.calibrate.samples import Point, Sample, Samples
from hetis_exec.crew import Crew, WorkerSpec
from hetis_exec.driver import Executor, ExecutorInput
from hetis_sim.spec.request import Request

BATCH_MAX = 64
QUICK_BATCH_MAX = 16
STEPS_EACH = 3
QUICK_STEPS_EACH = 2
PROMPT_TOKENS = 16
TOGETHER = (1, 2, 4)
"""Requests that end in the same iteration, so that as many prompts begin together."""


def requests_for(batch: int, steps_each: int, prompt_tokens: int) -> list[Request]:
    """Twice as many requests as a batch holds, all there from the first.

    Those of the first half end some at a time, and let in as many prompts of the second, while the others go
    on: so it is in service. Then the batch empties one by one, so that every size of it occurs.
    """
    sizes = cycle(TOGETHER)
    first: list[int] = []
    while len(first) < batch:
        first += [1 + steps_each * (len(first) + 1)] * min(next(sizes), batch - len(first))
    outputs = first + [1 + steps_each * (n + 1) for n in range(batch)]
    return [Request(n, 0.0, prompt_tokens, output) for n, output in enumerate(outputs)]


def measure_host(given: ExecutorInput, make_crew: Callable[[Sequence[WorkerSpec]], Crew], batch_max: int,
                 quick: bool) -> Samples:
    """Steps of a whole run, with its driver, workers and messages.

    Of the time from the moment in which the driver asks for a step to that in which it has its tokens,
    host time is what is left of it when the parts that the workers measure are taken away.
    """
    batch = min(batch_max, QUICK_BATCH_MAX if quick else BATCH_MAX)
    each = QUICK_STEPS_EACH if quick else STEPS_EACH
    longest = given.model.context_limit_tokens
    prompt = max(1, min(PROMPT_TOKENS, longest - each * batch - 1))
    batch = max(1, min(batch, (longest - prompt - 1) // each))
    limits = replace(given.settings.limits, max_batch_requests=batch)
    settings = replace(given.settings, limits=limits, chunked_prefill=False)
    run = Executor(replace(given, requests=requests_for(batch, each, prompt), settings=settings,
                           log_decisions=False), make_crew)
    return samples_of(run.run().recorder.steps(), prompt)


def samples_of(steps: pd.DataFrame, prompt_tokens: int) -> Samples:
    """Of iterations that only decode, and of those that only compute prompts, whole ones of equal length."""
    return [Sample(Point("host_overhead", "host", tokens=decoding + prompts, prompts=prompts),
                   max(1e-9, host_s))
            for decoding, prompts, host_s in zip(
                steps["requests"].tolist(), (steps["prefill_tokens"] // prompt_tokens).tolist(),
                steps["host_s"].tolist(), strict=True)
            if (decoding > 0) != (prompts > 0)]
