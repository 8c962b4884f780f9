"""What the runs of a validation say together: errors of each policy at each load, and the ranking."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from hetis_exec.validate.compare import (
    LATENCIES,
    Error,
    Part,
    latency_errors,
    paired,
    part_errors,
    rate_errors,
    spread_of,
)
from hetis_exec.validate.keep import Kept
from hetis_exec.validate.moments import scaled_steps
from hetis_exec.validate.ranking import CAPACITY, Figure, Order, orders_of
from hetis_exec.validate.runs import Outcome, Subject
from hetis_exec.validate.schedule import Run
from hetis_exec.validate.work import Worker

RANKED = (("tpot", "mean"), ("e2el", "mean"), ("output_throughput", "mean"))
PACED = "_paced"


@dataclass(frozen=True)
class Compared:
    """A policy at a load.

    Attributes:
        rate_rps: of arrivals.
        errors: of latencies, rates and use of the cache.
        parts: of iterations.
        runs: seed, turn, seconds and pace of each real run.
        requests: of all runs, paired.
    """

    policy: str
    load: float
    capacity_rps: float
    rate_rps: float
    errors: list[Error]
    parts: list[Part]
    runs: list[dict[str, Any]]
    requests: pd.DataFrame


@dataclass(frozen=True)
class Validation:
    """What there is of a validation.

    Attributes:
        capacities: measured (all times) and simulated requests per second of each policy.
        orders: pairs of policies by several figures.
        left_out: runs that the budget had no room for, or that are still to come.
        failed: why runs have failed, by name.
    """

    cases: list[Compared]
    capacities: list[dict[str, Any]] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all runs have been done."""
        return not self.left_out and not self.failed


def found_so_far(worker: Worker, runs: Sequence[Run]) -> Validation:
    """All that the runs that are done say."""
    done = [(run, kept) for run in runs if (kept := worker.shelf.find(run.name)) is not None]
    cases = []
    for policy in worker.subjects:
        for load in worker.config.validate.loads:
            own = [(run, kept) for run, kept in done if run.policy == policy and run.load == load]
            if own:
                cases.append(_compared(worker, policy, load, own))
    capacities = [_capacity(worker, policy, [kept for run, kept in done if run.policy == policy
                                             and run.load is None]) for policy in worker.subjects]
    known = [entry for entry in capacities if entry["measured_rps"]]
    todo = [run.name for run in runs if worker.shelf.find(run.name) is None and run.name not in worker.failed]
    return Validation(cases, known, _orders(known, cases), todo, dict(worker.failed))


def _capacity(worker: Worker, policy: str, kept: Sequence[Kept]) -> dict[str, Any]:
    measured = [one.capacity_rps for one in kept]
    return {"policy": policy, "measured_rps": measured,
            "simulated_rps": worker.simulated_capacity_rps(policy) if measured else math.nan}


def _compared(worker: Worker, policy: str, load: float, own: Sequence[tuple[Run, Kept]]) -> Compared:
    given, seed = worker.config.validate, worker.config.workload.seed
    real = [_outcome(kept) for _, kept in own]
    sim = [worker.simulated(run, kept) for run, kept in own]
    has_pace = all(kept.pace for _, kept in own)
    scaled = [worker.simulated(run, kept, paced=True) for run, kept in own] if has_pace else []
    pairs = paired(_pooled(real, own), _pooled(sim, own))
    paced = paired(_pooled(real, own), _pooled(scaled, own)) if scaled else None
    groups = _groups([run for run, _ in own])
    errors = latency_errors(pairs, given.resamples, seed, paced, [[real[n].requests for n in group]
                                                                  for group in groups])
    errors += rate_errors([one.rates for one in real], [one.rates for one in sim], given.resamples, seed,
                          [one.rates for one in scaled], [[real[n].rates for n in group] for group in groups])
    kinds = _first_kinds(worker.subjects[policy])
    then = [scaled_steps(kept.outcome.same, kept.moments, kinds) for _, kept in own
            if kept.moments and kept.outcome is not None and kept.outcome.same is not None]
    parts = part_errors([one.steps for one in real], [one.steps for one in sim],
                        [one.steps for one in scaled], [one.same for one in real if one.same is not None],
                        then)
    rows = [{"seed": run.seed, "turn": run.turn, "count": kept.count, "took_s": kept.took_s,
             "slowdown": kept.pace, "moments": kept.moments} for run, kept in own]
    if paced is not None:
        columns = {f"{name}_s_sim": f"{name}_s{PACED}" for name in LATENCIES}
        keys = ["seed", "turn", "request_id"]
        pairs = pairs.merge(paced[[*keys, *columns]].rename(columns=columns), on=keys, how="left")
    return Compared(policy, load, worker.capacity_rps(policy) or math.nan, own[0][1].rate_rps, errors, parts,
                    rows, pairs.assign(policy=policy, load=load))


def _first_kinds(subject: Subject) -> list[str]:
    """Type of device of each instance's first rank."""
    devices = subject.prepared.cluster.devices
    return [devices[plan.stages[0].devices[0]].gpu.name for plan in subject.prepared.plan.instances]


def _outcome(kept: Kept) -> Outcome:
    assert kept.outcome is not None
    return kept.outcome


def _pooled(outcomes: Sequence[Outcome], own: Sequence[tuple[Run, Kept]]) -> pd.DataFrame:
    return pd.concat([outcome.requests.assign(seed=run.seed, turn=run.turn)
                      for outcome, (run, _) in zip(outcomes, own, strict=True)], ignore_index=True)


def _groups(runs: Sequence[Run]) -> list[list[int]]:
    """Places of runs with the same requests."""
    seeds = dict.fromkeys(run.seed for run in runs)
    return [[n for n, run in enumerate(runs) if run.seed == seed] for seed in seeds]


def _orders(capacities: Sequence[dict[str, Any]], cases: Sequence[Compared]) -> list[Order]:
    noises = {entry["policy"]: _noise(*spread_of([entry["measured_rps"]])) for entry in capacities}
    found = orders_of(CAPACITY, math.nan, {
        entry["policy"]: Figure(sum(entry["measured_rps"]) / len(entry["measured_rps"]),
                                entry["simulated_rps"], noise_or(noises[entry["policy"]], noises.values()))
        for entry in capacities})
    for load in dict.fromkeys(case.load for case in cases):
        here = [case for case in cases if case.load == load]
        for metric, statistic in RANKED:
            everywhere = [_noise(error.noise_low, error.noise_high) for case in cases for error in case.errors
                          if (error.metric, error.statistic) == (metric, statistic)]
            figures = {case.policy: Figure(error.measured, error.simulated,
                                           noise_or(_noise(error.noise_low, error.noise_high), everywhere),
                                           error.measured * (1.0 + error.paced))
                       for case in here for error in case.errors
                       if (error.metric, error.statistic) == (metric, statistic)}
            found += orders_of(metric, load, figures)
    return found


def noise_or(noise: float, everywhere: Iterable[float]) -> float:
    """The noise or, of what was not run again, the largest that this figure has elsewhere."""
    known = [other for other in everywhere if not math.isnan(other)]
    return max(known, default=math.nan) if math.isnan(noise) else noise


def _noise(low: float, high: float) -> float:
    return max(abs(low), abs(high))


