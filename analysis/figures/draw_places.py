"""Maps, rows of time and diagrams, drawn with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.figures import style
from analysis.figures.charts import Box, Diagram, HeatMap, SpanChart
from analysis.figures.draw_marks import legend_below, new_figure, set_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW_IN = 0.13
MAP_MIN_IN, MAP_MAX_IN = 1.0, 3.2
SPAN_ROW_IN = 0.115
LABELS_PT = 6.5
NO_VALUE = "#d9d4cc"
DIAGRAM_PT = 6.5
BOX_FILLS = ("#D6E8F5", "#FBE7C0", "#E8E8E8")
BOX_EDGES = (style.BLUE, style.ORANGE, style.GREY)
MARK_SHAPES = ("v", "D", "^", "s", "o")


def draw_map(chart: HeatMap) -> Figure:
    """Rows of colours over time."""
    from matplotlib.colors import Normalize, PowerNorm

    height = min(max(ROW_IN * len(chart.rows), MAP_MIN_IN), MAP_MAX_IN)
    figure, axes = new_figure(height + 0.55)
    ceiling = chart.ceiling if chart.ceiling is not None else float(np.nanmax(chart.values,
                                                                              initial=0.0)) or 1.0
    axes.set_facecolor(NO_VALUE)
    mesh = axes.pcolormesh(chart.edges, np.arange(len(chart.rows) + 1), np.ma.masked_invalid(chart.values),
                           cmap=style.HEAT_MAP, rasterized=False, linewidth=0,
                           edgecolor="face", antialiased=False,
                           norm=PowerNorm(0.5, 0.0, ceiling) if chart.root else Normalize(0.0, ceiling))
    axes.set_ylim(len(chart.rows), 0)
    set_axis(axes, "x", chart.x)
    axes.set_xlim(chart.edges[0], chart.edges[-1])
    axes.grid(visible=False)
    _row_labels(axes, chart)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=18, shrink=min(1.0, 1.6 / height + 0.2))
    if chart.root:
        bar.set_ticks(_root_ticks(ceiling))
    bar.set_label(chart.scale.label, fontsize=style.SMALL_PT)
    bar.ax.tick_params(labelsize=LABELS_PT, width=0.5, length=2)
    bar.outline.set_linewidth(0.5)
    return figure


def _root_ticks(ceiling: float) -> list[float]:
    """Round values that do not crowd on a scale of square roots."""
    kept: list[float] = []
    for value in (0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
        if value <= ceiling and (not kept or np.sqrt(value) - np.sqrt(kept[-1]) > 0.1 * np.sqrt(ceiling)):
            kept.append(value)
    return kept


def _row_labels(axes: Axes, chart: HeatMap) -> None:
    if chart.groups:
        ends = [*(first for first, _ in chart.groups[1:]), len(chart.rows)]
        middles = [(first + end) / 2 for (first, _), end in zip(chart.groups, ends, strict=True)]
        # Groups of less than a line of text would print over one another.
        least = len(chart.rows) * ROW_IN / MAP_MAX_IN
        shown: list[int] = []
        for i, middle in enumerate(middles):
            if not shown or middle - middles[shown[-1]] >= least:
                shown.append(i)
        axes.set_yticks([middles[i] for i in shown], [chart.groups[i][1] for i in shown], fontsize=LABELS_PT)
        for first, _ in chart.groups[1:]:
            axes.axhline(first, color="#777777", linewidth=0.4)
    else:
        axes.set_yticks(np.arange(len(chart.rows)) + 0.5, chart.rows, fontsize=LABELS_PT)
    axes.tick_params(axis="y", length=0)


def draw_spans(chart: SpanChart) -> Figure:
    """Rows of stretches of time."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure, axes = new_figure(0.85 + SPAN_ROW_IN * len(chart.rows) + (0.15 if chart.mark_kinds else 0.0))
    handles: list[Any] = []
    for kind in range(len(chart.kinds)):
        look = style.fill_style(_span_fill(kind))
        own = [span for span in chart.spans if span.kind == kind]
        axes.barh([span.row for span in own], [span.end - span.start for span in own], height=0.72,
                  left=[span.start for span in own], color=look.color,
                  hatch=style.MATPLOTLIB_HATCHES[look.hatch],
                  edgecolor="white", linewidth=0.2, zorder=2)
        handles.append(Patch(facecolor=look.color, hatch=style.MATPLOTLIB_HATCHES[look.hatch],
                             edgecolor="white"))
    for kind in range(len(chart.mark_kinds)):
        at = [(mark.at, mark.row) for mark in chart.marks if mark.kind == kind]
        look_at: dict[str, Any] = {"marker": MARK_SHAPES[kind % len(MARK_SHAPES)], "color": "black",
                                   "linestyle": "",
                                   "markersize": 2.8, "markeredgecolor": "white", "markeredgewidth": 0.4}
        axes.plot([x for x, _ in at], [y for _, y in at], zorder=3, **look_at)
        handles.append(Line2D([], [], **{**look_at, "markersize": 4.0}))
    set_axis(axes, "x", chart.x)
    axes.set_ylim(len(chart.rows) - 0.4, -0.6)
    axes.set_yticks(range(len(chart.rows)), chart.rows, fontsize=LABELS_PT - 0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel(chart.row_label)
    axes.grid(visible=False, axis="y")
    legend_below(figure, handles, [*chart.kinds, *chart.mark_kinds])
    return figure


SPAN_FILLS = (6, 1, 0)


def _span_fill(kind: int) -> int:
    return SPAN_FILLS[kind % len(SPAN_FILLS)]


def draw_diagram(chart: Diagram) -> Figure:
    """Boxes and arrows; a unit is the same length in both directions."""
    from matplotlib.patches import Patch

    unit_in = style.COLUMN_IN / (chart.width + 0.4)
    figure, axes = new_figure(chart.height * unit_in + 0.42)
    axes.set_xlim(-0.2, chart.width + 0.2)
    axes.set_ylim(chart.height, 0)
    axes.set_aspect("equal")
    axes.axis("off")
    for arrow in chart.arrows:
        _draw_arrow(axes, arrow.points, plain=arrow.plain)
    for box in chart.boxes:
        _draw_box(axes, box)
    for text in chart.texts:
        axes.text(text.x, text.y, text.text, fontsize=style.SMALL_PT, va="center", ha="left")
    legend_below(figure, [Patch(facecolor=BOX_FILLS[_box_kind(name)], edgecolor=BOX_EDGES[_box_kind(name)])
                          for name in chart.kinds], list(chart.kinds))
    return figure


def _box_kind(name: str) -> int:
    """Fill of a kind of box by its name, so that a kind looks the same whatever others there are."""
    from analysis.figures.placement import KINDS

    return KINDS.index(name) if name in KINDS else len(KINDS) - 1


def _draw_box(axes: Axes, box: Box) -> None:
    from matplotlib.patches import Rectangle

    dashes: Any = ("-", (0, (4, 2)), (0, (1, 1)))[box.kind % 3]
    axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, facecolor=BOX_FILLS[box.kind % 3],
                             edgecolor=BOX_EDGES[box.kind % 3], linewidth=0.8, linestyle=dashes, zorder=2))
    spacing = box.height / (len(box.lines) + 0.6)
    for i, line in enumerate(box.lines):
        axes.text(box.x + box.width / 2, box.y + spacing * (i + 0.8), line, fontsize=DIAGRAM_PT, ha="center",
                  va="center", weight="bold" if i == 0 else "normal", zorder=3)


def _draw_arrow(axes: Axes, points: Any, *, plain: bool) -> None:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes.plot(xs, ys, color="#444444", linewidth=0.8, zorder=1, solid_joinstyle="miter")
    if not plain:
        axes.annotate("", xy=points[-1], xytext=points[-2], zorder=1.5,
                      arrowprops={"arrowstyle": "-|>", "color": "#444444", "linewidth": 0.8, "shrinkA": 0,
                                  "shrinkB": 0, "mutation_scale": 6})
