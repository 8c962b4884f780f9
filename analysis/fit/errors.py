"""Held-out error: the split, which rows count, and the figures that go into a profile."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

HELD_OUT_PERCENT = 25


@dataclass(frozen=True)
class HeldOut:
    """Absolute relative error |predicted / measured - 1| over rows that the fit did not see.

    ``n``, ``median`` and ``p95`` are over rows where the GPU is the limit; ``n_all``,
    ``median_all`` and ``p95_all`` over every held-out row. ``rows`` says how they were chosen.
    """

    n: int
    median: float
    p95: float
    n_all: int
    median_all: float
    p95_all: float
    rows: str

    def dump(self) -> dict[str, Any]:
        """The form for a profile file, errors to three digits."""
        return {key: float(f"{value:.3g}") if isinstance(value, float) else value
                for key, value in asdict(self).items()}


def held_out(rows: pd.DataFrame, group: list[str], salt: str = "") -> Mask:
    """True for about a quarter of the groups of equal ``group`` columns, chosen by a hash.

    Whole groups are held out, so that no near-duplicate of a held-out row is fitted on.
    """
    keys = rows[group].astype(str).agg("/".join, axis=1)
    table = {key: zlib.crc32(f"{salt}{key}".encode()) % 100 < HELD_OUT_PERCENT for key in sorted(set(keys))}
    return keys.map(table).to_numpy(dtype=bool)


def relative_error(predicted: Floats, measured: Floats) -> Floats:
    """|predicted / measured - 1|."""
    return np.abs(predicted / measured - 1.0)


def score(predicted: Floats, measured: Floats, counts: Mask, rows: str) -> HeldOut:
    """Figures over the rows given; ``counts`` marks those where the GPU is the limit."""
    error = relative_error(predicted, measured)
    if not counts.any():
        raise ValueError(f"no row left to score: {rows}")
    limited = error[counts]
    return HeldOut(len(limited), float(np.median(limited)), float(np.quantile(limited, 0.95)),
                   len(error), float(np.median(error)), float(np.quantile(error, 0.95)), rows)
