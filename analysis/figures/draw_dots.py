"""Dot plots, drawn with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.figures import style
from analysis.figures.charts import DotChart, Dots, Floats
from analysis.figures.draw import legend_columns, legend_rows
from analysis.figures.draw_marks import LEGEND_ROW_IN, RULE_COLOR, legend_below, new_figure, set_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW_IN = 0.07
SERIES_IN = 0.085
FRAME_IN = 0.55


def draw_dots(chart: DotChart) -> Figure:
    """Points in rows, the first row on top, series from top to bottom within a row."""
    names = [series.name for series in chart.series]
    below = LEGEND_ROW_IN * legend_rows(names, legend_columns(names)) + 0.05 if len(names) > 1 else 0.0
    height = (ROW_IN + SERIES_IN * max(1, len(names))) * len(chart.rows)
    figure, axes = new_figure(FRAME_IN + height + below)
    axes.set_xscale("log" if chart.axis.log else "linear")
    rows = np.arange(len(chart.rows), dtype=np.float64)
    share = SERIES_IN / (ROW_IN + SERIES_IN * max(1, len(names)))
    handles = [_draw_series(axes, series, rows + share * (number - (len(names) - 1) / 2))
               for number, series in enumerate(chart.series)]
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(rows, chart.rows)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    for border in rows[1:] - 0.5:
        axes.axhline(border, color="#dddddd", linewidth=0.4, zorder=1)
    _room(axes, chart)
    set_axis(axes, "x", chart.axis)
    for rule in chart.rules:
        _draw_rule(axes, rule.label, rule.value)
    if len(names) > 1:
        legend_below(figure, handles, names)
    return figure


def _draw_series(axes: Axes, series: Dots, places: Floats) -> Any:
    look = style.line_style(series.style)
    marker: Any = style.MATPLOTLIB_MARKERS[look.marker]
    if series.low is not None and series.high is not None:
        reach = [np.nan_to_num(np.maximum(series.values - series.low, 0.0)),
                 np.nan_to_num(np.maximum(series.high - series.values, 0.0))]
        axes.errorbar(series.values, places, xerr=reach, linestyle="", ecolor=look.color, elinewidth=0.8,
                      capsize=1.6, capthick=0.8, zorder=2.5)
    return axes.plot(series.values, places, linestyle="", marker=marker, color=look.color, label=series.name,
                     zorder=3)[0]


def _room(axes: Axes, chart: DotChart) -> None:
    """Widen the axis so that all rules are seen."""
    low, high = axes.get_xlim()
    for rule in chart.rules:
        low, high = min(low, rule.value * (0.95 if rule.value > 0 else 1.0)), max(high, rule.value * 1.05)
    axes.set_xlim(low, high)


def _draw_rule(axes: Axes, label: str, value: float) -> None:
    """A line with its name above the plot."""
    axes.axvline(value, color=RULE_COLOR, linewidth=0.8, linestyle=(0, (2.0, 1.0)), zorder=2)
    axes.annotate(label, (value, 1.0), xycoords=("data", "axes fraction"), xytext=(1, -1),
                  textcoords="offset points", ha="left", va="top", rotation=90, color=RULE_COLOR,
                  fontsize=style.SMALL_PT - 1)
