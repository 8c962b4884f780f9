"""Decode-attention costs of every position of an instance, from the cost model."""

from __future__ import annotations

from hetis_sim.cost.model import CostModel
from hetis_sim.policies.plan import InstancePlan, Position
from hetis_sim.policies.view import PositionCost
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.model import ModelSpec


def position_costs(cluster: ClusterSpec, model: ModelSpec, cost: CostModel,
                   instance: InstancePlan) -> tuple[PositionCost, ...]:
    """One :class:`PositionCost` per position, in seconds per layer."""
    return tuple(position_cost(cluster, model, cost, instance, p) for p in instance.positions)


def position_cost(cluster: ClusterSpec, model: ModelSpec, cost: CostModel,
                  instance: InstancePlan, position: Position) -> PositionCost:
    """Cost of one position, in seconds per layer."""
    attention = cost.decode_attention(cluster.devices[position.device].gpu, model)
    a = attention.a_s_per_head * model.heads_per_group
    b = attention.b_s_per_byte * model.kv_bytes_per_token_per_layer_per_group
    if not position.remote:
        return PositionCost(a, b, attention.c_s)
    sender = instance.stages[position.stage].devices[0]
    transfer = cost.transfer(cluster.link(sender, position.device))
    wire_bytes = model.remote_bytes_per_token(model.heads_per_group)
    share = wire_sharers(cluster, instance, position)
    # Query, key and value go out and the output comes back: two messages a layer.
    wire_s = transfer.gamma_s_per_byte * wire_bytes * max(1, share)
    return PositionCost(a, b, attention.c_s, wire_s, 2 * transfer.beta_s, share)


def wire_sharers(cluster: ClusterSpec, instance: InstancePlan, position: Position) -> int:
    """Attention workers whose head traffic crosses the same network interface; 0 for a wire of its own.

    Inside a host every GPU has its own lanes. Across hosts, all traffic of a stage leaves
    through its host's interface, and all workers of one host receive through theirs; the
    sender's interface carries the most.
    """
    stage_host = cluster.devices[instance.stages[position.stage].devices[0]].host_id
    if cluster.devices[position.device].host_id == stage_host:
        return 0
    return sum(cluster.devices[device].host_id != stage_host for device in instance.attention_workers)
