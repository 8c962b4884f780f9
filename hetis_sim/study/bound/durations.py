"""Shortest durations: step functions that lie below the cost model for every batch size.

A cost model is asked at a grid of token counts. Between two of its counts a duration is taken to
be no shorter than at the lower one, which holds where durations do not fall with more tokens;
where a fitted model dips, the dip counts for all smaller batches as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

GRID_STEP = 1.02
GRID_DENSE = 64
SLACK = 0.03

TP_EXACT = 8
TP_STEP = 4


TpGroup = tuple[int, int]
"""Least and largest of a group of tensor-parallel degrees."""


class Interval(NamedTuple):
    """Batches of ``low`` to ``high`` tokens take ``seconds`` at least."""

    low: int
    high: int
    seconds: float


def token_grid(most: int) -> list[int]:
    """Token counts 1 .. most: all of them up to 64, then in steps of 2 %."""
    counts = list(range(1, min(most, GRID_DENSE) + 1))
    while counts[-1] < most:
        counts.append(min(most, max(counts[-1] + 1, int(counts[-1] * GRID_STEP))))
    return counts


def _least(seconds: Callable[[int], float], grid: list[int]) -> list[float]:
    """At each count of the grid, the shortest duration of it or any larger one."""
    asked = np.array([seconds(n) for n in grid])
    found: list[float] = np.minimum.accumulate(asked[::-1])[::-1].tolist()
    return found


def intervals(seconds: Callable[[int], float], most: int) -> Iterator[Interval]:
    """Intervals of batch size, each with the least that its batches take.

    They are as wide as they can be with durations within 3 % of each other.
    """
    grid = token_grid(most)
    least = _least(seconds, grid)
    first = 0
    while first < len(grid):
        last = first
        while last + 1 < len(grid) and least[last + 1] <= (1.0 + SLACK) * least[first]:
            last += 1
        yield Interval(grid[first], grid[last + 1] - 1 if last + 1 < len(grid) else most, least[first])
        first = last + 1


def best_per_token(seconds: Callable[[int], float], most: int) -> float:
    """Least seconds a token over all batches of 1 .. most tokens."""
    grid = token_grid(most)
    ends = [*(n - 1 for n in grid[1:]), most]
    return min(shortest / end for shortest, end in zip(_least(seconds, grid), ends, strict=True))


def tp_groups(most: int) -> list[TpGroup]:
    """Tensor-parallel degrees 1 .. most: one by one at first, then in growing groups."""
    groups = [(tp, tp) for tp in range(1, min(most, TP_EXACT) + 1)]
    low = TP_EXACT + 1
    while low <= most:
        high = min(most, low + max(TP_STEP, low // 3) - 1)
        groups.append((low, high))
        low = high + 1
    return groups
