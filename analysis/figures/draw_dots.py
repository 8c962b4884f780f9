"""Dot plots, drawn with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.figures import style
from analysis.figures.charts import DotChart, Dots, Floats, Rule
from analysis.figures.draw import legend_columns, legend_rows
from analysis.figures.draw_marks import (
    LEGEND_ROW_IN,
    RULE_COLOR,
    legend_below,
    new_figure,
    place_on,
    set_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW_IN = 0.07
SERIES_IN = 0.085
RULE_IN = 0.11
FRAME_IN = 0.55
MARGIN = 0.06


def draw_dots(chart: DotChart) -> Figure:
    """Points in rows, the first row on top, series from top to bottom within a row.

    Rules have their names above the first row, each on a line of its own.
    """
    names = [series.name for series in chart.series]
    below = LEGEND_ROW_IN * legend_rows(names, legend_columns(names)) + 0.05 if len(names) > 1 else 0.0
    row_in = ROW_IN + SERIES_IN * max(1, len(names))
    above = RULE_IN * len(chart.rules)
    figure, axes = new_figure(FRAME_IN + row_in * len(chart.rows) + above + below)
    axes.set_xscale("log" if chart.axis.log else "linear")
    rows = np.arange(len(chart.rows), dtype=np.float64)
    handles = [_draw_series(axes, series, rows + SERIES_IN / row_in * (number - (len(names) - 1) / 2))
               for number, series in enumerate(chart.series)]
    axes.set_ylim(len(rows) - 0.5, -0.5 - above / row_in)
    axes.set_yticks(rows, chart.rows)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    for border in rows - 0.5:
        axes.axhline(border, color="#dddddd", linewidth=0.4, zorder=1)
    axes.set_xlim(*_limits(chart))
    set_axis(axes, "x", chart.axis)
    for number, rule in enumerate(chart.rules):
        _draw_rule(axes, rule, -0.5 - RULE_IN * (len(chart.rules) - number - 0.5) / row_in)
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


def _limits(chart: DotChart) -> tuple[float, float]:
    """Ends of the axis: all points, their limits and all rules, with a margin."""
    columns = [column for series in chart.series for column in (series.values, series.low, series.high)
               if column is not None]
    found = np.concatenate([*columns, np.array([rule.value for rule in chart.rules])])
    found = found[np.isfinite(found) & ((found > 0) | (not chart.axis.log))]
    if not len(found):
        return (0.5, 2.0)
    low, high = float(found.min()), float(found.max())
    if chart.axis.log:
        low, high = np.log(low), np.log(high)
    margin = MARGIN * ((high - low) or 1.0)
    ends = low - margin, high + margin
    return (float(np.exp(ends[0])), float(np.exp(ends[1]))) if chart.axis.log else ends


def _draw_rule(axes: Axes, rule: Rule, place: float) -> None:
    """A line from its name downwards; the name is on the side that has room."""
    axes.axvline(rule.value, color=RULE_COLOR, linewidth=0.8, linestyle=(0, (2.0, 1.0)), zorder=2)
    low, high = axes.get_xlim()
    right = place_on(axes.get_xscale(), rule.value, low, high) < 0.5
    halo = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
    axes.annotate(rule.label, (rule.value, place), xytext=(2 if right else -2, 0), textcoords="offset points",
                  ha="left" if right else "right", va="center", color=RULE_COLOR, bbox=halo, zorder=2.2,
                  fontsize=style.SMALL_PT - 0.5)
