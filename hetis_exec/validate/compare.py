"""Errors of a simulation against what was measured: latencies, rates, and the parts of iterations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]

LATENCIES = ("ttft", "tpot", "e2el")
STATISTICS: Mapping[str, Callable[[Floats], Floats]] = {
    "mean": lambda values: values.mean(axis=-1),
    "p50": lambda values: np.quantile(values, 0.50, axis=-1),
    "p95": lambda values: np.quantile(values, 0.95, axis=-1),
    "p99": lambda values: np.quantile(values, 0.99, axis=-1),
}
PARTS = ("host", "dense", "attention", "head_transfer", "collective", "hop", "waiting")
LEVELS = (0.025, 0.975)


@dataclass(frozen=True, slots=True)
class Error:
    """One figure, measured and simulated.

    Attributes:
        error: simulated over measured, less one.
        low, high: 95 % bootstrap interval of the error over requests; nan for a figure of few runs.
        noise_low, noise_high: ends of the differences between real runs of the same requests: of each against
            the mean of the others; nan where nothing was run again.
        n: requests, or runs.
        paced, paced_low, paced_high: the error, with its interval, of a simulation whose times of computing
            are scaled by the pace of the machine that was measured beside the run; nan where it was not.
    """

    metric: str
    statistic: str
    measured: float
    simulated: float
    error: float
    low: float
    high: float
    noise_low: float
    noise_high: float
    n: int
    paced: float = math.nan
    paced_low: float = math.nan
    paced_high: float = math.nan

    @property
    def within_noise(self) -> bool | None:
        """Whether the error is no larger than what real runs differ by; None where that is not known."""
        return None if math.isnan(self.noise_low) else self.noise_low <= self.error <= self.noise_high


@dataclass(frozen=True, slots=True)
class Part:
    """Mean seconds of a part of an iteration of one kind.

    Measured, simulated, simulated at the machine's pace, and what the cost model gives the steps that were
    measured: that leaves out how requests meet. ``low_s`` and ``high_s`` are the least and the most of single
    real runs; ``same_paced_s`` is ``same_s`` with each step at the pace of its moment.
    """

    kind: str
    part: str
    measured_s: float
    simulated_s: float
    paced_s: float
    same_s: float
    low_s: float
    high_s: float
    same_paced_s: float = math.nan


def paired(measured: pd.DataFrame, simulated: pd.DataFrame) -> pd.DataFrame:
    """Requests that finished in both worlds, with columns ``ttft_s``, ``ttft_s_sim`` and so on.

    Both have ``seed``, ``request_id`` and, where runs were repeated, ``turn``.
    """
    keys = [key for key in ("seed", "turn", "request_id") if key in measured]
    columns = [*keys, *(f"{name}_s" for name in LATENCIES)]
    parts = [frame[frame["status"] == "finished"][columns] for frame in (measured, simulated)]
    return parts[0].merge(parts[1], on=keys, suffixes=("", "_sim"), validate="one_to_one")


def latency_errors(pairs: pd.DataFrame, resamples: int, seed: int,
                   paced: pd.DataFrame | None = None,
                   repeated: Sequence[Sequence[pd.DataFrame]] = ()) -> list[Error]:
    """Errors of all statistics of all latencies.

    Args:
        pairs: see :func:`paired`.
        resamples, seed: of the bootstrap, which draws requests with both of their times.
        paced: the same pairs with simulations at the machine's pace.
        repeated: requests of real runs; those of one group had the same requests.
    """
    found: list[Error] = []
    for name in LATENCIES:
        rows = _rows(pairs, name)
        if not len(rows):
            continue
        scaled = None if paced is None else _rows(paced, name)
        drawn = np.random.default_rng(seed).integers(len(rows), size=(resamples, len(rows)))
        columns = [[_finished(run, name) for run in group] for group in repeated]
        for statistic, work_out in STATISTICS.items():
            measured, simulated = (float(work_out(rows[:, side])) for side in (0, 1))
            low, high = _interval(rows, drawn, work_out)
            noise = spread_of([[float(work_out(run)) for run in group] for group in columns])
            paces: tuple[float, ...] = ()
            if scaled is not None and len(scaled) == len(rows):
                paces = (relative(float(work_out(scaled[:, 1])), measured),
                         *_interval(scaled, drawn, work_out))
            found.append(Error(name, statistic, measured, simulated, relative(simulated, measured), low, high,
                               *noise, len(rows), *paces))
    return found


def _rows(pairs: pd.DataFrame, name: str) -> Floats:
    rows: Floats = pairs[[f"{name}_s", f"{name}_s_sim"]].dropna().to_numpy(dtype=np.float64)
    return rows


def _finished(requests: pd.DataFrame, name: str) -> Floats:
    """A latency of the requests of a run that have finished."""
    done = requests[requests["status"] == "finished"]
    values: Floats = done[f"{name}_s"].dropna().to_numpy(dtype=np.float64)
    return values


def _interval(rows: Floats, drawn: npt.NDArray[np.int64],
              work_out: Callable[[Floats], Floats]) -> tuple[float, float]:
    spread = work_out(rows[drawn, 1]) / work_out(rows[drawn, 0]) - 1.0
    low, high = np.quantile(spread, LEVELS)
    return float(low), float(high)


def spread_of(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Ends of what each figure of a group differs by from the mean of the others; nan without others."""
    found = [relative(value, (sum(group) - value) / (len(group) - 1))
             for group in groups if len(group) > 1 for value in group]
    return (min(found), max(found)) if found else (math.nan, math.nan)


def relative(value: float, reference: float) -> float:
    """Signed relative error; nan against nothing."""
    return value / reference - 1.0 if reference else math.nan


def rate_errors(measured: Sequence[Mapping[str, float]], simulated: Sequence[Mapping[str, float]],
                resamples: int, seed: int, paced: Sequence[Mapping[str, float]] = (),
                repeated: Sequence[Sequence[Mapping[str, float]]] = ()) -> list[Error]:
    """Errors of figures that a run has one of: means over the runs, with a bootstrap over them.

    ``paced`` are simulations at the machine's pace; runs of a group of ``repeated`` had the same requests.
    """
    found: list[Error] = []
    for metric in measured[0]:
        pairs = zip(measured, simulated, strict=True)
        rows = np.array([[one[metric], other[metric]] for one, other in pairs])
        means = rows.mean(axis=0)
        low = high = math.nan
        if len(rows) > 1:
            drawn = np.random.default_rng(seed).integers(len(rows), size=(resamples, len(rows)))
            low, high = _interval(rows, drawn, lambda values: values.mean(axis=-1))
        scaled = math.nan
        if len(paced) == len(rows):
            scaled = relative(float(np.mean([one[metric] for one in paced])), float(means[0]))
        noise = spread_of([[run[metric] for run in group] for group in repeated])
        found.append(Error(metric, "mean", float(means[0]), float(means[1]),
                           relative(float(means[1]), float(means[0])), low, high, *noise, len(rows), scaled))
    return found


def parts_of(steps: pd.DataFrame, whole: bool = True) -> dict[tuple[str, str], float]:
    """Mean seconds of each part of an iteration, by kind.

    ``all`` is the whole of it or, where the steps were not simulated, the sum of the parts.
    """
    found: dict[tuple[str, str], float] = {}
    for kind, rows in steps.groupby("kind", observed=True):
        iterations = float(rows["iterations"].sum())
        for part in PARTS:
            found[str(kind), part] = float(rows[f"{part}_s"].sum()) / iterations
        took_s = float((rows["end_s"] - rows["start_s"]).sum()) / iterations
        found[str(kind), "all"] = took_s if whole else sum(found[str(kind), part] for part in PARTS)
        found[str(kind), "requests"] = float((rows["requests"] * rows["iterations"]).sum()) / iterations
    return found


def part_errors(measured: Sequence[pd.DataFrame], simulated: Sequence[pd.DataFrame],
                paced: Sequence[pd.DataFrame] = (), same: Sequence[pd.DataFrame] = (),
                same_paced: Sequence[pd.DataFrame] = ()) -> list[Part]:
    """Parts of iterations that occur in both worlds; a frame of steps for each run.

    ``same`` are the measured steps with the parts that the cost model gives them, ``same_paced`` these at the
    pace of their moment.
    """
    real, sim = (parts_of(pd.concat(frames, ignore_index=True)) for frames in (measured, simulated))
    scaled = parts_of(pd.concat(paced, ignore_index=True)) if paced else {}
    modelled, then = (parts_of(pd.concat(frames, ignore_index=True), whole=False) if frames else {}
                      for frames in (same, same_paced))
    single = [parts_of(frame) for frame in measured]

    def ends(key: tuple[str, str]) -> tuple[float, float]:
        values = [one[key] for one in single if key in one]
        return min(values), max(values)

    return [Part(*key, value, sim[key], scaled.get(key, math.nan), modelled.get(key, math.nan),
                 *ends(key), then.get(key, math.nan))
            for key, value in real.items() if key in sim]


def plain_error(value: Any) -> dict[str, Any]:
    """The fields of an :class:`Error` or :class:`Part`."""
    return {name: getattr(value, name) for name in value.__slots__}
