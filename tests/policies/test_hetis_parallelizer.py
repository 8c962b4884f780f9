"""The search for the primary layout and the exclusion rule."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from policy_worlds import cluster, paper, problem

from hetis_sim.policies.check import check_plan
from hetis_sim.policies.hetis.policy import HetisPolicy
from hetis_sim.policies.hetis.settings import HetisSettings
from hetis_sim.policies.layout import gpu_types
from hetis_sim.policies.plan import Plan
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.errors import InfeasibleError


def plan_for(spec: ClusterSpec, name: str = "llama2-70b", **settings: object) -> Plan:
    """Hetis's plan."""
    return HetisPolicy(HetisSettings(**settings)).plan(problem(spec, name))  # type: ignore[arg-type]


def kinds(plan: Plan, spec: ClusterSpec) -> tuple[set[str], set[str]]:
    """GPUs with dense work, and attention workers."""
    primary = {spec.devices[d].gpu.name for i in plan.instances for stage in i.stages for d in stage.devices}
    workers = {spec.devices[d].gpu.name for i in plan.instances for d in i.attention_workers}
    return primary, workers


def cost(plan: Plan) -> float:
    """Seconds per request."""
    return float(1.0 / plan.search["requests_per_s"])


@pytest.mark.parametrize("name", ["llama2-70b", "llama2-13b", "opt-30b"])
@pytest.mark.parametrize("ideal", [False, True])
def test_plans_of_the_papers_models_can_be_carried_out(name: str, ideal: bool) -> None:
    """Layers add up, weights fit, every GPU has one role and a reason with figures."""
    spec = paper()
    plan = plan_for(spec, name, ideal_pipeline=ideal)
    check_plan(plan, problem(spec, name))
    used = sorted(d for instance in plan.instances for d in instance.devices)
    assert used == list(range(12))
    assert sorted(plan.reasons) == used
    assert all(text.startswith(("primary", "attention worker")) for text in plan.reasons.values())
    for instance in plan.instances:
        for d in instance.attention_workers:
            assert "delta = 5%" in plan.reasons[d] or "raise it by" in plan.reasons[d]


@pytest.mark.parametrize("name", ["llama2-70b", "llama2-13b", "opt-30b"])
def test_p100s_are_attention_workers_in_the_papers_testbed(name: str) -> None:
    """Dense work on them costs more than it brings."""
    spec = paper()
    primary, workers = kinds(plan_for(spec, name), spec)
    assert "a100-80gb" in primary
    assert "p100-12gb" in workers


def test_the_papers_roles_come_out_where_prefills_leave_no_bubbles() -> None:
    """Llama-70B: A100s and RTX 3090s primary, P100s attention workers, if pipelines overlap perfectly."""
    spec = paper()
    primary, workers = kinds(plan_for(spec, ideal_pipeline=True), spec)
    assert primary == {"a100-80gb", "rtx3090"}
    assert workers == {"p100-12gb"}


def test_a_useful_type_stays_primary() -> None:
    """Four more cards of nearly the same strength are not left out."""
    spec = cluster(("a100-80gb", 4), ("a100-40gb", 4))
    primary, workers = kinds(plan_for(spec, "llama2-13b"), spec)
    assert primary == {"a100-80gb", "a100-40gb"}
    assert workers == set()


def test_delta_decides_whether_a_weak_type_is_left_out() -> None:
    """With delta = 0 whatever helps at all stays; with a large delta it goes."""
    spec = cluster(("a100-80gb", 4), ("rtx3090", 2), ("rtx3090", 2))
    strict, _ = kinds(plan_for(spec, "llama2-13b", delta=0.0), spec)
    lax, workers = kinds(plan_for(spec, "llama2-13b", delta=10.0), spec)
    assert strict == {"a100-80gb", "rtx3090"}
    assert lax == {"a100-80gb"}
    assert workers == {"rtx3090"}


def test_the_exclusion_rule_goes_by_the_costs_that_it_prints() -> None:
    """Every set of types that was chosen over a larger one costs at most (1 + delta) times as much."""
    for delta in (0.0, 0.05, 0.5):
        plan = plan_for(paper(), "llama2-13b", delta=delta)
        sets: dict[str, float] = plan.search["sets"]
        primary, _ = kinds(plan, paper())
        chain = sorted((names for names in sets if set(names.split(" + ")) >= primary), key=lambda n: -len(n))
        costs = [sets[names] for names in chain]
        assert all(less <= (1 + delta) * more * (1 + 1e-9) for more, less in pairwise(costs))


def test_a_type_without_which_the_model_does_not_fit_stays() -> None:
    """However slow it is."""
    spec = cluster(("a100-80gb", 1), ("p100-16gb", 8))
    plan = plan_for(spec)
    primary, _ = kinds(plan, spec)
    assert primary == {"a100-80gb", "p100-16gb"}
    check_plan(plan, problem(spec))
    assert "does not fit without" in plan.reasons[8]


def test_a_model_that_fits_nowhere_is_refused_with_the_memory_it_needs() -> None:
    """The text says how many GB are needed and how many there are."""
    with pytest.raises(InfeasibleError, match=r"needs 138\.0 GB .* 2 GPUs offer \d+\.\d GB"):
        plan_for(cluster(("rtx3090", 2)))


def test_hosts_in_another_order_give_a_plan_of_equal_cost() -> None:
    """Numbers of devices mean nothing."""
    spec = paper()
    for hosts in (spec.hosts[::-1], (spec.hosts[2], spec.hosts[3], spec.hosts[0], spec.hosts[1])):
        turned = replace(spec, hosts=hosts)
        for name in ("llama2-70b", "llama2-13b"):
            assert cost(plan_for(turned, name)) == pytest.approx(cost(plan_for(spec, name)), rel=1e-12)


def test_more_hosts_never_cost_more() -> None:
    """A second host of the same kind lowers the cost per request."""
    one, two = cluster(("a100-80gb", 4)), cluster(("a100-80gb", 4), ("a100-80gb", 4))
    assert cost(plan_for(two, "llama2-13b")) < cost(plan_for(one, "llama2-13b"))


def test_hosts_with_odd_numbers_of_cards_are_used_in_full() -> None:
    """Groups that a degree does not divide leave a smaller group, not an idle card."""
    spec = cluster(("a100-80gb", 3), ("a100-80gb", 5))
    plan = plan_for(spec, "llama2-70b")
    check_plan(plan, problem(spec))
    assert len({d for instance in plan.instances for d in instance.devices}) == 8


def test_tensor_parallel_degrees_are_limited_by_kv_heads() -> None:
    """No rank is without a KV head."""
    (kind,) = gpu_types(problem(cluster(("a100-80gb", 8)), "qwen2.5-7b"))
    assert kind.tp_options(4) == (1, 2, 4)
    assert kind.tp_options(8) == (1, 2, 4, 8)


def test_types_are_ordered_by_what_they_can_do() -> None:
    """High-end first, whatever the order of the hosts."""
    spec = cluster(("t4", 1), ("a100-80gb", 1), ("p100-12gb", 1), ("rtx3090", 1))
    ordered = [kind.name for kind in gpu_types(problem(spec, "llama2-7b"))]
    assert ordered == ["a100-80gb", "rtx3090", "t4", "p100-12gb"]


def test_large_clusters_are_searched_by_a_short_list() -> None:
    """More candidates than are worked out exactly still give a plan that can be carried out."""
    spec = cluster(*[("a100-80gb", 8)] * 3, *[("l40s", 4)] * 5, *[("t4", 4)] * 4)
    plan = plan_for(spec, "llama2-13b")
    check_plan(plan, problem(spec, "llama2-13b"))
    assert plan.search["candidates"] > 500


def test_of_layouts_that_cost_the_same_the_quickest_is_chosen() -> None:
    """The chosen layout costs at most 5 % more than the cheapest of its set."""
    for name in ("llama2-70b", "llama2-13b", "opt-30b"):
        plan = plan_for(paper(), name)
        primary, _ = kinds(plan, paper())
        sets: dict[str, float] = plan.search["sets"]
        (cheapest,) = (value for names, value in sets.items() if set(names.split(" + ")) == primary)
        assert cheapest <= cost(plan) * (1 + 1e-9) <= 1.05 * cheapest
