"""Arrival processes have the rate and the variation that they were asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hetis_sim.spec.errors import SpecError
from traces import ArrivalProcess, Constant, Gamma, OnOff, Poisson, RngStreams
from traces.arrivals import REQUESTS_MAX, rescaled, times_until

N = 20_000
PROCESSES: dict[str, Callable[[float, int], ArrivalProcess]] = {
    "poisson": lambda rate, seed: Poisson(rate, RngStreams(seed)),
    "gamma": lambda rate, seed: Gamma(rate, 2.5, RngStreams(seed)),
    "constant": lambda rate, seed: Constant(rate),
    "onoff": lambda rate, seed: OnOff(rate, 3.0, 9.0, 0.1, RngStreams(seed)),
}


def gaps(process: ArrivalProcess, count: int = N) -> np.ndarray:
    """Gaps before the first ``count`` arrivals, seconds."""
    return np.diff(np.concatenate(([0.0], process.next_block(count))))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_poisson_gaps_are_exponential(seed: int) -> None:
    """Gaps of a Poisson process pass Kolmogorov and Smirnov, and have no cap."""
    drawn = gaps(Poisson(5.0, RngStreams(seed)))
    assert stats.kstest(drawn, "expon", args=(0, 1 / 5.0)).pvalue > 1e-4
    z = (drawn.mean() - 0.2) / (0.2 / np.sqrt(N))
    assert abs(z) <= 4
    # With 20,000 gaps the largest is about ln(20,000) = 9.9 means: far beyond a cap at 3.
    assert drawn.max() > 7 * 0.2


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.5])
def test_gamma_gaps_have_their_mean_and_variation(cv: float) -> None:
    """Gaps of a Gamma process pass the test of their law; mean and CV hold within 4 sigma."""
    drawn = gaps(Gamma(8.0, cv, RngStreams(4)))
    shape = 1 / cv**2
    assert stats.kstest(drawn, "gamma", args=(shape, 0, cv**2 / 8.0)).pvalue > 1e-4
    assert abs(drawn.mean() - 1 / 8.0) <= 4 * cv / 8.0 / np.sqrt(N)
    # Delta method: var(S^2) = (kurtosis - 1) sigma^4 / n, with excess kurtosis 6 / shape.
    sigma = cv * np.sqrt((2 + 6 / shape) / 4 / N + cv**2 / N)
    assert abs(drawn.std(ddof=1) / drawn.mean() - cv) <= 4 * sigma


def test_constant_arrivals_do_not_drift() -> None:
    """Request k arrives at k / rate to the last bit, in blocks as well."""
    process = Constant(3.0)
    blocks = np.concatenate([process.next_block(n) for n in (1, 7, 10_000)])
    assert np.array_equal(blocks, np.arange(10_008) / 3.0)


@pytest.mark.parametrize("seed", [5, 6])
def test_onoff_has_its_mean_rate_and_is_burstier_than_poisson(seed: int) -> None:
    """The mean rate holds within 4 sigma and counts spread more than a Poisson process's."""
    rate, on_s, off_s, share, width_s = 20.0, 3.0, 9.0, 0.1, 600.0
    horizon_s = 400 * width_s
    times = times_until(OnOff(rate, on_s, off_s, share, RngStreams(seed)), horizon_s)
    counts = np.histogram(times, bins=400, range=(0, horizon_s))[0]
    on = rate * (on_s + off_s) / (on_s + share * off_s)
    # Variance of the integral of a two-state chain over a window much longer than its
    # relaxation time: (r1 - r2)^2 * 2 p (1 - p) / (1/on + 1/off) per second.
    p, decay = on_s / (on_s + off_s), 1 / on_s + 1 / off_s
    variance = rate + (on - on * share) ** 2 * 2 * p * (1 - p) / decay
    assert abs(len(times) - rate * horizon_s) <= 4 * np.sqrt(variance * horizon_s)
    assert counts.var(ddof=1) / counts.mean() == pytest.approx(variance / rate, rel=0.35)
    assert variance / rate > 20


def test_onoff_is_silent_when_off() -> None:
    """With no rate in off phases, about the off share of time lies in long gaps."""
    process = OnOff(50.0, 2.0, 6.0, 0.0, RngStreams(7))
    drawn = gaps(process, 100_000)
    assert process.on_rate == 200.0
    silent_s = drawn[drawn > 0.1].sum()
    assert silent_s / drawn.sum() == pytest.approx(0.75, abs=0.06)


def test_onoff_starts_on_as_often_as_it_is_on() -> None:
    """The first state follows the stationary law over seeds."""
    first = [OnOff(1.0, 10.0, 30.0, 0.1, RngStreams(seed))._state == 0 for seed in range(1000)]
    assert abs(sum(first) - 250) <= 4 * np.sqrt(1000 * 0.25 * 0.75)


@pytest.mark.parametrize("kind", PROCESSES)
def test_blocks_do_not_matter(kind: str) -> None:
    """The first n times are the same however many are asked for, and in which blocks."""
    whole = PROCESSES[kind](4.0, 9).next_block(9000)
    process = PROCESSES[kind](4.0, 9)
    parts = np.concatenate([process.next_block(n) for n in (1, 0, 4095, 4000, 904)])
    assert np.array_equal(parts, whole)
    assert np.all(np.diff(whole) >= 0)
    until = times_until(PROCESSES[kind](4.0, 9), float(whole[5000]))
    assert np.array_equal(until, whole[:5000])


@pytest.mark.parametrize("kind", ["poisson", "gamma", "constant"])
def test_another_rate_stretches_the_same_pattern(kind: str) -> None:
    """Doubling the rate halves every time."""
    slow, fast = (PROCESSES[kind](rate, 3).next_block(1000) for rate in (2.0, 4.0))
    assert slow == pytest.approx(2 * fast, rel=1e-12)


def test_rescaling_keeps_the_pattern() -> None:
    """A replay at another rate has that mean rate, the same start and the same shape."""
    times = np.array([1.0, 1.0, 4.0, 9.0])
    scaled = rescaled(times, 3.0)
    assert 3 / (scaled[-1] - scaled[0]) == pytest.approx(3.0)
    assert (scaled - 1.0) / (scaled[-1] - 1.0) == pytest.approx((times - 1.0) / 8.0)


@pytest.mark.parametrize("times", [[2.0], [2.0, 2.0]])
def test_rescaling_needs_a_span(times: list[float]) -> None:
    """Times that are all one have no rate to change."""
    with pytest.raises(SpecError, match="no span"):
        rescaled(np.array(times), 1.0)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf"), 1e-300, 1e300])
@pytest.mark.parametrize("kind", PROCESSES)
def test_bad_rates(kind: str, rate: float) -> None:
    """A rate of 0, negative, nan, infinite or absurd is refused by every process."""
    with pytest.raises(SpecError, match="rate="):
        PROCESSES[kind](rate, 0)


@pytest.mark.parametrize(("on_s", "off_s", "share", "key"), [
    (0.0, 1.0, 0.1, "on_s"), (1.0, -1.0, 0.1, "off_s"), (1e-9, 1.0, 0.1, "on_s"),
    (1.0, 1.0, 1.0, "off_share"), (1.0, 1.0, -0.1, "off_share"), (float("nan"), 1.0, 0.1, "on_s"),
])
def test_bad_phases(on_s: float, off_s: float, share: float, key: str) -> None:
    """Phases that are empty, negative or far shorter than a gap are refused."""
    with pytest.raises(SpecError, match=f"{key}="):
        OnOff(1.0, on_s, off_s, share, RngStreams(0))


def test_durations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A duration that would need more requests than the limit is refused, not run."""
    assert REQUESTS_MAX == 10_000_000
    monkeypatch.setattr("traces.arrivals.REQUESTS_MAX", 10_000)
    with pytest.raises(SpecError, match="at most 10000 requests"):
        times_until(Poisson(1e6, RngStreams(0)), 1e9)


def test_streams_are_functions_of_seed_and_name() -> None:
    """A stream starts anew each time, and differs by name and by seed."""
    streams = RngStreams(1)
    first = streams.stream("arrivals").random(1000)
    streams.stream("other").random(7)
    assert np.array_equal(first, streams.stream("arrivals").random(1000))
    for seed, name in ((1, "lengths"), (2, "arrivals")):
        other = RngStreams(seed).stream(name).random(1000)
        assert abs(np.corrcoef(first, other)[0, 1]) <= 4 / np.sqrt(1000)


def test_streams_never_change() -> None:
    """The first numbers of a stream are what they were: recorded runs can be repeated."""
    first = RngStreams(0).stream("arrivals").integers(0, 2**32, 3)
    assert first.tolist() == [439541049, 4178186046, 2939736071]


def test_streams_ignore_the_hash_seed(project_root: Path) -> None:
    """Processes with different PYTHONHASHSEED build the same workload."""
    code = ("from traces import build_workload as b; "
            "print(b({'arrivals': 'onoff', 'requests': 500, 'seed': 3}).describe()['sha256'])")
    outputs = {
        subprocess.run([sys.executable, "-c", code], cwd=project_root, text=True, capture_output=True,
                       check=True, env=os.environ | {"PYTHONHASHSEED": seed}).stdout
        for seed in ("0", "4242")}
    assert len(outputs) == 1
    assert len(outputs.pop().strip()) == 64


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1", True, None])
def test_bad_seeds(seed: object) -> None:
    """Seeds are whole numbers of at most 64 bits."""
    with pytest.raises(SpecError, match="seed="):
        RngStreams(seed)  # type: ignore[arg-type]
