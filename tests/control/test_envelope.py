"""Sums over collapsed iterations are those of a loop."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from hetis_sim.control.envelope import envelope, envelope_sum

LINES = st.lists(st.tuples(st.floats(0, 1e-2), st.floats(0, 1e-5)), max_size=5)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(LINES, st.integers(0, 5000), st.integers(0, 700))
def test_the_sum_of_an_envelope_is_that_of_a_loop(lines: list[tuple[float, float]], first: int,
                                                  count: int) -> None:
    """Wherever the largest line changes, the closed form adds up what single iterations take."""
    by_hand = math.fsum(max([0.0, *(start + slope * n for start, slope in lines)])
                        for n in range(first, first + count))
    assert math.isclose(envelope_sum(lines, first, count), by_hand, rel_tol=1e-12, abs_tol=1e-15)


def test_the_largest_line_counts() -> None:
    """A steep line overtakes a high one; no lines take no time."""
    lines = [(3.0, 0.0), (1.0, 1.0)]
    assert [envelope(lines, n) for n in (0, 2, 5)] == [3.0, 3.0, 6.0]
    assert envelope([], 7) == envelope_sum([], 0, 7) == envelope_sum(lines, 3, 0) == 0.0
    assert envelope_sum(lines, 0, 6) == 3 + 3 + 3 + 4 + 5 + 6
