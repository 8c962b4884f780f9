"""Lines and bars, drawn with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.figures import style
from analysis.figures.charts import Axis, BarChart, Bars, Floats, Line, Rule, XYChart
from analysis.figures.draw import legend_columns, legend_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_IN = 2.0
LEGEND_ROW_IN = 0.145
BAR_IN = 0.34
LABEL_SHIFT = 0.36
MINOR_DECADES = 1.2
VALUE_ROOM = 1.16
RULE_ROOM = 0.4
RULE_COLOR = "#444444"


def new_figure(height_in: float) -> tuple[Figure, Axes]:
    """A figure of one column without pyplot's memory of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(style.COLUMN_IN, height_in))
    axes: Axes = figure.subplots()
    return figure, axes


def legend_below(figure: Figure, handles: list[Any], names: list[str]) -> None:
    """A legend outside the axes, so that it never covers data."""
    figure.legend(handles, names, loc="outside lower center", ncols=legend_columns(names))


def set_axis(axes: Axes, which: str, axis: Axis) -> None:
    """Label, scale, ends and ticks of one axis."""
    getattr(axes, f"set_{which}label")(axis.label)
    if axis.log:
        getattr(axes, f"set_{which}scale")("log")
    limits = {"x": ("left", "right"), "y": ("bottom", "top")}[which]
    for name, value in zip(limits, (axis.low, axis.high), strict=True):
        if value is not None:
            getattr(axes, f"set_{which}lim")(**{name: value})
    ticker = axes.xaxis if which == "x" else axes.yaxis
    if axis.log:
        _log_ticks(ticker, getattr(axes, f"get_{which}lim")())
    else:
        from matplotlib.ticker import MaxNLocator

        ticker.set_major_locator(MaxNLocator(nbins=6, integer=axis.whole, steps=[1, 2, 2.5, 5, 10]))


def _log_ticks(ticker: Any, limits: tuple[float, float]) -> None:
    """Plain numbers at decades, and at 2 and 5 where there are few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    few = np.log10(limits[1] / limits[0]) < 2 * MINOR_DECADES
    very_few = np.log10(limits[1] / limits[0]) < MINOR_DECADES
    subs = (1.0, 2.0, 3.0, 5.0, 7.0) if very_few else (1.0, 2.0, 5.0) if few else (1.0,)
    ticker.set_major_locator(LogLocator(subs=subs, numticks=20))
    ticker.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticker.set_minor_locator(LogLocator(subs="auto", numticks=20))
    ticker.set_minor_formatter(NullFormatter())


# -- lines --------------------------------------------------------------------------------


def draw_lines(chart: XYChart) -> Figure:
    """Lines over two axes."""
    names = [line.name for line in chart.lines if line.name]
    below = LEGEND_ROW_IN * legend_rows(names, legend_columns(names)) if len(names) > 1 else 0.0
    figure, axes = new_figure(PLOT_IN + below + 0.1)
    axes.set_xscale("log" if chart.x.log else "linear")
    axes.set_yscale("log" if chart.y.log else "linear")
    drawn = [(line, _draw_line(axes, line)) for line in chart.lines]
    handles = [handle for line, handle in drawn if line.name]
    _room_for_rules(axes, chart)
    set_axis(axes, "x", chart.x)
    set_axis(axes, "y", chart.y)
    for rule in chart.rules:
        _draw_rule(axes, rule)
    if len(names) > 1:
        legend_below(figure, handles, names)
    return figure


def _draw_line(axes: Axes, line: Line) -> Any:
    look = style.line_style(line.style)
    shared: dict[str, Any] = {"color": look.color, "drawstyle": "steps-post" if line.step else "default",
                              "label": line.name}
    if line.low is not None and line.high is not None:
        _draw_limits(axes, line, look.color)
    dashes: Any = (0, look.dashes) if look.dashes else "-"
    if line.scattered:
        dashes = ""
    handle = axes.plot(line.x, line.y, linestyle=dashes, zorder=2.5, clip_on=True, **shared)[0]
    if line.markers:
        marker = style.MATPLOTLIB_MARKERS[look.marker]
        hollow = line.hollow if line.hollow is not None else np.zeros(len(line.x), dtype=bool)
        for points, face in ((~hollow, look.color), (hollow, "white")):
            if not points.any():
                continue
            axes.plot(line.x[points], line.y[points], linestyle="", marker=marker, markerfacecolor=face,
                      markeredgecolor=look.color, markeredgewidth=0.8, zorder=3, clip_on=False)
        handle = _with_marker(line.name, look.color, dashes, marker)
    return handle


def _with_marker(name: str, color: str, dashes: Any, marker: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=dashes, marker=marker, label=name)


def _draw_limits(axes: Axes, line: Line, color: str) -> None:
    assert line.low is not None
    assert line.high is not None
    if line.band:
        axes.fill_between(line.x, line.low, line.high, step="post" if line.step else None, color=color,
                          alpha=0.15,
                          linewidth=0)
        return
    low, high = _reaches(line.y, line.low, line.high)
    axes.errorbar(line.x, line.y, yerr=[low, high], linestyle="", ecolor=color, elinewidth=0.7, capsize=1.8,
                  capthick=0.7)


def _reaches(y: Floats, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Lengths of whiskers; none where a limit is not known."""
    return np.nan_to_num(np.maximum(y - low, 0.0)), np.nan_to_num(np.maximum(high - y, 0.0))


def _room_for_rules(axes: Axes, chart: XYChart) -> None:
    """Widen the axes so that limits are seen, unless that would squeeze the data."""
    for which, vertical, axis in (("x", True, chart.x), ("y", False, chart.y)):
        values = [rule.value for rule in chart.rules if rule.vertical == vertical]
        low, high = getattr(axes, f"get_{which}lim")()
        for value in values:
            near = value <= high * (30 if axis.log else 3) and (not axis.log or value >= low / 30)
            if near:
                low, high = min(low, value), max(high, value * (1.15 if axis.log else 1.05))
        getattr(axes, f"set_{which}lim")(low, high)


def _draw_rule(axes: Axes, rule: Rule) -> None:
    low, high = axes.get_xlim() if rule.vertical else axes.get_ylim()
    if not low <= rule.value <= high:
        return
    look: dict[str, Any] = {"color": RULE_COLOR, "linewidth": 0.8, "linestyle": (0, (2.0, 1.0)), "zorder": 2}
    halo = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    text: dict[str, Any] = {"fontsize": style.SMALL_PT - 0.5, "color": RULE_COLOR, "bbox": halo, "zorder": 4}
    if rule.vertical:
        axes.axvline(rule.value, **look)
        # On the side that has room.
        right = place_on(axes.get_xscale(), rule.value, low, high) < 0.5
        axes.annotate(rule.label, (rule.value, 0.02), xycoords=("data", "axes fraction"),
                      textcoords="offset points",
                      xytext=(2.5 if right else -2.5, 2), rotation=90, ha="left" if right else "right",
                      va="bottom",
                      **text)
    else:
        axes.axhline(rule.value, **look)
        upper = place_on(axes.get_yscale(), rule.value, low, high) > 0.85
        axes.annotate(rule.label, (0.01, rule.value), xycoords=("axes fraction", "data"),
                      textcoords="offset points",
                      xytext=(1, -2.5 if upper else 2.5), va="top" if upper else "bottom", ha="left", **text)


def place_on(scale: str, value: float, low: float, high: float) -> float:
    """Where a value is on an axis, as a share of its length."""
    if scale == "log":
        value, low, high = np.log(value), np.log(low), np.log(high)
    return (value - low) / (high - low)


# -- bars ---------------------------------------------------------------------------------


def draw_bars(chart: BarChart) -> Figure:
    """Horizontal bars, each below its own label, so that labels may be long."""
    names = [series.name for series in chart.series]
    below = LEGEND_ROW_IN * legend_rows(names, legend_columns(names)) + 0.05 if len(names) > 1 else 0.0
    room = BAR_IN * RULE_ROOM if chart.rules else 0.0
    figure, axes = new_figure(0.62 + BAR_IN * len(chart.categories) + room + below)
    rows = np.arange(len(chart.categories), dtype=np.float64)
    start = np.zeros(len(rows))
    handles = []
    for series in chart.series:
        handles.append(_draw_series(axes, series, rows, start))
        start = start + np.nan_to_num(series.values)
    set_axis(axes, "x", chart.axis)
    top = max([float(start.max(initial=0.0)), *(rule.value for rule in chart.rules),
               *(_highest(series) for series in chart.series)])
    # The figure behind each bar needs room; ticks end where the axis does.
    axes.set_xlim(0.0, (chart.axis.high or top or 1.0) * VALUE_ROOM)
    if chart.axis.high is not None:
        axes.set_xticks([tick for tick in axes.get_xticks() if 0.0 <= tick <= chart.axis.high * 1.001])
    axes.set_ylim(len(rows) - 0.62, -0.62 - (RULE_ROOM if chart.rules else 0.0))
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    for row, name in enumerate(chart.categories):
        axes.annotate(name, (0.0, row - LABEL_SHIFT), xycoords=("axes fraction", "data"), xytext=(2, 0),
                      textcoords="offset points", va="center", ha="left", fontsize=style.SMALL_PT,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4}, zorder=4)
    _write_totals(axes, chart, rows, start)
    for rule in chart.rules:
        _draw_bar_rule(axes, rule)
    if len(names) > 1:
        legend_below(figure, handles, names)
    return figure


def _draw_bar_rule(axes: Axes, rule: Rule) -> None:
    """A limit, named above the first bar: bars have labels of their own."""
    axes.axvline(rule.value, color=RULE_COLOR, linewidth=0.8, linestyle=(0, (2.0, 1.0)), zorder=2.7)
    low, high = axes.get_xlim()
    left = place_on("linear", rule.value, low, high) > 0.5
    axes.annotate(rule.label, (rule.value, 1.0), xycoords=("data", "axes fraction"),
                  xytext=(-2 if left else 2, -1),
                  textcoords="offset points", ha="right" if left else "left", va="top", color=RULE_COLOR,
                  fontsize=style.SMALL_PT - 0.5)


def _draw_series(axes: Axes, series: Bars, rows: Floats, start: Floats) -> Any:
    look = style.fill_style(series.fill)
    values = np.nan_to_num(series.values)
    handle = axes.barh(rows + 0.06, values, height=0.44, left=start, color=look.color, edgecolor="white",
                       linewidth=0.4, hatch=style.MATPLOTLIB_HATCHES[look.hatch], zorder=2.5)
    if series.low is not None and series.high is not None:
        low, high = _reaches(series.values, series.low, series.high)
        axes.errorbar(values, rows + 0.06, xerr=[low, high], linestyle="", ecolor="black", elinewidth=0.8,
                      capsize=2.0, capthick=0.8, zorder=3)
    return handle


def _write_totals(axes: Axes, chart: BarChart, rows: Floats, total: Floats) -> None:
    """The figure of each bar behind its end."""
    ends = total.copy()
    for series in chart.series:
        if series.high is not None:
            ends = np.fmax(ends, series.high)
    known = np.isfinite(np.sum([series.values for series in chart.series], axis=0))
    for row, end, value, is_known in zip(rows, ends, total, known, strict=True):
        axes.annotate(number_text(value) if is_known else "unknown", (end, row + 0.06), xytext=(3, 0),
                      textcoords="offset points", va="center", ha="left", fontsize=style.SMALL_PT - 0.5)


def number_text(value: float) -> str:
    """Three significant figures, without an exponent where that is short."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _highest(series: Bars) -> float:
    return 0.0 if series.high is None else float(np.nan_to_num(series.high).max(initial=0.0))
