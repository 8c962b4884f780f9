"""Steady-state figures of an instance."""

from __future__ import annotations

from dataclasses import replace
from math import exp

import pytest
from policy_worlds import cluster, paper, problem

from hetis_sim.policies.estimate import Estimator
from hetis_sim.policies.memory import cache_units
from hetis_sim.policies.passes import arrivals_per_pass
from hetis_sim.policies.shape import instance_shape
from hetis_sim.spec.slo import Slo


def test_a_single_stage_agrees_with_a_sum_by_hand() -> None:
    """Time per token is an iteration plus the prefills that fall into it, some of them computed together."""
    given = problem(cluster(("a100-80gb", 1)), "llama2-13b", prompt=200, output=100)
    estimator = Estimator(given)
    shape = instance_shape(given, [(0,)])
    found = estimator.at(shape, 32, 32)
    assert found is not None
    cost, model, gpu = given.cost, given.model, given.cluster.devices[0].gpu
    attention = shape.stages[0].home.seconds(32 * 40, 32 * 40 * 250)
    iteration = 40 * (cost.dense_layer_s(gpu, model, 32, 1) + attention)
    iteration += cost.head_s(gpu, model, 32, 1) + cost.host_overhead_s(32)
    prompt = cost.dense_layer_s(gpu, model, 200, 1) + cost.prefill_attention_layer_s(gpu, model, 40, 200, 0)
    prompt = 40 * prompt + cost.head_s(gpu, model, 1, 1) + cost.host_overhead_s(1)
    assert found.prefill_s == pytest.approx(prompt)
    arrivals = arrivals_per_pass(32 / 100)
    together = arrivals / (1 - exp(-arrivals))
    assert 1.0 < together < 1.25
    alone = cost.prefill_attention_layer_s(gpu, model, 40, 200, 0)
    added = 40 * (cost.dense_layer_s(gpu, model, 250, 1) - cost.dense_layer_s(gpu, model, 200, 1) + alone / 4)
    passing = prompt + 4 * (together - 1) * added
    assert found.tpot_s == pytest.approx(iteration + 32 / 100 / together * passing)
    assert found.requests_per_s == pytest.approx(32 / (100 * found.tpot_s))


def test_activations_on_links_are_no_smaller_for_8_bit_weights() -> None:
    """All-reduces and hops carry 16-bit activations, as in the simulation, whatever the weights have."""
    given = problem(paper(), "llama2-13b", prompt=200, output=100)
    given = replace(given, model=replace(given.model, weight_bytes=1))
    shape = instance_shape(given, [(0, 1), (4,)])
    stage, model, cost = shape.stages[0], given.model, given.cost
    assert stage.link is not None
    assert stage.hop is not None
    estimator, size = Estimator(given), 32 * model.hidden * 2
    reduces = 2 * cost.all_reduce_s(stage.gpu, stage.link, size, 2)
    dense = cost.dense_layer_s(stage.gpu, model, 32, 2)
    assert estimator.decode_layer_s(stage, 32) == pytest.approx(dense + reduces)
    assert estimator._hop_s(stage, 32) == pytest.approx(cost.transfer(stage.hop).seconds(size))


def test_the_batch_is_one_that_the_cache_holds() -> None:
    """The best estimate's requests, at their mean context, fit into the ledger's units."""
    given = problem(cluster(("a100-80gb", 1)), "llama2-13b", prompt=1500, output=300)
    shape = instance_shape(given, [(0,)])
    found = Estimator(given).best(shape)
    assert found is not None
    units = cache_units(given.cluster, given.model, given.limits, shape.with_layers(found.layers))[0]
    per_request = 40 * 40 * (1650 / 16)
    assert found.requests * per_request <= units
    assert (found.requests + 5) * per_request > units * 0.8


def test_attention_workers_make_room_for_a_larger_batch() -> None:
    """Cache elsewhere lets more requests run, and more are served."""
    given = problem(paper(), "llama2-13b", prompt=3000, output=100)
    alone = Estimator(given).best(instance_shape(given, [(0,)]))
    helped = Estimator(given).best(instance_shape(given, [(0,)], [4, 5, 6, 7]))
    assert alone is not None
    assert helped is not None
    assert helped.requests > alone.requests


def test_the_slo_limits_the_batch() -> None:
    """A tighter limit on the time per token gives smaller batches, which hold it."""
    given = problem(cluster(("a100-80gb", 4)))
    shape = instance_shape(given, [(0, 1, 2, 3)])
    loose = Estimator(given).best(shape)
    tight = Estimator(replace(given, slo=Slo(5.0, 0.08))).best(shape)
    assert loose is not None
    assert tight is not None
    assert tight.tpot_s <= 0.08 < loose.tpot_s <= 0.2
    assert tight.requests < loose.requests


@pytest.mark.parametrize("chunk_tokens", [0, 512])
def test_no_other_batch_is_much_better(chunk_tokens: int) -> None:
    """Of all batches none that holds the SLO has an estimate that is 3 % higher."""
    given = replace(problem(cluster(("a100-80gb", 4)), prompt=156, output=66), chunk_tokens=chunk_tokens)
    for groups in ([(0, 1)], [(0, 1, 2, 3)], [(0, 1), (2, 3)]):
        shape, estimator = instance_shape(given, groups), Estimator(given)
        found = estimator.best(shape)
        assert found is not None
        others = [estimator.at(shape, lane, lane * len(groups)) for lane in range(1, 256, 5)]
        most = max(other.value for other in others if other is not None and other.penalty <= 1.0)
        assert most <= 1.03 * found.value


def test_an_slo_out_of_reach_is_marked() -> None:
    """The estimate says by which factor it is missed, and counts for less."""
    given = replace(problem(cluster(("a100-80gb", 4))), slo=Slo(5.0, 0.01))
    found = Estimator(given).best(instance_shape(given, [(0, 1, 2, 3)]))
    assert found is not None
    assert found.penalty > 1
    assert found.value < found.requests_per_s


def test_prefills_cost_more_in_a_pipeline_than_in_an_ideal_one() -> None:
    """Bubbles lower the throughput of two stages, not of one."""
    given = problem(cluster(("a100-80gb", 4)), "llama2-13b")
    deep, single = instance_shape(given, [(0,), (1,)]), instance_shape(given, [(0,)])
    for shape, same in ((deep, False), (single, True)):
        real = Estimator(given).at(shape, 64, 64)
        ideal = Estimator(given, ideal_pipeline=True).at(shape, 64, 64)
        assert real is not None
        assert ideal is not None
        assert (ideal.requests_per_s == pytest.approx(real.requests_per_s)) == same
        assert ideal.requests_per_s >= real.requests_per_s * (1 - 1e-9)


def test_chunked_prefill_is_estimated_on_its_own_terms() -> None:
    """Pieces of prompts beside a decode batch cost less than prompts that go first."""
    given = problem(cluster(("a100-80gb", 4)), "llama2-70b")
    shape = instance_shape(given, [(0, 1), (2, 3)])
    whole = Estimator(given).at(shape, 64, 128)
    chunked = Estimator(replace(given, chunk_tokens=512)).at(shape, 64, 128)
    assert whole is not None
    assert chunked is not None
    assert chunked.tpot_s < whole.tpot_s


def test_a_model_that_does_not_fit_has_no_estimate() -> None:
    """Neither with chosen layers nor with given ones."""
    given = problem(cluster(("rtx3090", 2)))
    shape = instance_shape(given, [(0,), (1,)])
    assert Estimator(given).best(shape) is None
    assert Estimator(given).best(shape, (40, 40)) is None
