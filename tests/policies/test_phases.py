"""What instances can do that serve one phase only."""

from __future__ import annotations

from dataclasses import replace

import pytest
from policy_worlds import cluster, problem

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.estimate import Estimator
from hetis_sim.policies.phases import LEAST_BUSY, DecodeEstimator, PrefillEstimator
from hetis_sim.policies.shape import InstanceShape, instance_shape
from hetis_sim.spec.slo import Slo


def shape_of(given: PlanningProblem, *groups: tuple[int, ...]) -> InstanceShape:
    """A pipeline of these groups."""
    return instance_shape(given, groups)


WORLD = problem(cluster(("a100-80gb", 4)), "llama2-13b", prompt=1000, output=200)
UNEQUAL = (1.0, 1999.0)
"""Lengths whose standard deviation is their mean, nearly."""


def test_decoding_alone_is_never_slower_than_with_prefills() -> None:
    """The same layers and batch, without the bubbles; and nothing is prefilled."""
    for groups in (((0,),), ((0, 1),), ((0,), (1,)), ((0,), (1,), (2,), (3,))):
        shape = shape_of(WORLD, *groups)
        both, alone = Estimator(WORLD), DecodeEstimator(WORLD)
        layers = tuple(40 // len(groups) for _ in groups)
        one, other = both.at(shape, 8, 8 * len(groups), layers), alone.at(shape, 8, 8 * len(groups), layers)
        assert one is not None
        assert other is not None
        assert other.tpot_s < one.tpot_s
        assert other.requests_per_s > one.requests_per_s
        chunked = DecodeEstimator(replace(WORLD, chunk_tokens=512))
        assert chunked.at(shape, 8, 8 * len(groups), layers) == other


def test_equal_prompts_fill_the_slowest_stage() -> None:
    """Without dispersion and without a limit in sight, that is the rate."""
    given = replace(WORLD, slo=Slo(1e6, 1.0))
    estimator, shape = PrefillEstimator(given), shape_of(given, (0,), (1,))
    found = estimator.best(shape)
    assert found is not None
    slowest = max(estimator._stage_times(shape, found.requests, found.layers))
    assert found.requests_per_s == pytest.approx(found.requests / slowest, rel=1e-4)


def test_unequal_prompts_hold_each_other_up() -> None:
    """In a queue, and the more in a pipeline: of two exponential times the larger is half longer."""
    calm = replace(WORLD, slo=Slo(1e6, 1.0))
    usual = replace(calm, prompt_parts=UNEQUAL)
    lone, deep = ((0,),), ((0,), (1,))

    def rate(given: PlanningProblem, groups: tuple[tuple[int, ...], ...]) -> float:
        layers = (40 // len(groups),) * len(groups)
        found = PrefillEstimator(given)._at_batch(shape_of(given, *groups), 1, layers)
        assert found is not None
        return found.requests_per_s

    assert rate(usual, lone) == pytest.approx(rate(calm, lone), rel=1e-4)
    assert rate(usual, deep) == pytest.approx(rate(calm, deep) / 1.5, rel=1e-3)
    short = [replace(given, slo=Slo(2.0, 1.0)) for given in (calm, usual)]
    assert rate(short[1], lone) < rate(short[0], lone)


def test_nine_in_ten_of_a_queue_keep_the_limit() -> None:
    """For lengths spread like exponential ones, on one card, the wait's tail is about that of M/M/1."""
    given = replace(WORLD, slo=Slo(3.0, 1.0), prompt_parts=UNEQUAL)
    shape = shape_of(given, (0,))
    estimator = PrefillEstimator(given)
    found = estimator._at_batch(shape, 1, (40,))
    assert found is not None
    service = max(estimator._stage_times(shape, 1, (40,)))
    busy = found.requests_per_s * service
    wait = service * 2.302585 / (1.0 - busy)
    assert LEAST_BUSY < busy < 1.0
    assert found.prefill_s + wait == pytest.approx(3.0, rel=2e-3)
    assert found.penalty == 1.0


def test_an_instance_too_slow_for_the_limit_is_marked_down() -> None:
    """It counts as busy for half of the time, at a penalty."""
    given = replace(WORLD, slo=Slo(0.05, 1.0))
    found = PrefillEstimator(given).best(shape_of(given, (0,)))
    assert found is not None
    assert found.penalty > 1.0
    assert found.value < found.requests_per_s


def test_prompts_in_flight_need_memory() -> None:
    """Where it is short the batches are smaller, down to none."""
    given = problem(cluster(("rtx3090", 1)), "llama2-7b", prompt=1000, output=200)
    sizes = []
    for share in (0.9, 0.75, 0.5):
        tight = replace(given, limits=replace(given.limits, memory_utilization=share))
        found = PrefillEstimator(tight).best(shape_of(tight, (0,)))
        sizes.append(found.requests if found is not None else 0)
    assert sizes[0] >= sizes[1] >= sizes[2] == 0
    assert sizes[0] > 1
