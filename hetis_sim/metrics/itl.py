"""Inter-token latencies of a whole run, kept as weighted linear segments.

A collapsed decode step makes k gaps that grow linearly with the cache, felt by every
request of its batch. A segment keeps that in four numbers; the tokens are never written out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetis_sim.spec.errors import require_finite

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FLAT = 1e-12
"""Relative distance of neighbouring points below which a segment counts as one value."""

SMALLEST_S = 1e-9
FINEST = 1e-4
"""Relative width of what is joined at first; doubled until few enough segments are left."""


@dataclass(frozen=True)
class Segments:
    """``count[i]`` points evenly spaced from ``low_s[i]`` to ``high_s[i]``, each of ``weight[i]`` gaps.

    Order is that of recording; ``recorded_s`` is a time by which the segment had been recorded.
    """

    low_s: Floats
    high_s: Floats
    count: Ints
    weight: Ints
    recorded_s: Floats

    @classmethod
    def of(cls, first_s: Floats, last_s: Floats, count: Ints, weight: Ints, recorded_s: Floats) -> Segments:
        """Segments from their first and last gap, falling or rising; those of no gap are left out."""
        kept = (count > 0) & (weight > 0)
        first_s, last_s, count = first_s[kept], last_s[kept], count[kept]
        # A single gap has one value; its other end would otherwise never be reached.
        last_s = np.where(count == 1, first_s, last_s)
        low_s, high_s = np.minimum(first_s, last_s), np.maximum(first_s, last_s)
        # Where neighbouring points are hardly apart in floating point, they are made equal:
        # which of them is smaller would be a matter of rounding.
        flat = high_s - low_s <= FLAT * count * np.abs(high_s)
        middle_s = (low_s + high_s) / 2
        return cls(np.where(flat, middle_s, low_s), np.where(flat, middle_s, high_s), count, weight[kept],
                   recorded_s[kept])

    def __len__(self) -> int:
        return len(self.count)

    def rows(self, chosen: NDArray[Any]) -> Segments:
        """The segments that a mask chooses."""
        return Segments(self.low_s[chosen], self.high_s[chosen], self.count[chosen], self.weight[chosen],
                        self.recorded_s[chosen])

    @property
    def gaps(self) -> Ints:
        """Gaps in each segment, over all requests."""
        return self.count * self.weight

    @property
    def n(self) -> int:
        """Gaps over all segments."""
        return int(self.gaps.sum())

    def mean_s(self) -> float:
        """Mean over all gaps; nan without any."""
        return float(np.average((self.low_s + self.high_s) / 2, weights=self.gaps)) if len(self) else math.nan

    def percentile_s(self, q: float) -> float:
        """The q-th percentile (0 to 100) of all gaps, as if each were written out; nan without any.

        Interpolates linearly between order statistics, as ``numpy.percentile`` does.

        Raises:
            SpecError: q outside 0 to 100.
        """
        require_finite("percentile", q, 0.0, 100.0)
        if not len(self):
            return math.nan
        position = (self.n - 1) * q / 100
        rank = math.floor(position)
        low = self.order_statistic_s(rank)
        if position == rank:
            return low
        return low + (self.order_statistic_s(rank + 1) - low) * (position - rank)

    def order_statistic_s(self, rank: int) -> float:
        """The gap that ``rank`` others come before in ascending order.

        Segments that lie wholly below or above bounds of the answer are settled by two
        look-ups. On the points of the others runs a quickselect, whose every pass drops about
        half of what is left.
        """
        low_s, high_s = self._bounds_s(rank)
        rank -= self._by_high.gaps_below(low_s)
        left = self._points((self.low_s <= high_s) & (self.high_s >= low_s))
        while True:
            pivot = left.middle_value()
            before, upto = left.points_below(pivot, np.less), left.points_below(pivot, np.less_equal)
            weight_before = int((left.weight * (before - left.start)).sum())
            weight_upto = int((left.weight * (upto - left.start)).sum())
            if rank < weight_before:
                left = left.narrowed(left.start, before)
            elif rank < weight_upto:
                return pivot
            else:
                rank -= weight_upto
                left = left.narrowed(upto, left.end)

    def gaps_upto(self, value_s: float) -> Ints:
        """Gaps of each segment that are at most ``value_s``."""
        upto = np.where(self.high_s <= value_s, self.gaps, 0)
        cut = (self.low_s <= value_s) & (self.high_s > value_s)
        upto[cut] = self._points(cut).points_below(value_s, np.less_equal) * self.weight[cut]
        return upto

    def _bounds_s(self, rank: int) -> tuple[float, float]:
        """Values that the gap of this rank is not below, and not above."""
        return self._by_low.value_at(rank), self._by_high.value_at(rank)

    def _points(self, chosen: NDArray[np.bool_]) -> _Ranges:
        count = self.count[chosen]
        return _Ranges(self.low_s[chosen], self.high_s[chosen], count, self.weight[chosen],
                       np.zeros_like(count), count)

    @cached_property
    def _by_low(self) -> _Ends:
        return _Ends.of(self.low_s, self.gaps)

    @cached_property
    def _by_high(self) -> _Ends:
        return _Ends.of(self.high_s, self.gaps)

    def compacted(self, rows_max: int, slices: int = 20) -> Segments:
        """At most ``rows_max`` segments of nearly the same distribution.

        The record is cut into consecutive slices of equal numbers of segments, and in each the
        segments of nearly equal mean become one, of as many gaps and with the same mean. So
        means stay exact, and a percentile moves by no more than the width of what was joined.
        """
        if len(self) <= rows_max:
            return self
        piece = np.arange(len(self)) * slices // len(self)
        size = np.log(np.maximum((self.low_s + self.high_s) / 2, SMALLEST_S))
        size -= size.min()
        width = FINEST
        while True:
            bins = (size / width).astype(np.int64)
            joined, group = np.unique(piece * (bins.max() + 1) + bins, return_inverse=True)
            if len(joined) <= rows_max:
                return self._joined(group)
            width *= 2

    def _joined(self, group: Ints) -> Segments:
        """Segments of one group (numbered from 0, none empty) as one."""
        order = np.argsort(group, kind="stable")
        starts = np.searchsorted(group[order], np.arange(int(group.max()) + 1))
        gaps, low, high = self.gaps[order], self.low_s[order], self.high_s[order]
        total = np.add.reduceat(gaps, starts)
        mean = np.add.reduceat(gaps * (low + high) / 2, starts) / total
        least, most = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
        reach = np.where(total > 1, np.maximum(np.minimum(mean - least, most - mean), 0.0), 0.0)
        recorded_s = np.maximum.reduceat(self.recorded_s[order], starts)
        return Segments(mean - reach, mean + reach, total, np.ones_like(total), recorded_s)


@dataclass(frozen=True)
class _Ends:
    """One end of every segment in ascending order, and the gaps of all segments up to it.

    As if all gaps of a segment were at that end.
    """

    value_s: Floats
    gaps_upto: Ints

    @classmethod
    def of(cls, value_s: Floats, gaps: Ints) -> _Ends:
        order = np.argsort(value_s, kind="stable")
        return cls(value_s[order], np.cumsum(gaps[order]))

    def value_at(self, rank: int) -> float:
        return float(self.value_s[np.searchsorted(self.gaps_upto, rank, side="right")])

    def gaps_below(self, value_s: float) -> int:
        index = int(np.searchsorted(self.value_s, value_s, side="left"))
        return int(self.gaps_upto[index - 1]) if index else 0


@dataclass(frozen=True)
class _Ranges:
    """Points ``start`` to ``end`` (exclusive) of every segment."""

    low_s: Floats
    high_s: Floats
    count: Ints
    weight: Ints
    start: Ints
    end: Ints

    def narrowed(self, start: Ints, end: Ints) -> _Ranges:
        kept = start < end
        return _Ranges(self.low_s[kept], self.high_s[kept], self.count[kept], self.weight[kept], start[kept],
                       end[kept])

    def value(self, index: Ints) -> Floats:
        """Value of one point of every segment; the last one is ``high_s`` to the bit."""
        last = self.count - 1
        step = (self.high_s - self.low_s) / np.maximum(last, 1)
        return np.where(index >= last, self.high_s, self.low_s + step * index)

    def middle_value(self) -> float:
        """A point near the middle of all."""
        values = self.value((self.start + self.end - 1) // 2)
        return float(np.partition(values, len(values) // 2)[len(values) // 2])

    def points_below(self, value_s: float, compare: np.ufunc) -> Ints:
        """Index of each segment's first point, from ``start``, that is not below ``value_s``."""
        width = self.high_s - self.low_s
        with np.errstate(divide="ignore", invalid="ignore"):
            guess = (value_s - self.low_s) / width * (self.count - 1)
        guess = np.where(width > 0, guess, 0.0)
        index = np.clip(np.ceil(guess), 0, self.count).astype(np.int64)
        # Division may land one point off; the points themselves decide.
        for _ in range(2):
            index -= (index > 0) & ~compare(self.value(index - 1), value_s)
            index += (index < self.count) & compare(self.value(index), value_s)
        # Flat segments: all points are the same value.
        flat = np.where(compare(self.low_s, value_s), self.count, 0)
        index = np.where(width > 0, index, flat)
        clipped: Ints = np.clip(index, self.start, self.end)
        return clipped
