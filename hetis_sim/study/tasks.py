"""What the processes of a study of capacity work on: one policy and one seed each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hetis_sim.metrics.columns import Table
from hetis_sim.metrics.summary import FINISHED
from hetis_sim.run import Result
from hetis_sim.study.runs import Case, Load, keep, planned, run_under
from hetis_sim.study.search import Found, Probe, highest

SAMPLES_MIN = 30


@dataclass(frozen=True)
class Task:
    """One policy and one seed.

    Attributes:
        case, seed: which.
        plan_rate_rps: the rate that the policy plans for.
        requests: of each run.
        start_rps: the rate of arrivals, or the first of a search.
        ceiling_rps: no rate above it is searched.
    """

    case: Case
    seed: int
    plan_rate_rps: float
    requests: int
    start_rps: float
    ceiling_rps: float

    def __str__(self) -> str:
        return f"policy {self.case.label}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Overload:
    """One run that never waits for work.

    Attributes:
        throughput_rps: requests per second that finish.
        service_s: mean time from the start of the prefill to the last token.
        requests: of the run.
    """

    throughput_rps: float
    service_s: float
    requests: int


def overload(task: Task) -> Overload:
    """Offer everything at ``start_rps``, which is more than can be served."""
    result = run_under(planned(task.case.config, task.plan_rate_rps),
                       Load(task.start_rps, task.requests, task.seed))
    study = task.case.config.study
    keep(result, study.keep, task.case.label, f"seed{task.seed}", "overload")
    requests = result.recorder.records().requests
    finished = requests.rows(requests["status"] == FINISHED)
    service = finished["finish_s"] - finished["first_scheduled_s"]
    return Overload(flooded_throughput(finished, study.warmup_fraction),
                    float(service.mean()) if len(service) else 0.0, len(requests))


def flooded_throughput(finished: Table, warmup_fraction: float) -> float:
    """Requests per second that finish while others wait.

    Counted from when the first ``warmup_fraction`` of them have finished to when the queue has run
    empty; over the whole run where that leaves fewer than 30.
    """
    ends = np.sort(finished["finish_s"])
    if not len(ends):
        return 0.0
    start = float(ends[int(len(ends) * warmup_fraction)])
    stop = float(finished["first_scheduled_s"].max())
    inside = int(((ends > start) & (ends <= stop)).sum())
    if inside >= SAMPLES_MIN:
        return inside / (stop - start)
    span = float(ends[-1] - finished["arrival_s"].min())
    return len(ends) / span if span > 0 else math.inf


def search(task: Task) -> Found:
    """The highest rate at which the SLO holds, for one seed."""
    config = task.case.config
    prepared = planned(config, task.plan_rate_rps)
    best: dict[float, Result] = {}

    def probe(rate_rps: float) -> Probe:
        result = run_under(prepared, Load(rate_rps, task.requests, task.seed))
        summary = result.summary
        verdict, share = summary.saturation.verdict, summary.slo.attainment
        holds = share >= config.study.attainment and verdict != "saturated"
        if holds and config.study.keep is not None and rate_rps > max(best, default=0.0):
            best.clear()
            best[rate_rps] = result
        return Probe(rate_rps, holds, share, verdict, summary.requests.submitted, summary.requests.measured)

    found = highest(probe, task.start_rps, task.ceiling_rps, config.study.tolerance, config.study.runs_max)
    for result in best.values():
        keep(result, config.study.keep, task.case.label, f"seed{task.seed}", "capacity")
    return found
