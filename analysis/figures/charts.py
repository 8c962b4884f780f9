"""What a figure shows, apart from how it is drawn.

A chart is described once. :mod:`analysis.figures.draw` draws it for print with matplotlib, and
the page of :mod:`analysis.report` draws it on a screen, so the two never differ in their figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

COLUMNS = 150
"""Stretches into which a long series is cut before it is thinned."""


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: name and unit.
        log: logarithmic.
        low, high: fixed ends; None leaves them to the data.
        whole: ticks at whole numbers only.
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    whole: bool = False


@dataclass(frozen=True)
class Line:
    """One series of points.

    Attributes:
        name: in the legend.
        x, y: of equal length; nan in ``y`` leaves a gap.
        style: number of its colour, dashes and marker.
        step: each value holds until the next x.
        markers: points are measurements, and are shown as such.
        low, high: limits of each y; nan where there is none on that side.
        band: draw the limits as an area, not as whiskers.
        hollow: points to draw hollow; none where left out.
        scattered: points that no line connects.
    """

    name: str
    x: Floats
    y: Floats
    style: int = 0
    step: bool = False
    markers: bool = False
    low: Floats | None = None
    high: Floats | None = None
    band: bool = False
    hollow: NDArray[np.bool_] | None = None
    scattered: bool = False


@dataclass(frozen=True)
class Rule:
    """A straight line across the whole plot: a limit, a bound, a border."""

    label: str
    value: float
    vertical: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What all charts have.

    Attributes:
        key: name of its files, unique in a report.
        title: heading on a page; figures for print have none, their caption says it.
        caption: what is shown and how it was worked out.
        origin: ``simulated``, ``measured`` or ``simulated and measured``; drawn into the figure.
        note: a word to add to that.
    """

    key: str
    title: str
    caption: str
    origin: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class XYChart(Chart):
    """Lines over two axes."""

    x: Axis
    y: Axis
    lines: Sequence[Line]
    rules: Sequence[Rule] = ()


@dataclass(frozen=True)
class Bars:
    """One series of bars, a value for each category, stacked upon the series before it.

    ``low`` and ``high`` are limits of each value and go with a single series only.
    """

    name: str
    values: Floats
    fill: int = 0
    low: Floats | None = None
    high: Floats | None = None


@dataclass(frozen=True, kw_only=True)
class BarChart(Chart):
    """Horizontal bars."""

    axis: Axis
    categories: Sequence[str]
    series: Sequence[Bars]
    rules: Sequence[Rule] = ()


@dataclass(frozen=True)
class Dots:
    """One series of points, a value for each row; nan where there is none.

    ``low`` and ``high`` are limits of each value.
    """

    name: str
    values: Floats
    style: int = 0
    low: Floats | None = None
    high: Floats | None = None


@dataclass(frozen=True, kw_only=True)
class DotChart(Chart):
    """Points in rows with names, several series beside each other in a row (Cleveland's dot plot)."""

    axis: Axis
    rows: Sequence[str]
    series: Sequence[Dots]
    rules: Sequence[Rule] = ()


@dataclass(frozen=True)
class Points:
    """One cloud of points: one value against another."""

    name: str
    x: Floats
    y: Floats
    style: int = 0


@dataclass(frozen=True, kw_only=True)
class ScatterChart(Chart):
    """Clouds of points over two axes of the same quantity, with the line on which both are equal."""

    x: Axis
    y: Axis
    clouds: Sequence[Points]


@dataclass(frozen=True, kw_only=True)
class HeatMap(Chart):
    """A value for each row and each stretch of the x axis.

    Attributes:
        edges: borders of the stretches, one more than columns.
        rows: labels.
        values: rows x columns; nan where there is none.
        scale: what a colour stands for, with unit.
        ceiling: value of the last colour; the largest there is where None.
        root: colours go by the square root of the values, so that small ones are told apart.
        groups: (first row, label) of runs of rows, which replace the labels where rows are many.
    """

    x: Axis
    edges: Floats
    rows: Sequence[str]
    values: Floats
    scale: Axis
    ceiling: float | None = None
    root: bool = False
    groups: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class Span:
    """A stretch of time on one row."""

    row: int
    start: float
    end: float
    kind: int


@dataclass(frozen=True)
class Mark:
    """An instant on one row."""

    row: int
    at: float
    kind: int


@dataclass(frozen=True, kw_only=True)
class SpanChart(Chart):
    """Stretches and instants of time, row by row (Gantt).

    Attributes:
        rows: labels, from top to bottom.
        row_label: what a row is.
        kinds, mark_kinds: names for the legend.
        notes: more on each row, for a reader who points at it.
    """

    x: Axis
    rows: Sequence[str]
    row_label: str
    kinds: Sequence[str]
    spans: Sequence[Span]
    mark_kinds: Sequence[str] = ()
    marks: Sequence[Mark] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Box:
    """A labelled rectangle; the first line is its heading. Units are those of the diagram."""

    x: float
    y: float
    width: float
    height: float
    lines: Sequence[str]
    kind: int
    note: str = ""


@dataclass(frozen=True)
class Arrow:
    """A line from one place to another, with a head at its end unless ``plain``."""

    points: Sequence[tuple[float, float]]
    plain: bool = False


@dataclass(frozen=True)
class Text:
    """A line of text that begins at a place."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Diagram(Chart):
    """Boxes and arrows. x runs to the right and y down, in units of a line of text."""

    width: float
    height: float
    kinds: Sequence[str]
    boxes: Sequence[Box]
    arrows: Sequence[Arrow] = ()
    texts: Sequence[Text] = field(default=())


def thinned(x: Floats, y: Floats, columns: int = COLUMNS) -> tuple[Floats, Floats]:
    """At most four points for each of ``columns`` stretches of x: first, last, least and largest.

    So a plot no wider than that many points looks as if all were drawn.

    Args:
        x: ascending.
        y: of equal length.
    """
    if len(x) <= 4 * columns:
        return x, y
    column = np.minimum(((x - x[0]) / (x[-1] - x[0]) * columns).astype(np.int64), columns - 1)
    order = np.arange(len(x))
    by_value = np.lexsort((y, column))
    starts = np.flatnonzero(np.r_[True, np.diff(column) > 0])
    ends = np.r_[starts[1:], len(x)] - 1
    kept = np.unique(np.concatenate([starts, ends, order[by_value][starts], order[by_value][ends]]))
    return x[kept], y[kept]
