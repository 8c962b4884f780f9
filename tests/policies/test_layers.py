"""Layers over stages of unequal speed and memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis_sim.policies.layers import StageLoad, split_layers

ROOMY = 1000.0


def plain(layer_s: float, fixed_s: float = 0.0, passing_s: float = 0.0) -> StageLoad:
    """A stage with memory for anything."""
    return StageLoad(fixed_s, layer_s, passing_s, ROOMY, ROOMY, 1.0)


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a sum of positive parts."""
    if parts == 1:
        yield (total,)
        return
    for first in range(1, total - parts + 2):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def turn(stages: list[StageLoad], counts: tuple[int, ...]) -> float:
    """What a split of the layers is judged by."""
    pairs = list(zip(stages, counts, strict=True))
    return max(s.fixed_s + n * s.layer_s for s, n in pairs) + sum(n * s.passing_s for s, n in pairs)


SPEEDS = (st.floats(0.1, 10), st.floats(0, 5))


@given(st.lists(st.builds(plain, *SPEEDS), min_size=1, max_size=4), st.integers(4, 14))
def test_the_slowest_stage_is_as_fast_as_whole_layers_allow(stages: list[StageLoad], layers: int) -> None:
    """No other split has a faster slowest stage."""
    counts = split_layers(stages, layers, 0.0)
    assert counts is not None
    assert sum(counts) == layers
    best = min(turn(stages, other) for other in compositions(layers, len(stages)))
    assert turn(stages, counts) == pytest.approx(best)


@given(st.lists(st.builds(plain, *SPEEDS, st.floats(0, 10)), min_size=2, max_size=3))
def test_stages_that_hold_others_up_get_fewer_layers(stages: list[StageLoad]) -> None:
    """A turn is no longer than with the fastest slowest stage."""
    counts = split_layers(stages, 12, 0.0)
    assert counts is not None
    balanced = split_layers([plain(stage.layer_s, stage.fixed_s) for stage in stages], 12, 0.0)
    assert balanced is not None
    assert turn(stages, counts) <= turn(stages, balanced) * (1 + 1e-9)


def test_faster_stages_get_more_layers() -> None:
    """In proportion to their speed."""
    assert split_layers([plain(1.0), plain(3.0)], 8, 0.0) == (6, 2)


def test_layers_respect_memory() -> None:
    """A full stage passes the rest on, unless spare memory takes the cache that it drives out."""
    small = StageLoad(0.0, 1.0, 0.0, 3.0, 5.0, 10.0)
    assert split_layers([small, plain(3.0)], 8, 0.0) == (3, 5)
    assert split_layers([small, plain(3.0)], 8, 10.0) == (4, 4)
    assert split_layers([small, plain(3.0)], 8, 1000.0) == (5, 3)


def test_what_fits_nowhere_is_refused() -> None:
    """Too many layers, and more stages than layers."""
    small = StageLoad(0.0, 1.0, 0.0, 3.0, 3.0, 10.0)
    assert split_layers([small, small], 7, 0.0) is None
    assert split_layers([plain(1.0)] * 3, 2, 0.0) is None
    assert split_layers([StageLoad(0.0, 1.0, 0.0, 0.5, 2.0, 10.0)], 1, 0.0) is None


def test_more_spare_memory_never_makes_a_turn_longer() -> None:
    """Attention workers can only help."""
    stages = [StageLoad(0.0, 1.0, 0.2, 2.5, 6.0, 10.0), StageLoad(0.0, 3.0, 1.0, 8.0, 9.0, 10.0)]
    turns = []
    for spare in (0.0, 5.0, 10.0, 20.0, 50.0):
        counts = split_layers(stages, 9, spare)
        assert counts is not None
        turns.append(turn(stages, counts))
    assert all(later <= earlier for earlier, later in pairwise(turns))
