"""Does the number of requests in the system grow? Then latencies measure the length of the run.

N(t) is known exactly from arrival and finish times. Its slope is that of the least-squares
line over the arrival window, by integrals, without sampling. The interval of the slope must
survive the correlation of N(t): a regression on N, or on averages of it, treats a queue that
wanders near capacity as a trend. The slope is also a weighted sum of the increments of N
over blocks of time, with weights 6 u (1 - u) / T at relative time u. In a queue that never
empties these increments are nearly independent (arrivals less departures of a block); in
a stable one they cancel, which the interval then overstates. So it errs to the safe side: few
false alarms, and "undetermined" where the run is too short.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hetis_sim.metrics.intervals import CONFIDENCE, UNKNOWN, Interval

Floats = NDArray[np.float64]
Verdict = Literal["saturated", "stable", "undetermined"]

BLOCKS = 10
ARRIVALS_MIN = 50
GROWTH_MIN = 0.01
"""Share of arrivals that must stay behind for growth to matter."""
STABLE_MAX = 0.05
"""Share of arrivals that the interval must exclude to call a queue stable."""


@dataclass(frozen=True, slots=True)
class Saturation:
    """Growth of the number in the system.

    Attributes:
        verdict: ``saturated``, ``stable`` or ``undetermined``.
        growth_per_s: slope of N(t), requests per second.
        growth_interval: its 95 % interval.
        arrival_rate_per_s: over the same window.
        from_s, to_s: the window: arrivals, less the time in which the system fills up.
        sentence: the verdict in words.
    """

    verdict: Verdict
    growth_per_s: float
    growth_interval: Interval
    arrival_rate_per_s: float
    from_s: float
    to_s: float
    sentence: str


def saturation(arrival_s: Floats, end_s: Floats, first_scheduled_s: Floats) -> Saturation:
    """Judge a run by its requests.

    The window runs from the first arrival, plus the 95th percentile of the time from first
    being scheduled to the end (an idle system fills up for that long at any load), to the
    last arrival. Where that leaves less than half, the second half is used, and the run is
    called saturated only when the number of requests not yet scheduled grows as well.

    Args:
        arrival_s: times of arrival.
        end_s: when each request left the system, by finishing or by rejection.
        first_scheduled_s: nan for requests that never were.
    """
    if len(arrival_s) < ARRIVALS_MIN or arrival_s.max() <= arrival_s.min():
        return Saturation("undetermined", math.nan, UNKNOWN, math.nan, math.nan, math.nan,
                          f"too few requests ({len(arrival_s)}) to tell whether the queue grows")
    first, last = float(arrival_s.min()), float(arrival_s.max())
    service = (end_s - first_scheduled_s)[np.isfinite(first_scheduled_s)]
    fill = float(np.percentile(service, 95)) if len(service) else 0.0
    filling = fill > (last - first) / 2
    start = first + min(fill, (last - first) / 2)
    slope, interval = growth(arrival_s, end_s, start, last)
    rate = float((arrival_s >= start).sum()) / (last - start)
    verdict = _verdict(slope, interval, rate)
    if filling:
        scheduled_s = np.where(np.isfinite(first_scheduled_s), first_scheduled_s, end_s)
        queue_grows = _verdict(*growth(arrival_s, scheduled_s, start, last), rate) == "saturated"
        verdict = "saturated" if verdict == "saturated" and queue_grows else "undetermined"
    sentence = _sentence(verdict, slope, interval, filling)
    return Saturation(verdict, slope, interval, rate, start, last, sentence)


def growth(arrival_s: Floats, end_s: Floats, start_s: float, stop_s: float) -> tuple[float, Interval]:
    """Slope of the number in the system between two times, per second, and its interval."""
    from scipy.special import stdtrit

    length = stop_s - start_s
    middle = (start_s + stop_s) / 2
    low, high = np.clip(arrival_s, start_s, stop_s) - middle, np.clip(end_s, start_s, stop_s) - middle
    slope = float(((high**2 - low**2) / 2).sum()) * 12 / length**3
    edges = np.linspace(start_s, stop_s, BLOCKS + 1)
    number = (np.searchsorted(np.sort(arrival_s), edges, side="right")
              - np.searchsorted(np.sort(end_s), edges, side="right"))
    u = (np.arange(BLOCKS) + 0.5) / BLOCKS
    weights = 6 * u * (1 - u) / length
    error = float(np.diff(number).std(ddof=1) * np.sqrt((weights**2).sum()))
    reach = float(stdtrit(BLOCKS - 1, (1 + CONFIDENCE) / 2)) * error
    return slope, Interval(slope - reach, slope + reach)


def _verdict(slope: float, interval: Interval, rate: float) -> Verdict:
    if interval.low > 0 and slope > GROWTH_MIN * rate:
        return "saturated"
    return "stable" if interval.high <= STABLE_MAX * rate else "undetermined"


def _sentence(verdict: Verdict, slope: float, interval: Interval, filling: bool) -> str:
    figures = f"{slope:.2g} requests/s (95 % interval {interval.low:.2g} to {interval.high:.2g})"
    if verdict == "saturated":
        return f"the queue grows by {figures}: latencies depend on the length of the run"
    if verdict == "stable":
        return f"the queue does not grow: slope {figures}"
    if filling:
        return "the run is too short to tell whether the queue grows: arrivals end while the system fills"
    return f"the run is too short to tell whether the queue grows: {figures}"
