"""What one layer and the LM head ask of a device: matrix products and bytes moved.

Counts only, no time: the roofline and the fitted models put durations on the same work.
"""

from __future__ import annotations

from dataclasses import dataclass

from hetis_sim.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Gemm:
    """``count`` products of an (m, k) activation with a (k, n) weight matrix.

    ``m`` and ``count`` may be expected values of a mixture of experts.
    """

    m: float
    n: int
    k: int
    count: float = 1.0

    @property
    def flops(self) -> float:
        """Multiply-adds count twice."""
        return 2.0 * self.m * self.n * self.k * self.count

    @property
    def weights(self) -> float:
        """Number of weights read."""
        return self.n * self.k * self.count

    @property
    def activations(self) -> float:
        """Elements of input read and of output written."""
        return self.m * (self.n + self.k) * self.count


def _shard(size: int, tp: int) -> int:
    return -(-size // tp)


def shard_kv_heads(model: ModelSpec, tp: int) -> int:
    """KV heads on one of ``tp`` shards; each shard keeps at least one (replicated beyond H_kv)."""
    return _shard(model.kv_heads, tp)


def expected_experts(model: ModelSpec, tokens: int) -> float:
    """Expected number of distinct experts that ``tokens`` touch with uniform routing (ours)."""
    if model.experts == 1:
        return 1.0
    miss = 1.0 - model.experts_per_token / model.experts
    return float(model.experts) * (1.0 - miss**tokens)


def layer_gemms(model: ModelSpec, tokens: int, tp: int) -> tuple[Gemm, ...]:
    """Matrix products of one layer for ``tokens`` on one of ``tp`` shards, fused as engines do.

    Q, K and V are one product, gate and up another (vLLM's and TensorRT-LLM's fusion).
    """
    heads = shard_kv_heads(model, tp) * 2 * model.head_dim + _shard(model.query_heads, tp) * model.head_dim
    gemms = [Gemm(tokens, heads, model.hidden),
             Gemm(tokens, model.hidden, _shard(model.query_heads, tp) * model.head_dim)]
    columns = 2 if model.gated_mlp else 1
    inner = _shard(model.ffn_hidden, tp)
    experts = expected_experts(model, tokens)
    rows = tokens * model.experts_per_token / experts
    gemms += [Gemm(rows, columns * inner, model.hidden, experts), Gemm(rows, model.hidden, inner, experts)]
    if model.shared_ffn_hidden:
        inner = _shard(model.shared_ffn_hidden, tp)
        gemms += [Gemm(tokens, 2 * inner, model.hidden), Gemm(tokens, model.hidden, inner)]
    if model.experts > 1:
        gemms.append(Gemm(tokens, model.experts, model.hidden))
    return tuple(gemms)


def layer_elementwise(model: ModelSpec, tokens: int, tp: int) -> tuple[tuple[str, float], ...]:
    """(kind, bytes moved) of each elementwise kernel of one layer on one of ``tp`` shards.

    Two norms, each fused with the residual add (x and residual read, both written), rotary
    embedding, activation and KV write; of a mixture also gate, permutation and combination.
    """
    size = model.activation_bytes
    query = _shard(model.query_heads, tp) * model.head_dim
    kv = shard_kv_heads(model, tp) * model.head_dim
    inner = _shard(model.ffn_hidden, tp) * model.experts_per_token + _shard(model.shared_ffn_hidden, tp)
    norm = 4.0 * tokens * model.hidden * size
    kernels = [("norm", norm), ("norm", norm),
               ("activation", (3.0 if model.gated_mlp else 2.0) * tokens * inner * size),
               ("kv_write", 2.0 * tokens * kv * (size + model.kv_bytes))]
    if not model.learned_positions:
        kernels.append(("rotary", 2.0 * tokens * (query + kv) * size))
    if model.qk_norm:
        kernels.append(("norm", 2.0 * tokens * (query + kv) * size))
    if model.experts > 1:
        copies = 2.0 * tokens * model.experts_per_token * model.hidden * size
        kernels += [("gate", 8.0 * tokens * model.experts), ("permute", copies), ("permute", copies)]
    return tuple(kernels)


def head_gemm(model: ModelSpec, tokens: int, tp: int) -> Gemm:
    """The LM head's product on one of ``tp`` shards of the vocabulary."""
    return Gemm(tokens, _shard(model.vocab, tp), model.hidden)


def head_elementwise(model: ModelSpec, tokens: int, tp: int) -> tuple[tuple[str, float], ...]:
    """(kind, bytes moved) of embedding, final norm and sampling for ``tokens`` sequences.

    Sampling converts the logits to fp32 and reads them three times (maximum, sum, draw); ours.
    """
    size = model.activation_bytes
    logits = float(tokens * _shard(model.vocab, tp))
    return (("embedding", 2.0 * tokens * model.hidden * size), ("norm", 4.0 * tokens * model.hidden * size),
            ("sampling", logits * (size + 4)), ("sampling", 4.0 * logits), ("sampling", 4.0 * logits),
            ("sampling", 4.0 * logits))


def causal_pairs(new_tokens: int, context_tokens: int) -> float:
    """Query-key pairs of one head: each new token sees the context, itself and those before it."""
    return new_tokens * context_tokens + new_tokens * (new_tokens + 1) / 2.0


def prefill_attention_flops(model: ModelSpec, query_heads: int, new_tokens: int,
                            context_tokens: int) -> float:
    """FLOPs of causal attention of ``query_heads`` heads."""
    return 4.0 * query_heads * model.head_dim * causal_pairs(new_tokens, context_tokens)


def prefill_attention_bytes(model: ModelSpec, query_heads: int, new_tokens: int,
                            context_tokens: int) -> float:
    """Bytes of K and V that the same attention must read at least once."""
    groups = _shard(query_heads, model.heads_per_group)
    return float(groups * (new_tokens + context_tokens) * model.kv_bytes_per_token_per_layer_per_group)


def decode_flops_per_kv_byte(model: ModelSpec) -> float:
    """FLOPs of decode attention for each byte of cache: 4*r*d per token over 2*d*kv_bytes."""
    return 2.0 * model.heads_per_group / model.kv_bytes
