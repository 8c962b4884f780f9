"""The saturation test tells growing queues from wandering ones."""

from __future__ import annotations

import numpy as np
import pytest
from metrics_fakes import served_queue

from hetis_sim.metrics.saturation import growth, saturation


def verdicts(load: float, n: int, servers: int, runs: int = 40) -> list[str]:
    """Verdicts over seeds."""
    queues = (served_queue(n, load, seed=seed, servers=servers) for seed in range(runs))
    return [saturation(*queue).verdict for queue in queues]


@pytest.mark.parametrize("servers", [1, 16])
@pytest.mark.parametrize("load", [0.5, 0.9])
def test_stable_queues_raise_no_alarm(load: float, servers: int) -> None:
    """Below capacity at most one run in 40 is called saturated, even near capacity."""
    assert verdicts(load, 1000, servers).count("saturated") <= 1


@pytest.mark.parametrize("servers", [1, 16])
def test_a_lightly_loaded_queue_is_called_stable(servers: int) -> None:
    """At half load 2000 requests are enough to be sure."""
    assert verdicts(0.5, 2000, servers).count("stable") >= 36


@pytest.mark.parametrize("servers", [1, 16])
def test_overload_is_found(servers: int) -> None:
    """At 1.2 times capacity nearly every run of 2000 requests is called saturated."""
    assert verdicts(1.2, 2000, servers).count("saturated") >= 36


def test_the_slope_is_the_rate_at_which_requests_stay_behind() -> None:
    """Two arrivals and one departure a second grow by one request a second."""
    arrival_s = np.arange(2000) / 2
    end_s = np.arange(2000) + 1.0
    slope, interval = growth(arrival_s, end_s, 0.0, float(arrival_s[-1]))
    assert slope == pytest.approx(1.0, rel=1e-3)
    assert interval == pytest.approx((1.0, 1.0), abs=0.01)
    result = saturation(arrival_s, end_s, end_s - 1.0)
    assert result.verdict == "saturated"
    assert result.sentence.startswith("the queue grows by 1 requests/s")


def test_a_clockwork_queue_is_stable() -> None:
    """Constant arrivals and services leave no trend to find, however narrow the interval."""
    arrival_s = np.arange(500) * 1.0
    assert saturation(arrival_s, arrival_s + 0.9, arrival_s).verdict == "stable"


def test_the_time_to_fill_an_idle_system_is_no_growth() -> None:
    """Long services that all begin at once make N rise at first; that alone is no alarm."""
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        arrival_s = np.cumsum(rng.exponential(0.1, 1000))
        end_s = arrival_s + rng.uniform(20.0, 40.0, 1000)
        # From the first arrival on, N does rise, by more than a tenth of the arrivals.
        assert growth(arrival_s, end_s, 0.0, float(arrival_s[-1]))[0] > 1.0
        found.append(saturation(arrival_s, end_s, arrival_s).verdict)
    assert found.count("saturated") <= 1


def test_a_run_that_ends_while_the_system_fills_is_undetermined() -> None:
    """Arrivals for less than twice the time in service cannot tell filling from growing."""
    rng = np.random.default_rng(1)
    arrival_s = np.cumsum(rng.exponential(0.1, 300))
    result = saturation(arrival_s, arrival_s + 40.0, arrival_s)
    assert result.verdict == "undetermined"
    assert "too short" in result.sentence


def test_a_short_overload_shows_in_those_not_yet_scheduled() -> None:
    """Where arrivals end early but the requests not yet scheduled pile up, the alarm is raised."""
    arrival_s, end_s, begin_s = served_queue(2000, 20.0, seed=3, servers=64)
    assert saturation(arrival_s, end_s, begin_s).verdict == "saturated"


def test_few_requests_are_undetermined() -> None:
    """A handful of requests prove nothing."""
    result = saturation(np.arange(5.0), np.arange(5.0) + 100, np.arange(5.0))
    assert (result.verdict, "too few" in result.sentence) == ("undetermined", True)
