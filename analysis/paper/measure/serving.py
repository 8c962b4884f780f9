"""Serving: bound, capacity, and latencies at given rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from analysis.paper.measure import capacity as capacity_measure
from analysis.paper.measure.capacity import bound_from, measure
from analysis.paper.measure.modules import mean_gap_s, module_times
from analysis.paper.measure.usable import usable_tokens
from hetis_sim.config import RunConfig, compose
from hetis_sim.run import Result
from hetis_sim.study.capacity import study_bound
from hetis_sim.study.runs import Case, Load, cases_of, instances_of, planned, run_under

Policy = Mapping[str, Any]


def bound(words: Sequence[str]) -> dict[str, Any]:
    """The bound on the throughput of any policy."""
    config = compose(*words)
    return asdict(study_bound(config, cases_of(config)[0]))


def run_length(words: Sequence[str], policy: Policy, bound: Mapping[str, Any], sojourns: float) -> int:
    """Requests that a run of a search for a policy's capacity takes."""
    return capacity_measure.run_length(_case(words, policy), bound_from(bound), sojourns)


def capacity(words: Sequence[str], policy: Policy, bound: Mapping[str, Any],
             requests: int) -> dict[str, Any]:
    """Capacity at the SLO and throughput without, by seed; and the plan's usable cache."""
    return measure(_case(words, policy), bound_from(bound), requests)


def latency(words: Sequence[str], policy: Policy, plan_rate: float, rates: Sequence[float],
            seeds: Sequence[int], requests: int,
            plan_words: Sequence[str] | None = None) -> list[list[dict[str, Any]]]:
    """The figures of runs with a plan made for ``plan_rate``: by rate and seed.

    Args:
        plan_words: of the configuration whose plan is run; None for the plan of ``words`` themselves.
    """
    prepared = planned(_case(words, policy).config, plan_rate)
    if plan_words is not None:
        prepared = replace(prepared, plan=planned(_case(plan_words, policy).config, plan_rate).plan)
    return [[figures(run_under(prepared, Load(rate, requests, seed))) for seed in seeds] for rate in rates]


def plan(words: Sequence[str], policy: Policy, rate: float) -> dict[str, Any]:
    """What a policy makes of the cluster for a rate."""
    prepared = planned(_case(words, policy).config, rate)
    return {"instances": list(instances_of(prepared)), "usable_tokens": usable_tokens(prepared),
            "primary": sorted({prepared.cluster.devices[device].gpu.name
                               for instance in prepared.plan.instances
                               for stage in instance.stages for device in stage.devices})}


def _case(words: Sequence[str], policy: Policy) -> Case:
    config: RunConfig = compose(*words, f"policy={policy['name']}")
    return cases_of(replace(config, policy={**config.policy, **policy}))[0]


def figures(result: Result) -> dict[str, Any]:
    """What is kept of one run. Latencies are in seconds, over the measured requests."""
    summary = result.summary
    requests = result.recorder.records().requests
    inside = slice(summary.window.first, summary.window.last)
    e2el = requests["e2el_s"][inside] / requests["output_tokens"][inside]
    served = e2el[e2el == e2el]
    return {"ttft_p95_s": summary.ttft_s.p95, "tpot_p95_s": summary.tpot_s.p95,
            "ttft_mean_s": summary.ttft_s.mean, "tpot_mean_s": summary.tpot_s.mean,
            "normalised_s": float(served.mean()) if len(served) else float("nan"),
            "throughput_rps": summary.throughput.request_throughput,
            "attainment": summary.slo.attainment, "saturated": summary.saturation.verdict == "saturated",
            "preemptions": summary.preemptions, "moves": summary.moves,
            "rejected": summary.requests.rejected,
            "moved_bytes": float(requests["moved_bytes"].sum()), "kv_used_max": summary.kv_used_max,
            "gap_s": mean_gap_s(requests), **module_times(result)}
