"""The linear program and its rounding against brute force."""

from __future__ import annotations

from itertools import product
from math import ceil

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from policy_worlds import all_placements, fits, instance, situations, time_with

from hetis_sim.policies.hetis.attention import AttentionContext
from hetis_sim.policies.hetis.joint import place_jointly, round_row, round_spread
from hetis_sim.policies.hetis.lp import Item, solve
from hetis_sim.policies.hetis.placing import Load, place
from hetis_sim.policies.view import PositionCost

Case = tuple[AttentionContext, Load, int]


def every_pair(context: AttentionContext) -> set[tuple[int, int]]:
    """All attention workers for all stages."""
    return {(stage.index, d) for stage in context.stages for d in range(len(context.workers))}


def used_load(load: Load) -> Load:
    """The same load with something at every position, so that no fixed cost is left to be opened."""
    return Load([n + 1 for n in load.groups], [t + 100 for t in load.tokens], load.free)


def one_by_one(context: AttentionContext, load: Load, items: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Placements of as many of the items, from the first on, as fit."""
    trial = load.copy()
    placed: list[tuple[int, ...]] = []
    for tokens, blocks in items:
        placement = place(context, trial, tokens, blocks)
        if placement is None:
            break
        trial.add(context, placement, tokens, blocks)
        placed.append(placement)
    return placed


@settings(max_examples=40)
@given(situations(), st.integers(1, 3000))
def test_rounding_stays_within_its_bound_of_the_optimum(case: Case, second: int) -> None:
    """Two requests on one stage: program <= best in whole groups <= rounded <= program + bound.

    The bound is the cost of two KV groups of the longer request at the position where they cost most; of
    workers behind one interface each may be off by as much, and all wait for it.
    """
    context, load, first = case
    load = used_load(load)
    items = [(first, ceil((first + 1) / 16)), (second, ceil((second + 1) / 16))]
    pairs = every_pair(context)
    spread = solve(context, [Item(*item) for item in items], load.groups, load.tokens, load.free, pairs)
    assert spread is not None
    both = product(all_placements(context.plan), repeat=2)
    best = min(time_with(context, load, [(first, a), (second, b)]) for a, b in both)
    rounded = round_spread(context, spread.groups, items, load.free)
    assert rounded is not None
    time = time_with(context, load, [(first, rounded[0]), (second, rounded[1])])
    stage = context.stages[0]
    longest = max(first, second)
    dearest = max([rank.a + rank.b * longest for rank in stage.local]
                  + [remote.a + remote.b * longest
                     + (stage.shared_wire * len(stage.shared) if remote.shared else remote.wire)
                     for remote in stage.remote])
    tolerance = 1e-6 * best
    assert spread.time <= best + tolerance
    assert best <= time + tolerance
    assert time <= spread.time + 2 * stage.layers * dearest + tolerance


@settings(max_examples=40)
@given(situations(stages=3), st.lists(st.integers(1, 3000), min_size=2, max_size=8))
def test_joint_placement_is_never_slower_than_one_by_one(case: Case, lengths: list[int]) -> None:
    """The answer is valid, and F is at most that of placing the requests in turn."""
    context, load, _ = case
    items = [(tokens, ceil((tokens + 1) / 16)) for tokens in lengths]
    placed = one_by_one(context, load, items)
    joint = place_jointly(context, load, items, placed)
    assert len(joint) == len(items)
    for placement in joint:
        for indices in context.plan.stage_positions:
            assert sum(placement[p] for p in indices) == context.kv_heads
        for position in context.plan.positions:
            assert placement[position.index] >= 0
            assert position.remote or placement[position.index] <= position.owned_groups
    times = [time_with(context, load, list(zip(lengths, found, strict=True))) for found in (joint, placed)]
    assert times[0] <= times[1] * (1 + 1e-9)


@settings(max_examples=60)
@given(situations(stages=2, tight=True), st.lists(st.integers(1, 200), min_size=2, max_size=6))
def test_joint_placement_respects_memory(case: Case, lengths: list[int]) -> None:
    """Together the requests take no more than the free units of any device."""
    context, load, _ = case
    items = [(tokens, ceil((tokens + 1) / 16)) for tokens in lengths]
    placed = one_by_one(context, load, items)
    items = items[:len(placed)]
    joint = place_jointly(context, load, items, placed) if placed else []
    assert len(joint) == len(items)
    free = dict(load.free)
    for placement, (_, blocks) in zip(joint, items, strict=True):
        assert fits(context, free, placement, blocks)
        for position in context.plan.positions:
            free[position.device] -= placement[position.index] * position.layers * blocks


def test_memory_that_cannot_hold_the_heads_has_no_solution() -> None:
    """The program says so rather than overfill a device."""
    plan = instance([(4,)], [2], 1)
    cost = PositionCost(1e-6, 1e-9, 1e-5)
    context = AttentionContext(plan, [cost, cost], 1)
    assert solve(context, [Item(16, 1)], [0, 0], [0, 0], {0: 4, 1: 2}, {(0, 0)}) is None
    spread = solve(context, [Item(16, 1)], [0, 0], [0, 0], {0: 4, 1: 4}, {(0, 0)})
    assert spread is not None
    assert spread.groups.tolist() == [[2.0, 2.0]]


def test_equal_questions_have_equal_answers() -> None:
    """Nothing of an earlier solution leaks into a later one."""
    plan = instance([(4, 4)], [10], 2)
    context = AttentionContext(plan, [PositionCost(1e-6, 2e-9, 1e-5)] * 4, 1)
    free = dict.fromkeys(plan.devices, 10**6)

    def ask(tokens: int) -> list[list[float]]:
        items = [Item(tokens, 10), Item(2 * tokens, 20)]
        spread = solve(context, items, [3] * 4, [900] * 4, free, every_pair(context))
        assert spread is not None
        return spread.groups.tolist()

    first = ask(1000)
    ask(50)
    again = ask(1000)
    assert again == first


@given(st.lists(st.floats(0, 8), min_size=1, max_size=6), st.integers(0, 20))
def test_rounding_a_row_keeps_its_sum(shares: list[float], units: int) -> None:
    """Whole numbers within the limits that add up."""
    limits = [8] * len(shares)
    assume(units <= sum(limits))
    counts = round_row(shares, limits, units)
    assert sum(counts) == units
    assert all(0 <= n <= 8 for n in counts)


def test_rounding_a_row_gives_left_overs_to_the_largest_remainders() -> None:
    """And takes an almost whole number from the solver as whole."""
    assert round_row([1.6, 1.5, 0.9], [4, 4, 4], 4) == [2, 1, 1]
    assert round_row([1.9999999, 2.0000001], [4, 4], 4) == pytest.approx([2, 2])
