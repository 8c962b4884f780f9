"""Figures of a report: what they show is what the records say, and they are drawn the same every time."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metrics_fakes import PLAN, add_request
from support_report import write_fake

from analysis.figures import BarChart, Chart, Diagram, HeatMap, SpanChart, XYChart, open_runs, save_chart
from analysis.figures.catalogue import overall_charts, run_charts
from analysis.figures.runs import ReportRun
from analysis.figures.style import COLUMN_IN, FILLS, line_style
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.spec.errors import SpecError


def charts_of(run: ReportRun) -> dict[str, Any]:
    """All figures of a single run by key."""
    return {chart.key: chart for chart in [*overall_charts([run], [run], None), *run_charts(run, None)]}


@pytest.fixture(scope="session")
def run(loaded: Path) -> ReportRun:
    """The loaded run."""
    return open_runs([loaded])[0]


@pytest.fixture(scope="session")
def charts(run: ReportRun) -> dict[str, Any]:
    """Its figures."""
    return charts_of(run)


def test_a_run_with_transfers_has_every_figure(charts: dict[str, Chart]) -> None:
    """Nothing that a report promises is missing."""
    assert set(charts) == {
        "goodput", "cdf-ttft", "cdf-tpot", "cdf-itl", "cdf-e2el", "iteration-parts", "plan", "kv-use",
        "heads",
        "kv-map", "busy-map", "busy-stages", "queue", "tokens", "transfers", "transfer-counts", "busy-links",
        "requests"}
    assert {chart.origin for chart in charts.values()} == {"simulated"}


@pytest.mark.parametrize("metric", ["ttft", "tpot", "itl", "e2el"])
def test_distributions_agree_with_the_percentiles(run: ReportRun, charts: dict[str, Any],
                                                  metric: str) -> None:
    """Where the line crosses one half and 95 % are the median and p95 of the summary, to a step."""
    line = charts[f"cdf-{metric}"].lines[0]
    assert line.y[-1] == pytest.approx(1.0)
    assert (np.diff(line.y) >= 0).all()
    for q, name in ((0.5, "p50"), (0.95, "p95")):
        above = int(np.searchsorted(line.y, q))
        low, high = line.x[max(above - 2, 0)], line.x[min(above + 2, len(line.x) - 1)]
        assert low <= run.summary[f"{metric}_s"][name] <= high


def test_slo_lines_stand_at_the_limits(run: ReportRun, charts: dict[str, Any]) -> None:
    """TTFT and TPOT have a limit, the others none."""
    for metric in ("ttft", "tpot"):
        assert [rule.value for rule in charts[f"cdf-{metric}"].rules] == [run.summary["slo"][f"{metric}_s"]]
    assert not charts["cdf-itl"].rules


def test_kv_use_over_time_has_the_mean_of_the_summary(measured: Path) -> None:
    """Averaged over the run, the line of a device is its mean use."""
    (run,) = open_runs([measured])
    chart = charts_of(run)["kv-use"]
    window = run.window
    for line, device in zip(chart.lines, run.summary["devices"], strict=True):
        widths = np.diff(line.x)
        mean = float((line.y[:-1] * widths).sum() / widths.sum())
        share = window.duration_s / widths.sum()
        assert mean == pytest.approx(device["kv_used_mean"] * share, rel=0.02)


def test_heads_on_devices_are_shares_of_all_cache(run: ReportRun, charts: dict[str, Any]) -> None:
    """A column of the map sums to one wherever anything is cached."""
    sums = np.nansum(charts["heads"].values, axis=0)
    empty = np.isnan(charts["heads"].values).all(axis=0)
    np.testing.assert_allclose(sums[~empty], 1.0)
    assert len(charts["heads"].values) == len(run.devices)


def test_maps_of_shares_stay_within_zero_and_one(charts: dict[str, Any]) -> None:
    """No device holds more than it can, or works more than all the time."""
    for key in ("kv-map", "busy-map", "heads"):
        values = charts[key].values
        values = values[np.isfinite(values)]
        assert values.min() >= 0.0
        assert values.max() <= 1.0 + 1e-9


def test_tokens_over_time_are_the_tokens_made(run: ReportRun, charts: dict[str, Any]) -> None:
    """The area below the lines is the output, and the prompts, of the finished requests."""
    requests = run.run.requests[run.run.requests["status"] == "finished"]
    for line, column in zip(charts["tokens"].lines, ("output_tokens", "prompt_tokens"), strict=True):
        width = run.end_s / len(line.x)
        assert float(line.y.sum()) * width == pytest.approx(float(requests[column].sum()), rel=1e-6)


def test_transfers_over_time_are_all_bytes_and_all_transfers(run: ReportRun, charts: dict[str, Any]) -> None:
    """The area is what was sent, the last count is how often."""
    width = run.end_s / len(charts["transfers"].lines[0].x)
    sent = sum(float(line.y.sum()) * width * 1e6 for line in charts["transfers"].lines)
    assert sent == pytest.approx(float(run.run.transfers["size_bytes"].sum()), rel=1e-6)
    assert sum(line.y[-1] for line in charts["transfer-counts"].lines) == len(run.run.transfers)


def test_shares_of_links_are_those_of_the_summary(run: ReportRun, charts: dict[str, Any],
                                                  loaded: Path) -> None:
    """By what was carried, heads included; a run in which nobody counted shows its cache."""
    chart, wires = charts["busy-links"], run.run.summary["wires"]
    total = np.sum([bars.values for bars in chart.series], axis=0)
    assert list(total) == [pytest.approx(wire["busy_share"]) for wire in wires[:len(total)]]
    heads = next(bars.values for bars in chart.series if bars.name.startswith("heads"))
    assert heads.max() > 0.0
    (other,) = open_runs([loaded])
    del other.run.summary["wires"]
    assert [bars.name for bars in charts_of(other)["busy-links"].series] == ["cache under way"]


def test_parts_of_an_iteration_make_its_mean_time(run: ReportRun, charts: dict[str, Any]) -> None:
    """Stacked bars end at the mean time of an iteration of their kind."""
    chart = charts["iteration-parts"]
    total = np.sum([series.values for series in chart.series], axis=0)
    for kind, value in zip(chart.categories, total, strict=True):
        use = run.summary["iterations"][kind]
        assert value == pytest.approx(1e3 * use["time_s"] / use["iterations"], rel=1e-3)


def test_goodput_and_the_rest_make_the_throughput(run: ReportRun, charts: dict[str, Any]) -> None:
    """The two parts of the bar add up."""
    good, outside = (series.values[0] for series in charts["goodput"].series)
    assert good == pytest.approx(run.summary["throughput"]["request_goodput"])
    assert good + outside == pytest.approx(run.summary["throughput"]["request_throughput"])


def test_the_diagram_names_every_stage_and_every_card(run: ReportRun, charts: dict[str, Any]) -> None:
    """Every device of the plan is in the note of some box, every number of layers in a heading."""
    plan = charts["plan"]
    notes = " ".join(box.note for box in plan.boxes)
    assert all(device.label in notes for device in run.devices)
    headings = [box.lines[0] for box in plan.boxes]
    for instance in run.run.plan["instances"]:
        for number, stage in enumerate(instance["stages"]):
            assert f"stage {number}: {stage['layers']} layers" in headings


def test_boxes_of_the_diagram_do_not_touch(tmp_path: Path) -> None:
    """Seven stages in rows, workers below, unused devices at the end: nothing covers anything."""
    recorder = Recorder(devices=[f"{i}:card@host{i // 2}" for i in range(12)], capacity_bytes=[1.0] * 12)
    add_request(recorder, 0, 0.0)
    stages = [{"devices": [i], "layers": 4, "owned_groups": [8]} for i in range(7)]
    plan = {"instances": [{"stages": stages, "attention_workers": [7, 8, 9], "role": "both"}]}
    (run,) = open_runs([write_fake(tmp_path / "run", recorder, plan=plan)])
    diagram = charts_of(run)["plan"]
    assert [kind.split()[0] for kind in diagram.kinds] == ["dense", "attention", "not"]
    for i, one in enumerate(diagram.boxes):
        assert one.x >= 0
        assert one.x + one.width <= diagram.width
        assert one.y + one.height <= diagram.height
        for other in diagram.boxes[i + 1:]:
            beside = one.x + one.width < other.x or other.x + other.width < one.x
            assert beside or one.y + one.height < other.y or other.y + other.height < one.y


def test_pools_of_one_phase_are_named(tmp_path: Path) -> None:
    """An instance that only computes prompts says so."""
    plan = {"instances": [{"stages": PLAN["instances"][0]["stages"], "attention_workers": [],
                           "role": "prefill"},
                          {"stages": [{"devices": [1], "layers": 4, "owned_groups": [8]}], "role": "decode"}]}
    (run,) = open_runs([write_fake(tmp_path / "run", plan=plan)])
    texts = [text.text for text in charts_of(run)["plan"].texts]
    assert texts == ["instance 0 (prefill only)", "instance 1 (decode only)"]


def test_requests_one_by_one_are_those_that_moved(run: ReportRun, charts: dict[str, Any]) -> None:
    """The rows hold the most moves that so many consecutive requests have; marks are ends of transfers."""
    chart = charts["requests"]
    events = (run.run.requests["moves"] + run.run.requests["preemptions"]).to_numpy()
    shown = run.run.requests["request_id"].isin([int(row) for row in chart.rows]).to_numpy()
    width = len(chart.rows)
    assert events[shown].sum() == max(events[i:i + width].sum() for i in range(len(events) - width + 1))
    ends = set(run.run.transfers["end_s"])
    assert all(mark.at in ends for mark in chart.marks)
    for span in chart.spans:
        assert chart.x.low <= span.start < span.end <= chart.x.high


def test_a_window_chooses_the_requests_one_by_one(run: ReportRun) -> None:
    """Only requests that arrive in it are shown; a window without any has no figure."""
    arrivals = run.run.requests["arrival_s"]
    low, high = float(arrivals.iloc[10]), float(arrivals.iloc[14])
    chart = next(chart for chart in run_charts(run, (low, high)) if chart.key == "requests")
    assert isinstance(chart, SpanChart)
    assert len(chart.rows) == 5
    assert "requests" not in [chart.key for chart in run_charts(run, (1e6, 2e6))]


def test_rate_curves_have_a_line_a_policy_and_a_point_a_rate(sweep: Path) -> None:
    """Each line goes through the figures of its runs, with their intervals and the limit."""
    runs = open_runs([sweep])
    by_key = {chart.key: chart for chart in overall_charts(runs, runs, 9.0)}
    chart = by_key["load-ttft"]
    assert isinstance(chart, XYChart)
    assert [line.name for line in chart.lines] == ["hetis", "vllm"]
    for line, own in zip(chart.lines, (runs[:2], runs[2:]), strict=True):
        np.testing.assert_allclose(line.x, [1.0, 4.0])
        np.testing.assert_allclose(line.y, [run.summary["ttft_s"]["p95"] for run in own])
    assert [rule.label for rule in chart.rules] == ["SLO 5 s"]
    assert [rule.value for rule in by_key["load-goodput"].rules] == [9.0]
    assert len(by_key["cdf-ttft"].lines) == 4


def test_runs_of_one_rate_have_no_rate_curves(measured: Path) -> None:
    """A line of one point is none."""
    runs = open_runs([measured])
    assert not [chart for chart in overall_charts(runs, runs, None) if chart.key.startswith("load-")]


def test_lines_and_areas_differ_in_more_than_colour() -> None:
    """Neighbouring lines differ in colour, dashes and marker; no two areas but the last share a hatching."""
    styles = [line_style(i) for i in range(49)]
    assert len(set(styles)) == 49
    for one, other in pairwise(styles[:7]):
        assert one.color != other.color
        assert one.dashes != other.dashes
        assert one.marker != other.marker
    assert len({fill.hatch for fill in FILLS[:-1]}) == len(FILLS) - 1


def test_figures_are_one_column_wide_and_vector(charts: dict[str, Chart], tmp_path: Path) -> None:
    """Every figure is 3.3 in wide, with no picture inside and the label in its corner."""
    for chart in charts.values():
        (path,) = save_chart(chart, tmp_path, ["svg"])
        text = path.read_text()
        width = re.search(r'<svg [^>]*width="([\d.]+)pt"', text)
        assert width is not None
        assert float(width[1]) == pytest.approx(COLUMN_IN * 72, abs=0.01)
        if not isinstance(chart, HeatMap):
            assert "<image" not in text
        assert "simulated" in text


def test_equal_charts_give_equal_files(charts: dict[str, Chart], tmp_path: Path) -> None:
    """No time of day, no random identifier."""
    chosen = [charts["kv-use"], charts["plan"]]
    for chart in chosen:
        first = [path.read_bytes() for path in save_chart(chart, tmp_path / "a")]
        second = [path.read_bytes() for path in save_chart(chart, tmp_path / "b")]
        assert first == second


def test_an_unknown_format_is_refused(charts: dict[str, Chart], tmp_path: Path) -> None:
    """The allowed ones are named."""
    with pytest.raises(SpecError, match="one of pdf, svg, png"):
        save_chart(charts["goodput"], tmp_path, ["jpeg"])


def test_values_that_are_missing_are_not_drawn_as_zero(charts: dict[str, Any], tmp_path: Path) -> None:
    """A bar without a value says so."""
    chart: BarChart = charts["busy-stages"]
    series = replace(chart.series[0], values=chart.series[0].values * np.nan, low=None, high=None)
    (path,) = save_chart(replace(chart, series=[series]), tmp_path, ["svg"])
    assert "unknown" in path.read_text()


def test_a_diagram_is_a_chart_like_the_others(charts: dict[str, Any]) -> None:
    """Its kinds are listed in the order of their boxes' numbers."""
    assert isinstance(charts["plan"], Diagram)
    assert all(0 <= box.kind < len(charts["plan"].kinds) for box in charts["plan"].boxes)
