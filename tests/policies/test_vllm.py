"""The homogeneous baseline."""

from __future__ import annotations

import pytest
from policy_worlds import cluster, paper, problem

from hetis_sim.policies.check import check_plan
from hetis_sim.policies.vllm import VllmPolicy, VllmSettings, even_layers
from hetis_sim.spec.errors import InfeasibleError, SpecError


@pytest.mark.parametrize("name", ["llama2-70b", "llama2-13b", "opt-30b"])
def test_one_kind_of_gpu_is_used_and_all_heads_stay_at_home(name: str) -> None:
    """The high-end kind on the paper's testbed; every unused card has a reason."""
    given = problem(paper(), name)
    plan = VllmPolicy().plan(given)
    check_plan(plan, given)
    used = {d for instance in plan.instances for d in instance.devices}
    assert {given.cluster.devices[d].gpu.name for d in used} == {"a100-80gb"}
    assert all(not instance.attention_workers for instance in plan.instances)
    assert all(len({stage.tp for stage in instance.stages}) == 1 for instance in plan.instances)
    assert sorted(plan.reasons) == list(range(12))
    assert all(plan.reasons[d].startswith("not used") for d in range(12) if d not in used)


def test_a_pool_of_many_weak_cards_is_taken_where_it_serves_more() -> None:
    """Capacity decides, not the price of a card."""
    spec = cluster(("a100-40gb", 1), *[("l40s", 8)] * 2)
    plan = VllmPolicy().plan(problem(spec, "llama2-7b"))
    assert spec.devices[plan.instances[0].devices[0]].gpu.name == "l40s"


def test_degrees_divide_the_heads() -> None:
    """Tensor parallelism is even: 28 query and 4 KV heads allow 1, 2 and 4, not 3 or 8."""
    spec = cluster(("l4", 8))
    plan = VllmPolicy().plan(problem(spec, "qwen2.5-7b"))
    assert {stage.tp for instance in plan.instances for stage in instance.stages} <= {1, 2, 4}


def test_layers_are_split_evenly() -> None:
    """What is left goes to the stages before the last."""
    assert even_layers(80, 4) == (20, 20, 20, 20)
    assert even_layers(40, 3) == (13, 14, 13)
    assert even_layers(30, 4) == (7, 8, 8, 7)
    assert even_layers(5, 1) == (5,)


def test_a_model_too_large_for_any_single_kind_is_refused() -> None:
    """With what each kind offers."""
    with pytest.raises(InfeasibleError, match=r"needs 138\.0 GB .*1 x a100-80gb offer .*4 x rtx3090 offer"):
        VllmPolicy().plan(problem(cluster(("a100-80gb", 1), ("rtx3090", 4))))


def test_a_user_may_choose_the_degrees() -> None:
    """All three, or some of them; a choice that does not fit names what was chosen."""
    spec = cluster(("a100-80gb", 8))
    for settings, shape in ((VllmSettings(tp=2, pp=2, dp=1), (1, 2, 2)),
                            (VllmSettings(tp=4, pp=1), (2, 1, 4))):
        plan = VllmPolicy(settings).plan(problem(spec, "llama2-13b"))
        found = (len(plan.instances), len(plan.instances[0].stages), plan.instances[0].stages[0].tp)
        assert found == shape
    with pytest.raises(InfeasibleError, match=r"policy\.tp=3 and policy\.pp=1"):
        VllmPolicy(VllmSettings(tp=3, pp=1)).plan(problem(spec, "llama2-13b"))
    with pytest.raises(SpecError, match=r"policy\.tp"):
        VllmSettings(tp=-1)
