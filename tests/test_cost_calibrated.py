"""Profiles that were measured on one machine: who may use them, what they decide, what lies outside."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from calibrated import device_profile, host_profile, links_profile, signed, written

from hetis_sim.config import compose, normalise
from hetis_sim.control.controller import Controller
from hetis_sim.control.state import RequestState
from hetis_sim.control.step import Chunk, Step, StepKind
from hetis_sim.control.timing import InstanceTimer, StepTiming
from hetis_sim.cost import load_cost_model
from hetis_sim.cost.model import CostModel
from hetis_sim.cost.outside import RangeWatch, sentence
from hetis_sim.metrics import load_run
from hetis_sim.policies.plan import InstancePlan, Plan, StagePlan
from hetis_sim.report import outside_notes
from hetis_sim.run import Result, prepare, simulate
from hetis_sim.spec.architectures import MODELS
from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.request import Request

MODEL = replace(MODELS["smollm2-135m"], weight_bytes=4, kv_bytes=4)
CORE = GpuSpec("cpu-core", 1 << 31, 1e10, 1e11, 1e11, 1e11)
WEAK = GpuSpec("weak-core", 1 << 31, 2.5e9, 2.5e9, 2.5e9, 2.5e9)
PIPE = LinkSpec("pipe", 1.25e9, 1e-4)
SERVED = ("model=smollm2-135m", "model.weight_bytes=4", "model.kv_bytes=4", "cluster=cpu-workers",
          "policy=vllm", "workload.table=fixed", "workload.prompt_scale=1", "workload.output_scale=1",
          "workload.prompt_tokens=40", "workload.output_tokens=20", "requests=6", "rate=100",
          "scheduler.max_batch_tokens=64")


def folder(path: Path, *, weak_s: float = 4e-3) -> Path:
    """Profiles of both kinds of core, of their link and of the host."""
    return written(path, device_profile("cpu-core", MODEL), device_profile("weak-core", MODEL, weak_s),
                   host_profile(MODEL), links_profile(MODEL, "pipe"))


def loaded(*paths: Path, gpus: tuple[GpuSpec, ...] = (CORE, WEAK)) -> CostModel:
    """The cost model of some profiles, for two kinds of core and the model that was measured."""
    return load_cost_model(profiles=paths, gpus=gpus, model=MODEL)


def test_measured_durations_are_used_as_they_are(tmp_path: Path) -> None:
    """Also where they beat the rough figures of the cluster file, from which no floor is made."""
    cost = loaded(folder(tmp_path))
    assert cost.dense_layer_s(CORE, MODEL, 16, 1) == pytest.approx(1e-3)
    assert cost.dense_layer_s(WEAK, MODEL, 16, 1) == pytest.approx(4e-3)
    assert cost.head_s(WEAK, MODEL, 1, 1) == pytest.approx(2e-3)
    assert cost.decode_attention(WEAK, MODEL).b_s_per_byte == 1e-9
    assert cost.decode_attention(WEAK, MODEL).b_s_per_byte < load_cost_model().decode_attention(
        replace(WEAK, memory_bandwidth_bytes_per_s=1e8), MODEL).b_s_per_byte
    assert cost.transfer(PIPE).beta_s == 1e-4
    assert cost.host_overhead_s(3) == pytest.approx(5.03e-3)
    # fp32, and yet not from the datasheet: 10 us, pairs of 9 heads, and what is moved.
    moved = 64 * 4 * (2 * 9 * 10 + 3 * 60)
    assert cost.prefill_attention_layer_s(CORE, MODEL, 9, 10, 0) == pytest.approx(
        1e-5 + 4 * 64 * 9 * 55 / 1e9 + moved / 1e9, rel=0.05)


def test_an_unmeasured_degree_is_scaled_from_the_nearest(tmp_path: Path) -> None:
    """Half the products take half the time; the datasheet, of which a rough figure is known, is not asked."""
    cost = loaded(folder(tmp_path))
    assert cost.dense_layer_s(CORE, MODEL, 16, 2) == pytest.approx(0.5e-3)
    assert any("tp" in text for text in load_warnings(cost))


def load_warnings(cost: CostModel) -> tuple[str, ...]:
    """After a question far outside the range of degrees."""
    cost.dense_layer_s(CORE, MODEL, 16, 3)
    return cost.warnings


def test_packing_lies_on_the_path_of_the_rank(tmp_path: Path) -> None:
    """A stage with remote heads is longer by what its rank spends on packing, however long it waits."""
    prepared = prepare(compose(*SERVED, f"profile={folder(tmp_path)}"))
    plan = InstancePlan((StagePlan((0,), MODEL.layers, (3,)),), (2,))
    timer = InstanceTimer(prepared.cluster, prepared.model, prepared.cost, plan)
    remote = next(p.index for p in plan.positions if p.remote)
    cost = timer.costs[remote]
    assert cost.pack_fixed_s == 1e-5
    assert cost.pack_s_per_group > 0
    controller = replace(prepared, plan=Plan((plan,))).controller()
    assert isinstance(controller, Controller)
    lane, loads = controller.engines[0].lanes[0], controller.engines[0].loads
    lane.groups[:] = [1, 2]
    lane.base[:] = [50, 100]
    lines = timer.lines(lane, loads).stages[0]
    packing = MODEL.layers * (1e-5 + 2 * cost.pack_s_per_group)
    for (before, _), (after, _) in zip(lines.local + lines.remote, lines.both, strict=True):
        assert after - before == pytest.approx(packing)


def test_hosts_that_start_kernels_one_by_one_hold_steps_up(tmp_path: Path) -> None:
    """Steps with prompts and steps spread over devices take at least that long; plain decoding does not."""
    raw = host_profile(MODEL)
    del raw["sha256"]
    raw["modules"]["host_overhead"]["coefficients"] |= {"eager_s_per_layer": 0.2, "eager_s_per_prompt": 0.05}
    path = written(folder(tmp_path), signed(raw))
    prepared = prepare(compose(*SERVED, f"profile={path}"))
    plan = InstancePlan((StagePlan((0,), MODEL.layers, (3,)),), (2,))
    controller = replace(prepared, plan=Plan((plan,))).controller()
    assert isinstance(controller, Controller)
    engine = controller.engines[0]
    lane, loads = engine.lanes[0], engine.loads

    def step_s(timing: StepTiming) -> float:
        ((busy, lines, _),) = timing.stages
        return busy + max([start for start, _ in lines], default=0.0)

    host_s = 5e-3
    for prompts in (1, 3):
        request = RequestState(Request(0, 0.0, 4, 2))
        chunks = tuple(Chunk(request, 4, 0, True) for _ in range(prompts))
        timing = engine.timer.prefill(Step(0, 0, StepKind.PREFILL, chunks), lane, loads)
        assert step_s(timing) == pytest.approx(MODEL.layers * (0.2 + 0.05 * prompts) + host_s, rel=1e-2)
    lane.groups[:] = [3, 0]
    lane.base[:] = [30, 0]
    assert step_s(engine.timer.decode(lane, loads)) < 1.0
    lane.groups[:] = [2, 1]
    lane.version += 1
    assert step_s(engine.timer.decode(lane, loads)) == pytest.approx(MODEL.layers * 0.2 + host_s, rel=1e-2)


def test_attention_workers_have_costs_of_their_own(tmp_path: Path) -> None:
    """Where a device was measured as attention worker, that is charged there and nowhere else."""
    raw = device_profile("weak-core", MODEL, 4e-3)
    slow = json.loads(json.dumps(raw["modules"]["decode_attention"]))
    slow["coefficients"]["classes"][0]["c_s"] = 7e-3
    raw["modules"]["remote_attention"] = slow
    path = folder(tmp_path)
    del raw["sha256"]
    written(path, signed(raw))
    prepared = prepare(compose(*SERVED, f"profile={path}"))
    plan = InstancePlan((StagePlan((0,), MODEL.layers, (3,)),), (2,))
    rank, worker = InstanceTimer(prepared.cluster, prepared.model, prepared.cost, plan).costs
    assert (rank.c_s, worker.c_s) == (2e-5, 7e-3)
    assert prepared.cost.decode_attention(WEAK, MODEL).c_s == 2e-5
    assert loaded(folder(tmp_path / "plain")).remote_attention(WEAK, MODEL).c_s == 2e-5


def test_a_profile_swapped_for_that_of_another_device_is_refused(tmp_path: Path) -> None:
    """Whether its file is renamed, its device rewritten, or the right one is simply not there."""
    strong, weak = device_profile("cpu-core", MODEL), device_profile("weak-core", MODEL, 4e-3)
    with pytest.raises(SpecError, match=r"sha256.*changed since it was measured"):
        loaded(written(tmp_path / "rewritten", strong, {**strong, "device": "weak-core"}))
    only_weak = written(tmp_path / "weak", weak)
    with pytest.raises(SpecError, match="cpu-core"):
        loaded(only_weak, gpus=(CORE,))
    with pytest.raises(SpecError, match=r"weak-core.*cpu-core"):
        loaded(only_weak / "weak-core.json", gpus=(CORE,))
    with pytest.raises(SpecError, match="no profile of 'cpu-core'"):
        loaded(only_weak)
    # A renamed file is still the profile of the device that it names.
    renamed = written(tmp_path / "renamed", strong)
    (renamed / "cpu-core.json").rename(renamed / "weak-core.json")
    with pytest.raises(SpecError, match="no profile of 'weak-core'"):
        loaded(renamed)
    assert loaded(written(tmp_path / "both", strong, weak)).dense_layer_s(WEAK, MODEL, 16, 1) > 3e-3


def test_changed_coefficients_are_refused(tmp_path: Path) -> None:
    """What was measured and what was edited are told apart."""
    raw = device_profile("cpu-core", MODEL)
    raw["modules"]["decode_attention"]["coefficients"]["classes"][0]["c_s"] = 1.0
    with pytest.raises(SpecError, match="sha256"):
        loaded(written(tmp_path, raw), gpus=(CORE,))
    del raw["sha256"]
    with pytest.raises(SpecError, match="sha256"):
        loaded(written(tmp_path, raw), gpus=(CORE,))


def test_another_model_or_number_type_is_refused(tmp_path: Path) -> None:
    """The text names the model that was measured."""
    path = folder(tmp_path)
    with pytest.raises(SpecError, match=r"llama3\.2-1b.*smollm2-135m"):
        load_cost_model(profiles=[path], gpus=[CORE, WEAK],
                        model=replace(MODELS["llama3.2-1b"], weight_bytes=4, kv_bytes=4))
    with pytest.raises(SpecError, match=r"weight_bytes.*float32"):
        load_cost_model(profiles=[path], gpus=[CORE, WEAK], model=MODELS["smollm2-135m"])


def test_the_shorthand_is_the_setting(tmp_path: Path) -> None:
    """``profile=`` takes a file, a folder or a list, and is ``cost.profiles``."""
    path = folder(tmp_path / "it's here")
    config = compose(f"profile={path}")
    assert config.cost.profiles == [str(path)]
    assert compose(f"profile=[{tmp_path},{tmp_path}/x.json]").cost.profiles == [
        str(tmp_path), f"{tmp_path}/x.json"]
    assert normalise(["profile=a,b"]) == ["cost.profiles=['a,b']"]
    files = [str(file) for file in sorted(path.glob("*.json"))]
    runs = [simulate(compose(*SERVED, f"profile={path}")), simulate(compose(*SERVED, f"profile={files}"))]
    config = compose(*SERVED)
    config.cost.profiles = [str(path)]
    runs.append(simulate(config))
    assert len({json.dumps(run.summary.to_dict(), default=str) for run in runs}) == 1


def run(path: Path, *words: str, output: Path | None = None) -> Result:
    """The workload on measured timings."""
    return simulate(compose(*SERVED, f"profile={path}", *words), output=output)


def test_collapsed_iterations_change_nothing(tmp_path: Path) -> None:
    """Figures and marks are the same with many iterations in a step as with one."""
    path = folder(tmp_path)
    words = ("workload.output_tokens=150",)
    whole, single = (run(path, *words, f"scheduler.collapse={on}").summary for on in ("true", "false"))
    assert whole.e2el_s.mean == pytest.approx(single.e2el_s.mean, rel=1e-9)
    assert whole.tpot_s.mean == pytest.approx(single.tpot_s.mean, rel=1e-9)
    marks = [{(m["module"], m["device"], m["quantity"]): (m["iterations"], m["of_iterations"], m["most"])
              for m in summary.outside_ranges} for summary in (whole, single)]
    assert marks[0] == marks[1]
    assert ("decode_attention", "cpu-core", "tokens_per_row") in marks[0]


def test_what_lies_outside_is_marked_everywhere(tmp_path: Path) -> None:
    """Module, device, how far and how often: in the summary, the manifest and the notes of the table."""
    path = folder(tmp_path / "profiles")
    result = run(path, "workload.output_tokens=120", output=tmp_path / "out")
    (mark,) = [m for m in result.summary.outside_ranges if m["module"] == "decode_attention"]
    assert (mark["device"], mark["quantity"], mark["low"], mark["high"]) == (
        "cpu-core", "tokens_per_row", 1.0, 128.0)
    assert 128 < mark["most"] <= 160
    assert 0 < mark["iterations"] < mark["of_iterations"]
    written_run = load_run(tmp_path / "out")
    assert written_run.manifest["outside_ranges"] == [dict(m) for m in result.summary.outside_ranges]
    assert written_run.summary["outside_ranges"] == written_run.manifest["outside_ranges"]
    assert any("decode attention on cpu-core, tokens per row up to" in text
               for text in outside_notes(result.summary))


def test_nothing_is_marked_inside(tmp_path: Path) -> None:
    """A run that stays where was measured has no marks, and says so in every place."""
    result = run(folder(tmp_path))
    assert result.summary.outside_ranges == ()
    assert outside_notes(result.summary) == []


def test_a_watch_counts_iterations() -> None:
    """Of values that run evenly, those beyond either end of the range."""

    class Ranged:
        def ranges(self, gpu: GpuSpec, module: str) -> dict[str, tuple[float, float]]:
            return {"x": (10.0, 20.0)} if module == "m" else {}

    watch = RangeWatch(Ranged())  # type: ignore[arg-type]
    watch.note(CORE, "m", "x", 5, 24, 20)
    watch.note(CORE, "m", "x", 12, 18, 7)
    watch.note(CORE, "m", "x", 25, 25, 3)
    watch.note(CORE, "m", "y", 99, 99, 1)
    watch.note(CORE, "other", "x", 99, 99, 1)
    (mark,) = watch.found()
    assert (mark.least, mark.most, mark.iterations, mark.of_iterations) == (5, 25, 5 + 4 + 3, 30)
    assert "down to 5 and up to 25 where 10 to 20 was fitted, in 40% of 30 iterations" in sentence(
        mark.to_dict())


def test_a_profile_says_how_it_was_measured(tmp_path: Path) -> None:
    """A block that lacks a version is refused by its name."""
    raw = device_profile("cpu-core", MODEL)
    del raw["sha256"], raw["calibration"]["driver"]
    with pytest.raises(SpecError, match=r"calibration\.driver"):
        loaded(written(tmp_path, signed(raw)), gpus=(CORE,))


def test_what_a_line_leaves_over_is_part_of_a_profile(tmp_path: Path) -> None:
    """It scales the line's time, down to a line that nothing is faster than."""
    raw = device_profile("weak-core", MODEL)
    del raw["sha256"]
    line = raw["modules"]["decode_attention"]["coefficients"]["classes"][0]
    line["correction"] = {"knots": [[0, 10], [0, 20]], "values_milli": [500, -200, 100, -700]}
    cost = loaded(written(tmp_path, signed(raw)), gpus=(WEAK,)).decode_attention(WEAK, MODEL)
    plain = replace(cost, correction=None)
    assert cost.seconds(32, 32 * 1024) == pytest.approx(
        plain.seconds(32, 32 * 1024) * math.exp((0.5 - 0.2 + 0.1 - 0.7) / 4))
    assert cost.seconds(0, 0) == 0.0
    assert cost.scaled(3.0).seconds(9, 999) == pytest.approx(3.0 * cost.seconds(9, 999))
    least = cost.least()
    assert least.c_s == pytest.approx(math.exp(-0.7) * plain.c_s)
    for heads, size in ((1, 100), (32, 10**5), (1024, 10**9)):
        assert least.seconds(heads, size) <= cost.seconds(heads, size) * (1 + 1e-12)
    line["correction"]["values_milli"] = [0]
    with pytest.raises(SpecError, match=r"grid\.values"):
        loaded(written(tmp_path / "bad", signed(raw)), gpus=(WEAK,))


def test_a_request_alone_is_attended_to_as_was_measured_of_one(tmp_path: Path) -> None:
    """Its line is that of a batch of one; with a second request the usual one holds, as for policies."""
    raw = device_profile("cpu-core", MODEL)
    line = raw["modules"]["decode_attention"]["coefficients"]["classes"][0]
    line["lone"] = {"a_s_per_head": 0.0, "b_s_per_byte": 1e-18, "c_s": 1e-3}
    path = written(tmp_path, signed({key: value for key, value in raw.items() if key != "sha256"}),
                   device_profile("weak-core", MODEL), host_profile(MODEL), links_profile(MODEL, "pipe"))

    def decode_s(requests: int, lone: bool) -> float:
        profile = path if lone else folder(tmp_path / "plain")
        words = [word for word in SERVED if not word.startswith("requests")]
        result = simulate(*words, f"requests={2 * requests}", f"profile={profile}", "output=none")
        steps = result.steps
        steps = steps[(steps["kind"] == "decode") & (steps["requests"] == requests)]
        return float(steps["attention_s"].sum() / steps["iterations"].sum()) / MODEL.layers

    assert decode_s(1, lone=True) == pytest.approx(1e-3)
    assert decode_s(2, lone=True) == pytest.approx(decode_s(2, lone=False))
    cost = loaded(path)
    assert cost.decode_attention(CORE, MODEL).c_s == 2e-5
    line["lone"]["c_s"] = -1.0
    bad = written(tmp_path / "bad", signed({key: value for key, value in raw.items() if key != "sha256"}))
    with pytest.raises(SpecError, match=r"lone\.c_s"):
        load_cost_model(profiles=[bad])


def test_an_attention_worker_may_hold_heads_of_one_request_among_several(tmp_path: Path) -> None:
    """What counts is how many requests have heads at a position, whatever the rest of the batch does."""
    raw = device_profile("weak-core", MODEL, 4e-3)
    remote = json.loads(json.dumps(raw["modules"]["decode_attention"]))
    remote["coefficients"]["classes"][0] |= {
        "c_s": 7e-3, "lone": {"a_s_per_head": 0.0, "b_s_per_byte": 1e-18, "c_s": 1e-3}}
    raw["modules"]["remote_attention"] = remote
    path = folder(tmp_path)
    del raw["sha256"]
    written(path, signed(raw))
    prepared = prepare(compose(*SERVED, f"profile={path}"))
    plan = InstancePlan((StagePlan((0,), MODEL.layers, (3,)),), (2,))
    controller = replace(prepared, plan=Plan((plan,))).controller()
    assert isinstance(controller, Controller)
    engine = controller.engines[0]
    lane, loads = engine.lanes[0], engine.loads

    def remote_s(*placements: tuple[int, int]) -> float:
        lane.members.clear()
        for n, placement in enumerate(placements):
            state = lane.members[n] = RequestState(Request(n, 0.0, 4, 2))
            state.shape = engine.books.shapes.shape(placement)
        lane.groups[:] = [sum(column) for column in zip(*placements, strict=True)]
        lane.base[:] = 10 * lane.groups
        lane.version += 1
        ((start, _),) = engine.timer.lines(lane, loads).stages[0].remote
        return start / MODEL.layers

    wire_s = remote_s((3, 0), (1, 2)) - 1e-3
    assert 0 < wire_s < 1e-3
    assert remote_s((0, 3)) == pytest.approx(1e-3 + wire_s, rel=0.1)
    assert remote_s((2, 1), (2, 1)) > 7e-3
