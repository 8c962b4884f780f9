"""Lamina: decode attention of whole requests on attention workers."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_worlds import cluster, instance, paper, problem, request, view_of

from hetis_sim.metrics.checks import record_violations
from hetis_sim.policies.check import check_policy
from hetis_sim.policies.lamina import LaminaPolicy, LaminaSettings
from hetis_sim.policies.plan import InstancePlan, Placement
from hetis_sim.policies.view import PositionCost
from hetis_sim.run import Result, simulate
from hetis_sim.spec.errors import InfeasibleError, SpecError

CLUSTERS = {
    "paper": paper(),
    "one card a host": cluster(*[("a100-40gb", 1)] * 4, *[("l4", 1)] * 4, *[("t4", 1)] * 4,
                               network="ethernet-10g"),
    "homogeneous": cluster(("a100-80gb", 4)),
}
MODELS = ("llama2-70b", "llama2-13b", "opt-30b")

HOME = PositionCost(2e-6, 2e-9, 1e-5)
WORKER = PositionCost(1e-6, 1e-9, 1e-5, 1e-6, 2e-5)
SLOW = PositionCost(1e-4, 1e-7, 1e-3, 1e-4, 2e-3)


def lamina(**given: object) -> LaminaPolicy:
    """The policy with some settings."""
    return LaminaPolicy(LaminaSettings(**given))  # type: ignore[arg-type]


def by_stage(plan: InstancePlan, placement: Placement) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(groups at ranks, groups at workers) of every stage."""
    return [(tuple(placement[p] for p in indices if not plan.positions[p].remote),
             tuple(placement[p] for p in indices if plan.positions[p].remote))
            for indices in plan.stage_positions]


def assert_whole(plan: InstancePlan, placement: Placement) -> None:
    """In each stage all heads are with the ranks, or all at a single worker."""
    for stage, (home, away) in zip(plan.stages, by_stage(plan, placement), strict=True):
        if any(away):
            assert not any(home)
            assert sorted(away)[:-1] == [0] * (len(away) - 1)
        else:
            assert home == stage.owned_groups


# -- plans and conformance ---------------------------------------------------------------------


QUICK = (("paper", "llama2-70b"), ("one card a host", "llama2-13b"), ("homogeneous", "opt-30b"))


@pytest.mark.parametrize(("where", "model"), [
    pytest.param(where, model, marks=() if (where, model) in QUICK else pytest.mark.slow)
    for where in CLUSTERS for model in MODELS])
def test_it_conforms(where: str, model: str) -> None:
    """On mixed hosts, on hosts of one card and on equal cards."""
    report = check_policy(LaminaPolicy(), problem(CLUSTERS[where], model), rounds=6)
    assert 0 < report.placed <= report.dispatched
    assert report.moves == 0


@pytest.mark.parametrize("given", [
    {"offload": "all"}, {"partition": "head"}, {"partition": "head", "offload": "all"},
    {"preemption": "swap", "reserve_fraction": 0.3},
], ids=str)
def test_it_conforms_with_other_settings(given: dict[str, object]) -> None:
    """Where the workers are of two kinds."""
    spec = cluster(("a100-80gb", 2), ("rtx3090", 1), ("t4", 2))
    check_policy(lamina(**given), problem(spec, "llama2-13b"), rounds=12)


@pytest.mark.parametrize("where", CLUSTERS)
@pytest.mark.parametrize("offload", ["all", "balanced"])
def test_every_instance_has_workers_that_are_no_stronger_than_its_primaries(where: str, offload: str) -> None:
    """Dense work goes to the high-end cards, and nobody does both."""
    given = problem(CLUSTERS[where], "llama2-13b")
    plan = lamina(offload=offload).plan(given)
    order = ["a100-80gb", "a100-40gb", "rtx3090", "l4", "t4", "p100-12gb"]
    used = [d for each in plan.instances for d in each.devices]
    assert len(set(used)) == len(used)
    assert sorted(plan.reasons) == list(range(len(given.cluster.devices)))
    ranks: dict[str, list[int]] = {"dense": [], "attention": []}
    for each in plan.instances:
        assert each.attention_workers
        for stage in each.stages:
            ranks["dense"] += [order.index(given.cluster.devices[d].gpu.name) for d in stage.devices]
        ranks["attention"] += [order.index(given.cluster.devices[d].gpu.name) for d in each.attention_workers]
    assert max(ranks["dense"]) <= min(ranks["attention"])


def test_a_single_card_serves_without_workers() -> None:
    """There is nobody to offload to."""
    plan = LaminaPolicy().plan(problem(cluster(("a100-80gb", 1)), "llama2-13b"))
    assert [each.devices for each in plan.instances] == [(0,)]


def test_a_model_that_does_not_fit_is_refused() -> None:
    """With what it needs."""
    with pytest.raises(InfeasibleError, match="does not fit"):
        LaminaPolicy().plan(problem(cluster(("t4", 2))))


@pytest.mark.parametrize(("key", "value"), [
    ("partition", "layer"), ("offload", True), ("reserve_fraction", -1), ("preemption", "drop"),
])
def test_settings_out_of_range_are_refused_by_name(key: str, value: object) -> None:
    """The error names key, value and what is allowed."""
    with pytest.raises(SpecError, match=rf"policy\.{key}=.* is not allowed: must be"):
        lamina(**{key: value})


# -- where requests go -------------------------------------------------------------------------


def dispatch(policy: LaminaPolicy, plan: InstancePlan, worker: PositionCost, tokens: Sequence[int],
             capacity: dict[int, int] | None = None) -> list[Placement]:
    """Placements on an empty instance."""
    costs = [worker if position.remote else HOME for position in plan.positions]
    new = [request(number, context) for number, context in enumerate(tokens)]
    return policy.dispatch(new, view_of(plan, costs, capacity=capacity))


def test_whole_requests_alternate_between_equal_workers() -> None:
    """Each goes where attention is done first."""
    plan = instance([(4,)], [10], workers=2)
    placed = dispatch(lamina(offload="all"), plan, WORKER, [100] * 4)
    assert [by_stage(plan, row)[0] for row in placed] == [((0,), (4, 0)), ((0,), (0, 4))] * 2


def test_balanced_keeps_requests_at_home_where_workers_are_slow() -> None:
    """And ``all`` does not."""
    plan = instance([(2, 2)], [10], workers=1)
    home, away = ((2, 2), (0,)), ((0, 0), (4,))
    assert [by_stage(plan, row)[0] for row in dispatch(lamina(), plan, SLOW, [100] * 3)] == [home] * 3
    forced = dispatch(lamina(offload="all"), plan, SLOW, [100] * 3)
    assert [by_stage(plan, row)[0] for row in forced] == [away] * 3


def test_balanced_divides_requests_over_home_and_equal_workers() -> None:
    """Nobody is idle while another has two."""
    plan = instance([(4,)], [10], workers=2)
    placed = dispatch(lamina(), plan, PositionCost(2e-6, 2e-9, 1e-5), [100] * 6)
    assert [sum(row[p] for row in placed) for p in range(3)] == [8, 8, 8]


def test_what_workers_cannot_hold_stays_with_the_primaries() -> None:
    """``all`` offloads as long as there is room, less the reserve."""
    plan = instance([(4,)], [10], workers=1)
    room = {0: 10**6, 1: 3 * 4 * 10 * 7}  # three requests of 100 tokens, 7 blocks each
    placed = dispatch(lamina(offload="all", reserve_fraction=0.0), plan, WORKER, [100] * 5, room)
    assert [by_stage(plan, row)[0][1] for row in placed] == [(4,)] * 3 + [(0,)] * 2
    placed = dispatch(lamina(offload="all", reserve_fraction=0.1), plan, WORKER, [100] * 5, room)
    assert [by_stage(plan, row)[0][1] for row in placed] == [(4,)] * 2 + [(0,)] * 3


def test_stages_that_do_not_fit_away_together_are_served_all_the_same() -> None:
    """The worker has room for one of two stages only: the one that the primaries cannot hold."""
    plan = instance([(4,), (4,)], [10, 10], workers=1)
    blocks = 7
    room = {0: 10**6, 1: 0, 2: 4 * 10 * blocks}
    (placed,) = dispatch(lamina(offload="all"), plan, WORKER, [100], room)
    assert by_stage(plan, placed) == [((4,), (0,)), ((0,), (4,))]


def test_partition_by_head_divides_every_request_over_all_workers() -> None:
    """In proportion to their cache; at home when that is sooner."""
    plan = instance([(8,)], [10], workers=3)
    room = {0: 10**6, 1: 10**5, 2: 10**5, 3: 2 * 10**5}
    placed = dispatch(lamina(partition="head", offload="all"), plan, WORKER, [100, 900], room)
    assert [by_stage(plan, row)[0] for row in placed] == [((0,), (2, 2, 4))] * 2
    at_home = dispatch(lamina(partition="head"), plan, SLOW, [100], room)
    assert by_stage(plan, at_home[0])[0] == ((8,), (0, 0, 0))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_requests_stay_whole_and_a_shorter_one_fits_where_a_longer_one_does(data: st.DataObject) -> None:
    """Over small instances, roomy and tight; the controller's longest context rests on the second."""
    stages = data.draw(st.lists(st.sampled_from([(4,), (2, 2)]), min_size=1, max_size=3))
    layers = [data.draw(st.integers(1, 9)) for _ in stages]
    plan = instance(stages, layers, data.draw(st.integers(1, 3)))
    room = {d: data.draw(st.integers(0, 1500)) for d in plan.devices}
    policy = lamina(offload=data.draw(st.sampled_from(["all", "balanced"])))
    tokens = data.draw(st.integers(2, 400))
    longer = dispatch(policy, plan, WORKER, [tokens], room)
    shorter = dispatch(policy, plan, WORKER, [tokens - data.draw(st.integers(1, tokens - 1))], room)
    assert len(shorter) >= len(longer)
    for placement in dispatch(policy, plan, WORKER, [tokens, *range(20, 400, 30)], room):
        assert_whole(plan, placement)


# -- whole runs --------------------------------------------------------------------------------

SMALL = ("policy=lamina", "cluster=a100-t4", "model=llama2-13b", "sim.debug=true", "sim.log_decisions=true",
         "progress=false")


def placements(result: Result) -> list[tuple[InstancePlan, Placement]]:
    """Every placement in the decision log."""
    lines = [json.loads(line) for line in result.decisions or []]
    (plan,) = result.prepared.plan.instances
    return [(plan, tuple(row)) for line in lines if line["kind"] == "dispatch" for row in line["decision"]]


@pytest.mark.parametrize("offload", ["all", "balanced"])
def test_a_whole_run_keeps_the_invariants(offload: str) -> None:
    """Requests are whole, workers are used, and everybody is served."""
    result = simulate(*SMALL, f"policy.offload={offload}", "rate=4", "requests=120")
    found = placements(result)
    assert found
    for plan, placement in found:
        assert_whole(plan, placement)
    records = result.recorder.records()
    assert record_violations(records) == []
    assert result.summary.requests.finished == 120
    assert records.requests["remote_share"].max() == 1.0


@pytest.mark.parametrize("partition", ["request", "head"])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_nobody_is_lost_in_overload(partition: str, preemption: str) -> None:
    """All at once, on little cache: requests wait or lose their cache, and end."""
    result = simulate(*SMALL, f"policy.partition={partition}", f"policy.preemption={preemption}",
                      "policy.reserve_fraction=0", "scheduler.memory_utilization=0.45", "rate=500",
                      "requests=50", "policy.offload=all")
    counts = result.summary.requests
    assert counts.submitted == 50 == counts.finished + counts.rejected
    assert counts.finished >= 49
    assert record_violations(result.recorder.records()) == []
    assert result.recorder.records().requests["preemptions"].sum() > 0
