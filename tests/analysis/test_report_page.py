"""The page of a report: all figures in it, nothing from outside, opened in a browser."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support_report import Page, edited, opened, simulate_to

from analysis.__main__ import main
from analysis.figures.loads import student
from analysis.figures.runs import open_runs
from analysis.report import build_report
from analysis.report.build import ReportOptions
from analysis.report.encode import dump
from analysis.report.headline import headline, paired
from hetis_sim.metrics.intervals import mean_interval
from hetis_sim.metrics.rows import as_dict, device_rows, latency_rows, notes, rate_rows
from hetis_sim.spec.errors import SpecError

PAGE_ONLY = ReportOptions(formats=())
BYTES_MAX = 2_000_000

# Plays a reader: points at everything, hides and shows every series, zooms in and out.
READER = """<script>
const seen = [];
window.addEventListener("error", (event) => seen.push(event.message));
const act = (target, name, x, y) => target.dispatchEvent(
  new PointerEvent(name, {bubbles: true, clientX: x, clientY: y, pointerId: 1, button: 0}));
Element.prototype.setPointerCapture = () => {};
let tips = 0, zooms = 0;
for (const figure of document.querySelectorAll("figure")) {
  for (const target of figure.querySelectorAll(".catch, .plot rect, .plot g")) {
    const box = target.getBoundingClientRect();
    act(target, "pointermove", box.left + box.width / 2, box.top + box.height / 2);
    if (!document.getElementById("tip").hidden) tips += 1;
    act(target, "pointerleave", 0, 0);
  }
  const before = figure.querySelectorAll(".legend button").length;
  for (let i = 0; i < before; i++) figure.querySelectorAll(".legend button")[i].click();
  for (let i = 0; i < before; i++) figure.querySelectorAll(".legend button")[i].click();
  const area = figure.querySelector(".catch");
  if (area) {
    const box = area.getBoundingClientRect();
    act(area, "pointerdown", box.left + box.width * .2, box.top + 5);
    act(area, "pointermove", box.left + box.width * .5, box.top + box.height - 5);
    act(area, "pointerup", box.left + box.width * .5, box.top + box.height - 5);
    if (!figure.querySelector(".reset").hidden) zooms += 1;
    figure.querySelector(".catch").dispatchEvent(new MouseEvent("dblclick"));
    if (!figure.querySelector(".reset").hidden) seen.push("still zoomed");
  }
}
document.documentElement.dataset.tips = tips;
document.documentElement.dataset.zooms = zooms;
document.documentElement.dataset.errors = seen.join("; ");
</script>"""


@pytest.fixture(scope="session")
def single(loaded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one run."""
    return build_report([loaded], tmp_path_factory.mktemp("single"), PAGE_ONLY)


@pytest.fixture(scope="session")
def several(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a sweep."""
    return build_report([sweep], tmp_path_factory.mktemp("several"), ReportOptions(formats=(), bound=7.5))


@pytest.fixture(params=["single", "several"])
def page(request: pytest.FixtureRequest) -> Path:
    """Both of them."""
    path: Path = request.getfixturevalue(request.param)
    return path


def test_the_page_is_well_formed(page: Path) -> None:
    """Every element is closed in order, and no identifier occurs twice."""
    parsed = Page.of(page.read_text())
    assert parsed.wrong == []
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert len(set(parsed.charts)) == len(parsed.charts)


def test_the_page_asks_for_nothing_from_outside(page: Path) -> None:
    """No address but anchors and data; its own policy forbids the rest; small enough to mail."""
    text = page.read_text()
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(['\"]?(?!#)", text)
    assert all(address.startswith(("#", "data:")) for address in Page.of(text).addresses)
    assert "default-src 'none'" in text
    assert page.stat().st_size < BYTES_MAX


def test_every_anchor_leads_somewhere(several: Path) -> None:
    """Links of the page point at sections of it."""
    parsed = Page.of(several.read_text())
    anchors = [address[1:] for address in parsed.addresses if address.startswith("#")]
    assert anchors
    assert set(anchors) <= set(parsed.ids)


def test_every_figure_of_the_terminal_is_in_the_tables(single: Path, loaded: Path) -> None:
    """Latencies, rates and devices stand there cell by cell, and so do the notes."""
    parsed = Page.of(single.read_text())
    summary = as_dict(open_runs([loaded])[0].summary)
    for row in [*latency_rows(summary), *rate_rows(summary), *device_rows(summary)]:
        assert set(row) <= set(parsed.cells)
    assert set(notes(summary)) <= set(parsed.notes)


def test_every_run_of_a_sweep_is_in_the_table(several: Path, sweep: Path) -> None:
    """Name, label and p95 of each run stand in the first table."""
    cells = Page.of(several.read_text()).cells
    for run in open_runs([sweep]):
        assert run.name in cells
        assert any(cell.startswith(f"{1e3 * run.summary['ttft_s']['p95']:.3g} ms") for cell in cells)


def test_charts_on_the_page_are_those_with_data(page: Path) -> None:
    """Each figure finds its data, and no data lie about unused."""
    parsed = Page.of(page.read_text())
    assert set(parsed.charts) == set(parsed.data["charts"])


def test_everything_is_labelled(several: Path, measured: Path, tmp_path: Path) -> None:
    """Each section and each figure says whether it is simulated or measured."""
    parsed = Page.of(several.read_text())
    assert parsed.badges.count("simulated") >= len(parsed.charts)
    assert "measured" not in parsed.badges
    other = Page.of(build_report([measured], tmp_path, PAGE_ONLY).read_text())
    assert set(other.badges) == {"measured"}
    assert other.headlines[0].endswith("(measured).")


def test_text_from_a_run_folder_cannot_become_markup(loaded: Path, tmp_path: Path) -> None:
    """Names with angle brackets, and ones that would end the script, stay names."""
    nasty = "</script><img src=x onerror=alert(1)>&"
    folder = edited(loaded, tmp_path / "run", "config.json", lambda value: value["policy"].update(name=nasty))
    page = build_report([folder], tmp_path / "out", PAGE_ONLY)
    text = page.read_text()
    assert "<img" not in text
    assert Page.of(text).wrong == []
    assert nasty in Page.of(text).headlines[0]
    assert json.loads(dump({"name": nasty}))["name"] == nasty


def test_equal_runs_give_equal_bytes(loaded: Path, tmp_path: Path) -> None:
    """The page is the same, however often it is made."""
    first, second = (build_report([loaded], tmp_path / name, PAGE_ONLY).read_bytes() for name in "ab")
    assert first == second


# -- headlines ----------------------------------------------------------------------------


def test_the_headline_of_one_run_has_its_figures(single: Path, loaded: Path) -> None:
    """Throughput, p95 with intervals and goodput are those of the summary."""
    summary = open_runs([loaded])[0].summary
    (sentence,) = Page.of(single.read_text()).headlines
    assert f"finishes {summary['throughput']['request_throughput']:.3g} requests/s" in sentence
    assert f"p95 TTFT {1e3 * summary['ttft_s']['p95']:.3g} ms [" in sentence
    assert f"a goodput of {summary['throughput']['request_goodput']:.3g} requests/s (simulated)." in sentence


def test_the_headlines_of_a_sweep_say_which_load_is_served(several: Path) -> None:
    """Every policy with the loads tried, and its best goodput as a share of the bound."""
    served, goodput, *pairs = Page.of(several.read_text()).headlines
    assert "of the loads tried: hetis up to 4 requests/s" in served
    assert "the largest tried" in served
    assert "% of the bound" in goodput
    assert len(pairs) == 1


def test_a_load_counts_as_served_only_up_to_the_first_that_fails(sweep: Path, tmp_path: Path) -> None:
    """With 80 % at rate 1 nothing is served, whatever happens at rate 4."""
    def fail(value: dict[str, Any]) -> None:
        value["slo"]["attainment"] = 0.8

    folders = [edited(sweep / "vllm-1", tmp_path / "vllm-1", "summary.json", fail), sweep / "vllm-4"]
    assert "at none (not at 1 requests/s)" in headline(open_runs(folders))[0]


def slowed(source: Path, folder: Path, by_s: float | np.ndarray) -> Path:
    """A copy of a run whose requests all end later."""
    def slower(value: dict[str, Any]) -> None:
        value["e2el_s"]["mean"] += float(np.mean(by_s))

    edited(source, folder, "summary.json", slower)
    frame = pd.read_parquet(folder / "requests.parquet")
    frame["e2el_s"] += by_s
    frame.to_parquet(folder / "requests.parquet")
    return folder


def test_paired_differences_are_those_of_the_same_requests(sweep: Path, tmp_path: Path) -> None:
    """A run that is 0.25 s slower on every request is said to be just that much slower."""
    (sentence,) = paired(open_runs([sweep / "vllm-4", slowed(sweep / "vllm-4", tmp_path / "slow", 0.25)]))
    assert "250 ms [250 ms, 250 ms] less from arrival to end" in sentence
    assert "exactly as long to its first token with vllm than with vllm (slow)" in sentence


def test_paired_intervals_are_those_of_batch_means(sweep: Path, tmp_path: Path) -> None:
    """The interval is that of the differences, request by request, in order of arrival."""
    by_s = np.random.default_rng(7).uniform(0.0, 0.5, 40)
    (sentence,) = paired(open_runs([sweep / "vllm-4", slowed(sweep / "vllm-4", tmp_path / "slow", by_s)]))
    low, high = mean_interval(by_s)
    shown = f"{1e3 * by_s.mean():.3g} ms [{1e3 * low:.3g} ms, {1e3 * high:.3g} ms] less from arrival to end"
    assert shown in sentence


def test_a_difference_that_may_be_none_is_called_so(sweep: Path, tmp_path: Path) -> None:
    """An interval on both sides of zero is no proof of anything."""
    by_s = np.random.default_rng(7).normal(0.01, 0.5, 40)
    (sentence,) = paired(open_runs([sweep / "vllm-4", slowed(sweep / "vllm-4", tmp_path / "slow", by_s)]))
    assert "(no clear difference)" in sentence


def test_seeds_are_paired_one_by_one(tmp_path: Path) -> None:
    """With three seeds the interval is Student's across them; a load where a queue grew is passed over."""
    folders = []
    for seed, by_s in enumerate((0.1, 0.2, 0.6)):
        one = simulate_to(tmp_path / f"a{seed}", "policy=vllm", "requests=12", "rate=2", f"seed={seed}")
        folders += [one, slowed(one, tmp_path / f"b{seed}", by_s)]
    runs = open_runs(folders)
    named = [replace(run, group="slow" if run.run.path.name[0] == "b" else "fast") for run in runs]
    (sentence,) = paired(named)
    mean, low, high = student([0.1, 0.2, 0.6])
    assert "On the same 36 arrivals at 2 requests/s (3 seeds)" in sentence
    shown = f"{1e3 * mean:.3g} ms [{1e3 * low:.3g} ms, {1e3 * high:.3g} ms]"
    assert f"{shown} less (no clear difference)" in sentence
    assert sentence.endswith("with fast than with slow (simulated).")
    growing = edited(folders[0], tmp_path / "growing", "summary.json",
                     lambda value: value["saturation"].update(verdict="saturated"))
    again = open_runs([growing, *folders[1:]])
    assert paired([replace(run, group=named[i].group) for i, run in enumerate(again)]) == []


def test_closed_loops_are_not_paired(tmp_path: Path) -> None:
    """Their arrivals depend on how fast they are served, so no two policies see the same ones."""
    words = ("workload=closed", "workload.users=4", "requests=12", "model=llama-13b")
    folders = [simulate_to(tmp_path / policy, f"policy={policy}", *words) for policy in ("hetis", "vllm")]
    assert paired(open_runs(folders)) == []


def test_runs_of_different_arrivals_are_not_paired(sweep: Path) -> None:
    """Requests that are not the same cannot be compared one by one."""
    assert paired(open_runs([sweep / "hetis-1", sweep / "vllm-4"])) == []


def test_a_growing_queue_is_warned_of_first(loaded: Path, tmp_path: Path) -> None:
    """The warning stands above all figures, and says why."""
    def saturate(value: dict[str, Any]) -> None:
        value["saturation"].update(verdict="saturated", sentence="the queue grows by 3 requests/s: too fast")

    folder = edited(loaded, tmp_path / "run", "summary.json", saturate)
    parsed = Page.of(build_report([folder], tmp_path / "out", PAGE_ONLY).read_text())
    assert "the queue grows by 3 requests/s: too fast" in parsed.warnings
    assert any("were rejected (context_limit" in sentence for sentence in parsed.warnings)


# -- the command line ---------------------------------------------------------------------


def test_the_command_writes_beside_the_run_and_says_where(measured: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    """Without --out the report goes into the run's own folder."""
    assert main(["report", str(measured), "--formats", "svg"]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == measured.resolve() / "report" / "report.html"
    assert (page.parent / "figures" / "cdf-ttft.svg").is_file()
    assert not list((page.parent / "figures").glob("*.pdf"))


def test_several_runs_are_reported_beside_them(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep's report goes into its folder, and is no run of it the next time."""
    for _ in range(2):
        assert main(["report", str(sweep), "--formats", "none"]) == 0
        assert Path(capsys.readouterr().out.strip()) == sweep.resolve() / "report" / "report.html"


@pytest.mark.parametrize(("words", "message"), [
    (["report", "nowhere"], "run='nowhere' is not allowed"),
    (["report", "RUN", "--formats", "gif"], "formats='gif' is not allowed"),
    (["report", "RUN", "--formats", ","], "formats=',' is not allowed"),
    (["report", "RUN", "--details", "0"], "details=0 is not allowed"),
    (["report", "RUN", "--bound", "nan"], "bound=nan is not allowed"),
    (["report", "RUN", "--bound", "-1"], "bound=-1.0 is not allowed"),
    (["report", "RUN", "--window", "5", "5"], "window=5.0 is not allowed"),
    (["report", "RUN", "--out", "RUN/summary.json"], "out="),
    (["reprot"], "command='reprot' is not allowed: must be one of"),
])
def test_bad_words_are_refused_before_anything_is_written(words: list[str], message: str, measured: Path,
                                                          monkeypatch:
                                                          pytest.MonkeyPatch, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, one line that names key, value and what is allowed, and no folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").symlink_to(measured)
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]


def test_a_run_that_cannot_be_shown_writes_nothing(tmp_path: Path) -> None:
    """The output folder is not even made."""
    with pytest.raises(SpecError):
        build_report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- in a browser -------------------------------------------------------------------------


def test_chromium_draws_every_figure_without_an_error(page: Path, tmp_path: Path) -> None:
    """All charts are drawn, nothing is written to the console."""
    document, console = opened(page, tmp_path / "profile")
    charts = Page.of(page.read_text()).charts
    assert console == []
    assert f'data-drawn="{len(charts)}"' in document
    # Neither in the text nor in a coordinate; the letters may well occur in the data of a picture.
    drawn = re.sub(r"<script.*?</script>|base64,[A-Za-z0-9+/=]*", "", document, flags=re.DOTALL)
    assert "NaN" not in drawn


def test_chromium_survives_a_reader(page: Path, tmp_path: Path) -> None:
    """Pointing, hiding, showing and zooming work on every figure without an error."""
    played = tmp_path / "played.html"
    played.write_text(page.read_text().replace("</body>", f"{READER}</body>"))
    document, console = opened(played, tmp_path / "profile")
    assert console == []
    assert 'data-errors=""' in document
    found = {name: int(value) for name, value in re.findall(r'data-(tips|zooms)="(\d+)"', document)}
    charts = Page.of(page.read_text()).data["charts"].values()
    assert found["zooms"] == sum(chart["kind"] in ("xy", "heat", "spans") for chart in charts)
    assert found["tips"] > len(charts)


def test_an_error_of_the_page_would_be_seen(single: Path, tmp_path: Path) -> None:
    """The console is really read: a page with a fault, and one that calls out, are caught."""
    broken = tmp_path / "broken.html"
    fault = '<script>document.querySelector("#nothing").remove()</script><img src="https://example.invalid/x">'
    broken.write_text(single.read_text().replace("</body>", f"{fault}</body>"))
    _, console = opened(broken, tmp_path / "profile")
    assert any("TypeError" in line for line in console)
    assert any("Content Security Policy" in line for line in console)
