"""Runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.figures.charts import Axis, BarChart, Bars, Chart, Floats, Rule
from analysis.figures.latency import slo_rules
from analysis.figures.runs import ReportRun, origin_of


def comparison_charts(runs: Sequence[ReportRun], bound: float | None = None) -> list[Chart]:
    """Throughput with goodput, and, for several runs, output tokens, p95 latencies and attainment."""
    charts: list[Chart] = [_goodput_chart(runs, bound)]
    if len(runs) > 1:
        charts.append(_bars(runs, "output-tokens", "Output tokens", "output (tokens/s)",
                            [_rate(run, "output_throughput") for run in runs]))
        charts += [_p95_chart(runs, metric) for metric in ("ttft", "tpot")]
        charts.append(_attainment_chart(runs))
    return charts


def _rate(run: ReportRun, name: str) -> float:
    value = run.summary["throughput"][name]
    return float("nan") if value is None else float(value)


def _names(runs: Sequence[ReportRun]) -> list[str]:
    return [run.name for run in runs]


def _goodput_chart(runs: Sequence[ReportRun], bound: float | None) -> BarChart:
    finished = np.array([_rate(run, "request_throughput") for run in runs])
    good = np.array([_rate(run, "request_goodput") for run in runs])
    rules = [] if bound is None else [Rule("bound", bound)]
    caption = ("Requests finished per second of the measured window, those that hold the SLO (goodput) and "
               "those that "
               "do not.")
    if bound is not None:
        caption += " No policy can exceed the bound."
    return BarChart(key="goodput", title="Throughput and goodput", caption=caption, origin=origin_of(runs),
                    axis=Axis("requests/s", low=0.0), categories=_names(runs),
                    series=[Bars("within the SLO", good, 0), Bars("outside", finished - good, 1)],
                    rules=rules)


def _bars(runs: Sequence[ReportRun], key: str, title: str, label: str, values: Sequence[float],
          limits: tuple[Floats, Floats] | None = None, rules: Sequence[Rule] = (), high: float | None = None,
          more: str = "") -> BarChart:
    low, high_limits = limits or (None, None)
    return BarChart(key=key, title=title, caption=f"{title} of the measured requests{more}.",
                    origin=origin_of(runs),
                    axis=Axis(label, low=0.0, high=high), categories=_names(runs),
                    series=[Bars(title, np.array(values), 0, low, high_limits)], rules=rules)


def _limits(intervals: Sequence[Sequence[float | None]]) -> tuple[Floats, Floats]:
    pairs = np.array([[np.nan if limit is None else limit for limit in pair] for pair in intervals])
    return pairs[:, 0], pairs[:, 1]


def _p95_chart(runs: Sequence[ReportRun], metric: str) -> BarChart:
    figures: list[Mapping[str, Any]] = [run.summary[f"{metric}_s"] for run in runs]
    values = [np.nan if own["p95"] is None else own["p95"] for own in figures]
    return _bars(runs, f"p95-{metric}", f"p95 {metric.upper()}", f"p95 {metric.upper()} (s)", values,
                 _limits([own["p95_interval"] for own in figures]), slo_rules(runs, metric, vertical=False),
                 more=", with the 95 % interval of the run where it has one")


def _attainment_chart(runs: Sequence[ReportRun]) -> BarChart:
    slos = [run.summary["slo"] for run in runs]
    values = [np.nan if slo["attainment"] is None else slo["attainment"] for slo in slos]
    return _bars(runs, "attainment", "SLO attainment", "share within the SLO", values,
                 _limits([slo["attainment_interval"] for slo in slos]), high=1.0,
                 more=", rejected ones counted against it, with the 95 % interval where the run has one")
