"""Charts as JSON for the page's own script."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from analysis.figures import style
from analysis.figures.charts import BarChart, Chart, Diagram, HeatMap, SpanChart, XYChart
from analysis.figures.placement import KINDS as BOX_KINDS

DIGITS = 7
"""Significant figures of positions, so that a short stretch of a long run can still be zoomed into."""

DIGITS_OF = {"y": 5, "low": 5, "high": 5, "values": 4}
"""The same of values, of which a plot shows no more; tables have their own."""

KINDS: dict[type[Chart], str] = {XYChart: "xy", BarChart: "bars", HeatMap: "heat", SpanChart: "spans",
                                 Diagram: "diagram"}


def chart_value(chart: Chart) -> dict[str, Any]:
    """A chart in plain types; what is left at its default is left out."""
    return {"kind": KINDS[type(chart)], **_plain(chart)}


def style_value() -> dict[str, Any]:
    """Colours, dashes, markers and hatches, so that screen and print look alike."""
    count = len(style.LINE_COLORS) ** 2
    return {"lines": [style.line_style(i)._asdict() for i in range(count)],
            "fills": [look._asdict() for look in style.FILLS], "heat": style.heat_colors(),
            "boxes": list(BOX_KINDS)}


def dump(value: Any) -> str:
    """JSON that may stand inside a script element of a page."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any, digits: int = DIGITS) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return _plain(value.item(), digits)
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return _rounded(value, digits)
    if isinstance(value, np.ndarray):
        return [_plain(item, digits) for item in value.tolist()]
    if is_dataclass(value) and not isinstance(value, type):
        found = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: _plain(item, DIGITS_OF.get(name, DIGITS)) for name, item in found.items()
                if not _is_empty(item)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, digits) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item, digits) for item in value]
    raise TypeError(f"no JSON for {type(value).__name__}")


def _is_empty(item: Any) -> bool:
    return item is None or item is False or (isinstance(item, (str, tuple, list)) and len(item) == 0)


def _rounded(value: float, digits: int) -> float | int | None:
    if not math.isfinite(value):
        return None
    if value == 0:
        return 0
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e15 else rounded
