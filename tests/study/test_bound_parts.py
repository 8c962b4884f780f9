"""The parts of the bound: demand adds up, shortest durations lie below, batches are pruned without loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis_sim.spec.errors import SpecError
from hetis_sim.study.bound.demand import demand_of
from hetis_sim.study.bound.durations import best_per_token, intervals, token_grid, tp_groups
from hetis_sim.study.bound.supply import Batch, undominated

PAIRS = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 800)), min_size=1, max_size=40)


@given(PAIRS)
def test_bins_and_cells_hold_every_decoded_token_once(pairs: list[tuple[int, int]]) -> None:
    """Tokens, contexts and generated parts add up to those of the requests."""
    demand = demand_of(*(np.array(column) for column in zip(*pairs, strict=True)))
    contexts = [[p + m for m in range(1, o)] for p, o in pairs]
    n = len(pairs)
    assert demand.decoded_tokens == pytest.approx(sum(map(len, contexts)) / n)
    assert sum(cell.tokens for cell in demand.cells) == pytest.approx(sum(map(len, contexts)) / n)
    assert sum(cell.context_tokens for cell in demand.cells) == pytest.approx(sum(map(sum, contexts)) / n)
    generated = sum(m for _, o in pairs for m in range(1, o)) / n
    assert sum(cell.generated_tokens for cell in demand.cells) == pytest.approx(generated)
    assert sum(share for share, _ in demand.prompts) == pytest.approx(1.0)
    assert demand.longest_tokens == max(p + o for p, o in pairs)


@given(PAIRS)
def test_edges_of_bins_hold_their_contexts(pairs: list[tuple[int, int]]) -> None:
    """As many tokens lie below a bin's low edge, and up to its high edge, as the bins say."""
    demand = demand_of(*(np.array(column) for column in zip(*pairs, strict=True)))
    contexts = np.array(sorted(p + m for p, o in pairs for m in range(1, o)))
    before = 0.0
    for found in demand.bins:
        assert np.searchsorted(contexts, found.low, "left") == pytest.approx(before * len(pairs))
        before += found.tokens
        assert np.searchsorted(contexts, found.high, "right") == pytest.approx(before * len(pairs))
    for cell in demand.cells:
        assert cell.tokens * cell.low <= cell.context_tokens * (1 + 1e-9)
        assert cell.context_tokens <= cell.tokens * cell.high * (1 + 1e-9)


@given(PAIRS)
def test_prompt_bins_start_at_their_shortest_prompt(pairs: list[tuple[int, int]]) -> None:
    """Taken at the near edge, no prompt is overstated, and the first edge is the shortest of all."""
    demand = demand_of(*(np.array(column) for column in zip(*pairs, strict=True)))
    prompts = sorted(p for p, _ in pairs)
    edges = [shortest for _, shortest in demand.prompts]
    assert edges[0] == prompts[0]
    taken = 0.0
    for share, shortest in demand.prompts:
        assert prompts[round(taken * len(prompts))] == shortest
        taken += share


def test_demand_refuses_nothing_and_less() -> None:
    """No requests, or a request without tokens, is an error."""
    with pytest.raises(SpecError):
        demand_of(np.array([], np.int64), np.array([], np.int64))
    with pytest.raises(SpecError):
        demand_of(np.array([4]), np.array([0]))


@given(st.floats(0, 10), st.floats(0, 1), st.floats(0, 1), st.integers(1, 3000))
def test_intervals_tile_all_batches_and_lie_below(fixed: float, slope: float, bend: float, most: int) -> None:
    """Every batch size is in one interval, which takes no longer than the batch does."""
    def seconds(n: int) -> float:
        return fixed + slope * n + bend * max(0, n - 100)

    after = 1
    for low, high, least in intervals(seconds, most):
        assert low == after
        after = high + 1
        for n in {low, (low + high) // 2, high}:
            assert least <= seconds(n)
    assert after == most + 1
    assert best_per_token(seconds, most) <= min(seconds(n) / n for n in range(1, most + 1)) * (1 + 1e-12)
    assert best_per_token(seconds, most) >= min(seconds(n) / n for n in range(1, most + 1)) / 1.03


def test_a_dip_counts_for_smaller_batches_too() -> None:
    """Where a larger batch is faster, the smaller ones are not taken to be slower than it."""
    found = list(intervals(lambda n: 5.0 if n < 50 else 2.0, 60))
    assert found == [(1, 60, 2.0)]


@given(st.integers(1, 500))
def test_groups_of_degrees_hold_each_once(most: int) -> None:
    """Degrees 1 to most, in order, none twice; the grid of counts ends where it should."""
    assert [tp for low, high in tp_groups(most) for tp in range(low, high + 1)] == list(range(1, most + 1))
    grid = token_grid(most)
    assert grid[0] == 1
    assert grid[-1] == most
    assert grid == sorted(set(grid))


def test_batches_that_are_nearly_equal_become_one() -> None:
    """Within 2 %: one batch with the shorter times; beyond: two."""
    def batch(busy_s: float, held_s: float) -> Batch:
        return Batch(0, 2.0, 2.0, busy_s, held_s, 0.1, 0.1)

    (one,) = undominated([batch(2.0, 1.01), batch(2.02, 1.0)])
    assert (one.busy_s / one.share, one.held_s) == (1.0, 1.0)
    assert len(undominated([batch(2.0, 1.1), batch(2.2, 1.0)])) == 2


@given(st.lists(st.tuples(*[st.sampled_from([1.0, 2.0, 3.0])] * 6), min_size=1, max_size=30))
def test_pruning_keeps_what_beats_the_rest(rows: list[tuple[float, ...]]) -> None:
    """For every batch, one that is at least as good in every respect is kept."""
    batches = [Batch(0, a, min(a, b), c, d, e, f) for a, b, c, d, e, f in rows]
    kept = undominated(batches)

    def respects(batch: Batch) -> tuple[float, ...]:
        return (batch.busy_s / batch.share, batch.held_s, batch.host_s / batch.share,
                batch.launches / batch.share, -batch.decode_share / batch.share)

    def at_least_as_good(one: Batch, other: Batch) -> bool:
        return all(mine <= its for mine, its in zip(respects(one), respects(other), strict=True))

    for batch in batches:
        assert any(at_least_as_good(one, batch) for one in kept)
    for one in kept:
        assert any(respects(batch)[:2] == pytest.approx(respects(one)[:2]) for batch in batches)
    assert len(kept) <= len(batches)
