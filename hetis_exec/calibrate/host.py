"""Host time of a step: what a run takes besides what its workers account for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from hetis_exec.calibrate.samples import Point, Sample, Samples
from hetis_exec.crew import Crew, WorkerSpec
from hetis_exec.driver import Executor, ExecutorInput
from hetis_sim.spec.request import Request

BATCH_MAX = 64
QUICK_BATCH_MAX = 16
STEPS_EACH = 3
QUICK_STEPS_EACH = 2
PROMPT_TOKENS = 16


def requests_for(batch: int, steps_each: int, prompt_tokens: int) -> list[Request]:
    """Requests that come at once and end one after the other: every size of batch occurs."""
    return [Request(n, 0.0, prompt_tokens, 1 + steps_each * (n + 1)) for n in range(batch)]


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
    run = Executor(replace(given, requests=requests_for(batch, each, prompt), log_decisions=False), make_crew)
    steps = run.run().recorder.steps()
    pure = steps[(steps["kind"] == "decode") & (steps["requests"] > 0)]
    pairs = zip(pure["requests"].tolist(), pure["host_s"].tolist(), strict=True)
    return [Sample(Point("host_overhead", "host", tokens=sequences), max(1e-9, host_s))
            for sequences, host_s in pairs]
