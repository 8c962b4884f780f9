"""Arrival processes: times that never depend on how many were asked for before.

Gaps are drawn in full and never capped: a cap at 3 / rate would raise the rate by 5 %.
Every process draws unit-mean numbers and scales them, so that a seed gives the same
pattern at every rate. Times are summed one after another, so that n times are always the
first n of n + 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from hetis_sim.spec.errors import SpecError, require_finite
from traces.rng import RngStreams
from traces.table import FloatArray

RATE_MIN, RATE_MAX = 1e-9, 1e9
CV_MAX = 100.0
PHASES_PER_REQUEST_MAX = 1000
REQUESTS_MAX = 10_000_000
BLOCK = 4096


class ArrivalProcess(ABC):
    """Times of arrival in seconds, from 0, in blocks that go on where the last one ended."""

    @abstractmethod
    def next_block(self, count: int) -> FloatArray:
        """The next ``count`` times, non-decreasing."""


class Renewal(ArrivalProcess):
    """Independent gaps between arrivals; the first request comes after one gap."""

    def __init__(self) -> None:
        self._last_s = 0.0

    @abstractmethod
    def _gaps(self, count: int) -> FloatArray:
        """Independent gaps, seconds."""

    def next_block(self, count: int) -> FloatArray:
        times = np.cumsum(np.concatenate(([self._last_s], self._gaps(count))))[1:]
        self._last_s = float(times[-1]) if count else self._last_s
        return times


class Poisson(Renewal):
    """Exponential gaps of mean 1 / rate."""

    def __init__(self, rate: float, streams: RngStreams) -> None:
        super().__init__()
        self.rate = checked_rate(rate)
        self._rng = streams.stream("arrivals")

    def _gaps(self, count: int) -> FloatArray:
        return self._rng.standard_exponential(count) / self.rate


class Gamma(Renewal):
    """Gamma gaps of mean 1 / rate and coefficient of variation ``cv`` (1 is Poisson).

    A larger ``cv`` gives bursts: shape 1 / cv^2, scale cv^2 / rate.
    """

    def __init__(self, rate: float, cv: float, streams: RngStreams) -> None:
        super().__init__()
        self.rate = checked_rate(rate)
        require_finite("cv", cv, 0.0, CV_MAX, open_low=True)
        self.cv = cv
        self._rng = streams.stream("arrivals")

    def _gaps(self, count: int) -> FloatArray:
        return self._rng.standard_gamma(1.0 / self.cv**2, count) * (self.cv**2 / self.rate)


class Constant(ArrivalProcess):
    """Request k arrives at k / rate, the first one at 0."""

    def __init__(self, rate: float) -> None:
        self.rate = checked_rate(rate)
        self._next = 0

    def next_block(self, count: int) -> FloatArray:
        times = np.arange(self._next, self._next + count) / self.rate
        self._next += count
        return times


class OnOff(ArrivalProcess):
    """A Poisson process whose rate is switched by a two-state Markov chain.

    Sojourns in both states are exponential; the chain starts in its stationary law and
    the mean rate over time is ``rate``. Times are exact: points of a unit Poisson process
    are mapped through the inverse of the integrated rate.

    Args:
        rate: mean rate over on and off phases, req/s.
        on_s, off_s: mean length of a phase, seconds.
        off_share: rate in off phases over that in on phases, in [0, 1).

    Raises:
        SpecError: for values out of range, or phases so short that a request would see
            more than 1000 of them (that is a Poisson process).
    """

    def __init__(self, rate: float, on_s: float, off_s: float, off_share: float, streams: RngStreams) -> None:
        checked_rate(rate)
        for key, value in (("on_s", on_s), ("off_s", off_s)):
            require_finite(key, value, 0.0, 1e9, open_low=True)
            if value * rate * PHASES_PER_REQUEST_MAX < 1.0:
                low = 1.0 / (rate * PHASES_PER_REQUEST_MAX)
                raise SpecError(key, value, f">= {low:g} s at rate {rate:g}")
        require_finite("off_share", off_share, 0.0)
        if off_share >= 1.0:
            raise SpecError("off_share", off_share, "in [0, 1)")
        self.on_rate = rate * (on_s + off_s) / (on_s + off_share * off_s)
        self._mean_s = (on_s, off_s)
        self._rates = (self.on_rate, self.on_rate * off_share)
        self._points = streams.stream("arrivals")
        self._phases = streams.stream("arrivals.phases")
        self._last_point = 0.0
        self._state = 0 if self._phases.random() * (on_s + off_s) < on_s else 1
        self._ends_s = np.zeros(1)
        self._integral = np.zeros(1)

    def next_block(self, count: int) -> FloatArray:
        points = np.cumsum(np.concatenate(([self._last_point], self._points.standard_exponential(count))))[1:]
        if not count:
            return points
        self._last_point = float(points[-1])
        while self._integral[-1] <= self._last_point:
            self._extend()
        times: FloatArray = np.interp(points, self._integral, self._ends_s)
        # Only the phase of the last point on can still be needed.
        first = max(0, int(np.searchsorted(self._integral, self._last_point, side="right")) - 1)
        self._ends_s, self._integral = self._ends_s[first:], self._integral[first:]
        return times

    def _extend(self) -> None:
        """Append 512 on and 512 off phases to the integrated rate."""
        states = (self._state + np.arange(1024)) % 2
        lengths_s = self._phases.standard_exponential(1024) * np.take(self._mean_s, states)
        self._ends_s = np.concatenate((self._ends_s, _continue(self._ends_s[-1], lengths_s)))
        gained = lengths_s * np.take(self._rates, states)
        self._integral = np.concatenate((self._integral, _continue(self._integral[-1], gained)))


def _continue(last: float, steps: FloatArray) -> FloatArray:
    return np.cumsum(np.concatenate(([last], steps)))[1:]


def checked_rate(rate: float) -> float:
    """The rate, req/s.

    Raises:
        SpecError: for 0, negative, nan, inf, or beyond 1e-9 to 1e9.
    """
    require_finite("rate", rate, RATE_MIN, RATE_MAX)
    return float(rate)


def first_times(process: ArrivalProcess, count: int) -> FloatArray:
    """The first ``count`` times of a new process."""
    return process.next_block(count)


def times_until(process: ArrivalProcess, duration_s: float) -> FloatArray:
    """All times before ``duration_s`` of a new process.

    Raises:
        SpecError: when there are more than 10 million.
    """
    blocks: list[FloatArray] = []
    total = 0
    while True:
        block = process.next_block(BLOCK)
        blocks.append(block[block < duration_s])
        total += len(blocks[-1])
        if total > REQUESTS_MAX:
            raise SpecError("duration_s", duration_s, f"short enough for at most {REQUESTS_MAX} requests")
        if len(blocks[-1]) < BLOCK:
            return np.concatenate(blocks)


def rescaled(arrival_s: FloatArray, rate: float) -> FloatArray:
    """Recorded times, stretched evenly to the mean rate ``rate`` from the first time on.

    Raises:
        SpecError: when the times have no span.
    """
    checked_rate(rate)
    if len(arrival_s) < 2 or arrival_s[-1] <= arrival_s[0]:
        raise SpecError("rate", rate, "null for a replay whose times have no span to stretch")
    own = (len(arrival_s) - 1) / (arrival_s[-1] - arrival_s[0])
    return np.asarray(arrival_s[0] + (arrival_s - arrival_s[0]) * (own / rate), dtype=np.float64)
