"""Every figure of a report, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from analysis.figures.activity import activity_charts
from analysis.figures.charts import Chart
from analysis.figures.comparison import comparison_charts
from analysis.figures.gantt import gantt_chart
from analysis.figures.latency import cdf_charts, load_charts
from analysis.figures.placement import plan_chart
from analysis.figures.runs import ReportRun, origin_of
from analysis.figures.usage import busy_chart, device_charts, iteration_chart


def overall_charts(runs: Sequence[ReportRun], detailed: Sequence[ReportRun],
                   bound: float | None) -> list[Chart]:
    """Figures that show several runs, or the one run as a whole.

    Args:
        runs: all, for what is drawn over the load.
        detailed: those that get a line of their own in distributions and a bar among others.
        bound: requests per second that no policy can exceed.
    """
    charts = [*load_charts(runs, bound), *comparison_charts(detailed, bound), *cdf_charts(detailed)]
    parts = iteration_chart(detailed, origin_of(detailed))
    return charts + ([parts] if parts is not None else [])


def run_charts(run: ReportRun, window_s: tuple[float, float] | None) -> list[Chart]:
    """Figures of one run; their notes and keys do not name it."""
    found: list[Chart | None] = [plan_chart(run), *device_charts(run), busy_chart(run), *activity_charts(run),
                                 gantt_chart(run, window_s)]
    return [chart for chart in found if chart is not None]


def named_after(run: ReportRun, charts: Sequence[Chart]) -> list[Chart]:
    """The same charts with the run in their key and in the corner of their figures."""
    return [replace(chart, key=f"{run.slug}-{chart.key}", note=run.name) for chart in charts]
