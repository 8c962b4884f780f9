"""Clouds of points, drawn with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.figures import style
from analysis.figures.charts import ScatterChart
from analysis.figures.draw import legend_columns, legend_rows
from analysis.figures.draw_marks import LEGEND_ROW_IN, RULE_COLOR, legend_below, new_figure, set_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE_IN = 2.6
MARGIN = 1.15
POINT_PT = 2.2


def draw_scatter(chart: ScatterChart) -> Figure:
    """A square plot: both axes have the same ends, and equal values lie on the diagonal."""
    names = [cloud.name for cloud in chart.clouds]
    below = LEGEND_ROW_IN * legend_rows(names, legend_columns(names)) if len(names) > 1 else 0.0
    figure, axes = new_figure(SIDE_IN + below)
    values = np.concatenate([values for cloud in chart.clouds for values in (cloud.x, cloud.y)])
    low, high = float(values.min()), float(values.max())
    ends = (low / MARGIN, high * MARGIN) if chart.x.log else (0.0, high * MARGIN)
    axes.set_xscale("log" if chart.x.log else "linear")
    axes.set_yscale("log" if chart.y.log else "linear")
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.plot(ends, ends, color=RULE_COLOR, linewidth=0.7, zorder=1.5)
    handles: list[Any] = []
    for cloud in chart.clouds:
        look = style.line_style(cloud.style)
        marker: Any = style.MATPLOTLIB_MARKERS[look.marker]
        handles += axes.plot(cloud.x, cloud.y, linestyle="", marker=marker, markersize=POINT_PT,
                             markerfacecolor="none", markeredgecolor=look.color, markeredgewidth=0.6,
                             label=cloud.name)
    set_axis(axes, "x", chart.x)
    set_axis(axes, "y", chart.y)
    axes.set_aspect("equal")
    if len(names) > 1:
        legend_below(figure, handles, names)
    return figure
