"""The dispatcher's fast path against brute force."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_worlds import best_time, fits, instance, situations, time_with

from hetis_sim.policies.hetis.attention import AttentionContext
from hetis_sim.policies.hetis.filling import fill
from hetis_sim.policies.hetis.placing import Load, place
from hetis_sim.policies.view import PositionCost

Case = tuple[AttentionContext, Load, int]

FAST = PositionCost(1e-6, 1e-9, 1e-5)
FAR = PositionCost(1e-6, 1e-9, 1e-5, 1e-6, 5e-5)

# Stages share attention workers, so placing them one after the other is not always best. Of some
# thousand random cases brute force was ahead by more than 10 % in 1 %, and never by more than 36 %.
STAGES_FACTOR = 2.0


def blocks_of(tokens: int) -> int:
    """Blocks of one group."""
    return ceil((tokens + 1) / 16)


@given(situations())
def test_one_request_on_one_stage_is_placed_as_brute_force_would(case: Case) -> None:
    """The smallest largest completion time over all placements is reached exactly."""
    context, load, tokens = case
    placement = place(context, load, tokens, blocks_of(tokens))
    assert placement is not None
    best = best_time(context, load, tokens, blocks_of(tokens))
    assert time_with(context, load, [(tokens, placement)]) == pytest.approx(best, rel=1e-9)


@given(situations(tight=True))
def test_memory_limits_are_met_exactly(case: Case) -> None:
    """With little cache the best placement that fits is found, and none only if none fits."""
    context, load, tokens = case
    tokens %= 400
    placement = place(context, load, tokens, blocks_of(tokens))
    best = best_time(context, load, tokens, blocks_of(tokens))
    assert (placement is None) == (best is None)
    if placement is not None:
        assert fits(context, load.free, placement, blocks_of(tokens))
        assert time_with(context, load, [(tokens, placement)]) == pytest.approx(best, rel=1e-9)


@given(situations(stages=3))
def test_several_stages_are_placed_close_to_brute_force(case: Case) -> None:
    """Sharing workers costs a bounded factor at most, and is never slower than staying home."""
    context, load, tokens = case
    placement = place(context, load, tokens, blocks_of(tokens))
    assert placement is not None
    time = time_with(context, load, [(tokens, placement)])
    best = best_time(context, load, tokens, blocks_of(tokens))
    assert best is not None
    assert time <= STAGES_FACTOR * best
    assert time <= time_with(context, load, [(tokens, context.local_placement)]) * (1 + 1e-9)


@given(situations(stages=3, tight=True))
def test_placements_are_whole_complete_and_within_limits(case: Case) -> None:
    """Every stage has all KV groups, ranks keep no more than they own, and devices have the room."""
    context, load, tokens = case
    placement = place(context, load, tokens, blocks_of(tokens))
    if placement is None:
        return
    assert all(type(n) is int and n >= 0 for n in placement)
    for indices in context.plan.stage_positions:
        assert sum(placement[p] for p in indices) == context.kv_heads
    for position in context.plan.positions:
        assert position.remote or placement[position.index] <= position.owned_groups
    assert fits(context, load.free, placement, blocks_of(tokens))


@given(situations(stages=3, tight=True))
def test_placing_changes_nothing_it_is_shown(case: Case) -> None:
    """The load is the same afterwards, and so is the answer to the same question."""
    context, load, tokens = case
    before = (list(load.groups), list(load.tokens), dict(load.free))
    first = place(context, load, tokens, blocks_of(tokens))
    assert (load.groups, load.tokens, load.free) == before
    assert place(context, load, tokens, blocks_of(tokens)) == first


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.01, 2), st.integers(0, 60)), min_size=1, max_size=6),
       st.integers(0, 100))
def test_fill_takes_the_smallest_numbers(rows: list[tuple[float, float, int]], units: int) -> None:
    """The level is the units-th smallest of all numbers on offer."""
    start, step, limit = ([row[i] for row in rows] for i in range(3))
    numbers = sorted(s + k * w for s, w, n in rows for k in range(1, n + 1))
    found = fill(start, step, limit, units)
    if units > len(numbers):
        assert found is None
        return
    assert found is not None
    counts, level = found
    assert sum(counts) == units
    assert all(n <= most for n, most in zip(counts, limit, strict=True))
    if units:
        assert level == pytest.approx(numbers[units - 1], rel=1e-9)


def test_short_requests_stay_at_home_and_long_ones_are_split() -> None:
    """An attention worker behind a wire is used only when it completes before the ranks do."""
    plan = instance([(4, 4)], [10], 2)
    context = AttentionContext(plan, [FAST, FAST, FAR, FAR], 1)
    load = Load([0] * 4, [0] * 4, dict.fromkeys(plan.devices, 10**6))
    assert place(context, load, 100, 7) == (4, 4, 0, 0)
    assert place(context, load, 20_000, 1251) == (3, 3, 1, 1)


def test_workers_behind_one_interface_are_placed_as_brute_force_would() -> None:
    """Every group that passes the interface delays all of them, so how many pass is part of the answer."""
    random = Random(1)
    used = 0
    for _ in range(150):
        plan = instance([(4,)], [random.randint(1, 40)], 3)
        costs = [PositionCost(random.uniform(1e-7, 2e-5), 10 ** random.uniform(-10, -6.7),
                              random.uniform(0.0, 1e-4)) for _ in plan.positions]
        wire = PositionCost(0.0, 0.0, 0.0, 3 * 10 ** random.uniform(-7, -4.5), random.uniform(0.0, 2e-4), 3)
        for p in (1, 2, 3):
            costs[p] = replace(wire, a_s_per_group=costs[p].a_s_per_group, c_s=costs[p].c_s,
                               b_s_per_group_token=costs[p].b_s_per_group_token)
        context = AttentionContext(plan, costs, 1)
        groups = [random.choice((0, random.randint(0, 30))) for _ in plan.positions]
        held = [n * random.randint(1, 2000) for n in groups]
        load = Load(groups, held, {d: random.choice((10**6, 20_000)) for d in plan.devices})
        tokens = random.randint(1, 3000)
        placement, best = (search(context, load, tokens, blocks_of(tokens)) for search in (place, best_time))
        assert (placement is None) == (best is None)
        if placement is not None:
            used += any(placement[1:])
            assert time_with(context, load, [(tokens, placement)]) == pytest.approx(best, rel=1e-9)
    assert used > 20


def test_what_moves_keeps_what_it_can_in_place() -> None:
    """Of two equal attention workers the one that holds the cache already keeps the larger part."""
    plan = instance([(5,)], [10], 2)
    context = AttentionContext(plan, [FAST, FAR, FAR], 1)
    load = Load([100, 50, 50], [10**6, 10**5, 10**5], dict.fromkeys(plan.devices, 10**6))
    assert place(context, load, 3000, 188, old=(0, 0, 5)) == (0, 2, 3)
    assert place(context, load, 3000, 188, old=(0, 5, 0)) == (0, 3, 2)


def test_cache_that_stays_needs_no_new_room() -> None:
    """A request on a full device may be placed there again."""
    plan = instance([(4,)], [1], 1)
    context = AttentionContext(plan, [FAST, FAR], 1)
    load = Load([0, 0], [0, 0], {0: 0, 1: 0})
    assert place(context, load, 15, 1) is None
    assert place(context, load, 15, 1, old=(3, 1)) == (3, 1)
