"""Runs of one group at several loads, and of several seeds at one load."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.figures.runs import ReportRun

CONFIDENCE = 0.95
SEEDS_MIN = 3
"""Fewer seeds give no interval worth drawing: Student's factor is 12.7 for two, 4.3 for three."""


@dataclass(frozen=True)
class Point:
    """One load of one group: a run, or several that differ in their seed."""

    load: float
    runs: tuple[ReportRun, ...]

    @property
    def saturated(self) -> bool:
        """Whether the queue grew in any of the runs."""
        return any(run.saturated for run in self.runs)

    def figures(self, read: Callable[[Mapping[str, Any]], tuple[float | None, Sequence[float | None]]],
                ) -> tuple[float, float, float]:
        """A figure with its 95 % limits: across the seeds, or those of the only run."""
        values = [read(run.summary) for run in self.runs]
        if len(values) == 1:
            value, (low, high) = values[0]
            return _number(value), _number(low), _number(high)
        return across([_number(value) for value, _ in values])


def across(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of independent values that are never negative, and Student's 95 % limits.

    Values that are not known are left out; fewer than three have no limits (nan).
    """
    known = [value for value in values if math.isfinite(value)]
    if len(known) < SEEDS_MIN:
        return (sum(known) / len(known) if known else math.nan), math.nan, math.nan
    mean, low, high = student(known)
    return mean, max(low, 0.0), high


def student(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of two or more independent values, and Student's 95 % limits."""
    from scipy.special import stdtrit

    array = np.array(values, dtype=np.float64)
    mean, factor = float(array.mean()), float(stdtrit(len(array) - 1, (1 + CONFIDENCE) / 2))
    reach = factor * float(array.std(ddof=1)) / math.sqrt(len(array))
    return mean, mean - reach, mean + reach


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def load_unit(runs: Sequence[ReportRun]) -> str | None:
    """Unit of the load axis: that of which some group has several loads; None where none has."""
    for unit in ("requests/s", "users"):
        loads: dict[str, set[float]] = {}
        for run in runs:
            if run.load.unit == unit and math.isfinite(run.load.value):
                loads.setdefault(run.group, set()).add(run.load.value)
        if any(len(own) > 1 for own in loads.values()):
            return unit
    return None


def load_points(runs: Sequence[ReportRun], unit: str) -> dict[str, list[Point]]:
    """Points of each group, loads ascending."""
    found: dict[str, dict[float, list[ReportRun]]] = {}
    for run in runs:
        if run.load.unit == unit and math.isfinite(run.load.value):
            found.setdefault(run.group, {}).setdefault(run.load.value, []).append(run)
    return {group: [Point(load, tuple(own)) for load, own in sorted(by_load.items())]
            for group, by_load in found.items()}
