"""Capacity: the highest load at which an SLO holds, and the throughput under overload.

``docs/capacity.md`` has the definitions and what they rest on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from hetis_sim.config import RunConfig
from hetis_sim.study.bound.result import Bound, upper_bound, workload_lengths
from hetis_sim.study.config import StudyConfig
from hetis_sim.study.estimate import Estimate, estimate
from hetis_sim.study.parallel import fan_out
from hetis_sim.study.runs import (
    Case,
    Load,
    cases_of,
    in_flight,
    instances_of,
    planned,
    require_open,
    seeds_of,
    under,
)
from hetis_sim.study.search import Found
from hetis_sim.study.tasks import Overload, Task, overload, search

OVERLOAD = 2.0
"""Rate of an overload run, in units of the bound."""
START = 0.8
"""First rate of a search, in units of the throughput under overload."""
FLIGHTS = 6
"""Requests of an overload run, in units of those in flight at once."""
SOJOURNS = 8
"""Length of the arrivals in a search, in units of the time that a request stays."""
REQUESTS_MIN = 500
BOUND_REQUESTS = 5000


@dataclass(frozen=True)
class Capacity:
    """What one policy can serve.

    Attributes:
        policy: name, with the settings that differ.
        slo: the highest rate at which the SLO holds, requests/s, over the seeds.
        throughput: requests/s finished under overload, over the seeds.
        ttft_s, tpot_s, attainment: the SLO, and the share of the requests that must hold it.
        seeds: of the runs.
        searches: for each seed, the search for the first figure.
        throughputs_rps: for each seed, the second figure.
        requests: of each run of a search; ``overload_requests`` of each run under overload.
        tolerance: of the searches.
        bound: no policy serves more.
        instances: of the plan, in words.
        notes: what a reader must know.
    """

    policy: str
    slo: Estimate
    throughput: Estimate
    ttft_s: float
    tpot_s: float
    attainment: float
    seeds: tuple[int, ...]
    searches: tuple[Found, ...]
    throughputs_rps: tuple[float, ...]
    requests: int
    overload_requests: int
    tolerance: float
    bound: Bound
    instances: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def runs(self) -> int:
        """Simulations that went into the figures."""
        return len(self.throughputs_rps) + sum(len(found.probes) for found in self.searches)

    @property
    def share_of_bound(self) -> dict[str, float]:
        """Both figures as shares of the bound."""
        return {"slo": self.bound.share(self.slo.mean), "throughput": self.bound.share(self.throughput.mean)}

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {**asdict(self), "runs": self.runs, "share_of_bound": self.share_of_bound}


def capacity(config: RunConfig, done: Callable[[], None] | None = None) -> Capacity:
    """The capacity of the configured policy.

    Raises:
        HetisError: the combination cannot run.
    """
    return capacities(config, cases_of(config), done)[0]


def capacities(config: RunConfig, cases: Sequence[Case],
               done: Callable[[], None] | None = None, bound: Bound | None = None) -> list[Capacity]:
    """The capacity of each case, on the same requests and the same patterns of arrivals.

    Args:
        config: what is studied.
        cases: the policies.
        done: called whenever a task of a process has ended.
        bound: of the throughput of any policy, where it is known already.

    Raises:
        HetisError: a combination cannot run.
    """
    require_open(config)
    return _Study(config, cases, done, bound).capacities()


def bound_for(case: Case, loads: Sequence[Load]) -> Bound:
    """The bound for the requests of some loads together; it does not depend on the policy."""
    prepared = planned(case.config, loads[0].rate_rps)
    lengths = [workload_lengths(under(prepared, load).workload) for load in loads]
    return upper_bound(prepared.cluster, prepared.model, prepared.cost, prepared.settings, lengths)


def study_bound(config: RunConfig, case: Case) -> Bound:
    """The bound for the requests of all seeds of a study of capacity."""
    # The rate does not matter here: the bound goes by the lengths.
    rate, requests = config.workload.rate or 1.0, config.study.requests or BOUND_REQUESTS
    return bound_for(case, [Load(rate, requests, seed) for seed in seeds_of(config)])


def clamped(study: StudyConfig, requests: float) -> int:
    """Requests of a run: as many as are needed, within the limits of the study."""
    return study.requests or min(study.requests_max, max(REQUESTS_MIN, math.ceil(requests)))


def search_requests(config: RunConfig, bound: Bound, runs: Sequence[Overload],
                    sojourns: float = SOJOURNS) -> float:
    """Requests for arrivals that last long enough for an overload by the tolerance to show.

    Args:
        config: with the SLO and the tolerance.
        bound: for the mean output.
        runs: under overload, of one policy.
        sojourns: arrivals last at least so many times as long as a request stays under overload.
    """
    mean_output = bound.output_tokens_per_s / bound.requests_per_s
    stay_s = min(fmean(run.service_s for run in runs), mean_output * config.slo.tpot_s) + config.slo.ttft_s
    lasts_s = max(config.slo.ttft_s / config.study.tolerance, sojourns * stay_s)
    return fmean(run.throughput_rps for run in runs) * lasts_s


class _Study:
    """The phases of a study of capacity, each fanned out over policies and seeds."""

    def __init__(self, config: RunConfig, cases: Sequence[Case], done: Callable[[], None] | None,
                 bound: Bound | None = None) -> None:
        self.config, self.study = config, config.study
        self.cases = list(cases)
        self.seeds = seeds_of(config)
        self.done = done
        self.bound = bound or study_bound(config, self.cases[0])

    def capacities(self) -> list[Capacity]:
        """All phases: overload, search, and the search once more where a policy plans for the rate."""
        flood = OVERLOAD * self.bound.requests_per_s
        flying = max(in_flight(planned(case.config, flood)) for case in self.cases)
        floods = [flood] * len(self.cases)
        overloads = self._fan_out(overload, floods, floods, self._clamped(FLIGHTS * flying))
        means = [fmean(run.throughput_rps for run in runs) for runs in overloads]
        requests = self._clamped(max(search_requests(self.config, self.bound, runs) for runs in overloads))
        searches = self._fan_out(search, means, [START * mean for mean in means], requests)
        return [self._capacity(case, runs, *self._replanned(case, mean, found, requests))
                for case, mean, runs, found in zip(self.cases, means, overloads, searches, strict=True)]

    def _fan_out(self, function: Callable[[Task], Any], plan_rates: Sequence[float], starts: Sequence[float],
                 requests: int, cases: Sequence[Case] | None = None) -> list[list[Any]]:
        """Results by case, and within a case by seed."""
        tasks = [Task(case, seed, rate, requests, start, self.bound.requests_per_s)
                 for case, rate, start in zip(cases or self.cases, plan_rates, starts, strict=True)
                 for seed in self.seeds]
        flat = fan_out(function, tasks, self.study.workers, self.done)
        width = len(self.seeds)
        return [flat[first:first + width] for first in range(0, len(flat), width)]

    def _clamped(self, requests: float) -> int:
        return clamped(self.study, requests)

    def _replanned(self, case: Case, plan_rate: float, searched: list[Found],
                   requests: int) -> tuple[list[Found], float]:
        """The searches, and the rate that their plan was made for.

        Where a policy plans otherwise for the rate that was found, it is given that plan too, and the
        better one counts.
        """
        reached = fmean(found.rate_rps for found in searched)
        plans = [planned(case.config, rate).plan for rate in (plan_rate, reached or plan_rate)]
        if (plans[0].instances, plans[0].mesh) != (plans[1].instances, plans[1].mesh):
            again = self._fan_out(search, [reached], [reached], requests, [case])[0]
            if fmean(found.rate_rps for found in again) > reached:
                return again, reached
        return searched, plan_rate

    def _capacity(self, case: Case, overloads: Sequence[Overload], searches: Sequence[Found],
                  plan_rate: float) -> Capacity:
        study, slo = self.study, self.config.slo
        throughputs = tuple(run.throughput_rps for run in overloads)
        return Capacity(
            policy=case.label, slo=estimate([found.rate_rps for found in searches], 0.0),
            throughput=estimate(throughputs, 0.0),
            ttft_s=slo.ttft_s, tpot_s=slo.tpot_s, attainment=study.attainment,
            seeds=tuple(self.seeds), searches=tuple(searches), throughputs_rps=throughputs,
            requests=searches[0].probes[0].requests, overload_requests=overloads[0].requests,
            tolerance=study.tolerance, bound=self.bound,
            instances=instances_of(planned(case.config, plan_rate)), notes=self._notes(searches))

    def _notes(self, searches: Sequence[Found]) -> tuple[str, ...]:
        most = self.study.requests_max
        notes = [note for note in dict.fromkeys(found.note for found in searches) if note]
        if len(self.seeds) < 2:
            notes.append("a single seed: there is no interval")
        if self.study.requests is None and searches[0].probes[0].requests == most:
            notes.append(f"runs are held to study.requests_max={most} requests, too few for an overload by "
                         f"{100 * self.study.tolerance:g} % to show: the capacity may be a little high")
        return tuple(notes)
