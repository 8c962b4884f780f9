"""Figures of devices and links, straight from the cost model: nothing is simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hetis_sim.config import compose
from hetis_sim.cost import work
from hetis_sim.cost.load import read_shipped
from hetis_sim.policies.costs import position_costs
from hetis_sim.policies.plan import InstancePlan, StagePlan
from hetis_sim.policies.view import PositionCost
from hetis_sim.run import Prepared, prepare
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.errors import require
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec

STRONG, WEAK = "a100-80gb", "p100-12gb"
PREFILL_TOKENS = 2048
SEQUENCES, CONTEXT = 64, 1000
"""A batch that decodes: requests, and tokens of cache of each (ours)."""

STATISTICS_BYTES = 8
"""What a head's partial result over part of a sequence carries to be merged: maximum and sum in fp32."""


def gaps(words: Sequence[str]) -> dict[str, float]:
    """Ratios of times and memory, P100 over A100."""
    prepared = _prepared(words)
    model, cost = prepared.model, prepared.cost
    strong, weak = _gpu(prepared, STRONG), _gpu(prepared, WEAK)

    def layer(gpu: GpuSpec) -> float:
        attention = cost.decode_attention(gpu, model)
        read = SEQUENCES * CONTEXT * model.kv_bytes_per_token / model.layers
        return cost.dense_layer_s(gpu, model, SEQUENCES, 1) + attention.seconds(
            SEQUENCES * model.query_heads, read)

    def attention_only(gpu: GpuSpec) -> float:
        return layer(gpu) - cost.dense_layer_s(gpu, model, SEQUENCES, 1)

    return {"prefill_mlp": _mlp_s(weak, model) / _mlp_s(strong, model),
            "dense_op": cost.dense_layer_s(weak, model, PREFILL_TOKENS, 1)
            / cost.dense_layer_s(strong, model, PREFILL_TOKENS, 1),
            "dense_decode": cost.dense_layer_s(weak, model, SEQUENCES, 1)
            / cost.dense_layer_s(strong, model, SEQUENCES, 1),
            "decode": layer(weak) / layer(strong), "attention": attention_only(weak) / attention_only(strong),
            "memory": strong.memory_bytes / weak.memory_bytes}


def _mlp_s(gpu: GpuSpec, model: ModelSpec) -> float:
    """The matrix products of one MLP for a prompt, by the profile of the card."""
    profile = read_shipped(gpu.name)
    assert profile is not None
    assert profile.gemm is not None
    products = [gemm for gemm in work.layer_gemms(model, PREFILL_TOKENS, 1)
                if model.ffn_hidden in (gemm.k, gemm.n, gemm.n / 2)]
    m, n, k, count = (np.array([float(getattr(gemm, name)) for gemm in products])
                      for name in ("m", "n", "k", "count"))
    return float(profile.gemm.seconds(m, n, k, count, model.weight_bytes, model.activation_bytes).sum())


def attention_workers(words: Sequence[str], most: int = 4) -> list[dict[str, float]]:
    """Attention of one layer with 1 to ``most`` attention workers, in seconds.

    A batch over contexts of the workload's mean length. ``alone``: the workers hold all heads;
    ``shared``: the heads are divided, without regard to whole groups, so that the A100 that computes the
    dense modules and all workers are done together; ``home``: that A100 has all.
    """
    prepared = _prepared(words)
    model, cluster = prepared.model, prepared.cluster
    about = prepared.workload.describe()
    context = about["prompt_tokens"]["mean"] + about["output_tokens"]["mean"] / 2
    primary, workers = _devices(cluster, STRONG)[0], _devices(cluster, WEAK)
    found = []
    for count in range(1, min(most, len(workers)) + 1):
        instance = InstancePlan((StagePlan((primary,), model.layers, (model.kv_heads,)),),
                                tuple(workers[:count]))
        own, *others = position_costs(cluster, model, prepared.cost, instance)
        found.append({"workers": count, "context": context, "alone_s": _level(others, model, context),
                      "home_s": _level([own], model, context),
                      "shared_s": _level([own, *others], model, context)})
    return found


def _level(positions: Sequence[PositionCost], model: ModelSpec, context: float) -> float:
    """When the last position is done with its share of the batch, heads being divisible."""
    groups = SEQUENCES * model.kv_heads
    starts = np.array([p.c_s + p.wire_fixed_s for p in positions])
    steps = np.array([p.a_s_per_group + p.wire_s_per_group + p.b_s_per_group_token * context
                      for p in positions])
    order = np.argsort(starts)
    level = float("inf")
    for count in range(1, len(order) + 1):
        used = order[:count]
        filled = (groups + (starts[used] / steps[used]).sum()) / (1 / steps[used]).sum()
        if count == len(order) or filled <= starts[order[count]]:
            level = float(filled)
            break
    return level


def offload(words: Sequence[str], shares: Sequence[float]) -> dict[str, Any]:
    """What one attention worker costs on the links, by head and by sequence.

    Per layer and iteration, for the batch: queries and outputs, and the new keys and values. By head only
    the offloaded heads travel. By sequence (a range of every request's tokens is offloaded) every query
    goes to the worker, and every head's partial output with its statistics comes back; the new keys and
    values stay with the primary, which holds the end of the sequence.

    ``share`` is the part of the cache that the worker holds; ``balanced`` the one at which A100 and P100
    are done together, by head.
    """
    prepared = _prepared(words)
    model, cluster, cost = prepared.model, prepared.cluster, prepared.cost
    primary, worker = _devices(cluster, STRONG)[0], _devices(cluster, WEAK)[0]
    wire = cost.head_transfer(cluster.link(primary, worker), _gpu(prepared, STRONG), _gpu(prepared, WEAK))
    heads = SEQUENCES * model.query_heads
    by_sequence = (2 * model.head_dim * model.activation_bytes + STATISTICS_BYTES) * heads

    def by_head(share: float) -> float:
        return share * SEQUENCES * model.remote_bytes_per_token(model.query_heads)

    def seconds(size: float) -> float:
        return 2 * wire.beta_s + wire.gamma_s_per_byte * size

    balanced = _balanced_share(prepared, primary, worker)
    return {"shares": list(shares), "balanced": balanced, "by_sequence_s": seconds(by_sequence),
            "by_head_s": [seconds(by_head(share)) for share in shares],
            "bytes_ratio": by_sequence / by_head(balanced),
            "time_ratio": seconds(by_sequence) / seconds(by_head(balanced)), "beta_s": wire.beta_s}


def _balanced_share(prepared: Prepared, primary: int, worker: int) -> float:
    model = prepared.model
    instance = InstancePlan((StagePlan((primary,), model.layers, (model.kv_heads,)),), (worker,))
    own, other = position_costs(prepared.cluster, model, prepared.cost, instance)
    level = _level([own, other], model, CONTEXT)
    rate = other.a_s_per_group + other.wire_s_per_group + other.b_s_per_group_token * CONTEXT
    return (level - other.c_s - other.wire_fixed_s) / rate / (SEQUENCES * model.kv_heads)


def accuracy(words: Sequence[str]) -> list[dict[str, Any]]:
    """Held-out errors of the linear models of attention and transfer, where there are measurements."""
    prepared = _prepared(words)
    return [{"module": row.module, "subject": row.subject, "kind": row.kind, "median": row.median_error,
             "p95": row.p95_error} for row in prepared.provenance()
            if row.module in ("decode_attention", "transfer", "gemm", "prefill_attention")]


def _prepared(words: Sequence[str]) -> Prepared:
    """A combination whose cluster has both cards.

    Raises:
        SpecError: it has not.
    """
    prepared = prepare(replace(compose(*words), policy={"name": "vllm"}))
    for name in (STRONG, WEAK):
        require(any(gpu.name == name for gpu in prepared.gpus), "cluster", prepared.cluster.name,
                f"one with {STRONG} and {WEAK}")
    return prepared


def _devices(cluster: ClusterSpec, name: str) -> list[int]:
    return [device.device_id for device in cluster.devices if device.gpu.name == name]


def _gpu(prepared: Prepared, name: str) -> GpuSpec:
    return next(gpu for gpu in prepared.gpus if gpu.name == name)


