"""Which requests are measured, and over which time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetis_sim.metrics.columns import Table
from hetis_sim.spec.errors import require, require_finite


@dataclass(frozen=True, slots=True)
class Trim:
    """What to leave out at the ends of a run, which starts and ends with an empty system.

    The default leaves nothing out, as ``vllm bench serve`` does.

    Attributes:
        warmup_fraction: share of the requests, first by arrival, that are not measured.
        drop_tail_fraction: share of the requests, last by arrival, that are not measured.
    """

    warmup_fraction: float = 0.0
    drop_tail_fraction: float = 0.0

    def __post_init__(self) -> None:
        require_finite("warmup_fraction", self.warmup_fraction, 0.0, 1.0)
        require_finite("drop_tail_fraction", self.drop_tail_fraction, 0.0, 1.0)
        require(self.warmup_fraction + self.drop_tail_fraction < 1,
                "drop_tail_fraction", self.drop_tail_fraction,
                f"such that warmup_fraction={self.warmup_fraction} and it leave something to measure")


@dataclass(frozen=True, slots=True)
class Window:
    """The measured part of a run.

    Attributes:
        warmup_fraction, drop_tail_fraction: as asked for.
        first, last: measured requests are those numbered first to last (exclusive) by arrival.
        dropped_warmup, dropped_tail: how many are left out at either end.
        from_s: arrival of the first measured request.
        to_s: arrival of the first request of the dropped tail, or when the last request left.
        sentence: all this in words.
    """

    warmup_fraction: float
    drop_tail_fraction: float
    first: int
    last: int
    dropped_warmup: int
    dropped_tail: int
    from_s: float
    to_s: float
    sentence: str

    @property
    def duration_s(self) -> float:
        """Length of the window."""
        return self.to_s - self.from_s

    @property
    def trimmed(self) -> bool:
        """Whether anything is left out."""
        return self.dropped_warmup + self.dropped_tail > 0

    def covers(self, times_s: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which times lie in the window; the end counts only where nothing is dropped there."""
        inside = (times_s >= self.from_s) & (times_s <= self.to_s)
        return inside & (times_s < self.to_s) if self.dropped_tail else inside


def left_s(requests: Table) -> NDArray[np.float64]:
    """When each request left the system: its finish, or its arrival where it was turned away at once."""
    finish_s, arrival_s = requests["finish_s"], requests["arrival_s"]
    return np.where(np.isnan(finish_s), arrival_s, finish_s)


def measured_window(requests: Table, trim: Trim, horizon_s: float | None = None) -> Window:
    """Cut the ends off a run.

    Args:
        requests: all that ended, in order of arrival.
        trim: what to leave out.
        horizon_s: when the run was stopped, if it was stopped before all had ended.
    """
    n = len(requests)
    first, tail = int(n * trim.warmup_fraction), int(n * trim.drop_tail_fraction)
    if n == 0:
        return Window(trim.warmup_fraction, trim.drop_tail_fraction, 0, 0, 0, 0, 0.0, horizon_s or 0.0,
                      "no requests")
    end_s = float(left_s(requests).max()) if horizon_s is None else horizon_s
    from_s = float(requests["arrival_s"][first])
    to_s = float(requests["arrival_s"][n - tail]) if tail else end_s
    return Window(trim.warmup_fraction, trim.drop_tail_fraction, first, n - tail, first, tail, from_s, to_s,
                  _sentence(n, first, tail))


def _sentence(n: int, first: int, tail: int) -> str:
    if not first and not tail:
        return f"all {n} requests measured, from the first arrival to the last end"
    return (f"{n - first - tail} of {n} requests measured: without the first {first} and the last {tail} "
            "by arrival")
