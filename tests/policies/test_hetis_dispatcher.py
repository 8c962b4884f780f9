"""Which requests are admitted, and where their heads go."""

from __future__ import annotations

from dataclasses import replace

import pytest
from policy_worlds import instance, request, view_of

from hetis_sim.policies.apportion import apportion
from hetis_sim.policies.hetis.attention import AttentionContext
from hetis_sim.policies.hetis.policy import HetisPolicy
from hetis_sim.policies.hetis.settings import HetisSettings
from hetis_sim.policies.plan import Placement
from hetis_sim.policies.view import InstanceView, PositionCost

FAST = PositionCost(1e-6, 1e-9, 1e-5)
FAR = PositionCost(1e-6, 2e-9, 1e-5, 1e-6, 5e-5)
PLAN = instance([(4, 4)], [10], 2)
COSTS = [FAST, FAST, FAR, FAR]
HOME = (4, 4, 0, 0)


def policy(**settings: object) -> HetisPolicy:
    """Hetis with some settings."""
    return HetisPolicy(HetisSettings(**settings))  # type: ignore[arg-type]


def units(view: InstanceView, placements: list[Placement], tokens: list[int]) -> dict[int, int]:
    """Units that placements take on every device."""
    used = dict.fromkeys(view.plan.devices, 0)
    for placement, n in zip(placements, tokens, strict=False):
        for device, need in view.units_needed(placement, n + 1).items():
            used[device] += need
    return used


def test_the_longest_prefix_that_fits_is_placed() -> None:
    """Requests are placed in order until one does not fit; none is skipped."""
    view = view_of(PLAN, COSTS, [(16, HOME)], dict.fromkeys(PLAN.devices, 1000))
    lengths = [300, 300, 5000, 15]
    placed = policy(reserve_fraction=0.0).dispatch([request(i, n) for i, n in enumerate(lengths)], view)
    assert len(placed) == 2
    assert all(need <= view.free_units[d] for d, need in units(view, placed, lengths).items())


def test_workers_take_what_the_ranks_cannot_hold_and_the_other_way_round() -> None:
    """With the ranks' cache short the rest goes to workers; with the workers' short, heads stay."""
    short_ranks = view_of(PLAN, COSTS, capacity={0: 20, 1: 20, 2: 1000, 3: 1000})
    (placement,) = policy().dispatch([request(0, 15)], short_ranks)
    assert placement[:2] == (2, 2)
    assert sum(placement[2:]) == 4
    heavy = [(3000, HOME)] * 40
    short_workers = view_of(PLAN, COSTS, heavy, {0: 10**6, 1: 10**6, 2: 0, 3: 0})
    assert policy().dispatch([request(99, 3000)], short_workers) == [HOME]


def test_admission_leaves_the_reserve_free() -> None:
    """Nobody is admitted into the reserve while others run, which a smaller reserve allows."""
    capacity = dict.fromkeys(PLAN.devices, 1000)
    view = view_of(PLAN, COSTS, [(1, HOME)], capacity)
    new = [request(1, 100)] * 6
    assert len(policy(reserve_fraction=0.0).dispatch(new, view)) == 6
    placed = policy(reserve_fraction=0.4).dispatch(new, view)
    assert 0 < len(placed) < 6
    left = {d: view.free_units[d] - need for d, need in units(view, placed, [100] * 6).items()}
    assert all(free >= 400 for free in left.values())


def test_a_request_alone_may_use_the_reserve() -> None:
    """What fits on the empty instance is placed there, whatever the reserve."""
    view = view_of(PLAN, COSTS, capacity=dict.fromkeys(PLAN.devices, 100))
    longest = 16 * (4 * 100 // 80) - 1  # the whole cache over all groups and layers
    alone = policy(reserve_fraction=0.5).dispatch([request(0, longest)], view)
    assert len(alone) == 1
    assert set(units(view, alone, [longest]).values()) == {100}
    busy = replace(view, running=1)
    assert policy(reserve_fraction=0.5).dispatch([request(0, longest)], busy) == []


def test_nothing_is_placed_where_nothing_is_free() -> None:
    """A full instance admits nobody."""
    view = replace(view_of(PLAN, COSTS), free_units=dict.fromkeys(PLAN.devices, 0), running=3)
    assert policy().dispatch([request(0, 10)], view) == []


def test_static_dispatch_gives_every_request_the_same_split() -> None:
    """In proportion to the cache of the devices, and blind to the load."""
    capacity = {0: 3000, 1: 3000, 2: 1000, 3: 1000}
    static = policy(dispatch="static")
    empty = view_of(PLAN, COSTS, capacity=capacity)
    loaded = view_of(PLAN, COSTS, [(160, (0, 0, 8, 0))], capacity)
    (a,) = static.dispatch([request(0, 10)], empty)
    (b,) = static.dispatch([request(0, 15)], loaded)
    assert a == b == (3, 3, 1, 1)


def test_the_program_is_asked_for_many_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """From lp_min_requests on, and never with dispatch=greedy."""
    asked: list[int] = []

    def spy(_context: AttentionContext, _load: object, items: list[object],
            placed: list[Placement]) -> list[Placement]:
        asked.append(len(items))
        return placed

    monkeypatch.setattr("hetis_sim.policies.hetis.joint.place_jointly", spy)
    view = view_of(PLAN, COSTS)
    new = [request(i, 100) for i in range(6)]
    policy(lp_min_requests=7).dispatch(new, view)
    policy(lp_min_requests=1, dispatch="greedy").dispatch(new, view)
    assert asked == []
    policy(lp_min_requests=6).dispatch(new, view)
    assert asked == [6]


def test_a_new_plan_with_the_same_index_is_not_mistaken_for_the_old_one() -> None:
    """Constants are kept per plan, not per number."""
    hetis = policy()
    assert hetis.dispatch([request(0, 10)], view_of(PLAN, COSTS)) == [HOME]
    other = instance([(8,)], [10], 1)
    assert hetis.dispatch([request(0, 10)], view_of(other, [FAST, FAR])) == [(8, 0)]


def test_apportion_follows_weights_within_limits() -> None:
    """Shares are near the weights; a full position's share goes to the others."""
    assert apportion([3.0, 1.0], [8, 8], 8) == [6, 2]
    assert apportion([3.0, 1.0], [4, 8], 8) == [4, 4]
