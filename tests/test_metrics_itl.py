"""Inter-token latencies: segments give what the gaps written out would give."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metrics_fakes import add_request

from hetis_sim.metrics import Recorder
from hetis_sim.metrics.distribution import distribution, itl_distribution
from hetis_sim.metrics.itl import Segments
from hetis_sim.spec.errors import SpecError

Rows = list[tuple[float, float, int, int]]

gap = st.one_of(st.sampled_from([0.0, 0.01, 0.02, 0.5]), st.floats(1e-4, 10.0))
rows = st.lists(st.tuples(gap, gap, st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=30)


def segments(rows: Rows) -> Segments:
    """The rows as a recorder turns them into segments."""
    recorder = Recorder()
    for row in rows:
        recorder.itl(*row)
    return recorder.records().itl


def written_out(rows: Rows) -> np.ndarray:
    """Every gap of every request."""
    return np.concatenate([np.repeat(np.linspace(first, last, count), weight)
                           for first, last, count, weight in rows])


@given(rows, st.floats(0, 100))
def test_percentiles_equal_those_of_the_gaps_written_out(rows: Rows, q: float) -> None:
    """Any percentile of any segments is numpy's percentile of the expansion."""
    expected = np.percentile(written_out(rows), q)
    assert segments(rows).percentile_s(q) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(rows)
def test_order_statistics_equal_the_sorted_gaps(rows: Rows) -> None:
    """First, middle and last gap in ascending order are found exactly."""
    expected = np.sort(written_out(rows))
    gaps = segments(rows)
    for rank in {0, len(expected) // 2, len(expected) - 1}:
        assert gaps.order_statistic_s(rank) == pytest.approx(expected[rank], rel=1e-9, abs=1e-12)


@given(rows)
def test_mean_and_number_equal_those_of_the_gaps(rows: Rows) -> None:
    """Segments count every gap and keep the mean."""
    expected = written_out(rows)
    gaps = segments(rows)
    assert gaps.n == len(expected)
    assert gaps.mean_s() == pytest.approx(expected.mean(), rel=1e-9, abs=1e-12)


@given(rows, st.floats(0, 10))
def test_gaps_up_to_a_value_are_counted(rows: Rows, value_s: float) -> None:
    """The share of gaps below a value that is no gap itself is exact."""
    expected = written_out(rows)
    if np.abs(expected - value_s).min() > 1e-9:
        assert segments(rows).gaps_upto(value_s).sum() == (expected <= value_s).sum()


def test_ends_a_rounding_error_apart_count_as_equal() -> None:
    """A segment whose ends differ in the last bit is one value, whatever the number of points."""
    high = np.nextafter(0.1, 1)
    assert segments([(0.1, high, 1000, 3)]).percentile_s(50) == pytest.approx(0.1, rel=1e-12)


def test_rows_without_gaps_are_left_out() -> None:
    """No gaps or nobody to feel them: not a sample."""
    gaps = segments([(0.1, 0.2, 0, 5), (0.1, 0.2, 5, 0), (0.3, 0.3, 1, 1)])
    assert (len(gaps), gaps.n) == (1, 1)


def test_no_gaps_give_nan() -> None:
    """Without gaps there is no percentile, and asking for one is no error."""
    assert math.isnan(segments([]).percentile_s(50))
    assert math.isnan(segments([]).mean_s())


@pytest.mark.parametrize("q", [-1.0, 101.0, math.nan])
def test_percentiles_outside_the_range_are_refused(q: float) -> None:
    """Percentiles are numbers from 0 to 100."""
    with pytest.raises(SpecError, match="percentile"):
        segments([(0.1, 0.2, 3, 1)]).percentile_s(q)


def random_rows(n: int) -> Rows:
    """Rows as decode steps of growing batches make them, with a long tail."""
    rng = np.random.default_rng(4)
    first = rng.lognormal(-3.0, 0.4, n) * np.where(rng.random(n) < 0.01, 20, 1)
    return [(a, a * 1.02, int(k), int(w)) for a, k, w in
            zip(first, rng.integers(1, 20, n), rng.integers(1, 64, n), strict=True)]


def test_compacting_bounds_the_rows_and_keeps_the_distribution() -> None:
    """A quarter of the rows keep number and mean exactly and percentiles within 0.5 %, tail included."""
    gaps = segments(random_rows(20_000))
    fewer = gaps.compacted(5_000)
    assert 1_000 < len(fewer) <= 5_000
    assert fewer.n == gaps.n
    assert fewer.mean_s() == pytest.approx(gaps.mean_s(), rel=1e-12)
    for q in (1, 50, 90, 95, 99):
        assert fewer.percentile_s(q) == pytest.approx(gaps.percentile_s(q), rel=5e-3)


def test_small_records_are_not_compacted() -> None:
    """Below the bound segments stay as they are."""
    gaps = segments(random_rows(100))
    assert gaps.compacted(100) is gaps


def test_a_gap_is_dated_by_the_next_request_that_ends() -> None:
    """Gaps carry the finish of the first request that ended after them."""
    recorder = Recorder()
    recorder.itl(0.1, 0.1, 1, 1)
    add_request(recorder, 0, 0.0, finish_s=5.0)
    recorder.itl(0.2, 0.2, 1, 1)
    recorder.itl(0.3, 0.3, 1, 1)
    add_request(recorder, 1, 0.0, finish_s=6.0)
    assert list(recorder.records().itl.recorded_s) == [5.0, 6.0, 6.0]


def test_intervals_of_gaps_are_those_of_plain_samples() -> None:
    """One gap a segment gives nearly the interval that the same numbers give as request latencies."""
    values = np.random.default_rng(5).lognormal(-3, 0.5, 2_000)
    pooled = itl_distribution(segments([(v, v, 1, 1) for v in values]))
    plain = distribution(values)
    assert pooled.mean == pytest.approx(plain.mean)
    for name in ("mean_interval", "p50_interval", "p95_interval"):
        assert getattr(pooled, name) == pytest.approx(getattr(plain, name), rel=0.01)


def test_too_few_segments_give_no_interval() -> None:
    """A thousand gaps of one step are one observation, so nothing bounds their mean."""
    result = itl_distribution(segments([(0.1, 0.2, 1000, 50)]))
    assert result.n == 50_000
    assert math.isnan(result.mean_interval.low)
