"""What is told of the lengths of requests before they are served."""

from __future__ import annotations

import numpy as np
import pytest

from traces import build_workload, length_facts
from traces.lengths import Lengths


def lengths(prompts: list[int], outputs: list[int]) -> Lengths:
    """Rows given as columns."""
    return Lengths(np.array(prompts), np.array(outputs))


def test_means_parts_and_the_context_of_those_who_decode() -> None:
    """A request counts for the context as long as it decodes; parts are sorted by prompt."""
    facts = length_facts(lengths([300, 100, 200, 400], [10, 30, 10, 10]), parts=2)
    assert facts.prompt_tokens == 250
    assert facts.output_tokens == 15
    assert facts.prompt_parts == (150, 350)
    assert facts.context_tokens == pytest.approx((10 * 305 + 30 * 115 + 10 * 205 + 10 * 405) / 60)


def test_requests_beyond_the_context_are_left_out_unless_all_are() -> None:
    """They are turned away, so nobody should plan for them."""
    given = lengths([10, 20, 5000], [10, 10, 10])
    assert length_facts(given, 4096).prompt_tokens == 15
    assert length_facts(given, 4096).prompt_parts == (10, 20)
    assert length_facts(given, 8).prompt_tokens == pytest.approx(5030 / 3)


def test_every_workload_tells_its_lengths() -> None:
    """Open ones all, closed ones the first."""
    for settings in ({"rate": 1.0}, {"arrivals": "closed", "users": 2, "rate": None}):
        workload = build_workload({"table": "sharegpt", "requests": 50, **settings})
        known = workload.known_lengths()
        assert len(known.prompt_tokens) == len(known.output_tokens) == 50
