"""Even pipelines through every kind of card."""

from __future__ import annotations

from itertools import product

import pytest
from policy_worlds import cluster, paper, problem

from hetis_sim.policies.check import check_plan
from hetis_sim.policies.estimate import Estimator
from hetis_sim.policies.shape import instance_shape
from hetis_sim.policies.vllm import VllmPolicy
from hetis_sim.policies.vllm_all import VllmAllPolicy, even_estimate, even_within


def test_layers_are_even_where_they_fit() -> None:
    """As vLLM splits them; what does not fit goes to the stage with the fewest."""
    assert even_within([99, 99, 99], 40) == (13, 14, 13)
    assert even_within([99, 10, 4], 40) == (26, 10, 4)
    assert even_within([30, 30, 4], 40) == (18, 18, 4)
    assert even_within([10, 10, 10], 40) is None
    assert even_within([40, 0], 40) is None
    assert even_within([9, 9, 9], 2) is None


@pytest.mark.parametrize("limits", [(5, 3, 4), (6, 1, 2), (2, 2, 9)])
def test_no_split_within_the_limits_is_more_even(limits: tuple[int, ...]) -> None:
    """By the largest stage, and by the sum of squares."""
    found = even_within(limits, 8)
    splits = [split for split in product(*(range(1, n + 1) for n in limits)) if sum(split) == 8]
    assert found in splits
    assert sum(n * n for n in found) == min(sum(n * n for n in split) for split in splits)


@pytest.mark.parametrize("name", [
    "llama2-13b", pytest.param("opt-30b", marks=pytest.mark.slow),
    pytest.param("llama2-70b", marks=pytest.mark.slow)])
def test_every_pipeline_goes_through_every_kind_of_card(name: str) -> None:
    """On the paper's testbed; all cards are used."""
    given = problem(paper(), name)
    plan = VllmAllPolicy().plan(given)
    check_plan(plan, given)
    kinds = set(given.cluster.gpu_counts)
    for instance in plan.instances:
        assert {given.cluster.devices[d].gpu.name for d in instance.devices} == kinds
    assert sorted(d for instance in plan.instances for d in instance.devices) == list(range(12))


def test_on_one_kind_of_card_it_is_vllm() -> None:
    """The same instances, but for the cache that it plans to leave free."""
    given = problem(cluster(("a100-80gb", 4)), "llama2-13b")
    one, other = VllmPolicy().plan(given), VllmAllPolicy().plan(given)
    assert [i.stages for i in one.instances] == [i.stages for i in other.instances]


def test_the_batch_is_the_best_of_all() -> None:
    """More cache drives layers out of small cards; every batch is tried."""
    given = problem(cluster(("a100-40gb", 1), ("t4", 1)), "llama2-7b")
    shape = instance_shape(given, [(0,), (1,)])
    estimator = Estimator(given)
    best = even_estimate(estimator, shape, 1000)
    assert best is not None
    for batch in range(2, 200, 2):
        layers = even_within([min(40, n) for n in fits(given, shape, batch)], given.model.layers)
        found = estimator.at(shape, batch // 2, batch, layers) if layers else None
        assert found is None or found.value <= 1.001 * best.value


def fits(given: object, shape: object, batch: int) -> list[int]:
    """Layers that each stage holds beside the cache of a batch."""
    size = Estimator(given).group_bytes  # type: ignore[arg-type]
    return [int(min(room / (weights + size * batch * owned) for room, weights, owned
                    in zip(stage.room_bytes, stage.layer_bytes, stage.owned, strict=True)))
            for stage in shape.stages]  # type: ignore[attr-defined]
