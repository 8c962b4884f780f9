"""Figures from run folders: what they show (charts), and how they are drawn for print."""

from analysis.figures.charts import (
    Arrow,
    Axis,
    BarChart,
    Bars,
    Box,
    Chart,
    Diagram,
    HeatMap,
    Line,
    Mark,
    Rule,
    Span,
    SpanChart,
    Text,
    XYChart,
)
from analysis.figures.draw import draw_chart, print_style, save_chart
from analysis.figures.runs import ReportRun, open_runs

__all__ = ["Arrow", "Axis", "BarChart", "Bars", "Box", "Chart", "Diagram", "HeatMap", "Line", "Mark",
           "ReportRun",
           "Rule", "Span", "SpanChart", "Text", "XYChart", "draw_chart", "open_runs", "print_style",
           "save_chart"]
