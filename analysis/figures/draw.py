"""Charts drawn for print with matplotlib, one column wide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.figures import style
from analysis.figures.charts import (
    BarChart,
    Chart,
    Diagram,
    DotChart,
    HeatMap,
    ScatterChart,
    SpanChart,
    XYChart,
)
from hetis_sim.spec.errors import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("pdf", "svg", "png")
PNG_DPI = 200
METADATA: dict[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None, "Creator": "hetis", "Producer": None},
    "svg": {"Date": None, "Creator": "hetis"},
    "png": {"Software": None},
}


@contextmanager
def print_style() -> Iterator[None]:
    """Matplotlib's settings for figures of one column, for as long as the block lasts."""
    import matplotlib as mpl

    settings: Any = style.parameters()
    with mpl.rc_context(settings):
        yield


def save_chart(chart: Chart, folder: str | Path, formats: Sequence[str] = ("pdf", "svg")) -> list[Path]:
    """Draw a chart into ``folder/KEY.FORMAT``; equal charts give equal bytes.

    Raises:
        SpecError: a format that is not one of pdf, svg and png.
    """
    for name in formats:
        require(name in FORMATS, "formats", name, f"one of {', '.join(FORMATS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with print_style():
        figure = draw_chart(chart)
        for name in formats:
            path = folder / f"{chart.key}.{name}"
            figure.savefig(path, format=name, dpi=PNG_DPI, metadata=METADATA[name])
            paths.append(path)
    return paths


def draw_chart(chart: Chart) -> Figure:
    """A figure of any chart, in matplotlib's present settings; see :func:`print_style`."""
    from analysis.figures.draw_dots import draw_dots
    from analysis.figures.draw_marks import draw_bars, draw_lines
    from analysis.figures.draw_places import draw_diagram, draw_map, draw_spans
    from analysis.figures.draw_scatter import draw_scatter

    drawers: dict[type[Chart], Callable[[Any], Figure]] = {
        XYChart: draw_lines, BarChart: draw_bars, DotChart: draw_dots, HeatMap: draw_map,
        ScatterChart: draw_scatter, SpanChart: draw_spans, Diagram: draw_diagram}
    figure = drawers[type(chart)](chart)
    # A corner of the figure itself says what the numbers are, wherever it is pasted.
    text = f"{chart.origin}{f', {chart.note}' if chart.note else ''}"
    _corner(figure, text)
    return figure


def _corner(figure: Figure, text: str) -> None:
    axes = figure.axes[0]
    axes.set_title(text, loc="right", fontsize=style.SMALL_PT - 1, color="#666666", pad=3)


def legend_rows(names: Sequence[str], columns: int) -> int:
    """Rows that a legend of so many columns takes."""
    return math.ceil(len(names) / columns)


def legend_columns(names: Sequence[str]) -> int:
    """Columns of a legend below a figure of one column: as many as the longest name lets in."""
    longest = max((len(name) for name in names), default=0)
    return 1 if longest > 22 else 2 if longest > 12 else 3
