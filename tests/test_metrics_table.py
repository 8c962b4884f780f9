"""Summaries for people and machines."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from metrics_fakes import PLAN, add_rejected, add_request, fake_run

from hetis_sim.metrics import (
    Recorder,
    Summary,
    Trim,
    build_manifest,
    load_run,
    print_summary,
    summarize,
    summary_line,
    summary_markdown,
    write_run,
)
from hetis_sim.metrics.rows import size_text
from hetis_sim.spec.slo import Slo


def summary(load: float = 0.5, **options: Any) -> Summary:
    """Figures of the made-up queue."""
    return summarize(fake_run(1000, load=load), slo=Slo(), roles=["primary", "attention"], **options)


def printed(figures: Any, **options: Any) -> str:
    """The terminal table as text."""
    file = io.StringIO()
    print_summary(figures, file=file, **options)
    return file.getvalue()


def test_the_table_names_every_figure() -> None:
    """Latencies, rates, counts, devices and notes are all there."""
    text = printed(summary(), title="hetis on paper", provenance=["p100: roofline"])
    for name in ("hetis on paper", "ttft (ms)", "tpot (ms)", "itl (ms)", "e2el (s)", "p99",
                 "request throughput", "output throughput", "total throughput", "goodput", "SLO attainment",
                 "preemptions", "migrations", "push", "KV use", "host 25.0 %", "0:a100-80gb@host0",
                 "attention", "simulated", "p100: roofline", "context_limit: 1"):
        assert name in text, name


def test_the_table_shows_the_figures_themselves() -> None:
    """A latency of two seconds reads 2.00 s; one of 500 ms reads 500.0."""
    recorder = Recorder()
    for i in range(30):
        add_request(recorder, i, float(i), first_token_s=i + 0.5, finish_s=i + 2.0)
    lines = printed(summarize(recorder, slo=Slo())).splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert rows["ttft"] == ["ttft", "(ms)", "500.0", "[500.0,", "500.0]", "500.0", "500.0", "500.0",
                            "[500.0,", "?]", "500.0", "30"]
    assert rows["e2el"][:3] == ["e2el", "(s)", "2.00"]


def test_files_get_plain_text_of_bounded_width() -> None:
    """No control sequences, no trailing blanks, tables within 110 columns."""
    text = printed(summary())
    assert "\x1b" not in text
    table = [line for line in text.splitlines() if not line.startswith(("note:", "warning:"))]
    assert max(map(len, table)) <= 110
    assert all(line == line.rstrip() for line in text.splitlines())


def test_colour_settings_of_the_shell_do_not_reach_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """FORCE_COLOR is for terminals; a file stays plain."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in printed(summary(load=1.5))


def test_saturation_is_a_warning_and_stability_a_note() -> None:
    """The growth of the queue stands out where it matters."""
    assert "warning: the queue grows by" in printed(summary(load=1.5))
    calm = printed(summary(load=0.3))
    assert "warning" not in calm
    assert "note: the queue does not grow" in calm


def test_the_window_is_stated() -> None:
    """Reader sees which requests are measured."""
    assert "note: all 1001 requests measured" in printed(summary())
    assert "without the first 100 and the last 0" in printed(summary(trim=Trim(0.1)))


def test_large_clusters_are_grouped() -> None:
    """Beyond 24 devices equal cards of one role share a line."""
    recorder = Recorder(devices=[f"{i}:{'t4' if i % 2 else 'l4'}@host{i}" for i in range(40)],
                        capacity_bytes=[1.0] * 40)
    add_request(recorder, 0, 0.0)
    text = printed(summarize(recorder, slo=Slo(), roles=["primary"] * 40))
    assert "20 x l4" in text
    assert "20 x t4" in text
    assert "39:t4@host39" not in text


def test_empty_runs_print() -> None:
    """Nothing measured prints dashes."""
    recorder = Recorder()
    add_rejected(recorder, 0, 0.0, "context_limit")
    text = printed(summarize(recorder, slo=Slo()))
    assert "1 rejected (context_limit: 1)" in text
    assert "nan" not in text
    assert "None" not in text


def test_a_loaded_summary_prints_like_a_fresh_one(tmp_path: Path) -> None:
    """Table, Markdown and line are the same from the folder."""
    recorder = fake_run()
    fresh = summarize(recorder, slo=Slo())
    write_run(tmp_path, recorder=recorder, summary=fresh, plan=PLAN,
              manifest=build_manifest(label="simulated", seeds={}, hashes={}))
    loaded = load_run(tmp_path).summary
    assert printed(loaded) == printed(fresh)
    assert summary_markdown(loaded) == summary_markdown(fresh)
    assert summary_line(loaded) == summary_line(fresh)


def test_markdown_tables_have_equal_columns() -> None:
    """Every row of a table has as many cells as its header."""
    text = summary_markdown(summary(load=1.5), title="run")
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1
    assert text.startswith("## run\n")
    assert "**Warning:** the queue grows" in text


def test_the_line_is_strict_json_with_its_context_first() -> None:
    """Machines read one line: context, then all figures."""
    line = summary_line(summary(), policy="hetis", rate=2.0)
    assert "\n" not in line
    figures = json.loads(line)
    assert list(figures)[:2] == ["policy", "rate"]
    assert figures["requests"]["finished"] == 1000


@pytest.mark.parametrize(("size_bytes", "text"), [
    (0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3.2e15, "3,200 TB"),
])
def test_sizes_read_well(size_bytes: float, text: str) -> None:
    """Bytes come in the largest unit that keeps them above one."""
    assert size_text(size_bytes) == text
