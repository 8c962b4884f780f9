"""What a validation shows: errors with their noise, every request in both worlds, and distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.figures.charts import (
    Axis,
    Chart,
    DotChart,
    Dots,
    Floats,
    Line,
    Points,
    Rule,
    ScatterChart,
    XYChart,
)

METRICS = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2EL"}
ORIGIN = "simulated and measured"
STATISTICS = ("mean", "p95")
CAPTION_NOISE = ("Whiskers are 95 % bootstrap intervals over requests; those of real against real are what "
                 "runs of the same requests differ by.")


def validation_charts(cases: Sequence[Mapping[str, Any]], requests: pd.DataFrame) -> list[Chart]:
    """All figures.

    Args:
        cases: of ``validation.json``.
        requests: of ``requests.parquet``.
    """
    charts: list[Chart] = [error_chart(metric, cases) for metric in METRICS]
    charts += [scatter_chart(metric, requests) for metric in METRICS]
    policies = list(dict.fromkeys(str(case["policy"]) for case in cases))
    for n, policy in enumerate(policies):
        own = requests[requests["policy"] == policy]
        charts += [overlay_chart(metric, f"{n}-{metric}", policy, own) for metric in METRICS]
    return charts


def error_chart(metric: str, cases: Sequence[Mapping[str, Any]]) -> DotChart:
    """Signed errors at every load of every policy, with intervals, and the noise beside them."""
    rows = [f"{case['policy']}, {case['load']:.0%}" for case in cases]
    series: list[Dots] = []
    for statistic in STATISTICS:
        found = [_error(case, metric, statistic) for case in cases]
        value, low, high, least, most = (
            100.0 * np.array([_number(error, key) for error in found])
            for key in ("error", "low", "high", "noise_low", "noise_high"))
        series.append(Dots(f"{statistic}", value, len(series), low, high))
        middle = (least + most) / 2.0
        series.append(Dots(f"real against real, {statistic}", middle, len(series), least, most))
    return DotChart(
        key=f"error-{metric}", title=f"Error of {METRICS[metric]}", origin=ORIGIN,
        caption=f"Simulated over measured {METRICS[metric]}, less one, by load. {CAPTION_NOISE}",
        axis=Axis("error (%)"), rows=rows, series=series, rules=(Rule("no error", 0.0, vertical=True),))


def _error(case: Mapping[str, Any], metric: str, statistic: str) -> Mapping[str, Any]:
    return next((error for error in case["errors"]
                 if error["metric"] == metric and error["statistic"] == statistic), {})


def _number(error: Mapping[str, Any], key: str) -> float:
    value = error.get(key)
    return float("nan") if value is None else float(value)


def scatter_chart(metric: str, requests: pd.DataFrame) -> ScatterChart:
    """Every request: measured against simulated."""
    rows = requests[[f"{metric}_s", f"{metric}_s_sim", "policy"]].dropna()
    clouds = [Points(str(policy), part[f"{metric}_s"].to_numpy(), part[f"{metric}_s_sim"].to_numpy(), n)
              for n, (policy, part) in enumerate(rows.groupby("policy", sort=False))]
    name = METRICS[metric]
    return ScatterChart(
        key=f"scatter-{metric}", title=f"{name} of every request", origin=ORIGIN,
        caption=f"{name} of each request at all loads; on the line both are equal.",
        x=Axis(f"measured {name} (s)", log=True), y=Axis(f"simulated {name} (s)", log=True), clouds=clouds)


def overlay_chart(metric: str, key: str, policy: str, requests: pd.DataFrame) -> XYChart:
    """Distributions of both worlds, one pair of lines for each load."""
    lines: list[Line] = []
    for n, (load, part) in enumerate(requests.groupby("load")):
        share = f"{float(str(load)):.0%}"
        for world, column in (("measured", f"{metric}_s"), ("simulated", f"{metric}_s_sim")):
            x, y = _cumulated(part[column].dropna().to_numpy(dtype=np.float64))
            # The same colour and marker for both; the dashes of the next style for the simulated one.
            lines.append(Line(f"{share} {world}", x, y, n if world == "measured" else n + 7, step=True))
    name = METRICS[metric]
    return XYChart(
        key=f"cdf-{key}", title=f"{name}, {policy}", origin=ORIGIN, note=policy,
        caption=f"Cumulative distributions of {name} with {policy}, by load in shares of the capacity.",
        x=Axis(f"{name} (s)", log=True), y=Axis("share of requests", low=0.0, high=1.0), lines=lines)


def _cumulated(values: Floats) -> tuple[Floats, Floats]:
    ascending = np.sort(values)
    share = np.arange(1, len(ascending) + 1) / len(ascending)
    return np.r_[ascending[:1], ascending], np.r_[0.0, share]
