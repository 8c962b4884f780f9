"""Splitwise with every kind of card in one pool, as Hetis' evaluation describes it."""

from __future__ import annotations

import pytest
from policy_worlds import paper, problem

from hetis_sim.policies.plan import Plan
from hetis_sim.policies.splitwise import SplitwisePolicy, SplitwiseSettings
from hetis_sim.spec.errors import SpecError

APART = SplitwiseSettings(share_kinds=False, high_end_bias=1000.0, evaluations=60)


def kinds(plan: Plan, role: str) -> set[str]:
    """Kinds of card of the instances with a role."""
    cluster = paper()
    return {cluster.devices[device].gpu.name for instance in plan.instances if instance.role == role
            for device in instance.devices}


def test_the_high_end_prefills_and_the_rest_decodes() -> None:
    """No kind is in both pools where the model fits otherwise."""
    plan = SplitwisePolicy(APART).plan(problem(paper(), "llama-13b"))
    assert kinds(plan, "prefill") == {"a100-80gb"}
    assert kinds(plan, "decode")
    assert not kinds(plan, "decode") & {"a100-80gb"}
    assert not kinds(plan, "both")


def test_a_model_that_the_low_end_cannot_hold_decodes_on_the_high_end_too() -> None:
    """Llama-2-70B takes more than the 3090s and P100s have."""
    plan = SplitwisePolicy(APART).plan(problem(paper(), "llama2-70b"))
    assert "a100-80gb" in kinds(plan, "prefill") & kinds(plan, "decode")


def test_the_setting_is_checked() -> None:
    """A word is no answer."""
    with pytest.raises(SpecError, match=r"policy\.share_kinds"):
        SplitwiseSettings(share_kinds="no")  # type: ignore[arg-type]
