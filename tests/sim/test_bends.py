"""Decode attention over its line, as the line that a batch goes along until it changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ATTENTION, BENT, TINY, ConstantCost, gpu

from hetis_sim.control.bends import GROWTH, bend_of, secant
from hetis_sim.policies.plan import Position

POSITION = Position(0, 0, 0, remote=False, owned_groups=TINY.kv_heads, layers=TINY.layers)
HEADS, KV = TINY.heads_per_group, TINY.kv_bytes_per_token_per_layer_per_group


def seconds(groups: int, first: int, now: int, iteration: float) -> float:
    """Of an iteration of a batch that goes along its line from the one with ``now`` tokens on."""
    bend = bend_of(ConstantCost(attention=BENT), gpu("card", 1), TINY, POSITION)
    line = (BENT.a_s_per_head * HEADS * groups, BENT.b_s_per_byte * KV, BENT.c_s)
    start, slope = secant(bend, line, groups, first, now)
    return start + slope * iteration


@given(groups=st.integers(1, 64), each=st.integers(1, 2000), issued=st.integers(0, 500))
def test_a_batch_takes_what_the_curve_says_now_and_a_quarter_later(groups: int, each: int,
                                                                   issued: int) -> None:
    """And never less than a batch that nothing is faster than, however far it goes on."""
    now = groups * (issued + each)
    here = seconds(groups, groups * each, now, issued)
    assert here == pytest.approx(BENT.seconds(HEADS * groups, KV * now), rel=1e-9)
    grown = issued + (GROWTH - 1.0) * now / groups
    there = seconds(groups, groups * each, now, grown)
    curve = BENT.seconds(HEADS * groups, KV * GROWTH * now)
    assert there >= curve * (1.0 - 1e-9)
    least = BENT.least()
    for later in (issued, int(grown), issued + 10_000):
        tokens = groups * (each + later)
        assert seconds(groups, groups * each, now, later) >= least.seconds(
            HEADS * groups, KV * tokens) * (1.0 - 1e-9)


def test_the_line_rises_as_the_curve_does() -> None:
    """Where a factor from the first iteration on would have been wrong by as much as the curve bends."""
    now, later = 256, 320
    assert seconds(1, now, now, later - now) == pytest.approx(BENT.seconds(HEADS, KV * later), rel=1e-9)
    factor = BENT.over_line(HEADS, KV * now) * ATTENTION.seconds(HEADS, KV * later)
    assert seconds(1, now, now, later - now) != pytest.approx(factor, rel=1e-3)


def test_without_a_curve_it_is_the_line_itself() -> None:
    """To the last bit."""
    assert bend_of(ConstantCost(), gpu("card", 1), TINY, POSITION) is None
    assert secant(None, (3e-6, 1e-9, 1e-5), 4, 100, 140) == (3e-6 + 1e-9 * 100 + 1e-5, 1e-9 * 4)
