"""Physical lower bounds: no prediction may be shorter (invariant 13).

Work that runs one after the other has the sum of its bounds as a bound: each matrix product
is bounded by its own FLOPs over the peak and its own weight bytes over the bandwidth.
"""

from __future__ import annotations

from hetis_sim.cost.work import (
    Gemm,
    decode_flops_per_kv_byte,
    head_gemm,
    layer_gemms,
    prefill_attention_bytes,
    prefill_attention_flops,
)
from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec


def matrix_flops_per_s(gpu: GpuSpec, model: ModelSpec) -> float:
    """Peak of matrix products: of 16-bit operands, or of fp32 where the weights are fp32."""
    return gpu.fp32_flops_per_s if model.weight_bytes == 4 else gpu.fp16_flops_per_s


def gemm_floor_s(gpu: GpuSpec, gemm: Gemm, model: ModelSpec) -> float:
    """Seconds below which a product cannot run when its weights come from device memory."""
    return max(gemm.flops / matrix_flops_per_s(gpu, model),
               gemm.weights * model.weight_bytes / gpu.memory_bandwidth_bytes_per_s)


def dense_layer_floor_s(gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
    """Bound on the dense work of one layer on one of ``tp`` shards."""
    return sum(gemm_floor_s(gpu, gemm, model) for gemm in layer_gemms(model, tokens, tp))


def head_floor_s(gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
    """Bound on the LM head on one of ``tp`` shards."""
    return gemm_floor_s(gpu, head_gemm(model, tokens, tp), model)


def prefill_attention_floor_s(gpu: GpuSpec, model: ModelSpec, query_heads: int,
                              new_tokens: int, context_tokens: int) -> float:
    """Bound on causal attention of one layer and one request."""
    flops = prefill_attention_flops(model, query_heads, new_tokens, context_tokens)
    kv_bytes = prefill_attention_bytes(model, query_heads, new_tokens, context_tokens)
    return max(flops / gpu.fp16_flops_per_s, kv_bytes / gpu.memory_bandwidth_bytes_per_s)


def decode_floor_s_per_byte(gpu: GpuSpec, model: ModelSpec) -> float:
    """Bound on the cost of one byte of cache in decode attention."""
    return max(1.0 / gpu.memory_bandwidth_bytes_per_s, decode_flops_per_kv_byte(model) / gpu.fp16_flops_per_s)


def all_reduce_floor_s(link: LinkSpec, size_bytes: int, ranks: int) -> float:
    """Bound on an all-reduce: every rank must send its whole contribution once.

    A ring sends 2*(p-1)/p of it, but switches that add in the network (NVLink SHARP) need only
    the contribution itself, and the eight-card tables of H100 and H200 do beat the ring's bound.
    """
    return size_bytes / link.bandwidth_bytes_per_s if ranks > 1 else 0.0
