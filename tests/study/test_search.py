"""The search for the highest rate, on functions whose answer is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis_sim.study.estimate import estimate, figure, ratio
from hetis_sim.study.search import Found, Probe, highest


def search(limit: float, start: float = 1.0, ceiling: float = 1e9, tolerance: float = 0.02,
           runs: int = 100) -> Found:
    """A search where exactly the rates up to ``limit`` hold."""
    def probe(rate: float) -> Probe:
        return Probe(rate, rate <= limit, 1.0 if rate <= limit else 0.2, "stable", 100, 80)

    return highest(probe, start, ceiling, tolerance, runs)


@given(st.floats(1e-2, 1e4), st.floats(1e-1, 1e2), st.floats(1e-3, 0.3))
def test_the_answer_is_within_the_tolerance(limit: float, start: float, tolerance: float) -> None:
    """The rate found holds, and the limit is within the tolerance above it."""
    found = search(limit, start, tolerance=tolerance)
    assert found.rate_rps <= limit <= found.rate_rps * (1 + tolerance) * (1 + 1e-12)
    assert found.note == ""


def test_a_good_start_takes_few_runs() -> None:
    """With a start at 0.8 of the answer, a bracket of 2 % takes eight runs at most."""
    assert len(search(1.25, start=1.0).probes) <= 8


def test_what_holds_at_no_load_is_zero() -> None:
    """The search gives up far below its start and says what was missed."""
    found = search(0.0)
    assert found.rate_rps == 0.0
    assert "at no load" in found.note
    assert len(found.probes) < 12


def test_what_holds_at_every_load_ends_at_the_ceiling() -> None:
    """No rate above the ceiling is tried, and the note says that the runs are too short."""
    found = search(math.inf, ceiling=7.0)
    assert found.rate_rps == 7.0
    assert max(probe.rate_rps for probe in found.probes) == 7.0
    assert "too short" in found.note


def test_a_search_is_cut_off() -> None:
    """At the cap on runs the best so far is given, with a note."""
    found = search(3.0, tolerance=1e-9, runs=5)
    assert len(found.probes) == 5
    assert "cut off" in found.note
    assert 0 < found.rate_rps <= 3.0


def test_intervals_over_seeds_are_students() -> None:
    """The mean of 1, 2, 3 is 2 +- 4.303 * 1/sqrt(3); ratios have theirs on the logarithms."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert estimate([1.0, 2.0, 3.0], 0.0, 3.0).low == 0.0
    assert estimate([1.0, 2.0, 3.0], 0.0, 3.0).high == 3.0
    assert math.isnan(estimate([1.0]).low)
    assert math.isnan(estimate([1.0, math.nan]).mean)
    pair = ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert pair.mean == pytest.approx(2.0)
    assert pair.low == pytest.approx(2.0)
    assert math.isnan(ratio([1.0, 1.0], [0.0, 1.0]).mean)


def test_figures_are_short() -> None:
    """Three digits, but no exponents for what is large."""
    assert [figure(value) for value in (0.012345, 1.2, 999.0, 12345.6)] == ["0.0123", "1.2", "999", "12,346"]
    assert estimate([1.0, 1.0]).text() == "1 [1, 1]"
    assert estimate([2.0]).text() == "2"
    assert estimate([math.nan]).text() == "-"
