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
        noise: the same error of a second measurement against the first; nan where there was none.
        n: requests, or runs.
    """

    metric: str
    statistic: str
    measured: float
    simulated: float
    error: float
    low: float
    high: float
    noise: float
    n: int


@dataclass(frozen=True, slots=True)
class Part:
    """Mean seconds of a part of an iteration of one kind: measured, simulated, and measured again."""

    kind: str
    part: str
    measured_s: float
    simulated_s: float
    noise_s: float


def paired(measured: pd.DataFrame, simulated: pd.DataFrame) -> pd.DataFrame:
    """Requests that finished in both worlds, with columns ``ttft_s``, ``ttft_s_sim`` and so on.

    Both have ``seed`` and ``request_id``.
    """
    keys = ["seed", "request_id"]
    columns = [*keys, *(f"{name}_s" for name in LATENCIES)]
    parts = [frame[frame["status"] == "finished"][columns] for frame in (measured, simulated)]
    return parts[0].merge(parts[1], on=keys, suffixes=("", "_sim"), validate="one_to_one")


def latency_errors(pairs: pd.DataFrame, again: pd.DataFrame | None, resamples: int,
                   seed: int) -> list[Error]:
    """Errors of all statistics of all latencies.

    Args:
        pairs: see :func:`paired`.
        again: the same of a second measurement (as ``_sim``) against the first.
        resamples, seed: of the bootstrap, which draws requests with both of their times.
    """
    found: list[Error] = []
    for name in LATENCIES:
        rows = pairs[[f"{name}_s", f"{name}_s_sim"]].dropna().to_numpy(dtype=np.float64)
        noise = None if again is None else again[[f"{name}_s", f"{name}_s_sim"]].dropna().to_numpy()
        if not len(rows):
            continue
        drawn = np.random.default_rng(seed).integers(len(rows), size=(resamples, len(rows)))
        for statistic, work_out in STATISTICS.items():
            measured, simulated = (float(work_out(rows[:, side])) for side in (0, 1))
            spread = work_out(rows[drawn, 1]) / work_out(rows[drawn, 0]) - 1.0
            low, high = (float(value) for value in np.quantile(spread, LEVELS))
            found.append(Error(name, statistic, measured, simulated, relative(simulated, measured), low, high,
                               _noise(noise, work_out), len(rows)))
    return found


def _noise(rows: Floats | None, work_out: Callable[[Floats], Floats]) -> float:
    if rows is None or not len(rows):
        return math.nan
    return relative(float(work_out(rows[:, 1])), float(work_out(rows[:, 0])))


def relative(value: float, reference: float) -> float:
    """Signed relative error; nan against nothing."""
    return value / reference - 1.0 if reference else math.nan


def rate_errors(measured: Sequence[Mapping[str, float]], simulated: Sequence[Mapping[str, float]],
                again: Sequence[Mapping[str, float]], resamples: int, seed: int) -> list[Error]:
    """Errors of figures that a run has one of: means over the runs, with a bootstrap over them.

    ``again`` are second measurements of the first runs.
    """
    found: list[Error] = []
    for metric in measured[0]:
        pairs = zip(measured, simulated, strict=True)
        rows = np.array([[one[metric], other[metric]] for one, other in pairs])
        means = rows.mean(axis=0)
        low = high = math.nan
        if len(rows) > 1:
            drawn = np.random.default_rng(seed).integers(len(rows), size=(resamples, len(rows)))
            spread = rows[drawn, 1].mean(axis=1) / rows[drawn, 0].mean(axis=1) - 1.0
            low, high = (float(value) for value in np.quantile(spread, LEVELS))
        noise = math.nan
        if again:
            first = float(np.mean([one[metric] for one in measured[:len(again)]]))
            noise = relative(float(np.mean([one[metric] for one in again])), first)
        found.append(Error(metric, "mean", float(means[0]), float(means[1]), relative(means[1], means[0]),
                           low, high, noise, len(rows)))
    return found


def parts_of(steps: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Mean seconds of each part of an iteration, by kind; ``all`` is the whole of it."""
    found: dict[tuple[str, str], float] = {}
    for kind, rows in steps.groupby("kind", observed=True):
        iterations = float(rows["iterations"].sum())
        for part in PARTS:
            found[str(kind), part] = float(rows[f"{part}_s"].sum()) / iterations
        found[str(kind), "all"] = float((rows["end_s"] - rows["start_s"]).sum()) / iterations
        found[str(kind), "requests"] = float((rows["requests"] * rows["iterations"]).sum()) / iterations
    return found


def part_errors(measured: pd.DataFrame, simulated: pd.DataFrame, again: pd.DataFrame | None) -> list[Part]:
    """Parts of iterations that occur in both worlds."""
    real, sim = parts_of(measured), parts_of(simulated)
    second = {} if again is None else parts_of(again)
    return [Part(kind, part, value, sim[kind, part], second.get((kind, part), math.nan))
            for (kind, part), value in real.items() if (kind, part) in sim]


def plain_error(value: Any) -> dict[str, Any]:
    """The fields of an :class:`Error` or :class:`Part`."""
    return {name: getattr(value, name) for name in value.__slots__}
