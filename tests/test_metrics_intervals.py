"""Intervals hold what they promise on data whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import norm

from hetis_sim.metrics.intervals import Interval, mean_interval, percentile_interval, share_interval

RUNS = 200
SAMPLES = 2_000


def independent(rng: np.random.Generator) -> np.ndarray:
    """Exponential samples of mean 1."""
    return rng.exponential(1.0, SAMPLES)


def correlated(rng: np.random.Generator) -> np.ndarray:
    """Standard normal samples, neighbours correlated by 0.95."""
    noise = rng.standard_normal(SAMPLES + 500) * math.sqrt(1 - 0.95**2)
    return lfilter([1.0], [1.0, -0.95], noise)[500:]


def sojourns(rng: np.random.Generator) -> np.ndarray:
    """Sojourn times of an M/M/1 queue at half load, begun in its steady state; exponential of mean 2."""
    gaps, services = rng.exponential(2.0, SAMPLES), rng.exponential(1.0, SAMPLES)
    waited = rng.exponential(2.0) if rng.random() < 0.5 else 0.0
    times = np.empty(SAMPLES)
    for i in range(SAMPLES):
        times[i] = waited + services[i]
        waited = max(times[i] - gaps[i], 0.0)
    return times


def coverage(draw: Callable[[np.random.Generator], np.ndarray],
             interval: Callable[[np.ndarray], Interval], truth: float) -> float:
    """Share of runs whose interval holds the truth."""
    rng = np.random.default_rng(11)
    found = [interval(draw(rng)) for _ in range(RUNS)]
    return sum(low <= truth <= (math.inf if math.isnan(high) else high) for low, high in found) / RUNS


def p_interval(q: float) -> Callable[[np.ndarray], Interval]:
    """Interval of the q-th percentile, as a function of the samples."""
    return lambda values: percentile_interval(values, np.sort(values), q)


CASES = [
    pytest.param(independent, 1.0, lambda q: -math.log(1 - q), id="independent"),
    pytest.param(correlated, 0.0, norm.ppf, id="correlated"),
    pytest.param(sojourns, 2.0, lambda q: -2 * math.log(1 - q), id="queue"),
]


@pytest.mark.parametrize(("draw", "mean", "quantile"), CASES)
def test_intervals_cover_means_and_percentiles(
        draw: Callable[[np.random.Generator], np.ndarray], mean: float,
        quantile: Callable[[float], float]) -> None:
    """95 % intervals hold the truth in at least 91 % of runs, correlated or not."""
    assert coverage(draw, mean_interval, mean) >= 0.91
    for q in (50, 95, 99):
        assert coverage(draw, p_interval(q), quantile(q / 100)) >= 0.91


def test_the_textbook_interval_would_fail_on_correlated_samples() -> None:
    """The check above is able to fail: s / sqrt(n) covers less than half of the time."""

    def textbook(values: np.ndarray) -> Interval:
        reach = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
        return Interval(values.mean() - reach, values.mean() + reach)

    assert coverage(correlated, textbook, 0.0) < 0.5


def test_intervals_are_not_needlessly_wide() -> None:
    """On independent samples the mean's interval is at most 1.6 times the textbook one on average."""
    rng = np.random.default_rng(12)
    widths = [np.subtract(*mean_interval(independent(rng))[::-1]) for _ in range(100)]
    assert np.mean(widths) / (2 * 1.96 / math.sqrt(SAMPLES)) < 1.6


def test_a_p99_of_a_hundred_samples_has_no_upper_limit() -> None:
    """Where even the maximum may lie below the truth, the limit is nan."""
    low, high = p_interval(99)(np.random.default_rng(3).random(100))
    assert 0 < low < 1
    assert math.isnan(high)


def test_few_samples_have_no_interval() -> None:
    """Below 20 samples nothing is promised."""
    values = np.arange(19.0)
    assert all(math.isnan(limit) for limit in (*mean_interval(values), *p_interval(50)(values)))
    assert all(math.isnan(limit) for limit in share_interval(values > 3))


def test_constant_samples_have_an_interval_of_no_width() -> None:
    """Equal latencies leave nothing uncertain about the mean."""
    values = np.full(400, 0.25)
    assert mean_interval(values) == pytest.approx((0.25, 0.25))
    assert p_interval(50)(values) == (0.25, 0.25)


def test_shares_stay_between_zero_and_one() -> None:
    """An SLO that all or none hold still has an interval with room on the open side."""
    low, high = share_interval(np.ones(100, dtype=bool))
    assert 0.9 < low < 1.0
    assert high == 1.0
    low, high = share_interval(np.zeros(100, dtype=bool))
    assert low == 0.0
    assert 0.0 < high < 0.1


@pytest.mark.parametrize("n", [26, 77, 1834])
def test_the_share_of_all_has_an_interval_for_any_number_of_them(n: int) -> None:
    """The mean of so many ones, taken in batches, comes out above one by a rounding."""
    low, high = share_interval(np.ones(n, dtype=bool))
    assert 0.8 < low < high == 1.0


def test_shares_are_covered() -> None:
    """The share of sojourns within 3 s is held by its interval in at least 91 % of runs."""
    truth = 1 - math.exp(-3 / 2)
    assert coverage(sojourns, lambda values: share_interval(values <= 3.0), truth) >= 0.91
