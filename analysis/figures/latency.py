"""Latencies: distributions of each run, and how they rise with the load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.figures.charts import Axis, Chart, Floats, Line, Rule, XYChart
from analysis.figures.loads import SEEDS_MIN, Point, load_points, load_unit
from analysis.figures.runs import ReportRun, origin_of
from hetis_sim.metrics.itl import Segments

METRICS = {"ttft": "time to first token (TTFT)", "tpot": "time per output token (TPOT)",
           "itl": "inter-token latency (ITL)", "e2el": "end-to-end latency (E2EL)"}
LIMITED = ("ttft", "tpot")
POINTS = 240
TAIL_POINTS = 60


def cdf_charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """Cumulative distributions of the four latencies, one line a run."""
    return [chart for metric in METRICS if (chart := _cdf_chart(metric, runs)) is not None]


def _cdf_chart(metric: str, runs: Sequence[ReportRun]) -> XYChart | None:
    lines = []
    for i, run in enumerate(runs):
        x, share = _itl_shares(run) if metric == "itl" else _shares(_latencies(run, metric))
        if len(x):
            lines.append(Line(run.name, x, share, i, step=metric != "itl"))
    if not lines:
        return None
    name = METRICS[metric]
    left_out = sum(run.summary["requests"]["rejected"] for run in runs)
    caption = f"Cumulative distribution of the {name} of measured requests that finished"
    caption += ", all gaps between tokens in one pool." if metric == "itl" else "."
    if left_out:
        caption += f" {left_out} rejected requests have no latency and are not in it."
    return XYChart(key=f"cdf-{metric}", title=name[0].upper() + name[1:], caption=caption,
                   origin=origin_of(runs),
                   x=Axis(f"{metric.upper()} (s)", log=all(float(line.x[0]) > 0 for line in lines)),
                   y=Axis("share of gaps" if metric == "itl" else "share of requests", low=0.0, high=1.0),
                   lines=lines, rules=slo_rules(runs, metric, vertical=True))


def _latencies(run: ReportRun, metric: str) -> Floats:
    values = np.asarray(run.measured[f"{metric}_s"], dtype=np.float64)
    return np.sort(values[np.isfinite(values)])


def _shares(ascending: Floats) -> tuple[Floats, Floats]:
    """Quantiles, the tail in finer steps; every sample where they are few."""
    n = len(ascending)
    if n == 0:
        return ascending, ascending
    share = np.arange(1, n + 1) / n
    if n <= POINTS + TAIL_POINTS:
        return np.r_[ascending[:1], ascending], np.r_[0.0, share]
    wanted = np.concatenate([np.linspace(0.0, 0.98, POINTS), np.linspace(0.98, 1.0, TAIL_POINTS)])
    index = np.unique(np.minimum((wanted * n).astype(np.int64), n - 1))
    return ascending[index], share[index]


def _itl_shares(run: ReportRun) -> tuple[Floats, Floats]:
    gaps = run.run.records().itl
    if run.window.trimmed:
        gaps = gaps.rows(run.window.covers(gaps.recorded_s))
    if not len(gaps):
        return np.zeros(0), np.zeros(0)
    low, high = float(gaps.low_s.min()), float(gaps.high_s.max())
    # Half of the points by value, half by share: neither steps nor the tail are lost.
    values = np.geomspace(max(low, 1e-9), max(high, 1e-9), POINTS // 2)
    by_share = [gaps.percentile_s(q) for q in np.linspace(0.0, 100.0, POINTS // 2)]
    x = np.unique(np.concatenate([values, by_share, [low, high]]))
    return x, np.array([_share_upto(gaps, float(value)) for value in x])


def _share_upto(gaps: Segments, value_s: float) -> float:
    return float(gaps.gaps_upto(value_s).sum()) / gaps.n


def slo_rules(runs: Sequence[ReportRun], metric: str, *, vertical: bool) -> list[Rule]:
    """The limit of the SLO on a latency, once for each that the runs have."""
    if metric not in LIMITED:
        return []
    limits = sorted({float(run.summary["slo"][f"{metric}_s"]) for run in runs})
    return [Rule(f"SLO {limit:g} s", limit, vertical) for limit in limits if np.isfinite(limit)]


# -- latency over load --------------------------------------------------------------------


def load_charts(runs: Sequence[ReportRun], bound: float | None = None) -> list[Chart]:
    """Latency, goodput, throughput and attainment over the load; none for a single load.

    Args:
        runs: those of one group make a line.
        bound: requests per second that no policy can exceed, drawn as a line.
    """
    unit = load_unit(runs)
    if unit is None:
        return []
    points = load_points(runs, unit)
    charts: list[Chart] = [
        _over_load(f"load-{metric}", f"p95 {metric.upper()} over load", f"p95 {metric.upper()} (s)", runs,
                   points, unit, _p95(metric), log=True, rules=slo_rules(runs, metric, vertical=False))
        for metric in LIMITED]
    bounds = [Rule("bound", bound)] if bound is not None else []
    charts.append(_over_load("load-goodput", "Goodput over load", "goodput (requests/s)", runs, points, unit,
                             _rate("request_goodput"), rules=bounds))
    charts.append(_over_load("load-requests", "Requests finished over load", "throughput (requests/s)", runs,
                             points,
                             unit, _rate("request_throughput"), rules=bounds))
    charts.append(_over_load("load-tokens", "Output tokens over load", "output (tokens/s)", runs, points,
                             unit,
                             _rate("output_throughput")))
    charts.append(_over_load("load-attainment", "SLO attainment over load", "share within the SLO", runs,
                             points,
                             unit, _attainment, high=1.0))
    return charts


Value = tuple[float | None, Sequence[float | None]]
Read = Callable[[Mapping[str, Any]], Value]
NO_LIMITS: tuple[None, None] = (None, None)


def _p95(metric: str) -> Read:
    def read(summary: Mapping[str, Any]) -> Value:
        figures = summary[f"{metric}_s"]
        return figures["p95"], figures["p95_interval"]

    return read


def _rate(name: str) -> Read:
    return lambda summary: (summary["throughput"][name], NO_LIMITS)


def _attainment(summary: Mapping[str, Any]) -> Value:
    return summary["slo"]["attainment"], summary["slo"]["attainment_interval"]


def _over_load(key: str, title: str, label: str, runs: Sequence[ReportRun], points: Mapping[str,
                                                                                            Sequence[Point]],
               unit: str, read: Read, *, log: bool = False, high: float | None = None,
               rules: Sequence[Rule] = ()) -> XYChart:
    lines = []
    for number, (group, own) in enumerate(points.items()):
        figures = np.array([point.figures(read) for point in own])
        hollow = np.array([point.saturated for point in own])
        low = np.where(figures[:, 1] > 0, figures[:, 1], np.nan) if log else figures[:, 1]
        limit = figures[:, 2] if high is None else np.minimum(figures[:, 2], high)
        lines.append(Line(group, np.array([point.load for point in own]), figures[:, 0], number, markers=True,
                          low=low, high=limit, hollow=hollow))
    several = any(len(point.runs) > 1 for own in points.values() for point in own)
    caption = f"{title}; " + ("means over seeds, with 95 % intervals across them where there are "
                              f"{SEEDS_MIN} or more"
                              if several else "95 % intervals of the one run, where it has them") + "."
    if any(line.hollow is not None and line.hollow.any() for line in lines):
        caption += " Hollow: the queue grew for as long as the run lasted, so the latency has no meaning."
    axis = Axis(f"load ({unit})", low=0.0, whole=unit == "users")
    return XYChart(key=key, title=title, caption=caption, origin=origin_of(runs), x=axis,
                   y=Axis(label, log=log, low=None if log else 0.0, high=high), lines=lines, rules=rules)
