"""The largest of a few lines, and its sum over consecutive iterations."""

from __future__ import annotations

from collections.abc import Sequence

Line = tuple[float, float]
"""(seconds at iteration 0, seconds more per iteration)."""


def envelope(lines: Sequence[Line], n: int) -> float:
    """Largest of the lines at iteration ``n``, 0 for none."""
    best = 0.0
    for start, slope in lines:
        value = start + slope * n
        if value > best:
            best = value
    return best


def envelope_sum(lines: Sequence[Line], first: int, count: int) -> float:
    """Sum of the envelope over iterations ``first .. first + count - 1``, in closed form.

    The line that is largest at both ends is largest throughout; otherwise the range is
    halved until it is, which takes about log2(count) steps for every change of the leader.
    """
    if count <= 0 or not lines:
        return 0.0
    if count == 1:
        return envelope(lines, first)
    if len(lines) == 1:
        start, slope = lines[0]
        return count * (start + slope * (first + (count - 1) / 2.0))
    last = first + count - 1
    # Of the largest at the left end the steepest, at the right end the flattest.
    left = right = lines[0]
    left_s, right_s = left[0] + left[1] * first, right[0] + right[1] * last
    for line in lines[1:]:
        start, slope = line
        value = start + slope * first
        if value > left_s or (value == left_s and slope > left[1]):
            left, left_s = line, value
        value = start + slope * last
        if value > right_s or (value == right_s and slope < right[1]):
            right, right_s = line, value
    if left[0] + left[1] * last >= right_s:
        return count * (left[0] + left[1] * (first + last) / 2.0)
    if right[0] + right[1] * first >= left_s:
        return count * (right[0] + right[1] * (first + last) / 2.0)
    half = count // 2
    return envelope_sum(lines, first, half) + envelope_sum(lines, first + half, count - half)
