"""Confidence intervals for correlated samples of one run.

Latencies of neighbouring requests are correlated, so the usual s / sqrt(n) is far too
narrow. Everything here rests on one estimate: the variance of a mean by batch means, with
the first-order correlation that is left between batches allowed for.

- Mean: Student's t on 10 batches of consecutive samples.
- Share of samples below a value, and with it every percentile: the exact binomial interval
  of Clopper and Pearson at the effective number of samples (Korn and Graubard, Survey
  Methodology 24, 1998), carried to the percentile through the empirical distribution
  (Woodruff, JASA 47, 1952). Where the effective number is too small for a limit to exist,
  the limit is nan: no finite number bounds a p99 from above on 100 samples.

The intervals speak of one run's steady state. They do not know of a queue that still fills
up, and in queues near capacity whose run holds only a few busy periods they are too narrow
(``docs/metrics.md`` has the measured coverage); independent seeds are better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
BATCHES = 10
SAMPLES_MIN = 20
CORRELATION_MAX = 0.9

METHOD = ("95 % intervals from this one run: batch means (10 batches in order of arrival) with first-order "
          "correlation for means; Korn-Graubard limits on the same variance, carried through the empirical "
          "distribution, for percentiles and shares")


class Interval(NamedTuple):
    """Limits of a 95 % confidence interval; nan where the data bound nothing on that side."""

    low: float
    high: float


UNKNOWN = Interval(math.nan, math.nan)


@dataclass(frozen=True)
class Batches:
    """Consecutive stretches of a record: the mean of each and its share of all samples."""

    means: Floats
    shares: Floats

    @property
    def mean(self) -> float:
        """Mean over all samples."""
        return float(self.means @ self.shares)

    @property
    def degrees(self) -> int:
        """Degrees of freedom of :meth:`variance`."""
        return len(self.means) - 1

    def variance(self) -> float:
        """Variance of :attr:`mean`, correlation between batches included."""
        size = len(self.means)
        deviations = (self.means - self.mean) * self.shares
        squares = float(deviations @ deviations)
        if squares <= 0:
            return 0.0
        correlation = float(deviations[1:] @ deviations[:-1]) / squares
        # The estimate is low by about (1 + 3 r) / size (Marriott and Pope, Biometrika 41, 1954).
        correlation = min(max(correlation + (1 + 3 * correlation) / size, 0.0), CORRELATION_MAX)
        return squares * size / (size - 1) * (1 + correlation) / (1 - correlation)


def batch(values: Floats) -> Batches:
    """Means of ten consecutive batches of nearly equal size."""
    edges = np.linspace(0, len(values), BATCHES + 1).astype(int)
    return Batches(np.add.reduceat(values, edges[:-1]) / np.diff(edges), np.diff(edges) / len(values))


def mean_interval(values: Floats) -> Interval:
    """Interval of the mean of samples given in order of time; nan for fewer than 20."""
    return batch_mean_interval(batch(values)) if len(values) >= SAMPLES_MIN else UNKNOWN


def batch_mean_interval(batches: Batches) -> Interval:
    """Interval of a mean whose batches are known."""
    from scipy.special import stdtrit

    reach = float(stdtrit(batches.degrees, (1 + CONFIDENCE) / 2)) * math.sqrt(batches.variance())
    return Interval(batches.mean - reach, batches.mean + reach)


def percentile_interval(values: Floats, ascending: Floats, q: float) -> Interval:
    """Interval of the q-th percentile of samples in order of time; ``ascending`` are the same, sorted."""
    if len(values) < SAMPLES_MIN:
        return UNKNOWN
    upto = (values <= np.percentile(ascending, q)).astype(float)
    low, high = share_limits(q / 100, len(values), batch(upto))
    return Interval(_quantile(ascending, low, "lower"), _quantile(ascending, high, "higher"))


def _quantile(ascending: Floats, share: float, method: str) -> float:
    if math.isnan(share):
        return math.nan
    position = (len(ascending) - 1) * share
    return float(ascending[math.floor(position) if method == "lower" else math.ceil(position)])


def share_interval(hits: NDArray[np.bool_]) -> Interval:
    """Interval of the share of true samples, given in order of time; nan for fewer than 20."""
    if len(hits) < SAMPLES_MIN:
        return UNKNOWN
    batches = batch(hits.astype(float))
    low, high = share_limits(batches.mean, len(hits), batches)
    return Interval(0.0 if math.isnan(low) else low, 1.0 if math.isnan(high) else high)


def share_limits(share: float, n: int, batches: Batches) -> Interval:
    """Korn-Graubard limits of a share, nan where even the extreme sample is no limit.

    Args:
        share: the estimate.
        n: samples.
        batches: of the indicator, which give its variance.
    """
    from scipy.special import betaincinv

    share = min(max(share, 0.0), 1.0)  # a mean of ones may come out one rounding above
    size = effective_number(share, n, batches)
    below, tail = share * size, (1 - CONFIDENCE) / 2
    low = float(betaincinv(below, size - below + 1, tail)) if below > 0 else math.nan
    high = float(betaincinv(below + 1, size - below, 1 - tail)) if below < size else math.nan
    return Interval(math.nan if (1 - share) ** size > tail else low, math.nan if share**size > tail else high)


def effective_number(share: float, n: int, batches: Batches) -> float:
    """Independent samples that would tell as much about a share as these n correlated ones.

    Reduced by (z / t)^2 for the variance's own uncertainty, as Korn and Graubard do.
    """
    from scipy.special import ndtri, stdtrit

    variance = batches.variance()
    alike = variance == 0 or not 0 < share < 1
    size = n if alike else min(float(n), share * (1 - share) / variance)
    level = (1 + CONFIDENCE) / 2
    return float(size * (ndtri(level) / stdtrit(batches.degrees, level)) ** 2)
