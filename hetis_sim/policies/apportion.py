"""Whole numbers in proportion to weights."""

from __future__ import annotations

from collections.abc import Sequence


def apportion(weights: Sequence[float], limits: Sequence[int], units: int) -> list[int]:
    """Whole units in proportion to weights, within limits that sum to ``units`` or more.

    Each unit goes where the count is furthest below its share (Webster's rule of divisors).
    """
    counts = [0] * len(weights)
    for _ in range(units):
        open_ = [i for i, limit in enumerate(limits) if counts[i] < limit]
        best = max(open_, key=lambda i: (weights[i] / (2 * counts[i] + 1), -i))
        counts[best] += 1
    return counts
