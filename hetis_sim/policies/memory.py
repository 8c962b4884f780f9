"""How much of each device is left for the cache once weights and activations are in."""

from __future__ import annotations

from hetis_sim.policies.base import EngineLimits
from hetis_sim.policies.plan import InstancePlan, MeshPlan, StagePlan
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.errors import InfeasibleError
from hetis_sim.spec.gpu import GB
from hetis_sim.spec.model import ModelSpec

RUNTIME_BYTES = 512 * 1024**2
"""Context, kernels and communication buffers of one process on a GPU (ours; CUDA
contexts with NCCL take 0.4 to 0.7 GB)."""


def stage_weight_bytes(model: ModelSpec, stage: StagePlan, rank: int, first: bool, last: bool) -> int:
    """Bytes of weights on one rank: its share of the layers, embedding and LM head."""
    attention = model.attention_weights_per_layer * stage.owned_groups[rank] / model.kv_heads
    norms = model.norm_weights_per_layer
    rest = (model.weights_per_layer - model.attention_weights_per_layer - norms) / stage.tp
    weights = stage.layers * (attention + rest + norms)
    if first:
        weights += model.embedding_weights / stage.tp
    if last:
        head = model.vocab * model.hidden if model.tied_embeddings and not first else model.lm_head_weights
        weights += head / stage.tp + model.hidden
    return int(weights * model.weight_bytes)


def activation_bytes(model: ModelSpec, limits: EngineLimits, tp: int, last: bool) -> int:
    """Peak of the temporaries of one step with a full token budget.

    The residual stream and its copy, QKV, the wider of attention output and MLP inner
    tensors, and the logits of one micro-batch on the last stage.
    """
    tokens = limits.max_batch_tokens
    qkv = (model.query_heads + 2 * model.kv_heads) * model.head_dim / tp
    inner = (2 if model.gated_mlp else 1) * model.ffn_hidden * model.experts_per_token / tp
    peak = tokens * (3 * model.hidden + max(qkv, inner)) * model.activation_bytes
    if last:
        peak += 4 * min(limits.max_batch_requests, tokens) * model.vocab / tp
    return int(peak)


def unit_bytes(model: ModelSpec, limits: EngineLimits) -> int:
    """Bytes of one ledger unit: block_tokens of one KV group in one layer."""
    return limits.block_tokens * model.kv_bytes_per_token_per_layer_per_group


def attention_worker_reserve_bytes(model: ModelSpec, limits: EngineLimits) -> int:
    """Queries, keys, values and outputs of one full micro-batch, twice for overlap."""
    return 2 * limits.max_batch_requests * model.remote_bytes_per_token(model.query_heads)


def stage_cache_bytes(cluster: ClusterSpec, model: ModelSpec, limits: EngineLimits, stage: StagePlan,
                      first: bool, last: bool) -> dict[int, int]:
    """Bytes left for cache on each device of a stage; negative where weights do not fit."""
    temporaries = RUNTIME_BYTES + activation_bytes(model, limits, stage.tp, last)
    return {device: int(cluster.devices[device].gpu.memory_bytes * limits.memory_utilization)
            - stage_weight_bytes(model, stage, rank, first, last) - temporaries
            for rank, device in enumerate(stage.devices)}


def _cache_bytes(cluster: ClusterSpec, model: ModelSpec, limits: EngineLimits, stage: StagePlan,
                 first: bool, last: bool) -> dict[int, int]:
    """What the configuration gives to each rank of a stage, or else what is left."""
    if not limits.cache_tokens:
        return stage_cache_bytes(cluster, model, limits, stage, first, last)
    found: dict[int, int] = {}
    for rank, device in enumerate(stage.devices):
        units = limits.cache_tokens // limits.block_tokens * stage.owned_groups[rank] * stage.layers
        found[device] = units * unit_bytes(model, limits)
        room = cluster.devices[device].gpu.memory_bytes - stage_weight_bytes(model, stage, rank, first, last)
        if found[device] > room:
            raise InfeasibleError(f"scheduler.cache_tokens={limits.cache_tokens} take "
                                  f"{found[device] / GB:.1f} GB on device {device}, beside whose weights "
                                  f"{max(0, room) / GB:.1f} GB are left; give fewer, or 0 for as many as "
                                  "memory allows")
    return found


def mesh_cache_bytes(cluster: ClusterSpec, model: ModelSpec, limits: EngineLimits,
                     mesh: MeshPlan) -> dict[int, int]:
    """Bytes left for cache on each device of a mesh; negative where weights do not fit.

    Raises:
        InfeasibleError: as :func:`cache_bytes` does.
    """
    left: dict[int, int] = {}
    for node in mesh.nodes:
        left |= _cache_bytes(cluster, model, limits, node, node.first_layer == 0,
                             node.end_layer == model.layers)
    return left


def cache_bytes(cluster: ClusterSpec, model: ModelSpec, limits: EngineLimits,
                instance: InstancePlan) -> dict[int, int]:
    """Bytes left for cache on each device of an instance; negative where weights do not fit.

    Raises:
        InfeasibleError: ``limits.cache_tokens`` do not fit beside the weights.
    """
    left: dict[int, int] = {}
    last_stage = len(instance.stages) - 1
    for s, stage in enumerate(instance.stages):
        left |= _cache_bytes(cluster, model, limits, stage, s == 0, s == last_stage)
    for device in instance.attention_workers:
        budget = cluster.devices[device].gpu.memory_bytes * limits.memory_utilization
        left[device] = int(budget) - RUNTIME_BYTES - attention_worker_reserve_bytes(model, limits)
    return left


def cache_units(cluster: ClusterSpec, model: ModelSpec, limits: EngineLimits,
                instance: InstancePlan) -> dict[int, int]:
    """Ledger units on each device of an instance, 0 where nothing is left."""
    return _units(model, limits, cache_bytes(cluster, model, limits, instance))


def mesh_cache_units(cluster: ClusterSpec, model: ModelSpec, limits: EngineLimits,
                     mesh: MeshPlan) -> dict[int, int]:
    """Ledger units on each device of a mesh, 0 where nothing is left."""
    return _units(model, limits, mesh_cache_bytes(cluster, model, limits, mesh))


def _units(model: ModelSpec, limits: EngineLimits, left: dict[int, int]) -> dict[int, int]:
    size = unit_bytes(model, limits)
    return {device: max(0, amount) // size for device, amount in left.items()}
