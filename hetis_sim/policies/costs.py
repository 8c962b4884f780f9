"""Decode-attention costs of every position of an instance, from the cost model."""

from __future__ import annotations

from dataclasses import replace

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
                  instance: InstancePlan, position: Position, lone: bool = False) -> PositionCost:
    """Cost of one position, in seconds per layer; ``lone`` is of a batch of one request.

    Where several workers share an interface, each is charged for the bytes of all at its own messages' rate.
    """
    gpu = cluster.devices[position.device].gpu
    attention = (cost.remote_attention if position.remote else cost.decode_attention)(gpu, model)
    if lone and attention.lone is not None:
        attention = attention.lone
    a = attention.a_s_per_head * model.heads_per_group
    b = attention.b_s_per_byte * model.kv_bytes_per_token_per_layer_per_group
    heads = model.heads_per_group
    if not position.remote:
        # Merging is taken to read at the rate of decode attention and to start as slowly (ours).
        merge = attention.b_s_per_byte * model.partial_bytes_per_token(heads)
        return PositionCost(a, b, attention.c_s, merge_s_per_group=merge)
    sender = instance.stages[position.stage].devices[0]
    rank = cluster.devices[sender].gpu
    transfer = cost.head_transfer(cluster.link(sender, position.device), rank, gpu)
    wire_bytes = model.remote_bytes_per_token(heads)
    share = wire_sharers(cluster, instance, position)
    wire_s_per_byte = transfer.gamma_s_per_byte * max(1, share)
    # Query, key and value go out and the output comes back: two messages a layer.
    wire_s = transfer.gamma_s_per_byte * wire_bytes * max(1, share)
    still, merged = range_wire_bytes(model)
    packing = cost.head_packing(rank)
    return PositionCost(a, b, attention.c_s, wire_s, 2 * transfer.beta_s, share, still * wire_s_per_byte,
                        merged * wire_s_per_byte, pack_s_per_group=packing.gamma_s_per_byte * wire_bytes,
                        pack_fixed_s=packing.beta_s)


def mixed_cost(cluster: ClusterSpec, model: ModelSpec, cost: CostModel, position: Position,
               alone: PositionCost) -> PositionCost:
    """Cost of a rank whose decoding requests share a kernel with prompts, in seconds per layer."""
    attention = cost.mixed_attention(cluster.devices[position.device].gpu, model)
    return replace(alone, a_s_per_group=attention.a_s_per_head * model.heads_per_group,
                   b_s_per_group_token=(attention.b_s_per_byte
                                        * model.kv_bytes_per_token_per_layer_per_group),
                   c_s=attention.c_s)


def range_wire_bytes(model: ModelSpec) -> tuple[int, int]:
    """Bytes of one KV group per token and layer: at a range, and what merging adds to a tail.

    A range gets the query and returns a partial output with its softmax statistics. A tail gets
    the new key and value besides, and adds the statistics to its output.
    """
    output = model.heads_per_group * model.head_dim * model.activation_bytes
    partial = model.partial_bytes_per_token(model.heads_per_group)
    return output + partial, partial - output


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
