"""Comparison of policies on identical arrivals: paired differences over seeds, and one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hetis_sim.config import RunConfig
from hetis_sim.metrics import Summary
from hetis_sim.spec.errors import SpecError, require
from hetis_sim.study.bound.result import Bound
from hetis_sim.study.capacity import Capacity, bound_for, capacities
from hetis_sim.study.estimate import Estimate, estimate, ratio
from hetis_sim.study.parallel import fan_out
from hetis_sim.study.runs import (
    Case,
    Load,
    cases_of,
    instances_of,
    keep,
    planned,
    require_open,
    run_under,
    seeds_of,
)
from traces import OpenWorkload, build_workload

LATENCIES = ("ttft", "tpot", "itl", "e2el")
SINGLE_KEYS = {"request_throughput": "requests/s", "output_throughput": "tokens/s",
               "request_goodput": "requests/s", "attainment": "share"}
CAPACITY_KEYS = {"slo_capacity": "requests/s", "overload_throughput": "requests/s"}


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of two policies on the same arrivals.

    Attributes:
        difference: first minus other, paired by seed.
        ratio: first over other, paired by seed.
    """

    difference: Estimate
    ratio: Estimate

    @property
    def decided(self) -> bool:
        """Whether the interval of the difference leaves out zero."""
        return self.difference.low > 0 or self.difference.high < 0


@dataclass(frozen=True)
class Entry:
    """One policy of a comparison.

    Attributes:
        policy: name, with the settings that differ.
        instances: of its plan, in words.
        values: each metric, by seed.
        metrics: each metric, over the seeds.
        saturated: in how many of the seeds its queue grew.
        capacity: None unless asked for.
    """

    policy: str
    instances: tuple[str, ...]
    values: dict[str, tuple[float, ...]]
    metrics: dict[str, Estimate]
    saturated: int
    capacity: Capacity | None


@dataclass(frozen=True)
class Comparison:
    """Policies on identical arrivals.

    Attributes:
        rate_rps, requests, seeds: the load.
        entries: the policies, in the order given.
        differences: for each other policy, by metric: the first policy against it.
        bound: no policy serves more.
        headline: the outcome in one sentence.
        notes: what a reader must know.
    """

    rate_rps: float
    requests: int
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    differences: dict[str, dict[str, Difference]]
    bound: Bound
    headline: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """One policy and one seed."""

    case: Case
    load: Load

    def __str__(self) -> str:
        return f"policy {self.case.label}, seed {self.load.seed}"


def units() -> dict[str, str]:
    """Names of the metrics with their units, in the order of the table."""
    latencies = {f"{name}_{point}": "s" for name in LATENCIES for point in ("mean", "p95")}
    return {**latencies, **SINGLE_KEYS, **CAPACITY_KEYS}


def compare(config: RunConfig, done: Callable[[], None] | None = None) -> Comparison:
    """Run the policies of ``study.policies`` on the same requests, arriving at the same times.

    Raises:
        SpecError: fewer than two policies, or arrivals that depend on the answers.
        HetisError: a combination cannot run.
    """
    study = config.study
    require(len(study.policies) >= 2, "study.policies", list(study.policies), "at least two policies")
    require_open(config)
    cases, seeds = cases_of(config, study.policies), seeds_of(config)
    rate = _rate(config)
    requests = study.requests or config.workload.requests
    tasks = [Task(case, Load(rate, requests, seed)) for case in cases for seed in seeds]
    measured = fan_out(_measure, tasks, study.workers, done)
    found = capacities(config, cases, done) if study.capacity else []
    entries = []
    for number, case in enumerate(cases):
        runs = measured[number * len(seeds):(number + 1) * len(seeds)]
        entries.append(_entry(case, rate, runs, found[number] if found else None))
    bound = found[0].bound if found else bound_for(cases[0], [task.load for task in tasks[:len(seeds)]])
    differences = {other.policy: _differences(entries[0], other) for other in entries[1:]}
    return Comparison(rate, measured[0].requests, tuple(seeds), tuple(entries), differences, bound,
                      headline(entries, differences, rate), _notes(entries, len(seeds)))


def _rate(config: RunConfig) -> float:
    """The configured rate, or that of the trace."""
    if config.workload.rate is not None:
        return config.workload.rate
    workload = build_workload(config.workload)
    rate = workload.rate_rps if isinstance(workload, OpenWorkload) else None
    if rate is None:
        raise SpecError("workload.rate", None, "a rate in req/s: the trace has no times that span one")
    return rate


# -- in the worker processes -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of one run."""

    values: dict[str, float]
    saturated: bool
    requests: int


def _measure(task: Task) -> Measured:
    result = run_under(planned(task.case.config, task.load.rate_rps), task.load)
    keep(result, task.case.config.study.keep, task.case.label, f"seed{task.load.seed}", "compare")
    summary = result.summary
    saturated = summary.saturation.verdict == "saturated"
    return Measured(metrics_of(summary), saturated, summary.requests.submitted)


def metrics_of(summary: Summary) -> dict[str, float]:
    """The metrics of a comparison, from one run."""
    values: dict[str, float] = {}
    for name in LATENCIES:
        found = getattr(summary, f"{name}_s")
        values |= {f"{name}_mean": found.mean, f"{name}_p95": found.p95}
    rates = summary.throughput
    return {**values, "request_throughput": rates.request_throughput,
            "output_throughput": rates.output_throughput, "request_goodput": rates.request_goodput,
            "attainment": summary.slo.attainment}


# -- the outcome ---------------------------------------------------------------------------------


def _entry(case: Case, rate_rps: float, runs: Sequence[Measured], capacity: Capacity | None) -> Entry:
    values = {name: tuple(run.values[name] for run in runs) for name in runs[0].values}
    if capacity is not None:
        values["slo_capacity"] = tuple(found.rate_rps for found in capacity.searches)
        values["overload_throughput"] = capacity.throughputs_rps
    metrics = {name: estimate(found, 0.0, 1.0 if name == "attainment" else math.inf)
               for name, found in values.items()}
    return Entry(case.label, instances_of(planned(case.config, rate_rps)), values, metrics,
                 sum(run.saturated for run in runs), capacity)


def _differences(first: Entry, other: Entry) -> dict[str, Difference]:
    return {name: Difference(estimate([a - b for a, b in zip(mine, other.values[name], strict=True)]),
                             ratio(mine, other.values[name])) for name, mine in first.values.items()}


def headline(entries: Sequence[Entry], differences: Mapping[str, Mapping[str, Difference]],
             rate_rps: float) -> str:
    """One sentence: the first policy against the strongest of the others."""
    first, others = entries[0], entries[1:]
    best = ", the best of the others," if len(others) > 1 else ""
    count = len(first.values["e2el_mean"])
    seeds = f"simulated, {count} seed{'s' if count > 1 else ''}"
    if first.capacity is not None:
        other = max(others, key=lambda entry: entry.metrics["slo_capacity"].mean)
        found = differences[other.policy]["slo_capacity"].ratio
        return _capacity_sentence(first, other, found, best, seeds)
    other = min(others, key=lambda entry: (entry.saturated, entry.metrics["e2el_mean"].mean))
    stuck = [entry.policy for entry in (first, other) if entry.saturated]
    if stuck:
        return (f"at {rate_rps:.4g} requests/s the queue of {' and of '.join(stuck)} grows, so that "
                f"latencies cannot be compared ({seeds})")
    found = differences[other.policy]["e2el_mean"].ratio
    return (f"at {rate_rps:.4g} requests/s a request takes {_times(found)} as long with {first.policy} as "
            f"with {other.policy}{best} on average ({seeds})")


def _capacity_sentence(first: Entry, other: Entry, found: Estimate, best: str, seeds: str) -> str:
    one, two = first.policy, other.policy
    mine, its = first.metrics["slo_capacity"].mean, other.metrics["slo_capacity"].mean
    if not math.isnan(found.mean):
        return f"{one} serves {_times(found)} the load of {two}{best} at the same SLO ({seeds})"
    if mine > 0 >= its:
        return (f"{one} serves {mine:.3g} requests/s at the SLO, {two}{best} holds it at no load "
                f"({seeds})")
    if its > 0 >= mine:
        return f"{one} holds the SLO at no load, {two} serves {its:.3g} requests/s at it ({seeds})"
    if mine > 0:
        return (f"{one} serves {mine:.3g} and {two}{best} {its:.3g} requests/s at the SLO, which not "
                f"every seed holds ({seeds})")
    return f"neither {one} nor {two}{best} holds the SLO at any load ({seeds})"


def _times(found: Estimate) -> str:
    """``1.62x [1.55, 1.69]``."""
    if math.isnan(found.low):
        return f"{found.mean:.2f}x"
    return f"{found.mean:.2f}x [{found.low:.2f}, {found.high:.2f}]"


def _notes(entries: Sequence[Entry], seeds: int) -> tuple[str, ...]:
    notes = [f"the queue of {entry.policy} grows in {entry.saturated} of {seeds} runs: its latencies measure "
             "the length of the run" for entry in entries if entry.saturated]
    if seeds < 2:
        notes.append("a single seed: there are no intervals")
    for entry in entries:
        notes += [f"{entry.policy}: {note}" for note in (entry.capacity.notes if entry.capacity else ())]
    return tuple(notes)
