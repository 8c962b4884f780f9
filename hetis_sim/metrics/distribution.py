"""Mean and percentiles of a latency, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetis_sim.metrics.intervals import SAMPLES_MIN, UNKNOWN, Interval, mean_interval, percentile_interval
from hetis_sim.metrics.itl import Segments
from hetis_sim.metrics.itl_intervals import itl_intervals

PERCENTILES = (50, 90, 95, 99)
POINTS = ("mean", *(f"p{q}" for q in PERCENTILES))


@dataclass(frozen=True, slots=True)
class Distribution:
    """A latency in seconds: mean and percentiles of ``n`` samples, each with its 95 % interval.

    Everything is nan without samples; a limit is nan where the samples bound nothing.
    """

    n: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    mean_interval: Interval
    p50_interval: Interval
    p90_interval: Interval
    p95_interval: Interval
    p99_interval: Interval


def distribution(values_s: NDArray[np.float64], *, steady: bool = True) -> Distribution:
    """Mean and percentiles of latencies in order of arrival; nan entries are left out.

    Unless ``steady``, there are no intervals: a queue that grows has no mean to bound.
    """
    values = values_s[np.isfinite(values_s)]
    if not len(values):
        return _distribution(0, [math.nan] * len(POINTS), [UNKNOWN] * len(POINTS))
    ascending = np.sort(values)
    points = [float(values.mean()), *(float(point) for point in np.percentile(ascending, PERCENTILES))]
    if not steady:
        return _distribution(len(values), points, [UNKNOWN] * len(POINTS))
    low, high = mean_interval(values)
    # Student's t does not know that latencies are positive. (max in this order leaves nan alone.)
    limits = [Interval(max(low, 0.0), high)]
    limits += [percentile_interval(values, ascending, q) for q in PERCENTILES]
    return _distribution(len(values), points, limits)


def itl_distribution(gaps: Segments) -> Distribution:
    """The same over all gaps between tokens."""
    if not len(gaps):
        return _distribution(0, [math.nan] * len(POINTS), [UNKNOWN] * len(POINTS))
    points = [gaps.mean_s(), *(gaps.percentile_s(q) for q in PERCENTILES)]
    few = gaps.n < SAMPLES_MIN
    return _distribution(gaps.n, points, [UNKNOWN] * len(POINTS) if few else itl_intervals(gaps, PERCENTILES))


def _distribution(n: int, points: Iterable[float], intervals: Iterable[Interval]) -> Distribution:
    values: dict[str, Any] = dict(zip(POINTS, points, strict=True))
    values |= {f"{point}_interval": limits for point, limits in zip(POINTS, intervals, strict=True)}
    return Distribution(n=n, **values)
