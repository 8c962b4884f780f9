"""Whole simulations of any small system: nobody lost, books balanced, collapsing changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import BENT, ConstantCost, ScaledCost, TransferCost
from support_policies import LocalPolicy
from support_runs import (
    SLOW_WORKERS,
    TIMES,
    Scenario,
    assert_same_requests,
    assert_sound,
    open_requests,
    scenarios,
)

from hetis_sim.cost.model import AttentionCost

QUICK = settings(max_examples=60, deadline=None, derandomize=True,
                 suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
SEARCH = settings(QUICK, max_examples=250)

TIGHT = {"blocks": 20, "worker_blocks": 24, "block_tokens": 4, "rate": 60.0, "prompt_max": 30}

CASES = {
    "one stage": Scenario(),
    "three stages": Scenario(layers=(1, 2, 3)),
    "one stage, chunked": Scenario(chunked=True),
    "three stages, chunked": Scenario(layers=(1, 2, 3), chunked=True),
    "recompute": Scenario(**TIGHT),
    "recompute, chunked, two stages": Scenario(**TIGHT, layers=(2, 4), chunked=True),
    "swap": Scenario(**TIGHT, preemption="swap"),
    "swap, chunked, two stages": Scenario(**TIGHT, layers=(2, 4), chunked=True, preemption="swap"),
    "remote heads": Scenario(workers=2, moves_max=0),
    "remote heads, three stages": Scenario(workers=2, moves_max=0, layers=(1, 2, 3)),
    "moves": Scenario(workers=2, interval=3, output_max=80),
    "moves, tight, three stages": Scenario(**TIGHT, workers=2, interval=3, layers=(1, 2, 3)),
    "moves, every other iteration, swap": Scenario(**TIGHT, workers=1, interval=2, tp=2, preemption="swap"),
    "several instances": Scenario(instances=3, rate=40.0),
    "several instances, shared wires, swap": Scenario(
        **TIGHT, instances=2, workers=2, preemption="swap", tp=2),
    "closed loop": Scenario(users=6, rate=4.0),
    "closed loop, moves, three stages": Scenario(users=6, rate=4.0, workers=2, interval=2, layers=(1, 2, 3)),
    "blocks of one token": Scenario(workers=1, block_tokens=1, blocks=90, worker_blocks=90, interval=4),
    "batches of one": Scenario(batch_requests=1, layers=(2, 4)),
    "handoff": Scenario(roles=("prefill", "decode"), rate=20.0),
    "handoff, streamed, two stages": Scenario(
        roles=("prefill", "decode"), layers=(2, 4), streams_handoff=True),
    "handoff, tight, remote heads": Scenario(**TIGHT, roles=("prefill", "decode", "decode"), workers=1),
    "token ranges": Scenario(workers=2, ranges=1.0, interval=3, output_max=80),
    "token ranges, tight, three stages": Scenario(
        **TIGHT, workers=2, ranges=0.8, interval=2, layers=(1, 2, 3)),
    "token ranges, tight, swap, chunked, two ranks": Scenario(
        **TIGHT, workers=2, ranges=0.8, interval=2, tp=2, preemption="swap", chunked=True),
    "token ranges, handoff": Scenario(**TIGHT, roles=("prefill", "decode"), workers=2, ranges=0.8),
    "handoff, mixed": Scenario(roles=("prefill", "decode"), mixes_pools=True, rate=30.0, blocks=20),
    "handoff, mixed, streamed, tight, swap": Scenario(
        **TIGHT, roles=("prefill", "decode", "prefill"), layers=(2, 4), streams_handoff=True,
        mixes_pools=True, preemption="swap"),
    "long outputs": Scenario(output_max=1500, prompt_max=200, blocks=900, requests=10, rate=2.0),
}

CASES |= {f"bent, {name}": replace(CASES[name], cost=ConstantCost(attention=BENT, slow=SLOW_WORKERS))
          for name in ("moves", "moves, tight, three stages", "recompute", "swap", "long outputs",
                       "closed loop, moves, three stages", "handoff, mixed, streamed, tight, swap")}

REACHED = {"token ranges": "moves", "token ranges, tight, three stages": "moves",
           "token ranges, tight, swap, chunked, two ranks": "preemptions", "token ranges, handoff": "moves",
           "recompute": "preemptions", "swap": "preemptions", "moves": "moves",
           "moves, tight, three stages": "moves", "moves, every other iteration, swap": "preemptions",
           "several instances, shared wires, swap": "moved_bytes",
           "closed loop, moves, three stages": "moves"}


@pytest.mark.parametrize("name", CASES)
def test_collapsed_steps_change_nothing(name: str) -> None:
    """Steps of many iterations give every request the same fate at the same times as single ones."""
    scenario = CASES[name]
    collapsed = scenario.run(debug=True).records()
    single = scenario.run(collapse=False, debug=True).records()
    assert_same_requests(collapsed, single)
    for records in (collapsed, single):
        assert_sound(records, scenario.requests)
    assert (single.steps["iterations"] == 1).all()
    assert collapsed.steps["iterations"].max() > 1
    assert collapsed.steps["decode_tokens"].sum() == single.steps["decode_tokens"].sum()
    if name in REACHED:
        assert collapsed.requests[REACHED[name]].sum() > 0


def check(scenario: Scenario) -> None:
    """All that must hold of any run."""
    collapsed = scenario.run(debug=True).records()
    assert_sound(collapsed, scenario.requests)
    assert_same_requests(collapsed, scenario.run(collapse=False).records())


@QUICK
@given(scenarios())
def test_any_system_keeps_its_books(scenario: Scenario) -> None:
    """Whatever the shape, load and policy: nobody is lost, tokens are made once, collapsing is exact."""
    check(scenario)


@pytest.mark.slow
@SEARCH
@given(scenarios(requests=st.integers(1, 60), prompt_max=st.sampled_from([5, 40, 90]),
                 output_max=st.sampled_from([3, 30, 120]), preemptions_max=st.sampled_from([1, 100])))
def test_any_system_keeps_its_books_at_length(scenario: Scenario) -> None:
    """The same over many more systems."""
    check(scenario)


@QUICK
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([(6,), (2, 4)]))
def test_ties_are_broken_alike(seed: int, chunked: bool, layers: tuple[int, ...]) -> None:
    """Where arrivals, ends and iterations coincide exactly, collapsing still changes nothing."""
    grid = ConstantCost(dense_s=2**-8, dense_s_per_token=0.0, last_s=2**-8, prefill_s_per_token=2**-8,
                        attention=AttentionCost(0.0, 0.0, 2**-8), wire=TransferCost(2**-16, 2**-8),
                        reduce_s=0.0, host_s=2**-8)
    scenario = Scenario(cost=grid, seed=seed, chunked=chunked, layers=layers, blocks=30, policy=LocalPolicy())
    due = tuple(same_time(request.arrival_s) for request in open_requests(scenario))
    assert len(set(due)) < len(due)
    scenario = replace(scenario, arrivals_s=due)
    assert_same_requests(scenario.run().records(), scenario.run(collapse=False).records(), relative=0.0)


def same_time(time_s: float) -> float:
    """The time on a coarse grid that floats hold exactly."""
    return round(time_s * 8) / 8


@pytest.mark.parametrize("factor", [2.0, 3.7])
@pytest.mark.parametrize("name", ["three stages, chunked", "swap", "moves, tight, three stages",
                                  "several instances, shared wires, swap"])
def test_slower_everything_is_the_same_run_in_slow_motion(name: str, factor: float) -> None:
    """All durations and arrival gaps times k make all times times k; exactly so for a power of two."""
    scenario = CASES[name]
    due = tuple(factor * request.arrival_s for request in open_requests(scenario))
    slow = replace(scenario, cost=ScaledCost(scenario.cost, factor), arrivals_s=due)
    base, scaled = scenario.run().records(), slow.run().records()
    for column in (*TIMES, "ttft_s", "tpot_s", "e2el_s"):
        np.testing.assert_allclose(scaled.requests[column], factor * base.requests[column],
                                   rtol=0.0 if factor == 2.0 else 1e-9, equal_nan=True, err_msg=column)
    for column in ("status", "instance", "preemptions", "moves", "moved_bytes"):
        np.testing.assert_array_equal(scaled.requests[column], base.requests[column], column)
