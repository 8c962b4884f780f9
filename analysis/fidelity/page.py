"""The page: tables of errors, pictures, and the settings of each engine with their sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.fidelity.case import METRICS, Case, DataSet
from analysis.fidelity.errors import Errors, errors
from analysis.fidelity.switches import farthest
from analysis.figures.charts import Axis, Chart, Floats, Line, XYChart
from analysis.figures.draw import save_chart
from analysis.paper.section import table
from analysis.paper.store import code_hash

ORIGIN = "simulated and measured"
RUNS_MOST = 16
"""A data set with more runs has a table by groups of runs instead of one of single runs."""

REQUESTS_LEAST = 80
"""Requests of a run whose distributions are shown."""

WORST = 4
"""Runs farthest off that are shown with the parts of their steps."""

SCATTERS = {"output_throughput": ("throughput", "output throughput", "tokens/s", 1.0),
            "mean_tpot_s": ("tpot", "mean TPOT", "ms", 1e3), "p50_ttft_s": ("ttft", "median TTFT", "ms", 1e3)}


@dataclass(frozen=True)
class Compared:
    """A data set and what came of its runs: (run, answer or None, error).

    ``switched`` has metrics of the runs farthest off without one mechanism each, by run and mechanism.
    """

    given: DataSet
    runs: Sequence[tuple[Case, Mapping[str, Any] | None, str]]
    switched: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    def pairs(self, metric: str) -> dict[str, tuple[float, float]]:
        """(measured, simulated) by run, where both are known."""
        return {case.name: (case.measured[metric], answer["metrics"][metric])
                for case, answer, _ in self.runs
                if answer and metric in case.measured and metric in answer["metrics"]}

    def errors(self) -> dict[str, Errors]:
        """Errors by metric."""
        found = {metric: errors(self.pairs(metric)) for metric in METRICS}
        return {metric: error for metric, error in found.items() if error is not None}

    def document(self) -> dict[str, Any]:
        """Plain types."""
        found = {metric: {"n": e.n, "signed_median": e.signed_median, "median": e.median, "p95": e.p95,
                          "interval": list(e.interval), "worst": [list(item) for item in e.worst]}
                 for metric, e in self.errors().items()}
        return {"title": self.given.title, "origin": "simulated against measured by others", "errors": found,
                "switched": {run: {what: dict(metrics) for what, metrics in each.items()}
                             for run, each in self.switched.items()},
                "failed": {case.name: error for case, _, error in self.runs if error},
                "left_out": list(self.given.left_out),
                "settings": [list(row) for row in self.given.settings]}


def write_page(page: Path, pictures: Path, compared: Sequence[Compared], *, quick: bool = False,
               in_docs: bool = False, formats: Sequence[str] = ("svg",)) -> None:
    """Write ``page`` and the pictures that it shows."""
    page.parent.mkdir(parents=True, exist_ok=True)
    charts = [*scatters(compared), *distributions(compared)]
    if quick:
        charts = [replace(chart, note="quick") for chart in charts]
    for chart in charts:
        save_chart(chart, pictures, formats)
    text = page_text(compared, charts, pictures.relative_to(page.parent).as_posix(), quick=quick)
    page.write_text(text if in_docs else text.replace("](cost.md)", "](docs/cost.md)"), encoding="utf-8")


def page_text(compared: Sequence[Compared], charts: Sequence[Chart], pictures: str, *, quick: bool) -> str:
    """The page in Markdown."""
    hurry = "\n\n**A quick run: only some of the runs.**" if quick else ""
    parts = ["# How far off the simulator is",
             "Public measured runs, simulated as their engines are documented. **Simulated here against "
             "measured "
             "by others.** None of these runs was fitted to: durations come from the shipped profiles of "
             "kernels "
             "and links ([cost model](cost.md)), and every setting of an engine is stated below with where "
             "it "
             "comes from. Errors are simulated over measured, less 1; aims: throughput and mean TPOT within "
             "10 % at the median. `python -m analysis fidelity` makes this page anew (code "
             f"{code_hash('analysis.fidelity.measure')[:12]}).{hurry}",
             "## Overview", overview(compared)]
    shown = {chart.key: f"![{chart.title}]({pictures}/{chart.key}.svg)\n\n*{chart.caption}*"
             for chart in charts}
    parts += [text for key, text in shown.items() if key.startswith("scatter-")]
    for each in compared:
        parts += [f"## {each.given.title}", each.given.about, error_table(each)]
        parts.append(run_table(each) if len(each.runs) <= RUNS_MOST else group_table(each))
        parts += [text for key, text in shown.items() if key.startswith(f"cdf-{each.given.key}-")]
        parts += ["**What is off, and why.**", *each.given.findings, worst(each), switch_table(each)]
        failed = [f"{case.name}: {error.splitlines()[-1]}" for case, _, error in each.runs if error]
        if each.given.left_out or failed:
            parts.append("Left out: " + "; ".join([*each.given.left_out, *failed]) + ".")
        parts += ["**Settings.**", table(["of the engine", "here", "source"],
                                         [list(row) for row in each.given.settings], texts=3)]
    return "\n\n".join(part for part in parts if part) + "\n"


def percent(value: float, *, signed: bool = False) -> str:
    """With one digit where that says something."""
    digits = 0 if abs(value) >= 0.1 else 1
    return f"{100 * value:{'+' if signed else ''}.{digits}f} %"


def overview(compared: Sequence[Compared]) -> str:
    """The main metrics of all data sets."""
    main = ("output_throughput", "mean_tpot_s", "mean_ttft_s", "p50_ttft_s", "mean_e2el_s")
    rows = []
    for title, found in [*((each.given.title, each.errors()) for each in compared),
                         ("all runs", pooled(compared))]:
        rows.append([title, *(_median(found.get(metric)) for metric in main)])
    return ("Median absolute error [95 % interval] (signed median, runs):\n\n"
            + table(["data set", *(METRICS[m].partition(",")[0] for m in main)], rows)
            + "\n\nIntervals are bootstrapped over machines, since the runs of one share its errors. "
            "No run of these data was measured twice, so that nothing is known of the noise in them.")


def _median(error: Errors | None) -> str:
    if error is None:
        return "-"
    low, high = (percent(value) for value in error.interval)
    return (f"{percent(error.median)} [{low.removesuffix(' %')}, {high}] "
            f"({percent(error.signed_median, signed=True)}, n {error.n})")


def pooled(compared: Sequence[Compared]) -> dict[str, Errors]:
    """Errors of the runs of all data sets, by metric."""
    found = {metric: errors({f"{each.given.key} {name}": pair for each in compared
                             for name, pair in each.pairs(metric).items()}) for metric in METRICS}
    return {metric: error for metric, error in found.items() if error is not None}


def group_table(each: Compared) -> str:
    """Errors of the main metrics by groups of runs."""
    main = [metric for metric in ("output_throughput", "mean_tpot_s", "p50_ttft_s", "mean_e2el_s")
            if each.pairs(metric)]
    rows = []
    for group in dict.fromkeys(case.group for case, _, _ in each.runs):
        part = Compared(each.given, [run for run in each.runs if run[0].group == group]).errors()
        cells = [f"{percent(part[m].median)} ({percent(part[m].signed_median, signed=True)})"
                 if m in part else "-" for m in main]
        rows.append([group, str(max((e.n for e in part.values()), default=0)), *cells])
    return ("Median absolute error (signed median):\n\n"
            + table(["runs", "n", *(METRICS[m].partition(",")[0] for m in main)], rows))


def error_table(each: Compared) -> str:
    """All metrics of a data set."""
    rows = [[METRICS[metric], str(e.n), percent(e.signed_median, signed=True), percent(e.median),
             percent(e.p95), _named(e.worst[:2])] for metric, e in each.errors().items()]
    return table(["metric", "n", "signed median", "median", "p95", "largest"], rows)


def _named(found: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {percent(value, signed=True)}" for name, value in found)


def run_table(each: Compared) -> str:
    """Run by run, the main metrics."""
    main = [m for m in ("output_throughput", "mean_ttft_s", "p50_ttft_s", "mean_tpot_s", "p95_tpot_s",
                        "mean_e2el_s") if each.pairs(m)]
    rows = []
    for case, answer, _ in each.runs:
        if answer:
            rows.append([case.name, *(_cell(case, answer, metric) for metric in main)])
    return ("Measured / simulated (error); throughput in tokens/s, times in ms:\n\n"
            + table(["run", *(METRICS[m].partition(",")[0] for m in main)], rows))


def _cell(case: Case, answer: Mapping[str, Any], metric: str) -> str:
    if metric not in case.measured or metric not in answer["metrics"]:
        return "-"
    a, b = case.measured[metric], answer["metrics"][metric]
    scale = 1e3 if metric.endswith("_s") else 1.0
    return f"{_figure(a * scale)} / {_figure(b * scale)} ({percent(b / a - 1.0, signed=True)})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def worst(each: Compared) -> str:
    """The runs farthest off in throughput and TPOT, with where the simulator spent its time."""
    found = farthest([each.pairs(metric) for metric in ("output_throughput", "mean_tpot_s")], WORST)
    answers = {case.name: answer for case, answer, _ in each.runs if answer}
    measured = {case.name: case for case, _, _ in each.runs}
    parts = ("host", "dense", "collective", "attention", "hop", "waiting")
    rows = []
    for name in found:
        answer, case = answers[name], measured[name]
        shares = [percent(answer["parts"].get(part, 0.0)) for part in parts]
        rows.append([name, *(_cell(case, answer, m) for m in ("output_throughput", "mean_tpot_s")), *shares])
    return ("The runs farthest off, and the shares of the parts in the simulated steps:\n\n"
            + table(["run", "throughput", "mean TPOT", *parts], rows))


def switch_table(each: Compared) -> str:
    """What each mechanism does to the runs farthest off: errors without it."""
    whats = list(dict.fromkeys(what for found in each.switched.values() for what in found))
    measured = {case.name: case for case, _, _ in each.runs}
    whole = {case.name: answer["metrics"] for case, answer, _ in each.runs if answer}
    rows = []
    for name, found in each.switched.items():
        metrics = [whole[name], *(found.get(what) for what in whats)]
        rows.append([name, *("-" if m is None else _both(measured[name].measured, m) for m in metrics)])
    if not rows:
        return ""
    return ("Mechanisms taken away one at a time from these runs, errors of throughput / mean TPOT:\n\n"
            + table(["run", "with all", *(f"without {what}" for what in whats)], rows))


def _both(measured: Mapping[str, float], simulated: Mapping[str, float]) -> str:
    return " / ".join(percent(simulated[m] / measured[m] - 1.0, signed=True)
                      for m in ("output_throughput", "mean_tpot_s") if m in measured and m in simulated)


# -- pictures ---------------------------------------------------------------------------------


def scatters(compared: Sequence[Compared]) -> list[Chart]:
    """Simulated against measured, a picture for each main metric."""
    found: list[Chart] = []
    for metric, (key, name, unit, scale) in SCATTERS.items():
        lines = []
        ends: list[float] = []
        for style, each in enumerate(compared):
            pairs = np.array([pair for pair in each.pairs(metric).values() if min(pair) > 0.0]) * scale
            if len(pairs):
                lines.append(Line(each.given.title, pairs[:, 0], pairs[:, 1], style, markers=True,
                                  scattered=True))
                ends += [float(pairs.min()), float(pairs.max())]
        if not lines:
            continue
        span = np.array([min(ends) / 1.3, max(ends) * 1.3])
        guide = [Line("equal", span, span, 2), Line("10 % off", span, span * 1.1, 6),
                 Line("", span, span / 1.1, 6)]
        found.append(XYChart(key=f"scatter-{key}", title=f"{name}, simulated against measured",
                             caption=f"Each point is a run: {name} in {unit}. Dashed: 10 % off.",
                             origin=ORIGIN, x=Axis(f"measured {name} ({unit})", *ends_of(span)),
                             y=Axis(f"simulated ({unit})", *ends_of(span)), lines=[*lines, *guide]))
    return found


def ends_of(span: Floats) -> tuple[bool, float, float]:
    """What makes an axis logarithmic between two ends."""
    return True, float(span[0]), float(span[1])


def distributions(compared: Sequence[Compared]) -> list[Chart]:
    """Measured and simulated distributions over requests, where single requests were measured."""
    names = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "end-to-end latency"}
    found: list[Chart] = []
    for each in compared:
        for case, answer, _ in each.runs:
            metrics = [name for name in names if answer and min(
                len(case.samples.get(name, ())), len(answer["samples"].get(name, ()))) >= REQUESTS_LEAST]
            if not metrics or answer is None:
                continue
            lines = []
            for n, name in enumerate(metrics):
                scale = 10.0 if name == "tpot" else 1.0
                what = f"{names[name]} x 10" if name == "tpot" else names[name]
                for style, origin, values in ((2 * n, "measured", case.samples[name]),
                                              (2 * n + 1, "simulated", answer["samples"][name])):
                    ordered = np.maximum(np.sort(np.array(values)) * scale, 1e-3)
                    share = np.linspace(0.0, 1.0, len(ordered))
                    lines.append(Line(f"{what}, {origin}", ordered, share, style))
            key = "".join(c if c.isalnum() else "-" for c in case.name.lower())
            found.append(XYChart(key=f"cdf-{each.given.key}-{key}", title=f"Distributions of {case.name}",
                                 caption=f"{case.name}: share of requests with at most so much; TPOT ten "
                                         "times "
                                         "as long, to fit on the axis.", origin=ORIGIN, x=Axis("s", log=True),
                                 y=Axis("share of requests", low=0.0, high=1.0), lines=lines))
    return found
