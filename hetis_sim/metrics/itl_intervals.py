"""Intervals of inter-token latencies: batches are stretches of the record with equal numbers of gaps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hetis_sim.metrics.intervals import BATCHES, UNKNOWN, Batches, Interval, batch_mean_interval, share_limits
from hetis_sim.metrics.itl import Segments


def itl_intervals(gaps: Segments, percentiles: Sequence[float]) -> tuple[Interval, ...]:
    """Intervals of the mean and of each percentile, in this order.

    A segment belongs to one batch as a whole. All are unknown where the record has too few
    segments to be cut.
    """
    number = gaps.gaps.astype(float)
    batch = _batch_numbers(number)
    if batch.max() < BATCHES // 2:
        return (UNKNOWN,) * (1 + len(percentiles))
    mean = batch_mean_interval(_batches(number * (gaps.low_s + gaps.high_s) / 2, number, batch))
    return (mean, *(_percentile_interval(gaps, number, batch, q) for q in percentiles))


def _batch_numbers(number: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which of the consecutive batches each segment belongs to, none of them empty."""
    middle = np.cumsum(number) - number / 2
    raw = (middle / number.sum() * BATCHES).astype(np.int64)
    return np.unique(raw, return_inverse=True)[1]


def _batches(sums: NDArray[np.float64], number: NDArray[np.float64], batch: NDArray[np.int64]) -> Batches:
    size = np.bincount(batch, weights=number)
    return Batches(np.bincount(batch, weights=sums) / size, size / size.sum())


def _percentile_interval(gaps: Segments, number: NDArray[np.float64], batch: NDArray[np.int64],
                         q: float) -> Interval:
    upto = gaps.gaps_upto(gaps.percentile_s(q)).astype(float)
    low, high = share_limits(q / 100, gaps.n, _batches(upto, number, batch))
    limits = (math.nan if math.isnan(share) else gaps.percentile_s(100 * share) for share in (low, high))
    return Interval(*limits)
