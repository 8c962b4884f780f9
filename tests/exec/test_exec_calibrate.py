"""``python -m hetis_exec calibrate`` from end to end, on a tiny model: behaviour, not timing."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("torch", reason="calibration needs the extra exec")

import exec_toys
from calibrated import TINY_CONFIG

from hetis_exec.calibrate import command, steps
from hetis_exec.calibrate.bench import BenchSpec, Job, Loopback, StepBench, Timed, owned_groups, tables_of
from hetis_exec.calibrate.crews import SENT
from hetis_exec.calibrate.glances import at_mean_pace
from hetis_exec.calibrate.host import measure_host
from hetis_exec.calibrate.launch import LaunchSpec, measure_launch
from hetis_exec.calibrate.loops import LoopSpec, measure_loops
from hetis_exec.calibrate.samples import Sample, clipped
from hetis_exec.calibrate.steps import Sizes, jobs_for, spread_contexts
from hetis_exec.calibrate.tasks import degrees_of, plan_of
from hetis_exec.cli import main
from hetis_exec.config import ExecutionConfig, compose_execution
from hetis_exec.errors import ExecutorError
from hetis_exec.kernels.runs import Pieces
from hetis_exec.measure_config import LIMITS
from hetis_exec.messages import CacheData, Message, Row, StageDone, StageTimes, Task
from hetis_exec.run import prepare_execution
from hetis_exec.throttle import NONE, Throttle
from hetis_sim.cost.profile import read_profile
from hetis_sim.run import simulate
from hetis_sim.spec.architectures import MODELS
from hetis_sim.spec.errors import SpecError

WORDS = ("cluster.hosts=[{gpus:{cpu-core:1},memory_gib:2},{gpus:{weak-core:1},memory_gib:2}]", "policy=vllm",
         "scheduler.max_batch_requests=8", "scheduler.max_batch_tokens=64", "executor.workers=threads",
         "calibrate.quick=true", "calibrate.repeats=2", "calibrate.pool_mib=4", "workload.table=fixed",
         "workload.prompt_tokens=12", "workload.output_tokens=6", "workload.prompt_scale=1",
         "workload.output_scale=1", "rate=100", "requests=6",
         "calibrate.limits={" + ",".join(f"{module}: 1e9" for module in LIMITS) + "}")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The command line of a calibration that takes a second or two."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    return [f"model.config={tmp_path}", f"calibrate.out={tmp_path / 'out'}", *WORDS]


def test_host_time_is_measured_with_and_without_prompts() -> None:
    """Of every size of batch that only decodes, and of several numbers of prompts."""
    model = exec_toys.MODEL
    plan = exec_toys.pipeline([[0]], [model.layers])
    what = exec_toys.given(plan, exec_toys.Fixed((model.kv_heads,)), [])
    found = measure_host(what, exec_toys.threads(), 8, quick=True)
    assert {sample.point.tokens for sample in found if not sample.point.prompts} == set(range(1, 9))
    together = {sample.point.prompts for sample in found if sample.point.prompts}
    assert {1, 4} <= together
    assert len(together) >= 3
    assert all(sample.seconds > 0 for sample in found)


def config_of(words: list[str], *more: str) -> ExecutionConfig:
    """The configuration of some words."""
    return compose_execution(*words, *more)


def test_a_calibration_closes_the_loop(words: list[str], tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    """One profile for each kind of core, one for links, one for the host; the simulator runs on them."""
    assert main(["calibrate", *words, "executor.throttle={weak-core: {attention: 3.0}}"]) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.json")) == [
        "cpu-core.json", "host.json", "links.json", "weak-core.json"]
    strong, weak = read_profile(out / "cpu-core.json"), read_profile(out / "weak-core.json")
    assert strong.calibration is not None
    assert weak.calibration is not None
    assert weak.calibration.throttle == {"dense": 1.0, "attention": 3.0}
    assert strong.calibration.throttle == {}
    assert strong.calibration.hardware
    assert set(strong.infos) == {"dense_layer", "head", "prefill_attention", "decode_attention",
                                 "remote_attention", "head_packing", "cache_packing", "host_copy"}
    assert set(read_profile(out / "links.json").infos) == {"transfer", "hop", "all_reduce"}
    assert strong.host_copy is not None
    assert 0 < strong.host_copy.seconds(1e6) < 1
    samples = pd.read_parquet(out / "cpu-core.parquet")
    assert (samples["seconds"] > 0).all()
    tokens = {module: set(samples[samples["module"] == module]["tokens"])
              for module in ("dense_layer", "decode_attention")}
    assert tokens["dense_layer"] >= {1, 2, 3, 4, 5, 6, 7, 8}
    assert tokens["decode_attention"] == {1, 2, 4, 8}
    parts = {"dense", "attention", "prompt", "prompt_attention"}
    reference = {f"reference_{part}" for part in parts}
    assert set(samples["module"]) == set(strong.infos) | reference
    taken = samples[samples["module"] == "reference_dense"]["seconds"]
    assert len(taken) >= 1
    assert strong.calibration.reference["dense"] == pytest.approx(clipped(taken).mean())
    sent = samples[samples["module"] == "cache_packing"]
    model = prepare_execution(config_of(words)).prepared.model
    token_bytes = model.kv_heads * model.kv_bytes_per_token_per_layer_per_group
    assert set(sent["size_bytes"]) == {n * token_bytes for n in SENT if n <= model.context_limit_tokens}
    assert strong.cache_packing is not None
    assert strong.calibration.reference_layers == TINY_CONFIG["num_hidden_layers"]
    assert set(strong.calibration.reference) == parts
    text = capsys.readouterr().out
    assert "decode_attention" in text
    assert "written to" in text
    result = simulate(replace(config_of(words, f"profile={out}").for_control(4), output="none"))
    origin = {(row.module, row.subject): row.kind for row in result.prepared.provenance()}
    assert origin["dense_layer", "cpu-core"] == "measured"
    assert origin["host_overhead", "host"] == "measured"
    assert origin["transfer", "loopback"] == "measured"
    assert result.summary.requests.finished == 6


def test_what_was_measured_is_not_measured_again(words: list[str], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was cut short goes on; other settings measure anew."""
    config = config_of(words)
    names = [work.name for work in plan_of(prepare_execution(config)).work]
    calls: list[str] = []
    whole = command.Work.run

    def counting(self: Any, apart: bool, tick: Any) -> Any:
        calls.append(self.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, apart, tick)

    monkeypatch.setattr(command.Work, "run", counting)
    with pytest.raises(KeyboardInterrupt):
        command.calibrate(config)
    assert calls == names[:3]
    done = command.calibrate(config)
    assert calls == [*names[:3], *names[2:]]
    assert done.known == names[:2]
    assert done.measured == names[2:]
    again = command.calibrate(config)
    assert again.measured == []
    assert len(calls) == 1 + len(names)
    other = command.key_of(prepare_execution(config_of(words, "calibrate.seed=1")), {})
    assert other != command.key_of(prepare_execution(config), {})


def test_fits_are_to_samples_at_mean_pace(words: list[str], tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fitted is what samples would have taken at the mean pace; files keep what they took."""
    config = config_of(words, "calibrate.only=[device]")

    def dense() -> tuple[list[float], float]:
        raw = json.loads((tmp_path / "out" / "cpu-core.json").read_text())
        table = raw["modules"]["dense_layer"]["coefficients"]["tables"][0]
        return table["seconds"], pd.read_parquet(tmp_path / "out" / "cpu-core.parquet")["seconds"].sum()

    command.calibrate(config)
    before, took_s = dense()
    monkeypatch.setattr(command, "at_mean_pace", lambda samples: samples.assign(
        seconds=2.0 * at_mean_pace(samples)["seconds"]))
    command.calibrate(config)
    after, still_s = dense()
    assert after == pytest.approx([2.0 * seconds for seconds in before], rel=1e-3)  # written rounded
    assert still_s == took_s


def test_what_cannot_be_measured_is_said(words: list[str], monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """The other modules are written; the exit status and the text tell."""

    def fails(execution: Any, tick: Any) -> Any:
        raise ExecutorError("the moon is in the way")

    monkeypatch.setattr("hetis_exec.calibrate.tasks._host", fails)
    assert main(["calibrate", *words]) == 1
    text = capsys.readouterr().out
    assert "not measured: host/before: the moon is in the way" in text
    assert "not measured: host/after: the moon is in the way" in text
    assert "cpu-core.json" in text


def test_refused_modules_are_not_written(words: list[str], tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """With a limit of nothing no fit is good enough."""
    strict = [word for word in words if not word.startswith("calibrate.limits")]
    assert main(["calibrate", *strict, "calibrate.limits={decode_attention: 0.0}"]) == 1
    assert "refused: decode_attention of cpu-core: median error" in capsys.readouterr().out
    assert "decode_attention" not in read_profile(tmp_path / "out" / "cpu-core.json").infos


def bench(throttle: Throttle = NONE, tp: int = 1) -> BenchSpec:
    """A bench of a small model."""
    execution = prepare_execution(compose_execution("requests=2", "policy=vllm", "executor.workers=threads",
                                                    "model=smollm2-135m"))
    model = replace(execution.prepared.model, layers=2)
    backend = execution.given.backend
    architecture = replace(backend.architecture, spec=model)  # type: ignore[union-attr]
    return BenchSpec(0, model, replace(backend, architecture=architecture), throttle,  # type: ignore[type-var]
                     "float32", 16, tp, 600)


def test_a_bench_computes_steps_as_a_worker_does() -> None:
    """Its parts are those of the worker's own report; a throttle stretches the part that it is for."""
    jobs = [Job(decode=(40, 20, 5)), Job(prompts=((30, 0),)), Job(prompts=((10, 20),))]
    plain, slow = (StepBench(bench(throttle), tables_of(jobs))
                   for throttle in (NONE, Throttle(attention=30.0)))
    for job in jobs:
        plain.step(job)
        slow.step(job)
        timed = plain.step(job)
        assert timed.times.dense_s > timed.sample_s > 0
        assert timed.times.attention_s > 0
        assert timed.whole_s >= timed.times.dense_s + timed.times.attention_s
        # Of several: what else happens on the machine only makes steps longer.
        fastest = [min(made.step(job).times.attention_s for _ in range(4)) for made in (plain, slow)]
        assert fastest[1] > 5 * fastest[0]


def test_launches_are_timed_by_the_number_of_prompts() -> None:
    """Whole steps of few tokens, a layer's share of each; a processor replays none."""
    given = bench()
    loop = LoopSpec(0, "cpu-core", given.model, "cpu", "float32", 4, 0, False, False, 1e8)
    found = measure_launch(LaunchSpec(loop, True), 2, lambda: None)
    assert [sample.point.tokens for sample in found] == [1, 2, 4, 8, 1, 0] * 2
    assert {sample.point.row_tokens for sample in found} == {0}
    assert all(sample.seconds > 0 for sample in found)


def test_cache_that_leaves_is_no_part_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sending it is counted with the heads that are sent, and not slowed down as attention is."""
    def send(self: Loopback, target: int, message: Message) -> None:
        if isinstance(message, CacheData):
            time.sleep(0.02)
        self.sent.append(message)

    monkeypatch.setattr(Loopback, "send", send)
    made = StepBench(bench(Throttle(attention=10.0)), {})
    row = Row(0, 0, 4, True, True, (7,) * made.spec.model.kv_heads, 3)
    made._control((), Task((row,), np.arange(4)))
    cache = [message for message in made._endpoint.sent if isinstance(message, CacheData)]
    done = made._endpoint.sent[-1]
    assert len(cache) == made.spec.model.layers
    assert isinstance(done, StageDone)
    assert done.times.head_transfer_s >= 0.02 * len(cache)
    assert done.times.attention_s < 0.5 * 10 * 0.02 * len(cache)


def test_tables_of_a_bench_lie_as_in_service() -> None:
    """Each in one piece in every layer, down to the last unit of the pool."""
    pool = StepBench(bench(), {0: 100, 1: 40, 2: 5}).pool
    pieces = Pieces()
    assert all(pieces.begins(table) is not None for table in pool.tables.values())
    assert pool.used_units == pool.capacity_units


def test_ranks_own_groups_as_even_as_can_be() -> None:
    """The first rank never has fewer than another; three groups on two ranks are two and one."""
    assert owned_groups(MODELS["smollm2-135m"], 2) == (2, 1)
    assert owned_groups(MODELS["llama3-8b"], 4) == (2, 2, 2, 2)
    timed = StepBench(bench(tp=2), {0: 20}).step(Job(decode=(20,)))
    assert timed.times.collective_s == 0.0


def test_jobs_stay_within_the_sizes() -> None:
    """Batches, prompts and contexts are no larger than asked for, and tables fit the pool."""
    sizes = Sizes(12, 100, 300, 2, 1.0, False, 0)
    jobs = jobs_for(sizes, 2000)
    assert max(len(job.decode) for job in jobs) == 12
    assert max(max(job.decode, default=0) for job in jobs) <= 300
    assert all(job.tokens <= 100 or job.decode for job in jobs)
    assert any(len(set(job.decode)) > 1 for job in jobs)
    assert sum(tokens for request, tokens in tables_of(jobs).items() if request < 12) <= 3 * 2000
    assert all(not job.decode or set(job.decode) == {16} for job in jobs_for(sizes, 2000, dense_only=True))


def test_contexts_are_spread_as_those_of_chats_are() -> None:
    """About the mean that is asked for and as widely as that is large, anew in each turn."""
    rng = np.random.default_rng(0)
    drawn = np.array([spread_contexts(200, 8, 10_000, rng) for _ in range(400)])
    assert (np.diff(drawn) <= 0).all()
    assert drawn.mean() == pytest.approx(200, rel=0.05)
    assert drawn.std() == pytest.approx(200, rel=0.1)
    assert max(spread_contexts(200, 32, 300, rng)) == 300
    assert spread_contexts(70, 1, 300, rng) == (70,)
    sizes = Sizes(12, 100, 300, 2, 1.0, False, 0)
    first, second = (jobs_for(sizes, 2000, turn=turn) for turn in range(2))
    assert [len(job.decode) for job in first] == [len(job.decode) for job in second]
    assert [job.prompts for job in first] == [job.prompts for job in second]
    assert first != second
    assert first == jobs_for(sizes, 2000)


def test_steps_are_measured_after_what_they_follow_on_in_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that decodes after the same step, a prompt after one that decodes; only the second counts."""
    computed: list[Job] = []

    class Counting:
        groups, pool = 1, None

        def __init__(self, spec: BenchSpec, tables: Mapping[int, int]) -> None:
            self.tables = tables

        def step(self, job: Job) -> Timed:
            computed.append(job)
            assert all(tokens <= self.tables[n] for n, tokens in enumerate(job.decode))
            return Timed(StageTimes(0.0, 0.0, 0.0, 0.0, float(len(computed)), 1.0, 0.0, 0.0), 0.0, 1e-3)

    class Nothing:
        def __init__(self, *_: object) -> None:
            """Copies are another matter."""

        def samples(self, *_: object) -> list[Sample]:
            return []

    monkeypatch.setattr(steps, "StepBench", Counting)
    monkeypatch.setattr(steps, "Cached", Nothing)
    spec = bench()
    found = steps.measure_steps(spec, Sizes(4, 64, 64, 2, 1.0, False, 0), "core", lambda: None)
    dense = {round(sample.seconds * spec.model.layers) for sample in found
             if sample.point.module == "dense_layer"}
    assert len(dense) == (len(computed) - 2) // 2
    assert any(computed[number - 1].prompts for number in dense)
    for number in dense:
        before, counted = computed[number - 2], computed[number - 1]
        assert before == counted if counted.decode else before.decode


def test_loops_measure_shapes_by_themselves() -> None:
    """Few layers, random weights, any device: every module of a named shape, at a degree."""
    shape = MODELS["smollm2-135m"]
    sizes = Sizes(4, 16, 64, 2, 1.0, True, 0)
    found = measure_loops(LoopSpec(1, "card", shape, "cpu", "float32", 16, 0, True, True, 2e6), 2, sizes,
                          lambda: None)
    assert {sample.point.module for sample in found} == {"dense_layer", "head", "prefill_attention",
                                                         "decode_attention"}
    assert {sample.point.tp for sample in found} == {2}
    assert {sample.point.model for sample in found} == {shape.name}
    assert all(sample.seconds > 0 for sample in found)
    heads = {sample.point.heads for sample in found if sample.point.module == "prefill_attention"}
    assert heads == {2 * shape.heads_per_group}


def test_shapes_of_other_models_are_named(words: list[str]) -> None:
    """``calibrate.models`` measures layers of models by name; an unknown or a mixed one is refused."""
    config = config_of(words, "calibrate.models=[llama3-8b]", "calibrate.tp=[1,2]")
    names = [work.name for work in plan_of(prepare_execution(config)).work]
    assert "shape/cpu-core/llama3-8b/tp1-2" in names
    only = config_of(words, "calibrate.only=[host]")
    assert [work.name for work in plan_of(prepare_execution(only)).work] == ["host/before", "host/after"]
    with pytest.raises(SpecError, match=r"calibrate\.only='hosts'"):
        config_of(words, "calibrate.only=[hosts]")
    for models in ("[nothing]", "[mixtral-8x7b]"):
        with pytest.raises(SpecError, match=r"calibrate\.models"):
            plan_of(prepare_execution(config_of(words, f"calibrate.models={models}")))
    assert degrees_of(config_of(words), MODELS["llama3-8b"], 2) == [1, 2]


def test_every_kind_and_link_is_crossed(words: list[str]) -> None:
    """Ranks of each kind, workers of each kind, and every link of the cluster."""
    link = "{name:pipe,bandwidth_gbps:1,latency_us:1}"
    config = config_of(words, f"cluster.hosts=[{{gpus:{{cpu-core:2}},link:{link}}},{{gpus:{{weak-core:1}}}}]")
    names = [work.name for work in plan_of(prepare_execution(config)).work if work.name.startswith("heads/")]
    parts = [name.split("/")[1:] for name in names]
    assert {rank for rank, _, _ in parts} == {worker for _, worker, _ in parts} == {"cpu-core", "weak-core"}
    assert {link for *_, link in parts} == {"pipe", "loopback"}


def test_fillers_are_numbers_of_the_type() -> None:
    """What stands for activations travels as the type does."""
    import torch

    from hetis_exec.calibrate.bench import filler
    from hetis_exec.kernels.wire import tensor_of

    assert filler("float32", (2, 3)).dtype == np.float32
    assert filler("bfloat16", (2, 3)).dtype == np.int16
    assert filler("float16", (2, 3)).dtype == np.float16
    for dtype in ("float32", "bfloat16"):
        numbers = tensor_of(filler(dtype, (700, 600))).float()
        assert abs(float(numbers.mean())) < 0.01
        assert abs(float(numbers.std()) - 1.0) < 0.01
        assert not torch.equal(numbers[0], numbers[-1])


def test_some_pieces_of_a_kind_can_be_chosen(words: list[str]) -> None:
    """By what they are of; an unknown kind is refused."""
    def names(*only: str) -> list[str]:
        config = config_of(words, f"calibrate.only=[{','.join(only)}]")
        return [work.name for work in plan_of(prepare_execution(config)).work]

    assert {name.split("/")[:2][1] for name in names("device")} == {"cpu-core", "weak-core"}
    assert [name.split("/")[:2] for name in names("device/weak-core", "host")] == [
        ["host", "before"], ["device", "weak-core"], ["host", "after"]]
    assert names("device/weak") == []
    with pytest.raises(SpecError, match=r"calibrate\.only='moon/cpu-core'"):
        config_of(words, "calibrate.only=[moon/cpu-core]")
