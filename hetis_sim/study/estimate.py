"""Figures over independent seeds, with Student's t intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over ``n`` seeds and its 95 % interval; the limits are nan for a single seed."""

    mean: float
    low: float
    high: float
    n: int

    def text(self) -> str:
        """For people: ``4.12 [3.95, 4.29]``."""
        if math.isnan(self.mean):
            return "-"
        if math.isnan(self.low):
            return figure(self.mean)
        return f"{figure(self.mean)} [{figure(self.low)}, {figure(self.high)}]"


def figure(value: float) -> str:
    """Three significant digits, all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def estimate(values: Sequence[float], least: float = -math.inf, most: float = math.inf) -> Estimate:
    """Mean of independent values; nan where any of them is.

    Student's t does not know that a quantity lies between ``least`` and ``most``; the limits do.
    """
    from scipy.special import stdtrit

    n = len(values)
    if not n or any(math.isnan(value) for value in values):
        return Estimate(math.nan, math.nan, math.nan, n)
    mean = fmean(values)
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    reach = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * stdev(values) / math.sqrt(n)
    return Estimate(mean, max(mean - reach, least), min(mean + reach, most), n)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Geometric mean of the ratios of pairs, interval on the logarithms; nan unless all are positive."""
    pairs = list(zip(numerators, denominators, strict=True))
    if not all(a > 0 and b > 0 for a, b in pairs):
        return Estimate(math.nan, math.nan, math.nan, len(pairs))
    found = estimate([math.log(a / b) for a, b in pairs])
    return Estimate(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.n)
