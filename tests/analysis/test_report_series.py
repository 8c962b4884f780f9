"""Series made from records: averages, rates, shares, thinned lines."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.figures.charts import thinned
from analysis.figures.loads import across
from analysis.figures.series import covered_s, edges_of, growth_rate, held_average, paced, spread_rate


def test_a_held_quantity_is_averaged_over_time() -> None:
    """2 from t=1 to 3 and 4 after that: a sample weighs as long as it lasts; before the first is nothing."""
    average = held_average(np.array([1.0, 3.0]), np.array([2.0, 4.0]), np.array([0.0, 2.0, 4.0, 6.0]))
    np.testing.assert_allclose(average, [1.0, 3.0, 4.0])


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 5)), min_size=1, max_size=20), st.integers(1, 30))
def test_averages_hold_the_integral(samples: list[tuple[float, float]], cells: int) -> None:
    """However finely time is cut, the area under the averages is the same."""
    times = np.sort(np.array([time for time, _ in samples]))
    values = np.array([value for _, value in samples])
    edges = edges_of(0.0, 12.0, cells)
    area = float((held_average(times, values, edges) * np.diff(edges)).sum())
    exact = float((values * np.diff(np.r_[times, 12.0])).sum())
    assert area == pytest.approx(exact, abs=1e-9)


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 3), st.floats(0, 100)), min_size=1, max_size=20))
def test_spread_amounts_are_all_there(pieces: list[tuple[float, float, float]]) -> None:
    """Rates times their stretches add up to the amounts."""
    start, length, amount = (np.array(column) for column in zip(*pieces, strict=True))
    edges = edges_of(0.0, 13.0, 17)
    total = float((spread_rate(start, start + length, amount, edges) * np.diff(edges)).sum())
    assert total == pytest.approx(float(amount.sum()), abs=1e-6)


def test_growth_is_a_rate_in_each_stretch() -> None:
    """A device that works half of the time grows by a half."""
    rate = growth_rate(np.array([1.0, 2.0, 4.0]), np.array([[1.0], [1.0], [2.0]]), np.array([0.0, 2.0, 4.0]))
    np.testing.assert_allclose(rate[:, 0], [0.5, 0.5])


def test_work_told_in_advance_is_done_no_faster_than_time_goes_by() -> None:
    """3 s told at t=1 last until t=4; 1 s told at t=2 waits behind it; at t=6 all is done."""
    done = paced(np.array([1.0, 2.0, 4.0, 6.0]), np.array([[3.0], [4.0], [4.0], [4.0]]))
    np.testing.assert_allclose(done[:, 0], [0.0, 1.0, 3.0, 4.0])


@given(st.lists(st.tuples(st.floats(0.01, 3), st.floats(0, 3)), min_size=1, max_size=30))
def test_paced_work_never_outruns_time_or_what_was_told(steps: list[tuple[float, float]]) -> None:
    """Growth is at most the time between samples, and work done at most work told."""
    times, told = np.cumsum([gap for gap, _ in steps]), np.cumsum([work for _, work in steps])
    done = paced(times, told[:, None])[:, 0]
    assert (np.diff(np.r_[0.0, done]) <= np.diff(np.r_[0.0, times]) + 1e-9).all()
    assert (np.diff(done) >= -1e-9).all()
    assert (done <= told + 1e-9).all()


def test_time_covered_twice_counts_once() -> None:
    """0..2 and 1..3 overlap, 5..9 is cut at 6, 4..4 is empty: 4 s in all."""
    start, end = np.array([0.0, 1.0, 5.0, 4.0]), np.array([2.0, 3.0, 9.0, 4.0])
    assert covered_s(start, end, 0.0, 6.0) == pytest.approx(4.0)
    assert covered_s(np.zeros(0), np.zeros(0), 0.0, 6.0) == 0.0


def test_one_long_transfer_hides_the_short_ones_within_it() -> None:
    """0..10 holds 1..2 and 3..4: the long one counts alone."""
    assert covered_s(np.array([0.0, 1.0, 3.0]), np.array([10.0, 2.0, 4.0]), 0.0, 20.0) == pytest.approx(10.0)


@given(st.integers(1, 5000), st.integers(0, 2**32 - 1))
def test_thinned_lines_keep_ends_and_extremes(n: int, seed: int) -> None:
    """What is left is a part of the points, in order, with the same range."""
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.uniform(0, 100, n)), rng.normal(size=n)
    kept_x, kept_y = thinned(x, y, columns=50)
    assert len(kept_x) <= max(4 * 50, 1)
    assert (kept_x[0], kept_x[-1]) == (x[0], x[-1])
    assert (kept_y.min(), kept_y.max()) == (y.min(), y.max())
    assert set(zip(kept_x, kept_y, strict=True)) <= set(zip(x, y, strict=True))
    assert (np.diff(kept_x) >= 0).all()


def test_intervals_across_seeds_are_students() -> None:
    """Of 1, 2 and 3: mean 2, and 4.303 times 1 / sqrt(3) around it, cut at zero; two values bound nothing."""
    mean, low, high = across([1.0, 2.0, 3.0])
    assert (mean, low) == (2.0, 0.0)
    assert high == pytest.approx(2 + 4.302653 / 3**0.5)
    assert across([1.0, 3.0])[0] == 2.0
    assert np.isnan(across([1.0, 3.0])[1:]).all()
