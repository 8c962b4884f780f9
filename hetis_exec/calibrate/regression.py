"""Least relative errors: coefficients, errors on points that were held out, and what a fit is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import linprog

from hetis_sim.cost.profile import MODELS

Floats = npt.NDArray[np.float64]
Predict = Callable[[pd.DataFrame], Floats]

FOLDS = 4
POINTS_MIN = 4


@dataclass(frozen=True)
class Fitted:
    """One module of one device, link or host.

    Attributes:
        coefficients: the form for a profile.
        ranges: of the points it was fitted to.
        errors: relative, of every held-out point; with its sign, predicted over measured.
        points, samples: how many it was fitted to.
    """

    module: str
    subject: str
    coefficients: dict[str, Any]
    ranges: dict[str, tuple[float, float]]
    errors: Floats
    points: int
    samples: int
    note: str = ""

    @property
    def median(self) -> float:
        """Median absolute error; nan where nothing could be held out."""
        return float(np.median(np.abs(self.errors))) if len(self.errors) else float("nan")

    @property
    def p95(self) -> float:
        """Its 95th percentile."""
        return float(np.quantile(np.abs(self.errors), 0.95)) if len(self.errors) else float("nan")

    def body(self, source: str) -> dict[str, Any]:
        """The form for a profile file."""
        held_out = {"n": len(self.errors), "median": _short(self.median), "p95": _short(self.p95),
                    "rows": f"each of {FOLDS} parts of the groups, by a fit to the others"}
        return {"model": MODELS[self.module], "status": "measured", "coefficients": self.coefficients,
                "range": {key: list(ends) for key, ends in self.ranges.items()},
                "held_out": held_out if len(self.errors) else None, "sources": [{"text": source}],
                "note": self.note}


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def ends_of(values: Any) -> tuple[float, float]:
    """Least and largest."""
    return float(np.min(values)), float(np.max(values))


def least_relative(columns: Sequence[Floats], seconds: Floats, power: float = 0.0,
                   known: Floats | float = 0.0) -> Floats:
    """Coefficients >= 0 of the columns for which the mean of |predicted / measured - 1| is least.

    Args:
        power: errors count in proportion to this power of the time: with 0 all alike, with 1 by what they
            cost.
        known: the part of the prediction that is not fitted.
    """
    weights = (seconds / seconds.mean()) ** power
    design = np.column_stack(columns) / seconds[:, None]
    scale = np.maximum(np.abs(design).max(axis=0), 1e-300)
    count, width = len(seconds), len(columns)
    identity, rest = np.eye(count), np.ones(count) - known / seconds
    found = linprog(
        np.concatenate([np.zeros(width), weights]),
        A_ub=np.block([[design / scale, -identity], [-design / scale, -identity]]),
        b_ub=np.concatenate([rest, -rest]), bounds=[(0, None)] * (width + count),
        method="highs")
    coefficients: Floats = np.asarray(found.x[:width]) / scale
    return coefficients


def held_out_errors(rows: pd.DataFrame, group: Sequence[str], fit: Callable[[pd.DataFrame], Predict],
                    least: int = POINTS_MIN - 1) -> Floats:
    """Signed relative error of every row, predicted by a fit to the other parts of the groups.

    Of at least so many rows.
    """
    keys = rows[list(group)].apply(tuple, axis=1)
    groups = sorted(set(keys))
    parts = {key: n % min(FOLDS, len(groups)) for n, key in enumerate(groups)}
    part = keys.map(parts).to_numpy()
    errors: list[Floats] = []
    for number in sorted(set(parts.values())):
        known, unseen = rows[part != number], rows[part == number]
        if len(known) >= least:
            errors.append(fit(known)(unseen) / unseen["seconds"].to_numpy() - 1.0)
    return np.concatenate(errors) if errors else np.empty(0)
