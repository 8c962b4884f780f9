"""Where tables lie: which units are handed out, and that nothing is lost or given twice."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from hetis_exec.units import PLACES_LEAST, Allocator, FreeUnits

LAYERS = 3


class Held(NamedTuple):
    units: NDArray[np.int64]
    places: int


def steady(units: NDArray[np.int64]) -> bool:
    """Whether the blocks of each layer lie one after the other."""
    return bool((np.diff(units, axis=1) == 1).all())


@pytest.mark.parametrize("seed", range(4))
def test_every_unit_has_one_owner_and_none_is_lost(seed: int) -> None:
    """Tables come, grow and go at random, in a pool that is often full."""
    rng = np.random.default_rng(seed)
    capacity = 40 * LAYERS + 2
    store, held = Allocator(capacity), list[Held]()
    for _ in range(2000):
        blocks = int(rng.integers(1, 6))
        fits = LAYERS * blocks <= store.free
        what = rng.integers(3)
        if what == 0 and fits:
            held.append(Held(*store.take(LAYERS, blocks)))
        elif what == 1 and held and fits:
            units, places = held.pop(int(rng.integers(len(held))))
            more, places = store.grow(LAYERS, blocks, places)
            held.append(Held(np.concatenate((units, more), axis=1), places))
        elif what == 2 and held:
            store.give(*held.pop(int(rng.integers(len(held)))))
        taken = np.concatenate([np.empty(0, dtype=np.int64), *(units.ravel() for units, _ in held)])
        assert len(np.unique(taken)) == len(taken)
        assert len(taken) + store.free == capacity
        assert not len(taken) or 0 <= taken.min() <= taken.max() < capacity
    for table in held:
        store.give(*table)
    units, _ = store.take(1, capacity)
    assert sorted(units[0].tolist()) == list(range(capacity))


def test_tables_that_grow_in_turns_lie_in_one_piece() -> None:
    """Each has places of its own; tables of one size lie at equal distances."""
    store = Allocator(1000)
    held = [Held(*store.take(LAYERS, 2)) for _ in range(4)]
    for _ in range(PLACES_LEAST):
        for n, (units, places) in enumerate(held):
            more, places = store.grow(LAYERS, 1, places)
            held[n] = Held(np.concatenate((units, more), axis=1), places)
    assert all(steady(units) for units, _ in held)
    begins = np.array([units[:, 0] for units, _ in held])
    assert len(np.unique(np.diff(begins, axis=0))) == 1


def test_places_are_given_up_for_whoever_lacks_units() -> None:
    """All units can be taken, whatever tables were to grow into."""
    store = Allocator(10 * (2 + PLACES_LEAST))
    units, places = store.take(10, 2)
    assert store.free == 10 * PLACES_LEAST
    others, _ = store.take(10, PLACES_LEAST)
    assert store.free == 0
    assert not set(units.ravel()) & set(others.ravel())
    store.give(others, -1)
    more, _ = store.grow(10, 1, places)
    assert more.shape == (10, 1)


def test_runs_are_found_among_scattered_units() -> None:
    """Units that were given back in pieces make a run again; without one, any units will do."""
    free = FreeUnits(12)
    taken = free.take(12)
    for part in (taken[4:6], taken[0:2], taken[8:11], taken[2:4]):
        free.give(part)
    assert free.take(6).tolist() == [0, 1, 2, 3, 4, 5]
    assert free.take(3).tolist() == [8, 9, 10]
    free.give(taken[[1, 5, 9]])
    assert sorted(free.take(3).tolist()) == [1, 5, 9]
    assert free.number == 0


def test_an_empty_pool_hands_units_out_in_line_again() -> None:
    """However its tables came and went."""
    store = Allocator(1000)
    held = [Held(*store.take(LAYERS, 3)) for _ in range(8)]
    for n in (3, 0, 7, 1, 6, 2, 5, 4):
        store.give(*held[n])
    firsts = [int(store.take(LAYERS, 3)[0][0, 0]) for _ in range(8)]
    assert len({b - a for a, b in pairwise(firsts)}) == 1
    assert firsts[0] < firsts[1]
