"""From run folders to a folder with a page and figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.figures.catalogue import named_after, overall_charts, run_charts
from analysis.figures.charts import Chart
from analysis.figures.draw import FORMATS, save_chart
from analysis.figures.runs import ReportRun, model_name, open_runs, origin_of, section_name
from analysis.report.headline import headline, warnings
from analysis.report.page import Section, render
from analysis.report.tables import (
    comparison_table,
    identity_table,
    provenance_table,
    reason_table,
    run_tables,
)
from hetis_sim.metrics import rows
from hetis_sim.spec.errors import require, require_finite

PAGE = "report.html"
FIGURES = "figures"
DETAILS = 6


@dataclass(frozen=True)
class ReportOptions:
    """How a report is made.

    Attributes:
        formats: of the figures beside the page: pdf, svg, png; none for the page alone.
        details: runs that get a section of their own and a line in distributions, at most.
        bound: requests per second that no policy can exceed on this cluster; drawn as a line.
        window_s: the stretch of arrivals whose requests are shown one by one.
        title: heading of the page.

    Raises:
        SpecError: a value outside what is allowed.
    """

    formats: tuple[str, ...] = ("pdf", "svg")
    details: int = DETAILS
    bound: float | None = None
    window_s: tuple[float, float] | None = None
    title: str | None = None

    def __post_init__(self) -> None:
        for name in self.formats:
            require(name in FORMATS, "formats", name, f"of {', '.join(FORMATS)}")
        require(self.details >= 1, "details", self.details, ">= 1")
        if self.bound is not None:
            require_finite("bound", self.bound, 0.0, open_low=True)
        if self.window_s is not None:
            require_finite("window", self.window_s[0], 0.0)
            require_finite("window", self.window_s[1], self.window_s[0], open_low=True)


def build_report(paths: Sequence[str | Path], output: str | Path | None = None,
                 options: ReportOptions | None = None,
                 progress: Callable[[int, int], None] | None = None) -> Path:
    """Write ``report.html`` and ``figures/`` about some runs; equal runs give equal bytes.

    Args:
        paths: run folders, or folders of sweeps.
        output: where to; by default ``report`` in the run's folder, or beside several runs.
        options: by default everything.
        progress: called with the number of figures drawn, and of all.

    Returns:
        The page.

    Raises:
        SpecError: no run folder, an empty run, runs of different models, or a bad option.
    """
    options = options or ReportOptions()
    runs = open_runs(paths)
    folder = Path(output) if output is not None else default_output(runs)
    require(not folder.exists() or folder.is_dir(), "out", str(folder), "a folder, or nothing yet")
    sections = _sections(runs, options)
    page = render(options.title or _title(runs), headline(runs, options.bound), warnings(runs), sections,
                  _remarks(options))
    folder.mkdir(parents=True, exist_ok=True)
    charts = [chart for section in sections for chart in section.charts] if options.formats else []
    for drawn, chart in enumerate(charts, start=1):
        save_chart(chart, folder / FIGURES, options.formats)
        if progress is not None:
            progress(drawn, len(charts))
    partial = folder / f".{PAGE}.partial"
    partial.write_text(page, encoding="utf-8", newline="\n")
    partial.replace(folder / PAGE)
    return folder / PAGE


def default_output(runs: Sequence[ReportRun]) -> Path:
    """``report`` in the folder of the only run, or in the one that holds all of them."""
    if len(runs) == 1:
        return runs[0].run.path / "report"
    return Path(os.path.commonpath([run.run.path.parent for run in runs])) / "report"


def in_detail(runs: Sequence[ReportRun], most: int) -> list[ReportRun]:
    """The runs that are shown one by one.

    All of them where they are few. Otherwise one of each group, at the highest load that every
    group was run at without a growing queue (or, failing that, at its own highest load).
    """
    if len(runs) <= most:
        return list(runs)
    groups: dict[str, list[ReportRun]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    steady = [{run.load for run in own} - {run.load for run in own if run.saturated}
              for own in groups.values()]
    common = set.intersection(*steady)
    load = max(common, key=lambda one: one.value) if common else None
    chosen = []
    for own in groups.values():
        at_load = [run for run in own if run.load == load] or [max(own, key=lambda run: run.load.value)]
        chosen.append(at_load[0])
    return chosen[:most]


def _sections(runs: Sequence[ReportRun], options: ReportOptions) -> list[Section]:
    detailed = in_detail(runs, options.details)
    overall = overall_charts(runs, detailed, options.bound)
    origins = sorted({run.origin for run in runs}, reverse=True)
    if len(runs) == 1:
        charts = [*overall, *run_charts(runs[0], options.window_s)]
        return [replace(_run_section(runs[0], charts), title="The run")]
    sections = [Section("all", "Runs side by side", origins, _differences(runs, detailed),
                        [comparison_table(runs)], overall)]
    for run in detailed:
        charts = named_after(run, run_charts(run, options.window_s))
        sections.append(_run_section(run, charts))
    return sections


def _run_section(run: ReportRun, charts: Sequence[Chart]) -> Section:
    folded = [reason_table(run), provenance_table(run), identity_table(run)]
    return Section(run.slug, run.name, [run.origin], rows.notes(rows.as_dict(run.summary)), run_tables(run),
                   charts,
                   [table for table in folded if table is not None])


def _title(runs: Sequence[ReportRun]) -> str:
    policies = list(dict.fromkeys(run.policy for run in runs))
    clusters = list(dict.fromkeys(section_name(run, "cluster") for run in runs))
    shown = ", ".join(policies[:4]) + (f" and {len(policies) - 4} more" if len(policies) > 4 else "")
    return f"{shown}: {model_name(runs[0])} on {', '.join(clusters)} ({origin_of(runs)})"


def _remarks(options: ReportOptions) -> list[str]:
    if options.bound is None:
        return []
    return [f"bound on the throughput of any policy, as given: {options.bound:g} requests/s"]


def _differences(runs: Sequence[ReportRun], detailed: Sequence[ReportRun]) -> list[str]:
    """What a reader must know before comparing."""
    found = []
    workloads = {run.workload_hash for run in runs}
    at_same_load: dict[tuple[float, int | None], set[str | None]] = {}
    for run in runs:
        at_same_load.setdefault((run.load.value, run.seed), set()).add(run.workload_hash)
    if None in workloads:
        found.append("whether all runs got the same requests at the same times is not known, or depends on "
                     "the runs "
                     "(closed loops)")
    elif len(workloads) == 1:
        found.append("all runs got the same requests at the same times")
    elif any(len(hashes) > 1 for hashes in at_same_load.values()):
        found.append("runs of equal load and seed got different requests: compare their figures with care")
    else:
        found.append("runs of equal load and seed got the same requests at the same times")
    for section in ("cluster", "workload"):
        names = list(dict.fromkeys(section_name(run, section) for run in runs))
        if len(names) > 1:
            found.append(f"runs differ in their {section}: {', '.join(names)}")
    limits = {(run.summary["slo"]["ttft_s"], run.summary["slo"]["tpot_s"]) for run in runs}
    if len(limits) > 1:
        found.append("runs differ in their SLO: goodput and attainment are each under the run's own")
    if len(detailed) < len(runs):
        found.append(f"{len(detailed)} of {len(runs)} runs are shown in detail: "
                     + "; ".join(run.name for run in detailed))
    return found
