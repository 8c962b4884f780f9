"""How much cache a plan can use for decoding."""

from __future__ import annotations

from hetis_sim.policies.memory import cache_units
from hetis_sim.policies.plan import InstancePlan
from hetis_sim.run import Prepared


def usable_tokens(prepared: Prepared) -> int:
    """Tokens of context that the decoding instances of a plan can hold together.

    Heads stay at the rank that holds their weights, so that the fullest rank is the limit, unless an
    instance has attention workers, which take any heads of any stage. Instances that only prefill hold
    nothing for decoding.
    """
    return sum(_instance_tokens(prepared, instance) for instance in prepared.plan.instances
               if instance.role != "prefill")


def _instance_tokens(prepared: Prepared, instance: InstancePlan) -> int:
    """The largest number that fits, by bisection: less cache never needs more room."""
    limits, model = prepared.settings.limits, prepared.model
    units = cache_units(prepared.cluster, model, limits, instance)
    shared = sum(units[device] for device in instance.attention_workers)
    low, high = 0, 1 + sum(units.values()) // (model.layers * model.kv_heads)
    while high - low > 1:
        blocks = (low + high) // 2
        lacking = sum(stage.layers * (model.kv_heads * blocks - sum(
            min(owned * blocks, units[device] // stage.layers)
            for device, owned in zip(stage.devices, stage.owned_groups, strict=True)))
            for stage in instance.stages)
        low, high = (blocks, high) if lacking <= shared else (low, blocks)
    return low * limits.block_tokens
