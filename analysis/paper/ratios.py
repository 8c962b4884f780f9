"""Ratios of two policies, cell by cell, and the largest: what the paper calls "up to"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis.paper.evaluation import Cell
from analysis.paper.scale import cell_name
from hetis_sim.study.estimate import Estimate, ratio


@dataclass(frozen=True)
class CellRatio:
    """A ratio in one cell, over seeds; ``why`` says why there is none."""

    cell: Cell
    estimate: Estimate
    why: str = ""

    @property
    def known(self) -> bool:
        """Whether there is a figure."""
        return not math.isnan(self.estimate.mean)


def cell_ratio(cell: Cell, numerators: Sequence[float], denominators: Sequence[float],
               why: str = "") -> CellRatio:
    """Geometric mean of the ratios of seeds, with its 95 % interval."""
    return CellRatio(cell, ratio(numerators, denominators), why)


def missing(cell: Cell, why: str) -> CellRatio:
    """No figure, and the reason."""
    return CellRatio(cell, Estimate(math.nan, math.nan, math.nan, 0), why)


def largest(ratios: Sequence[CellRatio]) -> CellRatio | None:
    """The largest that is known."""
    return max((r for r in ratios if r.known), key=lambda r: r.estimate.mean, default=None)


def up_to(ratios: Sequence[CellRatio]) -> str:
    """``up to 1.31x [1.28, 1.33] (Llama-70B, ShareGPT)``."""
    best = largest(ratios)
    if best is None:
        return "none: " + (next((r.why for r in ratios if r.why), "") or "no cell has both figures")
    return f"up to {times(best.estimate)} ({cell_name(*best.cell)})"


def spread(ratios: Sequence[CellRatio]) -> str:
    """``0.82 to 1.31 over 9 cells``."""
    known = [r.estimate.mean for r in ratios if r.known]
    if not known:
        return ""
    return f"{min(known):.2f} to {max(known):.2f} over {len(known)} cell{'s' if len(known) > 1 else ''}"


def times(found: Estimate) -> str:
    """``1.62x [1.55, 1.69]``; without an interval where there is none."""
    if math.isnan(found.mean):
        return "-"
    if math.isnan(found.low):
        return f"{found.mean:.2f}x"
    return f"{found.mean:.2f}x [{found.low:.2f}, {found.high:.2f}]"


def by_cell(values: Mapping[Cell, CellRatio]) -> dict[str, str]:
    """Each ratio as text, or why there is none."""
    return {cell_name(*cell): times(r.estimate) if r.known else f"none: {r.why}" if r.why else "-"
            for cell, r in values.items()}
