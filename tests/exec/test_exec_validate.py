"""Real runs beside simulated ones: statistics of made-up frames, and a whole validation of a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("torch", reason="real models need the extra exec")

from calibrated import TINY_CONFIG, device_profile, host_profile, links_profile, signed, written

from hetis_exec.calibrate.machine import machine_at
from hetis_exec.calibrate.pace import PaceKeeper
from hetis_exec.cli import main
from hetis_exec.config import compose_execution
from hetis_exec.measure_config import LIMITS, ValidateConfig
from hetis_exec.run import prepare_execution
from hetis_exec.validate import work
from hetis_exec.validate.case import noise_or
from hetis_exec.validate.command import recalibrated, run_command
from hetis_exec.validate.compare import Error, latency_errors, paired, part_errors, parts_of, rate_errors
from hetis_exec.validate.keep import Kept, Shelf, key_of
from hetis_exec.validate.profiles import check_profiles, hashes_of
from hetis_exec.validate.ranking import Figure, orders_of
from hetis_exec.validate.runs import capacity_rps, loaded, measure, simulate, subjects_of
from hetis_exec.validate.schedule import Run, Watch, count_of, runs_of
from hetis_sim.cost.paced import Slowdown
from hetis_sim.spec.errors import HetisError, SpecError
from hetis_sim.spec.model import ModelSpec
from hetis_sim.study.runs import Load

WORDS = ("cluster.hosts=[{gpus:{cpu-core:1},memory_gib:2},{gpus:{weak-core:1},memory_gib:2}]", "policy=vllm",
         "executor.workers=threads", "workload.table=fixed", "workload.prompt_tokens=12",
         "workload.output_tokens=6", "workload.prompt_scale=1", "workload.output_scale=1", "rate=100",
         "validate.policies=[vllm]", "validate.loads=[0.5]", "validate.run_s=0.2", "validate.requests_min=6",
         "validate.capacity_requests=8", "validate.resamples=50", "validate.warmup_s=1")


def frame(ttft: Any, tpot: Any, status: str = "finished", seed: int = 0) -> pd.DataFrame:
    """Requests with the given latencies."""
    n = len(ttft)
    return pd.DataFrame({"request_id": range(n), "seed": seed, "status": status, "ttft_s": ttft,
                         "tpot_s": tpot, "e2el_s": np.asarray(ttft) + 10 * np.asarray(tpot)})


def by_name(errors: list[Error]) -> dict[tuple[str, str], Error]:
    """Errors by metric and statistic."""
    return {(error.metric, error.statistic): error for error in errors}


def test_errors_have_signs_and_intervals() -> None:
    """A simulation that is 5 % long in every request is off by just that, whatever is drawn."""
    rng = np.random.default_rng(1)
    ttft, tpot = rng.exponential(0.5, 80), rng.uniform(0.01, 0.05, 80)
    pairs = paired(frame(ttft, tpot), frame(1.05 * ttft, 0.9 * tpot))
    found = by_name(latency_errors(pairs, 200, 0))
    for statistic in ("mean", "p50", "p95", "p99"):
        assert found["ttft", statistic].error == pytest.approx(0.05)
        assert found["ttft", statistic].low == pytest.approx(0.05)
        assert found["ttft", statistic].high == pytest.approx(0.05)
        assert found["tpot", statistic].error == pytest.approx(-0.1)
        assert np.isnan(found["tpot", statistic].noise_low)
        assert found["tpot", statistic].within_noise is None
    assert found["ttft", "mean"].measured == pytest.approx(ttft.mean())
    assert found["ttft", "p95"].simulated == pytest.approx(1.05 * np.quantile(ttft, 0.95))
    assert found["ttft", "mean"].n == 80


def test_intervals_cover_the_error() -> None:
    """With independent errors of 20 % in each of 200 requests, the mean's interval is narrow around 0."""
    rng = np.random.default_rng(2)
    ttft = rng.uniform(1.0, 2.0, 200)
    noisy = ttft * np.exp(0.2 * rng.standard_normal(200))
    pairs = paired(frame(ttft, ttft), frame(noisy, ttft))
    error = by_name(latency_errors(pairs, 500, 0))["ttft", "mean"]
    assert error.low < error.error < error.high
    assert 0.02 < error.high - error.low < 0.12
    assert error.low < 0.02 < 0.06 + error.high


def test_noise_stands_beside_the_error() -> None:
    """It is what real runs of the same requests differ by: each against the mean of the others."""
    ttft = np.linspace(0.1, 0.2, 20)
    runs = [frame(factor * ttft, ttft) for factor in (1.0, 1.1, 0.9)]
    pairs = paired(frame(ttft, ttft), frame(1.05 * ttft, ttft))
    error = by_name(latency_errors(pairs, 50, 0, repeated=[runs, [frame(ttft, ttft)]]))["ttft", "mean"]
    assert error.error == pytest.approx(0.05)
    assert error.noise_low == pytest.approx(0.9 / 1.05 - 1)
    assert error.noise_high == pytest.approx(1.1 / 0.95 - 1)
    assert error.within_noise
    assert not replace(error, error=0.2).within_noise


def test_errors_at_the_machines_pace_stand_beside_the_others() -> None:
    """They are of another simulation, against the same measurement."""
    ttft = np.linspace(0.1, 0.2, 20)
    real = frame(ttft, ttft)
    error = by_name(latency_errors(paired(real, frame(0.8 * ttft, ttft)), 50, 0,
                                   paired(real, frame(0.96 * ttft, ttft))))["ttft", "mean"]
    assert error.error == pytest.approx(-0.2)
    assert error.paced == pytest.approx(-0.04)
    assert error.paced_low == pytest.approx(-0.04)


def test_requests_are_paired_by_seed_and_number() -> None:
    """Another order changes nothing; what finished in one world only is left out."""
    ttft = np.arange(1.0, 6.0)
    one = pd.concat([frame(ttft, ttft), frame(10 * ttft, ttft, seed=1)])
    other = pd.concat([frame(20 * ttft, ttft, seed=1), frame(2 * ttft, ttft)]).iloc[::-1]
    other.loc[(other["seed"] == 1) & (other["request_id"] == 4), "status"] = "rejected"
    pairs = paired(one, other)
    assert len(pairs) == 9
    assert (pairs["ttft_s_sim"] == 2 * pairs["ttft_s"]).all()


def test_rates_are_compared_over_runs() -> None:
    """Means over the seeds; an interval needs two of them."""
    real = [{"output_throughput": 10.0, "kv_used_max": 0.5}, {"output_throughput": 20.0, "kv_used_max": 0.5}]
    sim = [{"output_throughput": 11.0, "kv_used_max": 0.4}, {"output_throughput": 22.0, "kv_used_max": 0.4}]
    again = [{"output_throughput": 10.5, "kv_used_max": 0.5}]
    found = by_name(rate_errors(real, sim, 100, 0, repeated=[[real[0], *again]]))
    assert found["output_throughput", "mean"].error == pytest.approx(0.1)
    assert found["output_throughput", "mean"].low == pytest.approx(0.1)
    assert found["output_throughput", "mean"].noise_high == pytest.approx(0.05)
    assert found["output_throughput", "mean"].noise_low == pytest.approx(1 / 1.05 - 1)
    assert found["kv_used_max", "mean"].error == pytest.approx(-0.2)
    single = by_name(rate_errors(real[:1], sim[:1], 100, 0))["output_throughput", "mean"]
    assert np.isnan(single.low)
    assert np.isnan(single.noise_low)


def steps(dense_s: float, iterations: int) -> pd.DataFrame:
    """Decode steps of some iterations each."""
    parts = {f"{part}_s": 0.0 for part in ("host", "attention", "collective", "hop", "waiting")}
    row = {"kind": "decode", "iterations": iterations, "requests": 3, "start_s": 1.0,
           "end_s": 1.0 + iterations * (dense_s + 0.01), "dense_s": iterations * dense_s,
           "head_transfer_s": iterations * 0.01, **parts}
    return pd.DataFrame([row, row])


def test_parts_are_per_iteration() -> None:
    """A step that stands for many iterations counts as many."""
    found = parts_of(steps(0.02, 5))
    assert found["decode", "dense"] == pytest.approx(0.02)
    assert found["decode", "all"] == pytest.approx(0.03)
    assert found["decode", "requests"] == pytest.approx(3.0)
    real = [steps(0.02, 1), steps(0.04, 1)]
    (dense,) = [part for part in part_errors(real, [steps(0.03, 7)]) if part.part == "dense"]
    assert (dense.measured_s, dense.simulated_s) == pytest.approx((0.03, 0.03))
    assert (dense.low_s, dense.high_s) == pytest.approx((0.02, 0.04))


# -- the whole of it ---------------------------------------------------------------------------------------


def profiles_for(model: ModelSpec, folder: Path, second_s: float = 1e-3, **changes: Any) -> Path:
    """Profiles as if they had been measured on this machine."""
    made = []
    devices = [device_profile(kind, model, second_s) for kind in ("cpu-core", "weak-core")]
    for raw in (*devices, host_profile(model), links_profile(model, "loopback")):
        raw["calibration"] |= {"hardware": machine_at("cpu").hardware,
                               "reference": {"dense": 1e-3, "attention": 1e-3}, **changes}
        made.append(signed({key: value for key, value in raw.items() if key != "sha256"}))
    return written(folder, *made)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The command line of a validation that takes a second or two."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    words = [f"model.config={tmp_path}", *WORDS]
    model = prepare_execution(compose_execution(*words)).prepared.model
    return [*words, f"profile={profiles_for(model, tmp_path / 'profiles')}"]


def test_a_validation_writes_what_it_says(words: list[str], tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    """Errors of all figures with intervals and noise, parts of iterations, requests of both worlds."""
    assert main(["validate", *words, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    raw = json.loads((tmp_path / "run" / "validation.json").read_text())
    (case,) = raw["cases"]
    assert (case["policy"], case["load"]) == ("vllm", 0.5)
    assert case["rate_rps"] == pytest.approx(0.5 * case["capacity_rps"])
    assert {(e["metric"], e["statistic"]) for e in case["errors"]} >= {
        ("ttft", "mean"), ("tpot", "p95"), ("e2el", "p99"), ("output_throughput", "mean"),
        ("kv_used_max", "mean")}
    first = case["errors"][0]
    assert first["error"] == pytest.approx(first["simulated"] / first["measured"] - 1)
    assert first["low"] <= first["high"]
    assert first["noise_low"] <= 0 <= first["noise_high"]
    assert first["paced"] is not None
    assert raw["complete"]
    assert [run["turn"] for run in case["runs"]] == [0, 1, 0]
    assert all(run["slowdown"]["cpu-core"]["dense"] > 0 for run in case["runs"])
    assert all(moment["slowdown"]["cpu-core"]["dense"] > 0 for run in case["runs"]
               for moment in run["moments"])
    assert [len(entry["measured_rps"]) for entry in raw["capacities"]] == [2]
    assert {part["part"] for part in case["parts"]} >= {"host", "dense", "attention", "all"}
    requests = pd.read_parquet(tmp_path / "run" / "requests.parquet")
    assert len(requests) % 3 == 0
    assert (requests["ttft_s_paced"] > 0).all()
    assert (requests["ttft_s_sim"] > 0).all()
    table = pd.read_csv(tmp_path / "run" / "validation.csv")
    assert len(table) == len(case["errors"])
    text = capsys.readouterr().out
    assert "real against real" in text
    assert "of its calibrated speed" in text
    assert not list((tmp_path / "run").glob("*.part"))
    assert "less measured" in text
    decode = {part["part"]: part for part in case["parts"] if part["kind"] == "decode"}
    parts = [part["same_s"] for name, part in decode.items() if name not in ("all", "requests")]
    assert decode["all"]["same_s"] == pytest.approx(sum(parts))
    assert decode["requests"]["same_s"] == pytest.approx(decode["requests"]["measured_s"])


def test_both_worlds_get_the_same(words: list[str]) -> None:
    """Requests, plan and settings are the same; simulating one iteration at a time changes nothing."""
    config = compose_execution(*words)
    (subject,) = subjects_of(config)
    load = Load(50.0, 8, 3)
    one, other = loaded(subject, load), loaded(subject, load)
    assert one.prepared.plan is other.prepared.plan is subject.execution.given.plan
    assert one.requests == other.requests
    single = replace(config, scheduler=replace(config.scheduler, collapse=False))
    outcomes = [simulate(case, load) for case in (subject, subjects_of(single)[0])]
    whole, single_s = (outcome.requests["e2el_s"].to_numpy() for outcome in outcomes)
    assert whole == pytest.approx(single_s)


def test_warming_up_does_not_count(words: list[str], tmp_path: Path) -> None:
    """Requests before the first one that counts are served, in both worlds, and are in no figure."""
    config = compose_execution(*words, "validate.warmup_s=1.5")
    (subject,) = subjects_of(config)
    load = Load(50.0, 8, 3)
    case = loaded(subject, load)
    assert len(case.requests) == 8 + 8
    assert min(request.arrival_s for request in case.requests[8:]) >= 1.5
    for outcome in (simulate(subject, load), measure(subject, load)):
        assert len(outcome.requests) == 8
        assert outcome.requests["request_id"].max() < 8
        assert outcome.steps["start_s"].min() >= 1.5
        assert outcome.rates["output_throughput"] > 0
    model = subject.prepared.model
    slow = f"profile={profiles_for(model, tmp_path / 'slow', second_s=0.1)}"
    free = [word for word in words if not word.startswith(("validate.warmup", "profile"))]
    assert subjects_of(compose_execution(*free, words[-1]))[0].begin_s == 4.0
    assert 5.0 < subjects_of(compose_execution(*free, slow))[0].begin_s < 60.0
    cold = subjects_of(compose_execution(*words, "validate.warmup_s=0"))[0]
    assert len(loaded(cold, load).requests) == 8
    hasty = subjects_of(compose_execution(*words, "validate.warmup_s=0.0001"))[0]
    with pytest.raises(HetisError, match=r"validate\.warmup_s=0\.0001"):
        measure(hasty, load)


def test_capacity_is_what_finishes_under_overload(words: list[str]) -> None:
    """Of a simulated system, which does not depend on the machine: the throughput when all come at once."""
    (subject,) = subjects_of(compose_execution(*words))
    capacity = capacity_rps(subject, 40, 0, simulate)
    outcome = simulate(subject, Load(0.5 * capacity, 40, 0))
    assert outcome.rates["request_throughput"] == pytest.approx(0.5 * capacity, rel=0.35)
    flooded = simulate(subject, Load(1000.0, 40, 0)).rates["request_throughput"]
    assert capacity == pytest.approx(flooded, rel=0.4)


def test_a_profile_of_another_machine_is_refused(words: list[str], tmp_path: Path) -> None:
    """Other hardware, another throttle, or none at all that was calibrated."""
    model = prepare_execution(compose_execution(*words)).prepared.model
    bare = [word for word in words if not word.startswith("profile=")]

    def check(*more: str) -> None:
        config = compose_execution(*bare, *more)
        check_profiles(config, prepare_execution(config))

    check(words[-1])
    with pytest.raises(SpecError, match="calibrate"):
        check()
    with pytest.raises(SpecError, match=r"hardware='abacus'"):
        check(f"profile={profiles_for(model, tmp_path / 'other', hardware='abacus')}")
    with pytest.raises(SpecError, match=r"throttle={}.*'attention': 4\.0"):
        check(words[-1], "executor.throttle={weak-core: 4.0}")


def test_settings_are_checked() -> None:
    """Loads, seeds and noise runs that make no sense are refused."""
    for wrong in ({"loads": []}, {"loads": [0.0]}, {"seeds": 0}, {"noise_runs": 3}):
        with pytest.raises(SpecError, match=f"validate.{next(iter(wrong))}"):
            ValidateConfig(**wrong)  # type: ignore[arg-type]


# -- in pieces ---------------------------------------------------------------------------------------------


def test_a_validation_goes_on_where_it_was_cut_short(words: list[str], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """After each run there is a file that says what is missing; nothing that is known is run again."""
    config, folder = compose_execution(*words, "validate.seeds=1"), tmp_path / "out"
    served: list[int] = []

    def counting(subject: Any, load: Load, rest: Any = None) -> Any:
        served.append(load.seed)
        if len(served) == 2:
            raise KeyboardInterrupt
        return measure(subject, load, rest)

    monkeypatch.setattr(work, "measure", counting)
    config = replace(config, validate=replace(config.validate, out=str(folder)))
    with pytest.raises(KeyboardInterrupt):
        run_command(config, tmp_path)
    partial = json.loads((folder / "validation.json").read_text())
    assert not partial["complete"]
    assert [run["turn"] for run in partial["cases"][0]["runs"]] == [0]
    assert "vllm/0.5/0/1" in partial["left_out"]
    assert run_command(config, tmp_path)
    whole = json.loads((folder / "validation.json").read_text())
    assert whole["complete"]
    assert len(served) == 2 + 1
    assert whole["cases"][0]["rate_rps"] == partial["cases"][0]["rate_rps"]
    assert key_of(replace(config, validate=replace(config.validate, seeds=9))) == key_of(config)
    assert key_of(replace(config, validate=replace(config.validate, warmup_s=2.0))) != key_of(config)
    assert len(list((folder / "runs").glob("*/*.steps.parquet"))) == 2
    assert key_of(replace(config, executor=replace(config.executor, seed=9))) != key_of(config)


def test_a_run_that_fails_ends_no_other(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    """It is named with its reason, and the exit status tells."""
    def failing(subject: Any, load: Load, rest: Any = None) -> Any:
        if load.seed == 0:
            raise HetisError("the moon is in the way")
        return measure(subject, load, rest)

    monkeypatch.setattr(work, "measure", failing)
    assert main(["validate", *words, f"hydra.run.dir={tmp_path / 'run'}"]) == 1
    assert "the moon is in the way" in capsys.readouterr().err
    raw = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert not raw["complete"]
    assert raw["failed"].keys() == {"vllm/0.5/0/0", "vllm/0.5/0/1"}
    assert [run["seed"] for run in raw["cases"][0]["runs"]] == [1]


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_budget_has_room_for_every_load_once() -> None:
    """Runs are shortened until all fit once; what would end too late does not begin."""
    hands, given = Hands(), ValidateConfig(requests_min=4, run_s=20.0)
    watch = Watch(100.0, clock=hands)
    watch.warmup_s = 5.0
    watch.took(12.0, 10, 2.0)
    assert watch.expects_s(20, 2.0) == pytest.approx(5.0 + 10.0 + 2.0)
    assert watch.run_s(given, [2.0, 4.0]) == 20.0
    shorter = watch.run_s(given, [2.0] * 8)
    need_s = 8 * watch.expects_s(count_of(given, 2.0, shorter), 2.0)
    assert 0.85 * 100 < need_s <= 95
    hands.now_s = 84.0
    assert not watch.fits(watch.expects_s(20, 2.0))
    assert watch.fits(16.0)
    assert Watch(None).fits(1e9)


def test_first_everything_once() -> None:
    """Capacities, all loads of all policies, repetitions, and further seeds last; policies take turns."""
    given = ValidateConfig(loads=[0.3, 0.6], seeds=2, noise_runs=1, repeats=2)
    names = [run.name for run in runs_of(["a", "b"], given, 7)]
    assert names[:6] == ["a/capacity/7/0", "b/capacity/7/0", "a/0.3/7/0", "b/0.3/7/0", "a/0.6/7/0",
                         "b/0.6/7/0"]
    assert names[6:12] == ["a/0.3/7/1", "b/0.3/7/1", "a/0.6/7/1", "b/0.6/7/1", "a/capacity/7/1",
                           "b/capacity/7/1"]
    assert names[12:16] == ["a/0.3/8/0", "b/0.3/8/0", "a/0.6/8/0", "b/0.6/8/0"]
    assert len(names) == len(set(names)) == 2 * 3 + 2 * 2 * 4


def test_policies_can_get_the_same_requests(words: list[str], tmp_path: Path) -> None:
    """Shares are of the least capacity then."""
    config = compose_execution(*words, "validate.rates=common", "validate.pace=false")
    subjects = [replace(subjects_of(config)[0], label=label) for label in ("slow", "fast")]
    shelf = Shelf(tmp_path / "runs")
    worker = work.Worker(config, subjects, shelf, work.MachinePace(PaceKeeper({}, False), {}), Watch(None))
    assert worker.rate_rps("fast", 0.5) is None
    for label, capacity in (("slow", 2.0), ("fast", 8.0)):
        shelf.add(Kept(f"{label}/capacity/0/0", 0.0, 8, 1.0, capacity_rps=capacity))
    assert worker.rate_rps("fast", 0.5) == worker.rate_rps("slow", 0.5) == 1.0
    assert Shelf(tmp_path / "runs").find("fast/capacity/0/0") == shelf.find("fast/capacity/0/0")
    hurried = work.Worker(config, subjects, shelf, work.MachinePace(PaceKeeper({}, False), {}), Watch(0.9))
    assert not hurried.do(Run("fast", None, 0, 1), [])
    assert hurried.left_out == ["fast/capacity/0/1"]


def test_the_ranking_knows_ties() -> None:
    """What measurements cannot tell apart is no error of the simulator."""
    figures = {"a": Figure(1.0, 2.0, 0.02), "b": Figure(1.01, 1.0, 0.02), "c": Figure(2.0, 3.0, 0.02),
               "d": Figure(3.0, 2.5)}
    verdicts = {(order.first, order.second): order.verdict for order in orders_of("tpot", 0.5, figures)}
    assert verdicts == {("a", "b"): "tie", ("a", "c"): "same", ("b", "c"): "same", ("a", "d"): "same",
                        ("b", "d"): "same", ("c", "d"): "other"}


def test_a_slower_machine_is_simulated_slower(words: list[str]) -> None:
    """Twice the time of dense modules and attention, and no other part, takes twice as long."""
    (subject,) = subjects_of(compose_execution(*words))
    load = Load(0.01, 8, 3)
    plain, slow = (parts_of(simulate(subject, load, factors).steps)
                   for factors in (None, {"cpu-core": Slowdown(2.0, 3.0)}))
    assert slow["decode", "dense"] == pytest.approx(2 * plain["decode", "dense"])
    assert slow["decode", "attention"] == pytest.approx(3 * plain["decode", "attention"], rel=0.05)
    assert slow["decode", "host"] == pytest.approx(plain["decode", "host"], rel=0.05)
    apart = parts_of(simulate(subject, load, {"cpu-core": Slowdown(2.0, 3.0, 8.0, 5.0)}).steps)
    assert apart["decode", "dense"] == pytest.approx(slow["decode", "dense"])
    assert apart["prefill", "attention"] == pytest.approx(5 * plain["prefill", "attention"], rel=0.05)
    assert apart["prefill", "dense"] > 1.1 * slow["prefill", "dense"]


def test_noise_that_was_not_measured_is_the_largest_elsewhere() -> None:
    """A ranking without any would have no ties."""
    assert noise_or(float("nan"), [0.1, 0.2, float("nan")]) == 0.2
    assert noise_or(0.05, [0.2]) == 0.05
    assert np.isnan(noise_or(float("nan"), []))


def test_calibrating_first_counts_against_the_budget(words: list[str], tmp_path: Path) -> None:
    """The profiles of the folder are used, measured once."""
    limits = "calibrate.limits={" + ",".join(f"{module}: 1e9" for module in LIMITS) + "}"
    config = compose_execution(*words, "calibrate.quick=true", "calibrate.pool_mib=4", "calibrate.repeats=1",
                               limits, "scheduler.max_batch_requests=4", "scheduler.max_batch_tokens=32",
                               "validate.budget_s=1000", "validate.recalibrate=true")
    one = recalibrated(config, tmp_path)
    assert one.cost.profiles == [str(tmp_path / "calibration")]
    assert one.validate.budget_s is not None
    assert one.validate.budget_s < 1000
    assert hashes_of(recalibrated(config, tmp_path)) == hashes_of(one)
    assert key_of(one) == key_of(recalibrated(config, tmp_path))
