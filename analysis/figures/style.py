"""How figures look: colours, dashes, markers and sizes.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), which people with any
common colour blindness tell apart. None carries a meaning alone: lines differ in dashes and markers
too, and areas in hatching, so that figures survive grey print.
"""

from __future__ import annotations

from typing import Any, NamedTuple

COLUMN_IN = 3.3
"""Width of a column of a paper, inches."""

FONT_PT = 8.0
SMALL_PT = 7.0

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"

GREY = "#999999"


class LineStyle(NamedTuple):
    """Colour, dashes (on and off, in line widths; empty for solid) and marker of a line."""

    color: str
    dashes: tuple[float, ...]
    marker: str


class FillStyle(NamedTuple):
    """Colour and hatching of an area."""

    color: str
    hatch: str


LINE_COLORS = (BLUE, VERMILLION, BLACK, GREEN, ORANGE, PURPLE, SKY)
DASHES: tuple[tuple[float, ...], ...] = (
    (), (4.0, 1.6), (1.2, 1.2), (5.0, 1.4, 1.2, 1.4), (2.4, 1.0), (6.0, 1.2, 1.2, 1.2, 1.2, 1.2), (8.0, 2.0))
MARKERS = ("circle", "square", "up", "diamond", "down", "cross", "plus")

FILLS = (FillStyle(BLUE, ""), FillStyle(ORANGE, "rising"), FillStyle(GREEN, "falling"),
         FillStyle(PURPLE, "cross"), FillStyle(SKY, "dots"), FillStyle(VERMILLION, "level"),
         FillStyle(YELLOW, "upright"), FillStyle(GREY, ""))

MATPLOTLIB_MARKERS = {"circle": "o", "square": "s", "up": "^", "diamond": "D", "down": "v", "cross": "X",
                      "plus": "P"}
MATPLOTLIB_HATCHES = {"": "", "rising": "////", "falling": "\\\\\\\\", "cross": "xxxx", "dots": "....",
                      "level": "----", "upright": "||||"}

HEAT_MAP = "Blues"
"""Matplotlib's name of a scale of one hue, whose lightness falls evenly for every kind of colour vision."""
HEAT_COLORS = 32


def line_style(number: int) -> LineStyle:
    """Style of the n-th line; the first 49 all differ, neighbours in all three respects."""
    around = number // len(LINE_COLORS)
    return LineStyle(LINE_COLORS[number % len(LINE_COLORS)], DASHES[(number + around) % len(DASHES)],
                     MARKERS[(number + around) % len(MARKERS)])


def fill_style(number: int) -> FillStyle:
    """Style of the n-th area."""
    return FILLS[number % len(FILLS)]


def heat_colors() -> list[str]:
    """The scale of heat maps from least to most, as hexadecimal colours."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    scale = colormaps[HEAT_MAP]
    return [to_hex(scale(i / (HEAT_COLORS - 1))) for i in range(HEAT_COLORS)]


def parameters() -> dict[str, Any]:
    """Settings of matplotlib for figures of one column; equal charts give equal files.

    Text in PDF files stays text (TrueType); in SVG files it is outlines, which look the same
    wherever they are opened.
    """
    return {
        "font.family": "DejaVu Sans", "font.size": FONT_PT, "axes.labelsize": FONT_PT,
        "axes.titlesize": FONT_PT, "xtick.labelsize": SMALL_PT, "ytick.labelsize": SMALL_PT,
        "legend.fontsize": SMALL_PT, "legend.frameon": False, "legend.handlelength": 2.6,
        "legend.borderpad": 0.2, "legend.columnspacing": 1.2, "legend.handletextpad": 0.5,
        "legend.labelspacing": 0.3, "axes.linewidth": 0.6, "axes.spines.top": False,
        "axes.spines.right": False, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
        "xtick.minor.width": 0.4, "ytick.minor.width": 0.4, "xtick.major.size": 2.5,
        "ytick.major.size": 2.5, "xtick.minor.size": 1.5, "ytick.minor.size": 1.5,
        "lines.linewidth": 1.1, "lines.markersize": 3.6, "hatch.linewidth": 0.4,
        "axes.grid": True, "grid.linewidth": 0.4, "grid.color": "#dddddd", "axes.axisbelow": True,
        "figure.constrained_layout.use": True, "figure.constrained_layout.h_pad": 0.02,
        "figure.constrained_layout.w_pad": 0.02, "text.usetex": False, "mathtext.default": "regular",
        "pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "hetis",
    }
