"""Relative errors of a metric over many runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
SEED = 1


@dataclass(frozen=True)
class Errors:
    """Relative errors, simulated over measured less 1.

    Attributes:
        n: runs.
        signed_median: which way they go.
        median, p95: of the absolute errors.
        worst: (name, error), largest first.
        interval: of the median of absolute errors, 95 %; see :func:`bootstrap`.
    """

    n: int
    signed_median: float
    median: float
    p95: float
    worst: tuple[tuple[str, float], ...]
    interval: tuple[float, float]


def relative(measured: float, simulated: float) -> float:
    """Simulated over measured, less 1; both positive."""
    return simulated / measured - 1.0


def errors(named: Mapping[str, tuple[float, float]], most: int = 3) -> Errors | None:
    """Errors of (measured, simulated) by name of the run; None without any.

    Values that are not positive have no relative error and are left out. The name of a run begins with that
    of its machine, up to a comma.
    """
    found = {name: relative(a, b) for name, (a, b) in named.items() if a > 0.0 and b > 0.0}
    if not found:
        return None
    values = np.array(list(found.values()))
    worst = sorted(found.items(), key=lambda item: -abs(item[1]))[:most]
    return Errors(len(values), float(np.median(values)), float(np.median(np.abs(values))),
                  float(np.percentile(np.abs(values), 95)), tuple(worst), bootstrap(found))


def bootstrap(found: Mapping[str, float]) -> tuple[float, float]:
    """A 95 % interval of the median of absolute errors, by drawing machines anew.

    All runs of a machine come with it: they share its errors, and are no independent draws.
    """
    machines: dict[str, list[float]] = {}
    for name, error in found.items():
        machines.setdefault(name.partition(",")[0], []).append(abs(error))
    groups = [np.array(values) for values in machines.values()]
    rng = np.random.default_rng(SEED)
    drawn = rng.integers(len(groups), size=(DRAWS, len(groups)))
    medians = [float(np.median(np.concatenate([groups[n] for n in row]))) for row in drawn]
    low, high = np.percentile(medians, (2.5, 97.5)).tolist()
    return float(low), float(high)


def percentiles(values: Sequence[float], which: Sequence[float] = (50, 95, 99)) -> list[float]:
    """Percentiles by linear interpolation, as ``vllm bench serve`` has them."""
    return [float(value) for value in np.percentile(np.asarray(values, dtype=np.float64), which)]


def summary(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles of a metric of single requests, under the names of the metrics."""
    p50, p95, p99 = percentiles(values)
    return {f"mean_{name}_s": float(np.mean(np.asarray(values))), f"p50_{name}_s": p50, f"p95_{name}_s": p95,
            f"p99_{name}_s": p99}
