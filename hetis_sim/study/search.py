"""Finds the highest rate at which something holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

STEP = 1.25
STEP_MAX = 16.0
LOWEST = 1e-4


@dataclass(frozen=True, slots=True)
class Probe:
    """One run of a search.

    Attributes:
        rate_rps: of arrivals.
        holds: whether the run counts as holding the SLO.
        attainment: share of the measured requests that held it.
        verdict: whether the queue grew: ``saturated``, ``stable`` or ``undetermined``.
        requests, measured: of the run, and of those the measured ones.
    """

    rate_rps: float
    holds: bool
    attainment: float
    verdict: str
    requests: int
    measured: int


@dataclass(frozen=True, slots=True)
class Found:
    """The end of a search.

    Attributes:
        rate_rps: the highest rate that was tried and held below all that failed; 0 where none held.
        probes: all runs, in order.
        note: what was in the way of an answer; empty where nothing was.
    """

    rate_rps: float
    probes: tuple[Probe, ...]
    note: str = ""


def highest(probe: Callable[[float], Probe], start_rps: float, ceiling_rps: float, tolerance: float,
            runs_max: int) -> Found:
    """The highest rate that holds, by bracketing and then bisection on the logarithm of the rate.

    Args:
        probe: runs at a rate.
        start_rps: the first rate tried.
        ceiling_rps: no rate above it is tried.
        tolerance: the search ends when the rate that failed is within this share of the one that held.
        runs_max: or after so many runs.
    """
    probes: list[Probe] = []
    low, high = 0.0, math.inf
    rate, step = min(start_rps, ceiling_rps), STEP
    while len(probes) < runs_max:
        probes.append(probe(rate))
        if probes[-1].holds:
            low = rate
        else:
            high = rate
        if low and high <= low * (1.0 + tolerance):
            return Found(low, tuple(probes))
        if low and high < math.inf:
            rate = math.sqrt(low * high)
        elif low:
            if rate >= ceiling_rps:
                return Found(low, tuple(probes), f"the SLO holds even at {rate:.4g} requests/s, where every "
                             "queue must grow: the runs are too short to show it (study.requests)")
            rate, step = min(rate * step, ceiling_rps), min(step * step, STEP_MAX)
        else:
            if rate < start_rps * LOWEST:
                return Found(0.0, tuple(probes), f"the SLO holds at no load: at {rate:.2g} requests/s only "
                             f"{probes[-1].attainment:.1%} of the requests hold it")
            rate, step = rate / step, min(step * step, STEP_MAX)
    return Found(low, tuple(probes), f"the search was cut off after {runs_max} runs (study.runs_max)")
