"""Capacity and comparison: definitions, pairing, and the same figures however they are computed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_study import SMALL

from hetis_sim.cli import main
from hetis_sim.config import RunConfig, compose
from hetis_sim.metrics import load_run
from hetis_sim.metrics.columns import Table
from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.plan import Plan
from hetis_sim.policies.vllm import VllmPolicy
from hetis_sim.spec.errors import HetisError, SpecError
from hetis_sim.study.capacity import Capacity, capacities, capacity
from hetis_sim.study.compare import Comparison, compare
from hetis_sim.study.runs import Load, cases_of, planned, seeds_of, under
from hetis_sim.study.tasks import flooded_throughput

QUICK = ("study.requests=200", "seeds=2", "study.tolerance=0.1", "slo.ttft_s=0.3", "slo.tpot_s=0.03")


def small(*words: str) -> RunConfig:
    """A configuration whose runs are quick."""
    return compose(*SMALL, *QUICK, *words)


@pytest.fixture(scope="module")
def found() -> Capacity:
    """The capacity of the small system."""
    return capacity(small("policy=vllm"))


def test_capacity_is_the_highest_rate_that_held(found: Capacity) -> None:
    """For each seed the rate found held, what failed lies above it, and the bracket is narrow enough."""
    assert len(found.searches) == len(found.seeds) == 2
    for search in found.searches:
        held = [probe.rate_rps for probe in search.probes if probe.holds]
        failed = [probe.rate_rps for probe in search.probes if not probe.holds]
        assert search.rate_rps == max(held)
        assert max(held) < min(failed) <= 1.1 * max(held) * (1 + 1e-9)
        for probe in search.probes:
            assert probe.holds == (probe.attainment >= 0.9 and probe.verdict != "saturated")
            assert probe.requests == found.requests == 200
    assert found.slo.mean == pytest.approx(np.mean([search.rate_rps for search in found.searches]))
    assert found.slo.low <= found.slo.mean <= found.slo.high


def test_capacity_stays_below_throughput_and_bound(found: Capacity) -> None:
    """An SLO costs throughput, and the bound lies above both."""
    assert 0 < found.slo.mean < found.throughput.mean < found.bound.requests_per_s
    assert 0 < found.share_of_bound["slo"] < found.share_of_bound["throughput"] < 1
    assert found.runs == 2 + sum(len(search.probes) for search in found.searches)
    assert found.to_dict()["share_of_bound"] == found.share_of_bound


def test_a_looser_slo_never_lowers_the_capacity(found: Capacity) -> None:
    """The same arrivals with twice the limits: more load is allowed."""
    loose = capacity(small("policy=vllm", "slo.ttft_s=0.6", "slo.tpot_s=0.06"))
    pairs = zip(loose.searches, found.searches, strict=True)
    assert all(more.rate_rps >= less.rate_rps for more, less in pairs)
    assert loose.slo.mean > found.slo.mean


def test_an_slo_that_nobody_can_hold_has_no_capacity() -> None:
    """A microsecond to the first token: zero, and a sentence on why."""
    none = capacity(small("policy=vllm", "slo.ttft_s=1e-6", "seeds=1"))
    assert none.slo.mean == 0.0
    assert math.isnan(none.slo.low)
    assert any("at no load" in note for note in none.notes)
    assert any("single seed" in note for note in none.notes)


def test_the_number_of_processes_does_not_change_the_figures(found: Capacity) -> None:
    """Two processes find what one finds, to the last digit."""
    two = capacity(small("policy=vllm", "study.workers=2"))
    assert two == found


def test_the_same_requests_arrive_at_every_rate() -> None:
    """Lengths do not depend on the rate, and times only by its factor; seeds differ."""
    prepared = planned(cases_of(small("policy=vllm"))[0].config, 5.0)
    slow, fast = (under(prepared, Load(rate, 50, 7)).workload for rate in (1.0, 4.0))
    assert fast.lengths.prompt_tokens.tolist() == slow.lengths.prompt_tokens.tolist()
    assert (4.0 * fast.arrival_s).tolist() == pytest.approx(slow.arrival_s.tolist())
    other = under(prepared, Load(4.0, 50, 8)).workload
    assert other.lengths.prompt_tokens.tolist() != fast.lengths.prompt_tokens.tolist()


def test_a_policy_that_does_not_plan_for_the_rate_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At another rate it has the same plan, and the workload of that rate; other settings ask again."""
    asked: list[float | None] = []

    def plan(self: VllmPolicy, problem: PlanningProblem) -> Plan:
        asked.append(problem.rate_per_s)
        return original(self, problem)

    original = VllmPolicy.plan
    monkeypatch.setattr(VllmPolicy, "plan", plan)
    config = cases_of(small("policy=vllm", "slo.ttft_s=0.77"))[0].config
    slow, fast = planned(config, 5.0), planned(config, 7.0)
    assert len(asked) == 1
    assert fast.plan is slow.plan
    assert fast.config.workload.rate == 7.0
    assert fast.workload.describe()["rate_rps"] == pytest.approx(1.4 * slow.workload.describe()["rate_rps"])
    planned(replace(config, slo=replace(config.slo, ttft_s=0.78)), 7.0)
    monkeypatch.setattr(VllmPolicy, "plans_for_rate", True)
    planned(replace(config, slo=replace(config.slo, ttft_s=0.79)), 5.0)
    planned(replace(config, slo=replace(config.slo, ttft_s=0.79)), 7.0)
    assert len(asked) == 4
    assert asked[1] == asked[3] == pytest.approx(1.4 * asked[2])


def test_throughput_under_overload_leaves_out_both_ends() -> None:
    """One request a second finishes while others wait; a slow start and a slow end do not count."""
    ends = np.concatenate([np.linspace(0, 500, 25), 500 + np.arange(1, 101), 600 + 50 * np.arange(1, 11)])
    scheduled = np.minimum(ends - 1, 600)
    table = Table({"finish_s": ends, "first_scheduled_s": scheduled, "arrival_s": np.zeros(len(ends))})
    assert flooded_throughput(table, 25 / len(ends)) == pytest.approx(1.0, rel=0.02)
    few = table.rows(np.arange(10))
    assert flooded_throughput(few, 0.2) == pytest.approx(10 / ends[9])


def test_final_runs_are_kept_when_asked_for(tmp_path: Path) -> None:
    """One run folder for the overload and one for the capacity of each seed."""
    kept = capacity(small("policy=vllm", "seeds=1", f"study.keep={tmp_path}"))
    run = load_run(tmp_path / "vllm" / "seed0" / "capacity")
    assert run.config is not None
    assert run.config["workload"]["rate"] == kept.searches[0].rate_rps
    assert load_run(tmp_path / "vllm" / "seed0" / "overload").summary["requests"]["submitted"] == 200


def test_without_a_number_runs_are_long_enough_to_show_an_overload() -> None:
    """The arrivals last at least the first-token limit over the tolerance."""
    config = small("policy=vllm", "seeds=1", "slo.ttft_s=3", "study.tolerance=0.3", "workload=longbench")
    derived = capacity(replace_study(config, requests=None))
    assert derived.requests >= 500
    assert derived.requests / derived.throughput.mean >= 3 / 0.3


def replace_study(config: RunConfig, **changed: Any) -> RunConfig:
    """The configuration with other settings of the study."""
    return replace(config, study=replace(config.study, **changed))


# -- comparison --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared() -> Comparison:
    """Hetis and vLLM where memory is short, with capacities."""
    return compare(compose("cluster=a100-t4", "model=llama2-13b", "rate=3", "study.workers=1", "seeds=2",
                           "study.requests=150", "study.tolerance=0.2", "policies=[hetis,vllm]",
                           "study.capacity=true"))


def test_differences_are_paired_by_seed(compared: Comparison) -> None:
    """The mean difference is that of the seeds' own differences, and its interval is theirs."""
    mine, its = (entry.values["e2el_mean"] for entry in compared.entries)
    paired = [a - b for a, b in zip(mine, its, strict=True)]
    found = compared.differences["vllm"]["e2el_mean"].difference
    assert found.mean == pytest.approx(np.mean(paired))
    assert found.high - found.mean == pytest.approx(12.7062 * np.std(paired, ddof=1) / np.sqrt(2), rel=1e-4)
    assert compared.entries[0].capacity is not None
    expected = {"slo_capacity", "overload_throughput", "ttft_p95", "request_goodput"}
    assert expected <= set(compared.differences["vllm"])


def test_the_headline_is_the_ratio_of_capacities(compared: Comparison) -> None:
    """One sentence: who serves how many times the load of whom, with its interval."""
    ratio = compared.differences["vllm"]["slo_capacity"].ratio
    times = f"{ratio.mean:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
    assert compared.headline == f"hetis serves {times} the load of vllm at the same SLO (simulated, 2 seeds)"


def test_a_policy_does_not_differ_from_itself() -> None:
    """The same policy under another name of its settings: every difference is zero, every ratio one."""
    same = compare(small("rate=20", "policies=[vllm,{name:vllm,preemption:recompute}]"))
    assert [entry.policy for entry in same.entries] == ["vllm", "vllm (preemption=recompute)"]
    for difference in same.differences["vllm (preemption=recompute)"].values():
        assert (difference.difference.mean, difference.difference.low) == (0.0, 0.0)
        assert difference.ratio.mean == pytest.approx(1.0)
        assert not difference.decided
    assert "a request takes 1.00x" in same.headline


def test_a_queue_that_grows_is_not_compared_by_latency() -> None:
    """Latencies under overload measure the length of the run, and the headline says so."""
    flooded = compare(small("rate=2000", "policies=[vllm,{name:vllm,preemption:swap}]", "seeds=1"))
    assert "grows" in flooded.headline
    assert any("measure the length of the run" in note for note in flooded.notes)


# -- input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "message"), [
    (("workload=closed", "workload.requests=100"), "workload.arrivals"),
    (("workload.duration_s=10",), "workload.duration_s"),
    (("study.seeds=0",), "study.seeds"),
    (("study.attainment=1.5",), "study.attainment"),
    (("study.tolerance=0",), "study.tolerance"),
    (("study.requests=3",), "study.requests"),
    (("study.warmup_fraction=0.6", "study.drop_tail_fraction=0.6"), "study.drop_tail_fraction"),
    (("study.wrong=1",), "study.wrong"),
])
def test_bad_settings_are_refused_by_name(words: tuple[str, ...], message: str) -> None:
    """Before anything runs, with the key and what is allowed."""
    with pytest.raises(HetisError, match=message):
        capacity(compose("cluster=single-a100", "model=llama3-8b", "study.workers=1", *words))


@pytest.mark.parametrize(("policies", "message"), [
    ("[vllm]", "at least two"), ("[vllm,vllm]", "named once"), ("[vllm,nonsense]", "nonsense"),
    ("[vllm,{name:vllm,wrong:1}]", "wrong"), ("[vllm,7]", "study.policies"),
])
def test_bad_policies_are_refused_by_name(policies: str, message: str) -> None:
    """Too few, twice the same, unknown, unknown settings, or no policy at all."""
    with pytest.raises(HetisError, match=message):
        compare(small(f"policies={policies}", "rate=5"))


def test_a_recorded_trace_has_no_seeds(tmp_path: Path) -> None:
    """A replay is the same for every seed, so that it is run once, with all its rows."""
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n"
                    + "".join(f"{n * 0.1},{20 + n},{5 + n % 7}\n" for n in range(80)))
    config = compose("cluster=single-a100", "model=llama3-8b", "policy=vllm", "workload=trace",
                     f"workload.path={path}", "study.workers=1", "study.tolerance=0.3")
    assert seeds_of(config) == [0]
    (one,) = capacities(config, cases_of(config))
    assert one.requests == one.overload_requests == 80
    with pytest.raises(SpecError, match="usable rows"):
        capacity(replace(config, workload=replace(config.workload, requests=500)))


# -- the command line --------------------------------------------------------------------------


def test_the_command_line_prints_one_line_of_json(capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """``capacity output=json`` prints what the Python API returns, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["hetis-sim"])
    main(["capacity", *SMALL, *QUICK, "seeds=1", "policy=vllm"])
    line = json.loads(capsys.readouterr().out)
    assert line["study"] == "capacity"
    assert line["slo"]["mean"] > 0
    assert line["bound"]["requests_per_s"] > line["throughput"]["mean"]
    assert list(tmp_path.iterdir()) == []


def test_the_table_names_every_policy_and_the_bound(capsys: pytest.CaptureFixture[str],
                                                    compared: Comparison) -> None:
    """For people: headline first, then metrics, differences and notes; the line for machines is asked for."""
    from hetis_sim.study.tables import print_comparison

    print_comparison(replace(small("rate=3"), output="table"), compared)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == compared.headline
    text = "\n".join(lines)
    assert "hetis - vllm" in text
    assert "no policy serves more than" in text
    assert max(map(len, lines[:30])) <= 110
    print_comparison(replace(small("rate=3"), output="json"), compared)
    assert json.loads(capsys.readouterr().out)["headline"] == compared.headline
