"""Hetis with other units of division: whole requests and blocks of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_worlds import BLOCK, cluster, instance, paper, position_cost_strategy, problem, view_of

from hetis_sim.cost import RooflineCost
from hetis_sim.metrics.checks import record_violations
from hetis_sim.policies.check import check_policy
from hetis_sim.policies.costs import position_costs, range_wire_bytes
from hetis_sim.policies.hetis.attention import AttentionContext
from hetis_sim.policies.hetis.placing import Load
from hetis_sim.policies.hetis.policy import HetisPolicy
from hetis_sim.policies.hetis.settings import HetisSettings
from hetis_sim.policies.hetis.units import Asked, TokenBlocks, WholeRequests, count_in
from hetis_sim.policies.plan import InstancePlan, StagePlan
from hetis_sim.policies.ranges import AnyPlacement, TokenSplit, computed_groups, token_split
from hetis_sim.policies.view import RequestView
from hetis_sim.run import simulate
from hetis_sim.spec.architectures import model
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.model import ModelSpec

UNITS = ("request", "sequence")
CLUSTERS = {
    "paper": paper(),
    "like helix24": cluster(*[("a100-40gb", 1)] * 4, *[("l4", 1)] * 4, *[("t4", 1)] * 4,
                            network="ethernet-10g"),
    "homogeneous": cluster(("a100-80gb", 4)),
}


def hetis(granularity: str, **given: object) -> HetisPolicy:
    """The policy with a unit of division."""
    return HetisPolicy(HetisSettings(granularity=granularity, **given))  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", UNITS)
@pytest.mark.parametrize(("where", "name"), [
    ("paper", "llama2-70b"), ("like helix24", "llama2-13b"), ("homogeneous", "opt-30b"),
    pytest.param("like helix24", "llama2-70b", marks=pytest.mark.slow),
    pytest.param("paper", "opt-30b", marks=pytest.mark.slow)])
def test_it_conforms(granularity: str, where: str, name: str) -> None:
    """On mixed hosts, hosts of one card and equal cards; with moves where there are workers."""
    policy = hetis(granularity, theta=0.0, min_benefit=0.0)
    report = check_policy(policy, problem(CLUSTERS[where], name), rounds=10)
    assert 0 < report.placed <= report.dispatched
    if any(each.attention_workers for each in report.plan.instances):
        assert report.moves > 0


def test_the_plan_is_that_of_heads() -> None:
    """Only what is divided differs."""
    given = problem(paper())
    plans = [hetis(unit).plan(given).instances for unit in ("head", *UNITS)]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("given", [
    {"granularity": "layer"}, {"granularity": "request", "dispatch": "static"}])
def test_settings_out_of_range_are_refused_by_name(given: dict[str, object]) -> None:
    """The error names key, value and what is allowed."""
    with pytest.raises(SpecError, match=r"policy\.(granularity|dispatch)=.* is not allowed: must be"):
        HetisSettings(**given)  # type: ignore[arg-type]


# -- what is divided ---------------------------------------------------------------------------


def dispatched(granularity: str, spec: ModelSpec, plan: InstancePlan, room: dict[int, int],
               tokens: int) -> AnyPlacement:
    """Where one request goes on an idle instance of the paper's cards."""
    view = view_of(plan, position_costs(paper(), spec, RooflineCost(), plan), capacity=room)
    (placed,) = hetis(granularity).dispatch([RequestView(0, 0.0, tokens, tokens)], view)
    return placed


def bytes_sent(spec: ModelSpec, plan: InstancePlan, placement: AnyPlacement) -> int:
    """Head traffic of one layer and iteration, out and back."""
    tail = placement.tail if isinstance(placement, TokenSplit) else placement
    total = 0
    for position, grow, all_ in zip(plan.positions, tail, computed_groups(plan, placement), strict=True):
        if position.remote:
            total += spec.remote_bytes_per_token(grow * spec.heads_per_group)
            total += (all_ - grow) * range_wire_bytes(spec)[0]
    return total


@pytest.mark.parametrize("name", ["llama2-70b", "llama2-13b"])
@pytest.mark.parametrize("workers", [1, 4])
def test_heads_send_fewer_bytes_than_tokens_where_half_of_the_cache_leaves(name: str, workers: int) -> None:
    """By head each query goes to one worker, by sequence to every holder."""
    spec = model(name)
    plan = InstancePlan((StagePlan((0,), spec.layers, (spec.kv_heads,)),), tuple(range(8, 8 + workers)))
    tokens = 64 * BLOCK
    whole = (tokens // BLOCK + 1) * spec.kv_heads * spec.layers
    each = whole // 2 // workers + spec.layers * spec.kv_heads
    room = {0: whole // 2, **dict.fromkeys(plan.attention_workers, each)}
    by_head = bytes_sent(spec, plan, dispatched("head", spec, plan, room, tokens))
    by_sequence = bytes_sent(spec, plan, dispatched("sequence", spec, plan, room, tokens))
    assert 0 < by_head < by_sequence
    # All heads' queries to every worker, and as many outputs with two numbers each.
    assert by_sequence == workers * spec.kv_heads * range_wire_bytes(spec)[0]


def test_a_request_that_does_not_fit_whole_can_be_divided() -> None:
    """By head and by sequence, but not by request: neither place has room for all of it."""
    spec = model("llama2-70b")
    plan = InstancePlan((StagePlan((0,), spec.layers, (spec.kv_heads,)),), (8,))
    whole = 65 * spec.kv_heads * spec.layers
    room = dict.fromkeys((0, 8), int(whole * 0.6))
    view = view_of(plan, position_costs(paper(), spec, RooflineCost(), plan), capacity=room)
    asked = [RequestView(0, 0.0, 64 * BLOCK, 64 * BLOCK)]
    assert [len(hetis(unit).dispatch(asked, view)) for unit in ("head", "sequence", "request")] == [1, 1, 0]


@st.composite
def cases(draw: st.DrawFn) -> tuple[AttentionContext, Load, int]:
    """One stage with workers under some load, roomy or tight."""
    heads = draw(st.sampled_from([2, 4]))
    plan = instance([draw(st.sampled_from([(heads,), (heads // 2, heads - heads // 2)]))],
                    [draw(st.integers(1, 20))], draw(st.integers(1, 2)))
    ranks = draw(position_cost_strategy(remote=False))
    costs = [draw(position_cost_strategy(remote=True)) if position.remote else ranks
             for position in plan.positions]
    costs = [replace(cost, still_wire_s_per_group=cost.wire_s_per_group) for cost in costs]
    context = AttentionContext(plan, costs, 1, ranges=True)
    full = [heads if p.remote else p.owned_groups for p in plan.positions]
    load = draw(st.integers(0, 10))
    groups = [n * (draw(st.integers(0, 10)) if p.remote else load)
              for n, p in zip(full, plan.positions, strict=True)]
    held = draw(st.integers(1, 1000))
    tokens = [n * (draw(st.integers(1, 1000)) if p.remote else held)
              for n, p in zip(groups, plan.positions, strict=True)]
    most = draw(st.sampled_from([10**6, 600]))
    home = draw(st.integers(0, most))
    free = {d: draw(st.integers(0, most)) for d in plan.devices}
    free |= dict.fromkeys(plan.stages[0].devices, home)
    return context, Load(groups, tokens, free), draw(st.integers(1, 120))


def all_splits(plan: InstancePlan, blocks: int, most: int) -> list[AnyPlacement]:
    """Every placement by blocks with the tail at home, and all at one worker."""
    workers = range(plan.stages[0].tp, len(plan.positions))
    heads = sum(plan.stages[0].owned_groups)
    found: list[AnyPlacement] = [tuple(heads if p == w else 0 for p in range(len(plan.positions)))
                                 for w in workers]
    return found + [token_split(plan.local_placement, (*[0] * plan.stages[0].tp, *row))
                    for row in product(range(most + 1), repeat=len(workers)) if sum(row) <= most]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases())
def test_one_request_is_divided_so_that_the_slowest_is_as_fast_as_can_be(
        case: tuple[AttentionContext, Load, int]) -> None:
    """Against all ways to divide it by blocks, and by request against those."""
    context, load, tokens = case
    asked = Asked(tokens, -(-(tokens + 1) // BLOCK), BLOCK, [0] * context.positions)

    def time(placement: AnyPlacement | None) -> float:
        if placement is None:
            return float("inf")
        trial = load.copy()
        count_in(context, trial, placement, tokens, BLOCK)
        return context.total_time(trial.groups, trial.tokens)

    def fits(placement: AnyPlacement) -> bool:
        view = view_of(context.plan, context.costs, capacity=dict(load.free))
        return view.fits(placement, tokens + 1)

    ways: Sequence[AnyPlacement] = all_splits(context.plan, asked.blocks, asked.most)
    best = min((time(way) for way in ways if fits(way)), default=float("inf"))
    found = TokenBlocks().place(context, load, asked)
    whole = WholeRequests().place(context, load, asked)
    assert found is None or fits(found)
    # A block more or less at the ranks, whose last one is not full.
    slack = max(c.b_s_per_group_token for c in context.costs) * context.kv_heads * BLOCK * context.layers
    assert time(found) <= best + slack
    assert time(found) <= time(whole) + 1e-12


# -- whole runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", UNITS)
def test_a_whole_run_keeps_the_invariants(granularity: str) -> None:
    """All at once on little cache: moves, preemptions, and nobody is lost."""
    result = simulate("policy=hetis", f"policy.granularity={granularity}", "cluster=a100-t4",
                      "model=llama2-13b", "sim.debug=true", "progress=false",
                      "scheduler.memory_utilization=0.45", "rate=500", "requests=60")
    assert result.summary.requests.finished >= 59
    records = result.recorder.records()
    assert record_violations(records) == []
    assert records.requests["moves"].sum() > 0
    assert records.requests["remote_share"].max() > 0.0
