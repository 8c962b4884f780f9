"""Moves of running requests: for speed, and for memory."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from policy_worlds import instance, request, view_of

from hetis_sim.policies.hetis.attention import AttentionContext
from hetis_sim.policies.hetis.ideal import attention_bound, ideal_time
from hetis_sim.policies.hetis.policy import HetisPolicy
from hetis_sim.policies.hetis.settings import HetisSettings
from hetis_sim.policies.plan import InstancePlan, Placement
from hetis_sim.policies.view import InstanceView, Move, PositionCost, RequestView

FAST = PositionCost(1e-6, 1e-9, 1e-5)
FAR = PositionCost(1e-6, 2e-9, 1e-5, 1e-6, 5e-5)
PLAN = instance([(4, 4)], [10], 2)
COSTS = [FAST, FAST, FAR, FAR]
TWO_STAGES = instance([(4, 4), (8,)], [30, 10], 2)
TWO_COSTS = [FAST, FAST, FAR, FAR, FAST, FAR, FAR]


def policy(**settings: object) -> HetisPolicy:
    """Hetis with some settings."""
    return HetisPolicy(HetisSettings(**settings))  # type: ignore[arg-type]


def total(view: InstanceView) -> float:
    """F of a view."""
    context = AttentionContext(view.plan, view.costs, view.lanes)
    return context.total_time(view.groups, view.group_tokens)


def world(rows: list[tuple[int, Placement]], plan: InstancePlan = PLAN, costs: list[PositionCost] = COSTS,
          capacity: dict[int, int] | None = None) -> tuple[InstanceView, list[RequestView]]:
    """A view, and its running requests given as (context, placement)."""
    running = [request(i, tokens, placement) for i, (tokens, placement) in enumerate(rows)]
    return view_of(plan, costs, rows, capacity), running


def moved(running: list[RequestView], move: Move) -> list[RequestView]:
    """The requests after a move."""
    return [replace(r, placement=move.placement) if r.request_id == move.request_id else r for r in running]


def after(view: InstanceView, running: list[RequestView], move: Move) -> InstanceView:
    """The view after a move."""
    rows = [(r.context_tokens, r.placement or ()) for r in moved(running, move)]
    return view_of(view.plan, view.costs, rows)


def crowded(plan: InstancePlan, many: int, seed: int = 0) -> list[tuple[int, Placement]]:
    """Requests all of whose heads sit at the first attention worker."""
    placement: list[int] = []
    for stage in plan.stages:
        placement += [0] * stage.tp + [sum(stage.owned_groups), 0]
    random = Random(seed)
    return [(random.randint(50, 4000), tuple(placement)) for _ in range(many)]


def test_a_balanced_load_stays_where_it_is() -> None:
    """No request moves while attention takes no longer than (1 + theta) times the ideal."""
    view, running = world([(1000, (4, 4, 0, 0))] * 3)
    assert policy().rebalance(view, running) is None


@pytest.mark.parametrize("many", [1, 5, 60])
def test_a_move_for_speed_shortens_attention(many: int) -> None:
    """One request moves, and F falls by more than min_benefit; repeated, the load comes into balance."""
    view, running = world(crowded(TWO_STAGES, many), TWO_STAGES, TWO_COSTS)
    hetis = policy(min_benefit=0.001)
    first = hetis.rebalance(view, running)
    assert first is not None
    before = total(view)
    for _ in range(3 * many):
        move = hetis.rebalance(view, running)
        if move is None:
            break
        better = after(view, running, move)
        assert total(better) < (1 - 0.001) * total(view)
        view, running = better, moved(running, move)
    else:
        pytest.fail("moves do not come to an end")
    context = AttentionContext(view.plan, view.costs, view.lanes)
    assert total(view) <= 1.5 * ideal_time(context, view) * 1.1
    assert total(view) < before


def test_the_request_with_the_largest_benefit_moves() -> None:
    """No other single request would have shortened F further."""
    view, running = world(crowded(PLAN, 6))
    hetis = policy()
    move = hetis.rebalance(view, running)
    assert move is not None
    best = total(after(view, running, move))
    for other in running:
        alone = [replace(r, movable=r is other) for r in running]
        found = hetis.rebalance(view, alone)
        if found is not None:
            assert best <= total(after(view, running, found)) * (1 + 1e-9)


def test_theta_decides_when_heads_move() -> None:
    """A load that a small theta moves is left alone by a large one."""
    view, running = world([*crowded(PLAN, 1), (3000, (4, 4, 0, 0)), (3000, (4, 4, 0, 0))])
    assert policy(theta=0.0).rebalance(view, running) is not None
    assert policy(theta=50.0).rebalance(view, running) is None


def test_moves_that_bring_little_are_not_made() -> None:
    """No churn: the benefit must reach min_benefit."""
    view, running = world(crowded(PLAN, 40))
    assert policy(min_benefit=0.001).rebalance(view, running) is not None
    assert policy(min_benefit=0.5).rebalance(view, running) is None


def test_requests_on_their_way_do_not_move_again() -> None:
    """Only movable requests are considered."""
    view, running = world(crowded(PLAN, 4))
    still = [replace(r, movable=False) for r in running]
    assert policy().rebalance(view, still) is None
    assert policy().relieve(replace(view, free_units={**view.free_units, 2: 0}), 2, still) is None


def test_without_redispatch_nothing_moves() -> None:
    """The switch turns both triggers off."""
    view, running = world(crowded(PLAN, 4))
    full = replace(view, free_units={**view.free_units, 2: 0})
    assert policy(redispatch=False).rebalance(view, running) is None
    assert policy(redispatch=False).relieve(full, 2, running) is None


def test_the_bound_is_below_the_ideal_and_the_ideal_below_the_present() -> None:
    """The quick test that spares the linear program never spares it wrongly."""
    for seed in range(20):
        random = Random(seed)
        rows = crowded(TWO_STAGES, random.randint(1, 30), seed)
        rows += [(n, (4, 4, 0, 0, 8, 0, 0)) for n, _ in crowded(TWO_STAGES, random.randint(0, 30), seed + 99)]
        capacity = dict.fromkeys(TWO_STAGES.devices, random.choice((10**6, 400_000)))
        view, _ = world(rows, TWO_STAGES, TWO_COSTS, capacity)
        context = AttentionContext(view.plan, view.costs, view.lanes)
        ideal = ideal_time(context, view)
        assert attention_bound(context, view) <= ideal * (1 + 1e-6)
        assert ideal <= total(view) * (1 + 1e-9)


def test_relief_frees_the_full_device_and_touches_only_requests_with_cache_there() -> None:
    """Trigger 2: a request with heads on the device gives some of them up."""
    rows = [(1000, (4, 4, 0, 0)), (800, (2, 4, 2, 0)), (900, (4, 2, 0, 2))]
    view, running = world(rows)
    full = replace(view, free_units={**view.free_units, 2: 0})
    move = policy().relieve(full, 2, running)
    assert move is not None
    assert move.request_id == 1
    assert move.placement[2] < 2
    assert sum(move.placement) == 8


def test_relief_makes_room_for_growth_if_a_single_move_can() -> None:
    """Afterwards every request on the device can grow by relief_blocks."""
    rows = [(1000, (0, 0, 8, 0)), (200, (4, 2, 2, 0))]
    capacity = dict.fromkeys(PLAN.devices, 20_000)
    view, running = world(rows, capacity=capacity)
    short = replace(view, free_units={**view.free_units, 2: 10})
    move = policy(relief_blocks=4).relieve(short, 2, running)
    assert move is not None
    old = running[move.request_id].placement
    assert old is not None
    freed = (old[2] - move.placement[2]) * 10 * view.blocks(running[move.request_id].context_tokens)
    assert 10 + freed >= 4 * view.groups[2] * 10


def test_relief_does_not_overfill_another_device() -> None:
    """Heads go only where there is room beyond what that device needs itself."""
    view, running = world([(1000, (0, 0, 4, 4))] * 3)
    none_free = replace(view, free_units=dict.fromkeys(PLAN.devices, 0))
    assert policy().relieve(none_free, 2, running) is None
    only_one = replace(view, free_units={0: 0, 1: 10**5, 2: 0, 3: 0})
    move = policy().relieve(only_one, 2, running)
    assert move is not None
    assert move.placement[0] == 0
    assert move.placement[1] > 0


def test_eviction_by_arrival_moves_the_latest() -> None:
    """With eviction=lifo the last to arrive moves, with eviction=benefit the one that helps most."""
    rows = [(4000, (0, 0, 8, 0)), (2000, (0, 0, 8, 0)), (16, (0, 0, 8, 0))]
    view, running = world(rows)
    full = replace(view, free_units={**view.free_units, 2: 0})
    lifo = policy(eviction="lifo").relieve(full, 2, running)
    benefit = policy(eviction="benefit").relieve(full, 2, running)
    assert lifo is not None
    assert lifo.request_id == 2
    assert benefit is not None
    assert benefit.request_id != 2


def test_victims_are_the_latest_of_those_preempted_least() -> None:
    """So nobody loses the cache again and again; with eviction=lifo it is simply the latest."""
    running = [replace(request(i, 100, (4, 4, 0, 0)), preemptions=n) for i, n in enumerate((0, 0, 2))]
    assert policy().victim(0, running).request_id == 1
    assert policy(eviction="lifo").victim(0, running).request_id == 2


def test_decisions_leave_what_they_are_shown_alone() -> None:
    """And are the same when asked again, by a policy that has seen other states in between."""
    view, running = world(crowded(TWO_STAGES, 30), TWO_STAGES, TWO_COSTS)
    copy = (list(view.groups), list(view.group_tokens), dict(view.free_units), list(running))
    hetis = policy()
    first = hetis.rebalance(view, running)
    other, others = world(crowded(TWO_STAGES, 3, seed=5), TWO_STAGES, TWO_COSTS)
    hetis.rebalance(other, others)
    assert hetis.rebalance(view, running) == first == policy().rebalance(view, running)
    assert (view.groups, view.group_tokens, view.free_units, running) == copy
