"""The conformance checks pass for the policies here and catch broken ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

import pytest
from policy_worlds import cluster, paper, problem

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.check import ConformanceError, check_policy
from hetis_sim.policies.hetis.policy import HetisPolicy
from hetis_sim.policies.plan import InstancePlan, Placement, Plan, Role, StagePlan
from hetis_sim.policies.registry import make_policy
from hetis_sim.policies.view import InstanceLoad, InstanceView, Move, RequestView
from hetis_sim.policies.vllm import VllmPolicy


@pytest.mark.parametrize("config", [
    {"name": "hetis"},
    {"name": "hetis", "lp_min_requests": 1, "theta": 0.0, "min_benefit": 0.0},
    {"name": "hetis", "dispatch": "greedy", "eviction": "lifo", "ideal_pipeline": True},
    {"name": "hetis", "dispatch": "static", "redispatch": False},
    {"name": "vllm"},
], ids=str)
@pytest.mark.parametrize("model", ["llama2-70b", "llama2-13b"])
def test_the_policies_here_conform(config: dict[str, object], model: str) -> None:
    """On the testbed of the paper, in random states, roomy and full."""
    report = check_policy(make_policy(config), problem(paper(), model), rounds=12)
    assert 0 < report.placed <= report.dispatched
    if config.get("redispatch", True) and config["name"] == "hetis" and model == "llama2-70b":
        assert report.moves > 0


def test_gqa_with_few_kv_heads_conforms() -> None:
    """Groups stay whole where a rank owns a single one."""
    check_policy(HetisPolicy(), problem(cluster(("l4", 4), ("t4", 2)), "qwen2.5-7b"), rounds=12)


class Broken(VllmPolicy):
    """A policy in which one decision is replaced."""


def broken(**methods: Callable[..., object]) -> VllmPolicy:
    """vLLM's policy with other methods."""
    return type("Broken", (Broken,), dict(methods))()


def dispatch_short(self: VllmPolicy, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
    """Places no head at all."""
    return [tuple([0] * len(view.plan.positions)) for _ in requests]


def dispatch_greedy(self: VllmPolicy, requests: Sequence[RequestView],
                    view: InstanceView) -> list[Placement]:
    """Places everybody, cache or not."""
    return [view.plan.local_placement for _ in requests]


def dispatch_nobody(self: VllmPolicy, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
    """Never admits."""
    return []


def dispatch_twice(self: VllmPolicy, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
    """Has more answers than questions."""
    return [*super(Broken, self).dispatch(requests, view)] * 2


def dispatch_booking(self: VllmPolicy, requests: Sequence[RequestView],
                     view: InstanceView) -> list[Placement]:
    """Writes into the view."""
    placed = super(Broken, self).dispatch(requests, view)
    view.free_units[0] -= 1
    return placed


def moody() -> Callable[..., list[Placement]]:
    """Remembers how often it was asked, and answers accordingly."""
    calls = count()

    def dispatch(self: VllmPolicy, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
        placed = super(Broken, self).dispatch(requests, view)
        return placed[:-1] if next(calls) % 2 else placed

    return dispatch


def route_away(self: VllmPolicy, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
    """Names no instance."""
    return len(instances)


def plan_pools(self: VllmPolicy, given: PlanningProblem) -> Plan:
    """One card that prefills and two that decode, whichever hosts come first."""
    roles: tuple[Role, ...] = ("prefill", "decode", "decode")
    whole = (given.model.layers, (given.model.kv_heads,))
    return Plan(tuple(InstancePlan((StagePlan((d,), *whole),), (), role) for d, role in enumerate(roles)))


def handoff_to_nobody(self: VllmPolicy, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
    """Counts from one."""
    return len(instances)


def handoff_in_turns() -> Callable[..., int]:
    """A round robin that remembers whose turn it is."""
    turns = count()

    def handoff(self: VllmPolicy, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        return next(turns) % len(instances)

    return handoff


def handoff_in_order(self: VllmPolicy, request: RequestView, instances: list[InstanceLoad]) -> int:
    """Sorts what it was handed."""
    instances.sort(key=lambda load: -load.index)
    return 0


def route_by_name(self: VllmPolicy, request: RequestView, instances: Sequence[InstanceLoad]) -> str:
    """An answer of the wrong type."""
    return "the first"


@pytest.mark.parametrize(("policy", "rule"), [
    (broken(plan=plan_pools, handoff=handoff_to_nobody), "handoff names an instance"),
    (broken(plan=plan_pools, handoff=handoff_in_turns()), "handoff is pure"),
    (broken(plan=plan_pools, handoff=handoff_in_order), "handoff leaves its arguments alone"),
])
def test_broken_handoffs_are_caught(policy: VllmPolicy, rule: str) -> None:
    """Of policies whose plan has instances that only decode."""
    given = problem(cluster(*[("a100-80gb", 1)] * 3), "llama2-13b")
    check_policy(broken(plan=plan_pools), given, rounds=3)
    with pytest.raises(ConformanceError, match=rf"rule broken: {rule}"):
        check_policy(policy, given, rounds=3)


def move_nothing(self: VllmPolicy, view: InstanceView, running: Sequence[RequestView]) -> Move | None:
    """Moves a request to where it is."""
    movable = [r for r in running if r.movable and r.placement]
    return Move(movable[0].request_id, movable[0].placement or ()) if movable else None


def move_stranger(self: VllmPolicy, view: InstanceView, running: Sequence[RequestView]) -> Move | None:
    """Moves a request that does not run."""
    return Move(-1, view.plan.local_placement)


def victim_elsewhere(self: VllmPolicy, device: int, candidates: Sequence[RequestView]) -> RequestView:
    """Preempts somebody who was not offered."""
    return RequestView(-1, 0.0, 1, 1)


def plan_lame(self: VllmPolicy, given: PlanningProblem) -> Plan:
    """Forgets a layer."""
    made = super(Broken, self).plan(given)
    first, *others = made.instances
    stage, *stages = first.stages
    return Plan((replace(first, stages=(replace(stage, layers=stage.layers - 1), *stages)), *others))


def plan_heavy(self: VllmPolicy, given: PlanningProblem) -> Plan:
    """Puts the whole model on one card."""
    return Plan((InstancePlan((StagePlan((0,), given.model.layers, (given.model.kv_heads,)),)),))


@pytest.mark.parametrize(("policy", "rule"), [
    (broken(dispatch=dispatch_short), "places all heads of every stage"),
    (broken(dispatch=dispatch_greedy), "placements fit the free cache"),
    (broken(dispatch=dispatch_nobody), "a short request fits on the empty instance"),
    (broken(dispatch=dispatch_twice), "dispatch places a prefix"),
    (broken(dispatch=dispatch_booking), "dispatch leaves its arguments alone"),
    (broken(dispatch=moody()), "dispatch is pure"),
    (broken(route=route_away), "route names an instance"),
    (broken(route=route_by_name), "route names an instance"),
    (broken(rebalance=move_nothing), "rebalance moves something"),
    (broken(rebalance=move_stranger), "rebalance moves a movable request"),
    (broken(victim=victim_elsewhere), "the victim is one of the candidates"),
    (broken(plan=plan_lame), "layers sum to the model's"),
    (broken(plan=plan_heavy), "weights fit"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_broken_policies_are_caught(policy: VllmPolicy, rule: str) -> None:
    """The error names the rule."""
    with pytest.raises(ConformanceError, match=rf"rule broken: .*{rule}"):
        check_policy(policy, problem(cluster(("a100-80gb", 4))), rounds=40)
