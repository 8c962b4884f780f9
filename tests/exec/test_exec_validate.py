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
from hetis_exec.cli import main
from hetis_exec.config import compose_execution
from hetis_exec.measure_config import ValidateConfig
from hetis_exec.run import prepare_execution
from hetis_exec.validate.compare import Error, latency_errors, paired, part_errors, parts_of, rate_errors
from hetis_exec.validate.profiles import check_profiles
from hetis_exec.validate.runs import capacity_rps, loaded, measure, simulate, subjects_of
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
    found = by_name(latency_errors(pairs, None, 200, 0))
    for statistic in ("mean", "p50", "p95", "p99"):
        assert found["ttft", statistic].error == pytest.approx(0.05)
        assert found["ttft", statistic].low == pytest.approx(0.05)
        assert found["ttft", statistic].high == pytest.approx(0.05)
        assert found["tpot", statistic].error == pytest.approx(-0.1)
        assert np.isnan(found["tpot", statistic].noise)
    assert found["ttft", "mean"].measured == pytest.approx(ttft.mean())
    assert found["ttft", "p95"].simulated == pytest.approx(1.05 * np.quantile(ttft, 0.95))
    assert found["ttft", "mean"].n == 80


def test_intervals_cover_the_error() -> None:
    """With independent errors of 20 % in each of 200 requests, the mean's interval is narrow around 0."""
    rng = np.random.default_rng(2)
    ttft = rng.uniform(1.0, 2.0, 200)
    noisy = ttft * np.exp(0.2 * rng.standard_normal(200))
    pairs = paired(frame(ttft, ttft), frame(noisy, ttft))
    error = by_name(latency_errors(pairs, None, 500, 0))["ttft", "mean"]
    assert error.low < error.error < error.high
    assert 0.02 < error.high - error.low < 0.12
    assert error.low < 0.02 < 0.06 + error.high


def test_noise_stands_beside_the_error() -> None:
    """It is the error of a second measurement against the first."""
    ttft = np.linspace(0.1, 0.2, 20)
    pairs, again = paired(frame(ttft, ttft), frame(2 * ttft, ttft)), paired(frame(ttft, ttft),
                                                                           frame(1.1 * ttft, ttft))
    error = by_name(latency_errors(pairs, again, 50, 0))["ttft", "mean"]
    assert error.error == pytest.approx(1.0)
    assert error.noise == pytest.approx(0.1)


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
    found = by_name(rate_errors(real, sim, again, 100, 0))
    assert found["output_throughput", "mean"].error == pytest.approx(0.1)
    assert found["output_throughput", "mean"].low == pytest.approx(0.1)
    assert found["output_throughput", "mean"].noise == pytest.approx(0.05)
    assert found["kv_used_max", "mean"].error == pytest.approx(-0.2)
    single = by_name(rate_errors(real[:1], sim[:1], [], 100, 0))["output_throughput", "mean"]
    assert np.isnan(single.low)
    assert np.isnan(single.noise)


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
    (dense,) = [part for part in part_errors(steps(0.02, 1), steps(0.03, 7), None) if part.part == "dense"]
    assert (dense.measured_s, dense.simulated_s) == pytest.approx((0.02, 0.03))


# -- the whole of it ---------------------------------------------------------------------------------------


def profiles_for(model: ModelSpec, folder: Path, **changes: Any) -> Path:
    """Profiles as if they had been measured on this machine."""
    made = []
    for raw in (device_profile("cpu-core", model), device_profile("weak-core", model), host_profile(model),
                links_profile(model, "loopback")):
        raw["calibration"] |= {"hardware": machine_at("cpu").hardware, **changes}
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
    assert first["noise"] is not None
    assert {part["part"] for part in case["parts"]} >= {"host", "dense", "attention", "all"}
    requests = pd.read_parquet(tmp_path / "run" / "requests.parquet")
    assert len(requests) == 2 * 6 or len(requests) % 2 == 0
    assert (requests["ttft_s_sim"] > 0).all()
    table = pd.read_csv(tmp_path / "run" / "validation.csv")
    assert len(table) == len(case["errors"])
    text = capsys.readouterr().out
    assert "noise" in text
    assert "simulated less measured" in text


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


def test_warming_up_does_not_count(words: list[str]) -> None:
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
