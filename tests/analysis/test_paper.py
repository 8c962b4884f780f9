"""The paper's evaluation on small inputs: jobs and their cache, ratios, sections, and the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.__main__ import main
from analysis.figures.charts import Axis, DotChart, Dots, Rule
from analysis.figures.draw import save_chart
from analysis.paper import store as store_module
from analysis.paper.claims import CLAIMS
from analysis.paper.command import SECTIONS, narrowed, run
from analysis.paper.evaluation import Evaluation, Variant
from analysis.paper.measure import devices
from analysis.paper.measure import serving as serving_measure
from analysis.paper.measure.capacity import _Search, crossing, measure, run_length
from analysis.paper.measure.usable import usable_tokens
from analysis.paper.page import page_text, statement_table, write_page
from analysis.paper.ratios import cell_ratio, largest, missing, up_to
from analysis.paper.scale import QUICK, Scale
from analysis.paper.section import Finding, Section, table
from analysis.paper.sections import assumptions, latency, serving
from analysis.paper.sections.serving import ratio_chart
from analysis.paper.store import Answer, Job, Store
from hetis_sim import compose
from hetis_sim.metrics.columns import PARTS
from hetis_sim.policies.splitwise import SplitwisePolicy
from hetis_sim.run import prepare
from hetis_sim.spec.errors import InfeasibleError, SpecError
from hetis_sim.study.capacity import SOJOURNS, capacity
from hetis_sim.study.estimate import Estimate
from hetis_sim.study.runs import cases_of
from hetis_sim.study.search import Found, Probe

TINY = replace(QUICK, cluster="a100-t4", models=("llama3-8b",), workloads=("humaneval",),
               policies=("hetis", "splitwise", "vllm"), requests=60, requests_max=60, tolerance=0.4,
               focus=("llama3-8b", "humaneval"), curve=(0.5, 1.0), thetas=(0.5,), deltas=(0.05,),
               error_draws=1, hosts=(1,))
CELL = ("llama3-8b", "humaneval")
PAPER = ("cluster=paper", "model=llama-13b", "workload=sharegpt")


def in_one_process(folder: Path) -> Store:
    """A store that starts no processes."""
    return Store(folder, workers=1)


# -- jobs --------------------------------------------------------------------------------------


def test_an_answer_is_kept_and_not_worked_out_again(tmp_path: Path) -> None:
    """The second store reads what the first has written, to the last digit."""
    job = Job("devices.gaps", {"words": list(PAPER)})
    told: list[tuple[str, int, int]] = []
    first = Store(tmp_path, 1, lambda *words: told.append(words)).answers("gaps", [job, job])
    assert told == [("gaps", 0, 1), ("gaps", 1, 1)]
    path = next(tmp_path.iterdir())
    path.write_text(json.dumps({**json.loads(path.read_text()), "cpu_s": 77.0}))
    again = Store(tmp_path, 1, lambda *words: told.append(words))
    assert again.answers("gaps", [job])[0].value == first[0].value == first[1].value
    assert again.cpu_s == 77.0
    assert len(told) == 2


def test_other_code_or_arguments_are_another_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key goes by function, arguments and the hash of the code."""
    job = Job("devices.gaps", {"words": list(PAPER)})
    keys = {job.key, Job("devices.gaps", {"words": [*PAPER, "seed=1"]}).key,
            Job("devices.accuracy", {"words": list(PAPER)}).key}
    monkeypatch.setattr(store_module, "code_hash", lambda _: "of other code")
    assert len(keys | {job.key}) == 4


def test_what_cannot_run_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    """An impossible combination is an answer that stays; a defect is one that is tried again."""
    jobs = [Job("devices.gaps", {"words": ["model=nobody"]}), Job("devices.gaps", {"no": "such argument"}),
            Job("devices.gaps", {"words": list(PAPER)})]
    store = in_one_process(tmp_path)
    impossible, defect, good = store.answers("gaps", jobs)
    assert "nobody" in impossible.error
    assert not impossible.defect
    assert defect.defect
    assert store.defects == [defect.error]
    assert good.value["memory"] > 6
    assert len(list(tmp_path.iterdir())) == 2


# -- capacities ----------------------------------------------------------------------------------


def probes(*pairs: tuple[float, float], verdict: str = "stable") -> tuple[Probe, ...]:
    """Runs by rate and attainment, with 90 % to be held."""
    return tuple(Probe(rate, share >= 0.9, share, verdict, 100, 75) for rate, share in pairs)


def test_a_capacity_lies_between_what_held_and_what_failed() -> None:
    """On the logarithm of the rate, where the attainment passes the limit."""
    found = Found(4.0, probes((4.0, 1.0), (8.0, 0.6), (16.0, 0.1)))
    assert crossing(found, 0.9) == pytest.approx(4.0 * 2**0.25)
    assert crossing(Found(4.0, probes((4.0, 1.0))), 0.9) == 4.0
    assert crossing(Found(0.0, probes((4.0, 0.1))), 0.9) == 0.0
    grown = Probe(8.0, False, 0.95, "saturated", 100, 75)
    assert crossing(Found(4.0, (*probes((4.0, 1.0)), grown)), 0.9) == 4.0


@pytest.mark.parametrize(("guess", "runs"), [(10.0, 2), (7.0, 5), (16.0, 5), (1.0, 11), (160.0, 11)])
def test_a_search_around_a_guess_brackets_the_answer(guess: float, runs: int,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs where the guess is right, more where it is not."""
    monkeypatch.setattr(_Search, "probe", lambda _, rate, seed: probes((rate, 1.0 if rate <= 10 else 0.0))[0])
    found = around(guess, ceiling=1000.0)
    assert len(found.probes) <= runs
    assert found.rate_rps <= 10.0 < min(p.rate_rps for p in found.probes if not p.holds)
    assert found.rate_rps > 10.0 / 1.26


def around(guess: float, ceiling: float) -> Found:
    """A search of a further seed; none from the start tells of itself."""
    case = cases_of(compose("policy=vllm"))[0]
    return _Search(case, None, 100, 8.0, ceiling).around(guess, 1)  # type: ignore[arg-type]


def test_a_search_around_a_guess_reaches_the_bound_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds there is the answer."""
    monkeypatch.setattr(_Search, "probe", lambda _, rate, seed: probes((rate, 1.0))[0])
    found = around(48.0, ceiling=50.0)
    assert found.rate_rps == 50.0
    assert [p.rate_rps for p in found.probes] == [pytest.approx(48.0 / 1.05), 50.0]


def test_a_seed_may_hold_the_slo_where_the_first_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess of zero says nothing of other seeds; where none holds at any load, the search ends."""
    monkeypatch.setattr(_Search, "probe", lambda _, rate, seed: probes((rate, 1.0 if rate <= 3 else 0.0))[0])
    assert 2.0 < around(0.0, ceiling=50.0).rate_rps <= 3.0
    monkeypatch.setattr(_Search, "probe", lambda _, rate, seed: probes((rate, 0.0))[0])
    for guess in (0.0, 5.0):
        found = around(guess, ceiling=50.0)
        assert found.rate_rps == 0.0
        assert len(found.probes) < 12


def test_a_measured_capacity_is_that_of_the_study() -> None:
    """Within the tolerances of both, on a small system; runs cost what they say."""
    words = ("cluster=single-a100", "model=llama3-8b", "workload=humaneval", "study.workers=1", "policy=vllm",
             "study.requests=200", "seeds=2", "study.tolerance=0.1", "slo.ttft_s=0.3", "slo.tpot_s=0.03")
    case = cases_of(compose(*words))[0]
    study = capacity(case.config)
    requests = run_length(case, study.bound, SOJOURNS)
    assert requests == study.requests == 200
    mine = measure(case, study.bound, requests)
    assert mine["overload"] == list(study.throughputs_rps)
    for found, searched in zip(mine["slo"], study.searches, strict=True):
        assert searched.rate_rps / 1.12 <= found <= searched.rate_rps * 1.1
    assert all(free >= held * 0.99 for free, held in zip(mine["sustained"], mine["slo"], strict=True))
    assert mine["runs"] <= study.runs


def test_no_run_of_a_search_is_done_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where a plan is tried at the rate that its search then begins with, nor elsewhere."""
    ran: list[tuple[float, int]] = []

    def once(_: object, rate: float, seed: int) -> Probe:
        ran.append((rate, seed))
        return probes((rate, 1.0 if rate <= 9.0 else 0.0))[0]

    monkeypatch.setattr(_Search, "_run", once)
    case = cases_of(compose("cluster=single-a100", "model=llama3-8b"))[0]
    search = _Search(case, prepare(case.config), 10, 4.0, 50.0)
    assert search.probe(5.0, 0).holds
    assert search.from_start(5.0, 0).rate_rps <= 9.0 < search.from_start(5.0, 0).rate_rps * 1.1
    search.around(9.0, 1)
    assert len(ran) == len(set(ran))
    assert {seed for _, seed in ran} == {0, 1}


# -- figures of single parts ---------------------------------------------------------------------


def test_up_to_is_the_largest_known_cell() -> None:
    """Paired by seed; cells without a figure are left out, with their reason when all are."""
    small, large = cell_ratio(CELL, [1.0, 2.0], [1.0, 2.0]), cell_ratio(("a", "b"), [4.0, 9.0], [2.0, 3.0])
    none = missing(CELL, "the model does not fit")
    best = largest([small, none, large])
    assert best is large
    assert large.estimate.mean == pytest.approx(math.sqrt(6.0))
    assert up_to([small, none, large]).startswith("up to 2.45x [")
    assert up_to([none]) == "none: the model does not fit"


def test_usable_cache_is_what_the_fullest_card_allows() -> None:
    """All of it with attention workers, which take any heads; less where stages are unequal."""
    shares: dict[str, float] = {}
    for policy in ("hetis", "vllm_all"):
        words = ("cluster=a100-t4", "model=llama3-8b", f"policy={policy}")
        prepared = prepare(compose(*words, *(["policy.delta=100"] if policy == "hetis" else [])))
        units = sum(sum(engine.capacity_units.values()) for engine in prepared.controller().engines)
        model = prepared.model
        whole = units * prepared.settings.limits.block_tokens / model.layers / model.kv_heads
        shares[policy] = usable_tokens(prepared) / whole
        assert (policy == "hetis") == any(instance.attention_workers for instance in prepared.plan.instances)
    assert 0.999 < shares["hetis"] <= 1.0
    assert 0.0 < shares["vllm_all"] < 0.98


def test_offloading_by_head_sends_what_belongs_to_the_heads() -> None:
    """By sequence costs the same at every share; by head in proportion, and less at small shares."""
    found = devices.offload(PAPER, [0.1, 0.2])
    fixed = 2 * found["beta_s"]
    low, high = found["by_head_s"]
    assert (high - fixed) / (low - fixed) == pytest.approx(2.0)
    assert low < found["by_sequence_s"]
    # Without grouped heads four tensors go by head and two by sequence.
    assert found["bytes_ratio"] == pytest.approx(0.5 / found["balanced"], rel=0.05)


def test_more_attention_workers_are_never_slower_and_at_most_ideal() -> None:
    """With and without the share of the card that computes the dense modules."""
    rows = devices.attention_workers(PAPER)
    alone, shared = ([row[key] for row in rows] for key in ("alone_s", "shared_s"))
    assert alone == sorted(alone, reverse=True)
    assert shared == sorted(shared, reverse=True)
    assert 1 < alone[0] / alone[3] <= 4
    assert all(row["shared_s"] <= row["home_s"] for row in rows)


def test_the_gaps_are_those_of_the_documentation(project_root: Path) -> None:
    """docs/cost.md states them; memory is a matter of the data sheets."""
    found = devices.gaps(PAPER)
    assert found["memory"] == pytest.approx(6.7, abs=0.05)
    line = next(line for line in (project_root / "docs/cost.md").read_text().splitlines()
                if line.startswith("| prefill MLP"))
    assert round(found["prefill_mlp"]) == int(line.split("|")[2])


# -- the page ----------------------------------------------------------------------------------------


def test_every_statement_of_the_paper_has_a_row() -> None:
    """Also where nothing was run; what no section measures says so."""
    text = statement_table([])
    for claim in CLAIMS:
        assert claim.quantity in text
        assert claim.section in {"", *SECTIONS}
    answered = statement_table([Section("x", "X", [], [Finding("theta", "17", "so")])])
    assert "| 17 | so |" in answered
    assert answered.count("not run") == sum(bool(claim.section) for claim in CLAIMS) - 1


def test_tables_stay_tables_whatever_is_in_them() -> None:
    """Errors may hold bars and lines."""
    assert table(["a", "b"], [["x|y\nz", "1"]]).splitlines()[2] == "| x/y z | 1 |"


def test_dots_are_drawn_with_gaps_and_limits(tmp_path: Path) -> None:
    """A nan leaves its place empty; equal charts give equal bytes."""
    values = np.array([1.0, np.nan, 3.0])
    chart = DotChart(key="dots", title="Dots", caption="Dots.", origin="simulated", axis=Axis("x", log=True),
                     rows=["one", "two", "three"], rules=[Rule("equal", 1.0)],
                     series=[Dots("a", values, 0, values / 1.1, values * 1.1), Dots("b", values[::-1], 1)])
    first = save_chart(chart, tmp_path / "1", ("svg",))[0].read_bytes()
    assert first == save_chart(chart, tmp_path / "2", ("svg",))[0].read_bytes()


@pytest.mark.slow
def test_sections_of_the_cost_model_answer_their_statements(tmp_path: Path) -> None:
    """On the paper's testbed, with every statement that the section is for."""
    scale = replace(TINY, cluster="paper", models=("llama2-70b",), workloads=("sharegpt",),
                    focus=("llama2-70b", "sharegpt"))
    (section,) = run(scale, in_one_process(tmp_path), ["devices"])
    answered = {finding.claim for finding in section.findings}
    assert answered == {claim.key for claim in CLAIMS if claim.section == "devices"}
    assert {chart.key for chart in section.charts} == {"attention-workers", "offload"}


@pytest.mark.slow
def test_all_sections_on_a_small_system(tmp_path: Path) -> None:
    """Everything of a small cluster, twice; a policy that does not fit is reported in its place."""
    store = in_one_process(tmp_path / "answers")
    sections = run(TINY, store)
    assert store.defects == []
    assert [section.key for section in sections] == list(SECTIONS)
    text = page_text(TINY, sections, "figures")
    keys = [chart.key for section in sections for chart in section.charts]
    assert len(keys) == len(set(keys))
    assert all(f"figures/{key}.svg" in text for key in keys)
    assert "quick run" in text
    write_page(tmp_path / "page.md", tmp_path / "figures", TINY, sections)
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == set(keys)
    again = Store(tmp_path / "answers", 1, lambda *words: pytest.fail(f"worked out again: {words}"))
    assert page_text(TINY, run(TINY, again), "figures") == text


def test_a_policy_without_a_plan_is_reported_in_its_place(tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of the cell are run."""
    def refuse(*_: object) -> None:
        raise InfeasibleError("it fits nowhere")

    monkeypatch.setattr(SplitwisePolicy, "plan", refuse)
    scale = replace(TINY, policies=("hetis", "splitwise"))
    store = in_one_process(tmp_path)
    section = run(scale, store, ["serving"])[0]
    text = "\n".join(block for block in section.blocks if isinstance(block, str))
    assert "no plan: it fits nowhere" in text
    assert "none: it fits nowhere" in statement_table([section])
    found = Evaluation(scale, store).serving()
    assert min(found[CELL, "hetis"].value["slo"]) > 0
    assert store.defects == []


def test_only_the_figures_of_its_own_earlier_page_are_removed(tmp_path: Path) -> None:
    """What somebody else keeps in the folder stays."""
    page, pictures = tmp_path / "paper.md", tmp_path / "figures"
    pictures.mkdir()
    (pictures / "mine.svg").write_text("mine")
    chart = DotChart(key="old-1.5b", title="Dots", caption="Dots.", origin="simulated", axis=Axis("x"),
                     rows=["a"], series=[Dots("s", np.array([1.0]), 0)])
    write_page(page, pictures, TINY, [Section("x", "X", [chart])], ("svg", "pdf"))
    assert sorted(path.name for path in pictures.iterdir()) == ["mine.svg", "old-1.5b.pdf", "old-1.5b.svg"]
    write_page(page, pictures, TINY, [])
    assert [path.name for path in pictures.iterdir()] == ["mine.svg"]


def test_captions_speak_of_intervals_where_there_are_any() -> None:
    """A ratio of two plans has no seeds."""
    seeds = ratio_chart("k", "T", "w", {"hexgen": [cell_ratio(CELL, [2.0, 3.0], [1.0, 1.0])]})
    single = ratio_chart("k", "T", "w", {"hexgen": [cell_ratio(CELL, [2.0], [1.0])]})
    assert seeds.caption == "T, paired by seed, with 95 % intervals."
    assert single.caption == "T."


def test_systems_beside_the_baselines_are_run_for_one_model(tmp_path: Path) -> None:
    """That of the cell of the sweeps; Hetis and the baselines everywhere."""
    scale = Scale(policies=("hetis", "splitwise", "vllm"))
    evaluation = Evaluation(scale, in_one_process(tmp_path))
    assert evaluation.cells_of("hetis") == evaluation.cells_of("splitwise, kinds apart") == scale.cells
    assert evaluation.cells_of("vllm") == [cell for cell in scale.cells if cell[0] == scale.focus[0]]


def test_wrong_coefficients_can_leave_the_plan_as_it_is(tmp_path: Path) -> None:
    """The plan is then that of the configuration without the error."""
    evaluation = Evaluation(TINY, in_one_process(tmp_path))
    plain = Variant("x", {"name": "hetis", "delta": 100.0}, ("cost.policy_error=0.9",))
    jobs = [evaluation.latency_job(CELL, variant, 3.0, [3.0], [0])
            for variant in (plain, replace(plain, keeps_plan=True))]
    assert "plan_words" not in jobs[0].arguments
    assert jobs[1].arguments["plan_words"] == evaluation.words(CELL)
    right = replace(plain, words=())
    rows = [serving_measure.latency(**{**job.arguments, "requests": 30})[0][0]
            for job in (*jobs, evaluation.latency_job(CELL, right, 3.0, [3.0], [0]))]
    assert rows[1]["gap_s"] > 0.0
    # Dense work is that of the plan, whatever dispatch believes.
    assert rows[1]["decode_dense_s"] == pytest.approx(rows[2]["decode_dense_s"], rel=0.05)


def test_the_page_says_which_limit_is_missed_first() -> None:
    """The one that fewer requests hold where the SLO first fails; nothing where it never did."""
    failure = {"rate_rps": 12.34, "ttft": 1.0, "tpot": 0.77}
    assert serving._missed(Answer({"first_failure": failure}), "hetis") == (
        "Hetis TPOT (at 12.3 requests/s 100 % hold that on TTFT, 77 % that on TPOT)")
    assert serving._missed(Answer({"first_failure": None}), "hetis") == ""
    assert serving._missed(Answer(None, "no plan"), "hetis") == ""


def test_a_reason_is_named_only_where_the_switches_tell_one() -> None:
    """A limit that changes the ratio by a quarter; of links only what they show."""
    base, more, less = (Estimate(mean, mean, mean, 3) for mean in (1.0, 1.9, 0.7))
    told = assumptions._reason(base, {"TPOT x 5": more, "NVLink between A100s": less}, "Splitwise")
    assert "limit on TPOT" in told
    assert "not the reason" in told
    assert "not the reason" not in assumptions._reason(base, {"TPOT x 5": more}, "Splitwise")
    assert assumptions._reason(base, {"TPOT x 5": base, "NVLink between A100s": less}, "Splitwise") == ""


def test_a_capacity_that_ends_at_the_bound_is_marked() -> None:
    """The search says so in its note."""
    value = {"slo": [4.0, 4.0], "note": "the SLO holds even at 4 requests/s: the runs are too short"}
    assert serving._text(value, "slo").endswith("(+)")
    assert not serving._text({**value, "note": ""}, "slo").endswith("(+)")


def test_what_is_no_decode_iteration_is_a_share_of_the_gap() -> None:
    """Of 40 ms between two tokens, 30 ms in parts of iterations leave a quarter."""
    run = {f"decode_{part}_s": 0.03 / len(PARTS) for part in PARTS} | {"gap_s": 0.04}
    assert latency._stalled(Answer([[run, run]])) == pytest.approx(25.0)
    assert latency._stalled(Answer(None, "no plan")) is None


@pytest.mark.slow
def test_quick_runs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page says that it was a quick run, and has all its pictures."""
    assert main(["paper", "--quick", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "paper.md")
    text = (tmp_path / "paper.md").read_text()
    assert "A quick run" in text
    assert "not run" not in text
    assert "failed (defect)" not in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.partition("](")[2].partition(")")[0]).is_file()


@pytest.mark.parametrize("words", [["--only", "nothing"], ["--workers", "0"], ["--docs", "--quick"]])
def test_bad_words_are_refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what is allowed, before anything is run."""
    assert main(["paper", "--out", str(tmp_path / "out"), *words]) == 2
    assert "is not allowed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_scale_is_narrowed_to_what_is_named() -> None:
    """In its own order; the cell of the sweeps stays one of its cells; the baselines stay."""
    some = narrowed(Scale(), "llama-13b,opt-30b", "longbench,humaneval", "vllm")
    assert some.models == ("llama-13b", "opt-30b")
    assert some.workloads == ("humaneval", "longbench")
    assert some.focus in some.cells
    assert some.policies == ("hetis", "splitwise", "hexgen", "vllm")
    assert narrowed(Scale(), None, None, None) == Scale()
    assert narrowed(Scale(), None, None, "").policies == ("hetis", "splitwise", "hexgen")
    for words in (("gpt", None, None), (None, "", None), (None, None, "hetis")):
        with pytest.raises(SpecError, match="one of"):
            narrowed(Scale(), *words)


def test_scales_are_what_they_say() -> None:
    """Registered policies only, in the order of the list."""
    scale = Scale(policies=("hetis", "nobody", "hexgen"))
    assert scale.run_policies == ["hetis", "hexgen"]
    assert len(Scale().cells) == 9
