"""Capacity of one policy, with fewer runs than a search for every seed takes.

The definitions are those of ``docs/capacity.md``. What differs: the first seed is searched from the start,
the others begin around its answer; and the capacity is interpolated between the last rate that held and the
first that failed, so that the bracket may be wider (:data:`WIDTH` for the further seeds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from analysis.paper.measure.usable import usable_tokens
from hetis_sim.run import Prepared, Result
from hetis_sim.study.bound.result import Bound
from hetis_sim.study.capacity import FLIGHTS, OVERLOAD, START, clamped, search_requests
from hetis_sim.study.runs import Case, Load, in_flight, instances_of, planned, run_under, seeds_of
from hetis_sim.study.search import LOWEST, STEP_MAX, Found, Probe, highest
from hetis_sim.study.tasks import Overload, Task, overload

NEAR = 1.05
"""Half the width of the first bracket of a further seed, as a factor."""
BEYOND = 1.12
"""First step of a further seed whose answer lies outside it; each is the square of the one before."""
WIDTH = 1.25
"""Bracket that a further seed ends with, as a factor."""


@dataclass(frozen=True)
class _Search:
    """Runs of one plan at rates that a search asks for; none is done twice.

    ``limits`` keeps of every run, by rate and seed, the shares of the requests within the limit on TTFT and
    within that on TPOT; ``done`` what a search is told of it.
    """

    case: Case
    prepared: Prepared
    requests: int
    start_rps: float
    ceiling_rps: float
    limits: dict[tuple[float, int], tuple[float, float]] = field(default_factory=dict)
    done: dict[tuple[float, int], Probe] = field(default_factory=dict)

    def probe(self, rate_rps: float, seed: int) -> Probe:
        """One run."""
        key = rate_rps, seed
        if key not in self.done:
            self.done[key] = self._run(rate_rps, seed)
        return self.done[key]

    def _run(self, rate_rps: float, seed: int) -> Probe:
        study = self.case.config.study
        result = run_under(self.prepared, Load(rate_rps, self.requests, seed))
        summary = result.summary
        self.limits[rate_rps, seed] = within_limits(result)
        verdict, share = summary.saturation.verdict, summary.slo.attainment
        return Probe(rate_rps, share >= study.attainment and verdict != "saturated", share, verdict,
                     summary.requests.submitted, summary.requests.measured)

    def from_start(self, start_rps: float, seed: int) -> Found:
        """A search that knows no answer."""
        study = self.case.config.study
        return highest(lambda rate: self.probe(rate, seed), start_rps, self.ceiling_rps, study.tolerance,
                       study.runs_max)

    def around(self, guess_rps: float, seed: int) -> Found:
        """A search that begins on both sides of a guess; one from the start where the guess is 0."""
        if not guess_rps:
            return self.from_start(self.start_rps, seed)
        probes = [self.probe(min(guess_rps / NEAR, self.ceiling_rps), seed)]
        low, high = (probes[0].rate_rps, math.inf) if probes[0].holds else (0.0, probes[0].rate_rps)
        rate, step = guess_rps * NEAR if probes[0].holds else guess_rps / NEAR / BEYOND, BEYOND
        while len(probes) < self.case.config.study.runs_max and guess_rps * LOWEST < high:
            if low and low >= min(high / WIDTH, self.ceiling_rps):
                break
            rate = min(rate, self.ceiling_rps)
            probes.append(self.probe(rate, seed))
            low, high = (rate, high) if probes[-1].holds else (low, rate)
            if low and high < math.inf:
                rate = math.sqrt(low * high)
            else:
                rate, step = rate * step if low else rate / step, min(step * step, STEP_MAX)
        return Found(low, tuple(probes))


def run_length(case: Case, bound: Bound, sojourns: float) -> int:
    """Requests of a run of a search, by one run under overload.

    Args:
        sojourns: see :func:`hetis_sim.study.capacity.search_requests`.

    Raises:
        HetisError: the combination cannot run.
    """
    floods = _floods(case, bound, seeds_of(case.config)[:1])
    return clamped(case.config.study, search_requests(case.config, bound, floods, sojourns))


def measure(case: Case, bound: Bound, requests: int) -> dict[str, Any]:
    """Capacity at the SLO and throughputs without, by seed, and what the plan is.

    Args:
        requests: of each run of a search.

    Raises:
        HetisError: the combination cannot run.
    """
    config, ceiling = case.config, bound.requests_per_s
    seeds = seeds_of(config)
    floods = _floods(case, bound, seeds)
    mean = fmean(run.throughput_rps for run in floods)
    search = _Search(case, planned(config, mean), requests, START * mean, ceiling)
    first = search.from_start(START * mean, seeds[0])
    search, first = _replanned(search, first, seeds[0], config.study.attainment)
    guess = crossing(first, config.study.attainment)
    searches = [first, *(search.around(guess, seed) for seed in seeds[1:])]
    return {"slo": [crossing(found, config.study.attainment) for found in searches],
            "overload": [run.throughput_rps for run in floods],
            "sustained": [max([run.throughput_rps, *_open(found.probes)])
                          for run, found in zip(floods, searches, strict=True)],
            "instances": list(instances_of(search.prepared)), "requests": requests,
            "runs": len(floods) + sum(len(found.probes) for found in searches), "note": first.note,
            "first_failure": _first_failure(search, first, seeds[0]),
            "usable_tokens": usable_tokens(search.prepared)}


def _floods(case: Case, bound: Bound, seeds: Sequence[int]) -> list[Overload]:
    """Runs under overload."""
    flood = OVERLOAD * bound.requests_per_s
    flooded = clamped(case.config.study, FLIGHTS * in_flight(planned(case.config, flood)))
    return [overload(Task(case, seed, flood, flooded, flood, bound.requests_per_s)) for seed in seeds]


def within_limits(result: Result) -> tuple[float, float]:
    """Shares of the measured requests within the limit on TTFT, and within that on TPOT."""
    slo, window = result.prepared.config.slo, result.summary.window
    inside = slice(window.first, window.last)
    requests = result.recorder.records().requests
    ttft_s, tpot_s = requests["ttft_s"][inside], requests["tpot_s"][inside]
    served = np.isfinite(ttft_s)
    # A single output token has no time per output token.
    shares = [float(np.mean(served & (ttft_s <= slo.ttft_s))),
              float(np.mean(served & ~(tpot_s > slo.tpot_s)))] if len(ttft_s) else [math.nan] * 2
    return shares[0], shares[1]


def _first_failure(search: _Search, found: Found, seed: int) -> dict[str, float] | None:
    """What the requests held at the lowest rate that failed; None where none did."""
    failed = [probe.rate_rps for probe in found.probes if not probe.holds]
    if not failed:
        return None
    ttft, tpot = search.limits[min(failed), seed]
    return {"rate_rps": min(failed), "ttft": ttft, "tpot": tpot}


def _open(probes: Sequence[Probe]) -> list[float]:
    """Rates at which the queue did not grow."""
    return [probe.rate_rps for probe in probes if probe.verdict != "saturated"]


def _replanned(search: _Search, found: Found, seed: int, attainment: float) -> tuple[_Search, Found]:
    """The search, or one with the plan that the policy makes for the rate found, where that serves more."""
    rate = crossing(found, attainment)
    other = planned(search.case.config, rate) if rate else search.prepared
    if other.plan.instances == search.prepared.plan.instances:
        return search, found
    again = _Search(search.case, other, search.requests, rate, search.ceiling_rps)
    if not again.probe(min(rate * NEAR, search.ceiling_rps), seed).holds:
        return search, found
    return again, again.from_start(rate * NEAR, seed)


def crossing(found: Found, attainment: float) -> float:
    """The rate at which the SLO ceases to hold, between the last that held and the first that failed.

    Interpolated in the attainment over the logarithm of the rate; the last that held where the next failed
    for another reason (a growing queue), or none did.
    """
    held = [probe for probe in found.probes if probe.rate_rps == found.rate_rps and probe.holds]
    failed = min((probe for probe in found.probes if probe.rate_rps > found.rate_rps),
                 key=lambda probe: probe.rate_rps, default=None)
    if not held or failed is None or failed.attainment >= attainment:
        return found.rate_rps
    way = (held[0].attainment - attainment) / (held[0].attainment - failed.attainment)
    return found.rate_rps * math.exp(way * math.log(failed.rate_rps / found.rate_rps))


def bound_from(plain: Mapping[str, Any]) -> Bound:
    """A bound from plain types, without the use of the devices."""
    return Bound(**{**plain, "kinds": ()})
