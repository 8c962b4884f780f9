"""Serving: bound, capacity, and latencies at given rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from analysis.paper.measure.modules import module_times
from analysis.paper.measure.usable import usable_tokens
from hetis_sim.config import RunConfig, compose
from hetis_sim.run import Prepared, Result
from hetis_sim.study.bound.result import Bound
from hetis_sim.study.capacity import capacities, study_bound
from hetis_sim.study.runs import Case, Load, cases_of, instances_of, planned, run_under
from hetis_sim.study.search import Found

Policy = Mapping[str, Any]


def bound(words: Sequence[str]) -> dict[str, Any]:
    """The bound on the throughput of any policy."""
    config = compose(*words)
    return asdict(study_bound(config, cases_of(config)[0]))


def capacity(words: Sequence[str], policy: Policy, bound: Mapping[str, Any]) -> dict[str, Any]:
    """Capacity at the SLO and throughput under overload, by seed; and the plan's usable cache."""
    case = _case(words, policy)
    found = capacities(case.config, [case], bound=Bound(**bound))[0]
    prepared = _plan_of(case, found.instances, [found.slo.mean, found.throughput.mean])
    # Runs of the search may serve more than a flood does, which makes some systems thrash.
    stable = [max([flood, *(probe.rate_rps for probe in search.probes if probe.verdict == "stable")])
              for flood, search in zip(found.throughputs_rps, found.searches, strict=True)]
    return {"slo": [crossing(search, found.attainment) for search in found.searches],
            "overload": list(found.throughputs_rps), "sustained": stable,
            "instances": list(found.instances), "notes": list(found.notes),
            "requests": found.requests, "runs": found.runs, "usable_tokens": usable_tokens(prepared)}


def crossing(search: Found, attainment: float) -> float:
    """The rate at which the SLO ceases to hold, between the last that held and the first that failed.

    Interpolated in the attainment over the logarithm of the rate; the last that held where the next failed
    for another reason (a growing queue), or none did.
    """
    held = [probe for probe in search.probes if probe.rate_rps == search.rate_rps]
    failed = min((probe for probe in search.probes if probe.rate_rps > search.rate_rps),
                 key=lambda probe: probe.rate_rps, default=None)
    if not held or failed is None or failed.attainment >= attainment:
        return search.rate_rps
    way = (held[0].attainment - attainment) / (held[0].attainment - failed.attainment)
    return float(search.rate_rps * (failed.rate_rps / search.rate_rps) ** way)


def latency(words: Sequence[str], policy: Policy, plan_rate: float, rates: Sequence[float],
            seeds: Sequence[int], requests: int) -> list[list[dict[str, Any]]]:
    """The figures of runs with a plan made for ``plan_rate``: by rate and seed."""
    case = _case(words, policy)
    prepared = planned(case.config, plan_rate)
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


def _plan_of(case: Case, instances: Sequence[str], rates: Sequence[float]) -> Prepared:
    """The plan that a capacity was found with: that of one of these rates."""
    plans = [planned(case.config, rate) for rate in rates if rate > 0]
    return next((p for p in plans if instances_of(p) == tuple(instances)), plans[0])


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
            **module_times(result)}
