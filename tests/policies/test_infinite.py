"""Infinite-LLM: the newest tokens at home, older ones with creditors."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_worlds import BLOCK, cluster, instance, paper, problem, view_of

from hetis_sim.metrics.checks import record_violations
from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.bundles import FREE_SHARE
from hetis_sim.policies.check import ConformanceError, check_policy
from hetis_sim.policies.infinite import InfinitePolicy, InfiniteSettings
from hetis_sim.policies.layout import gpu_types
from hetis_sim.policies.lending import LendingEstimator
from hetis_sim.policies.plan import InstancePlan, Plan, StagePlan
from hetis_sim.policies.ranges import AnyPlacement, TokenSplit, token_split
from hetis_sim.policies.search import LayoutSearch
from hetis_sim.policies.view import InstanceView, PositionCost, RequestView
from hetis_sim.run import simulate
from hetis_sim.spec.cluster import ClusterSpec, HostSpec
from hetis_sim.spec.errors import InfeasibleError, SpecError
from hetis_sim.spec.gpus import gpu
from hetis_sim.spec.links import link

CLUSTERS = {
    "paper": paper(),
    "like helix24": cluster(*[("a100-40gb", 1)] * 4, *[("l4", 1)] * 4, *[("t4", 1)] * 4,
                            network="ethernet-10g"),
    "homogeneous": cluster(("a100-80gb", 4)),
    "small": cluster(("a100-80gb", 2), ("rtx3090", 1), ("t4", 2)),
}
MODELS = ("llama2-70b", "llama2-13b", "opt-30b")
QUICK = (("paper", "llama2-70b"), ("like helix24", "opt-30b"), ("homogeneous", "llama2-13b"))

HOME = PositionCost(2e-6, 2e-9, 1e-5)
CREDITOR = PositionCost(2e-6, 4e-9, 1e-5, 1e-6, 2e-5, still_wire_s_per_group=1e-6)
SLOW = PositionCost(2e-6, 4e-8, 1e-5, 1e-6, 2e-5, still_wire_s_per_group=1e-6)


def infinite(**given: object) -> InfinitePolicy:
    """The policy with some settings."""
    return InfinitePolicy(InfiniteSettings(**given))  # type: ignore[arg-type]


def costs(plan: InstancePlan, *creditors: PositionCost) -> list[PositionCost]:
    """Costs of the positions; the creditors in order."""
    which = {device: creditors[n % len(creditors)] for n, device in enumerate(plan.attention_workers)}
    return [which.get(position.device, HOME) for position in plan.positions]


# -- plans and conformance ---------------------------------------------------------------------


@pytest.mark.parametrize(("where", "model"), [
    pytest.param(where, model, marks=() if (where, model) in QUICK else pytest.mark.slow)
    for where in CLUSTERS for model in MODELS])
def test_it_conforms(where: str, model: str) -> None:
    """On mixed hosts, on hosts of one card and on equal cards."""
    report = check_policy(InfinitePolicy(), problem(CLUSTERS[where], model), rounds=12)
    assert 0 < report.placed <= report.dispatched
    if any(each.attention_workers for each in report.plan.instances):
        assert report.moves > 0


MIXED_HOST = ClusterSpec("test", (HostSpec((gpu("a100-80gb"),) * 2 + (gpu("t4"),) * 2, link("pcie4x16")),),
                         link("ethernet-100g"))


class Lender(InfinitePolicy):
    """Two primaries and two creditors."""

    def plan(self, given: PlanningProblem) -> Plan:
        return Plan((InstancePlan((StagePlan((0, 1), 80, (4, 4)),), (2, 3)),))


class Unannounced(Lender):
    """Gives out ranges without saying so."""

    splits_tokens = False


class Everything(Lender):
    """Lends all whole blocks of a context, its last token too where that ends one."""

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> Sequence[AnyPlacement]:
        placed = super().dispatch(requests, view)
        others = [0] * (len(view.plan.positions) - view.plan.stages[0].tp - 1)
        rows = [[*[0] * view.plan.stages[0].tp, request.context_tokens // view.block_tokens, *others]
                for request in requests[:len(placed)]]
        return [token_split(view.plan.local_placement, row) for row in rows]


class TailTwice(Lender):
    """Gives a range to whoever has the tail."""

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> Sequence[AnyPlacement]:
        ranges = (*[1] * view.plan.stages[0].tp, *[0] * (len(view.plan.positions) - view.plan.stages[0].tp))
        return [TokenSplit(view.plan.local_placement, ranges)] * len(super().dispatch(requests, view))


@pytest.mark.parametrize(("policy", "rule"), [
    (Unannounced(), "splits_tokens says that there are ranges"), (Everything(), "leaves a token to the tail"),
    (TailTwice(), "gives ranges that keep the rules"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_broken_ranges_are_caught(policy: InfinitePolicy, rule: str) -> None:
    """The conformance check names the rule."""
    with pytest.raises(ConformanceError, match=rf"rule broken: .*{rule}"):
        check_policy(policy, problem(MIXED_HOST), rounds=40)


def test_weaker_cards_are_creditors_and_only_where_that_serves_more() -> None:
    """No creditor is stronger than a primary; the plan is no worse than the best without creditors."""
    given = problem(paper())
    plan = InfinitePolicy().plan(given)
    order = ["a100-80gb", "rtx3090", "p100-12gb"]
    kinds = [order.index(device.gpu.name) for device in given.cluster.devices]
    primaries = [kinds[d] for each in plan.instances for stage in each.stages for d in stage.devices]
    creditors = [kinds[d] for each in plan.instances for d in each.attention_workers]
    assert creditors
    assert max(primaries) <= min(creditors)
    assert sorted(plan.reasons) == list(range(len(kinds)))
    alone = LayoutSearch(LendingEstimator(given, FREE_SHARE)).run(gpu_types(given), [])
    assert alone.cost_s is not None
    assert plan.search["requests_per_s"] >= 1.0 / alone.cost_s


def test_a_model_that_does_not_fit_is_refused() -> None:
    """With what it needs."""
    with pytest.raises(InfeasibleError, match="does not fit"):
        InfinitePolicy().plan(problem(cluster(("t4", 2))))


@pytest.mark.parametrize(("key", "value"), [
    ("reserve_fraction", -1), ("relief_blocks", 0), ("recall", 1), ("preemption", "drop"),
])
def test_settings_out_of_range_are_refused_by_name(key: str, value: object) -> None:
    """The error names key, value and what is allowed."""
    with pytest.raises(SpecError, match=rf"policy\.{key}=.* is not allowed: must be"):
        infinite(**{key: value})


# -- where tokens go ---------------------------------------------------------------------------


def dispatch(plan: InstancePlan, tokens: Sequence[int], capacity: dict[int, int],
             *creditors: PositionCost) -> Sequence[AnyPlacement]:
    """Placements on an empty instance without a reserve."""
    new = [RequestView(n, float(n), context, context) for n, context in enumerate(tokens)]
    view = view_of(plan, costs(plan, *creditors or (CREDITOR,)), capacity=capacity)
    return infinite(reserve_fraction=0.0).dispatch(new, view)


def test_what_home_cannot_hold_is_lent_oldest_first() -> None:
    """Whole at home as long as there is room; then the rest with the creditor; then nothing."""
    plan = instance([(2, 2)], [10], workers=1)
    room = {0: 20 * 13, 1: 20 * 13, 2: 40 * 12}  # thirteen blocks at home, twelve with the creditor
    # Requests of 7 blocks: one is whole at home, of the second one block finds none there.
    placed = dispatch(plan, [100] * 4, room)
    home = plan.local_placement
    assert placed == [home, TokenSplit(home, (0, 0, 1))]
    room[0] = room[1] = 20 * 20
    assert dispatch(plan, [100] * 4, room) == [home, home, TokenSplit(home, (0, 0, 1))]


def test_the_last_blocks_are_never_lent() -> None:
    """A home without room for two blocks takes nobody, whatever the creditor has."""
    plan = instance([(4,)], [10], workers=1)
    assert dispatch(plan, [100], {0: 40 * 1, 1: 10**6}) == []
    assert dispatch(plan, [100], {0: 40 * 2, 1: 10**6}) == [TokenSplit(plan.local_placement, (0, 5))]


def test_blocks_go_to_the_creditor_that_is_done_first_or_to_several() -> None:
    """The quicker one while it has room for all of them; else the room of both is used."""
    plan = instance([(4,)], [10], workers=2)
    home = plan.local_placement
    ample = dispatch(plan, [100], {0: 80, 1: 10**6, 2: 10**6}, SLOW, CREDITOR)
    assert ample == [TokenSplit(home, (0, 0, 5))]
    short = dispatch(plan, [100], {0: 80, 1: 10**6, 2: 40 * 3}, SLOW, CREDITOR)
    assert short == [TokenSplit(home, (0, 5, 0))]
    both = dispatch(plan, [100], {0: 80, 1: 40 * 3, 2: 40 * 3}, SLOW, CREDITOR)
    assert both == [TokenSplit(home, (0, 2, 3))]
    assert dispatch(plan, [100], {0: 80, 1: 40, 2: 40 * 3}, SLOW, CREDITOR) == []


def running(plan: InstancePlan, *requests: tuple[int, Sequence[int]]) -> list[RequestView]:
    """Decoding requests given as (context, blocks away)."""
    return [RequestView(n, float(n), context, context, 1, plan.local_placement, movable=True,
                        blocks=tuple(blocks) if any(blocks) else ())
            for n, (context, blocks) in enumerate(requests)]


def test_the_request_with_most_cache_at_home_lends() -> None:
    """As much as every request needs for a few blocks more; its oldest tokens."""
    plan = instance([(4,)], [10], workers=1)
    view = view_of(plan, costs(plan, CREDITOR), capacity={0: 0, 1: 10**6})
    asked = running(plan, (160, [0, 0]), (640, [0, 35]), (320, [0, 0]))
    move = infinite(relief_blocks=2).relieve(view, 0, asked)
    assert move is not None
    assert (move.request_id, move.placement) == (2, TokenSplit(plan.local_placement, (0, 6)))
    everything = infinite(relief_blocks=100).relieve(view, 0, asked)
    assert everything is not None
    assert everything.placement == TokenSplit(plan.local_placement, (0, 19))
    full = view_of(plan, costs(plan, CREDITOR), capacity={0: 0, 1: 39})
    assert infinite().relieve(full, 0, asked) is None
    assert infinite().relieve(view, 1, asked) is None


def test_blocks_come_home_when_there_is_room_and_the_creditor_is_slower() -> None:
    """Not while the creditor is the quicker one, nor without room, nor when told not to."""
    plan = instance([(4,)], [10], workers=1)
    room = {0: 40 * 100, 1: 10**6}
    view = view_of(plan, costs(plan, SLOW), [(320, plan.local_placement)], capacity=room)
    slow = InstanceView(**{**_fields(view), "groups": (4, 4), "group_tokens": (4 * 160, 4 * 160)})
    asked = running(plan, (320, [0, 10]))
    move = infinite(reserve_fraction=0.0).rebalance(slow, asked)
    assert move is not None
    assert move.placement == plan.local_placement
    assert infinite(recall=False).rebalance(slow, asked) is None
    tight = InstanceView(**{**_fields(slow), "free_units": {0: 40 * 3, 1: 10**6}})
    assert infinite(reserve_fraction=0.0).rebalance(tight, asked) is None
    quick = InstanceView(**{**_fields(slow), "group_tokens": (4 * 32000, 4 * 16)})
    assert infinite(reserve_fraction=0.0).rebalance(quick, asked) is None


def _fields(view: InstanceView) -> dict[str, object]:
    return {name: getattr(view, name) for name in InstanceView.__slots__}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_a_shorter_request_fits_where_a_longer_one_does(data: st.DataObject) -> None:
    """Over small instances, roomy and tight; the controller's longest context rests on it."""
    stages = data.draw(st.lists(st.sampled_from([(4,), (2, 2)]), min_size=1, max_size=2))
    layers = [data.draw(st.integers(1, 9)) for _ in stages]
    plan = instance(stages, layers, data.draw(st.integers(1, 3)))
    room = {d: data.draw(st.integers(0, 1500)) for d in plan.devices}
    tokens = data.draw(st.integers(2, 600))
    fewer = tokens - data.draw(st.integers(1, min(tokens - 1, BLOCK + 1)))
    assert len(dispatch(plan, [fewer], room)) >= len(dispatch(plan, [tokens], room))


# -- whole runs --------------------------------------------------------------------------------

SMALL = ("policy=infinite", "cluster=a100-t4", "model=llama2-13b", "sim.debug=true", "progress=false")
TIGHT = ("scheduler.memory_utilization=0.45", "rate=500", "requests=60")


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_in_overload_creditors_take_the_overflow_and_nobody_is_lost(preemption: str) -> None:
    """All at once, on little cache: blocks are lent at admission and later, invariants hold throughout."""
    result = simulate(*SMALL, *TIGHT, f"policy.preemption={preemption}", "sim.log_decisions=true")
    counts = result.summary.requests
    assert counts.submitted == 60 == counts.finished + counts.rejected
    assert counts.finished >= 59
    records = result.recorder.records()
    assert record_violations(records) == []
    assert records.requests["moves"].sum() > 0
    assert 0.0 < records.requests["remote_share"].max() < 1.0
    decided = [json.loads(line) for line in result.decisions or []]
    assert any("blocks" in row for each in decided if each["kind"] == "dispatch" for row in each["decision"])


def test_creditors_spare_preemptions() -> None:
    """On the plan with creditors fewer requests lose their cache than where nobody lends."""
    lending = simulate(*SMALL, *TIGHT).recorder.records().requests
    alone = simulate("policy=vllm", *SMALL[1:], *TIGHT).recorder.records().requests
    assert lending["preemptions"].sum() < alone["preemptions"].sum()
