"""Architectures of decoder-only transformers and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetis_sim.spec.errors import SpecError, require
from hetis_sim.spec.lookup import require_int

# Bounds beyond which a figure is a slip of the hand; the largest published models stay far below.
SIZE_LIMITS = {
    "layers": 1_000, "hidden": 1_000_000, "query_heads": 10_000, "kv_heads": 10_000, "head_dim": 10_000,
    "ffn_hidden": 10_000_000, "vocab": 10_000_000, "context_limit_tokens": 1 << 30, "experts": 10_000,
    "experts_per_token": 10_000, "shared_ffn_hidden": 10_000_000, "learned_positions": 1 << 30,
}
MAY_BE_ZERO = ("shared_ffn_hidden", "learned_positions")
SOFTMAX_STATISTICS_BYTES = 8


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The facts of an architecture that decide its memory and its work.

    One KV group is one KV head with the ``heads_per_group`` query heads that share
    it; heads are placed and moved in whole groups.

    Attributes:
        name: how users call it.
        layers: transformer blocks.
        hidden: width of the residual stream.
        query_heads, kv_heads: H_q and H_kv; H_kv divides H_q.
        head_dim: d_head.
        ffn_hidden: inner width of one expert's MLP (of the MLP where ``experts`` is 1).
        gated_mlp: three matrices (SwiGLU) instead of two.
        vocab: rows of the embedding.
        tied_embeddings: the LM head reuses the input embedding.
        context_limit_tokens: longest prompt plus output.
        experts, experts_per_token: 1 and 1 for a dense model.
        shared_ffn_hidden: inner width of an always-active shared expert, 0 for none.
        learned_positions: rows of a learned position embedding, 0 for rotary; they bound
            ``context_limit_tokens``.
        linear_biases: biases on every linear layer and on every norm, as OPT has them.
        qkv_biases: biases on Q, K and V, as Qwen2 has them.
        output_bias: a bias on the attention output projection as well.
        mlp_biases: biases on the matrices of the MLP (``mlp_bias`` of Llama).
        qk_norm: a norm over the head dimension of Q and of K, as Qwen3 has it.
        weight_bytes: bytes of one weight: 2 for fp16 and bf16, 4 for fp32; 1 stands for
            weight-only quantization, which still computes in 16 bits.
        kv_bytes: bytes of one cache element: 2 for fp16 and bf16, 1 for an fp8 cache.
    """

    name: str
    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    ffn_hidden: int
    vocab: int
    gated_mlp: bool = True
    tied_embeddings: bool = False
    context_limit_tokens: int = 4096
    experts: int = 1
    experts_per_token: int = 1
    shared_ffn_hidden: int = 0
    learned_positions: int = 0
    linear_biases: bool = False
    qkv_biases: bool = False
    weight_bytes: int = 2
    kv_bytes: int = 2
    output_bias: bool = False
    mlp_biases: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for key, limit in SIZE_LIMITS.items():
            require_int(f"model.{key}", getattr(self, key), 0 if key in MAY_BE_ZERO else 1, limit)
        for key in ("weight_bytes", "kv_bytes"):
            value = getattr(self, key)
            require(type(value) is int and value in (1, 2, 4), f"model.{key}", value, "1, 2 or 4")
        require(self.query_heads % self.kv_heads == 0, "model.kv_heads", self.kv_heads,
                f"a divisor of query_heads={self.query_heads}")
        require(self.experts_per_token <= self.experts, "model.experts_per_token",
                self.experts_per_token, f"<= experts={self.experts}")
        require(not self.learned_positions or self.context_limit_tokens <= self.learned_positions,
                "model.context_limit_tokens", self.context_limit_tokens,
                f"<= the {self.learned_positions} learned positions of {self.name}")

    def with_context_limit(self, tokens: int) -> ModelSpec:
        """A copy with another longest prompt plus output.

        Raises:
            SpecError: out of range, or more than a model with learned positions has.
        """
        require_int("model.context_limit_tokens", tokens, 1, SIZE_LIMITS["context_limit_tokens"])
        require(not self.learned_positions or tokens <= self.context_limit_tokens,
                "model.context_limit_tokens", tokens,
                f"<= {self.context_limit_tokens}, the learned positions of {self.name}")
        return replace(self, context_limit_tokens=tokens)

    @property
    def activation_bytes(self) -> int:
        """Bytes of one element of an activation: 2, or 4 where the weights are fp32."""
        return max(2, self.weight_bytes)

    @property
    def heads_per_group(self) -> int:
        """r = H_q / H_kv, query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @property
    def kv_bytes_per_token_per_layer_per_group(self) -> int:
        """Bytes of K and V of one token, one layer, one KV head."""
        return 2 * self.head_dim * self.kv_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers and KV heads."""
        return self.layers * self.kv_heads * self.kv_bytes_per_token_per_layer_per_group

    @property
    def attention_weights_per_layer(self) -> int:
        """Weights of the QKV and output projections of one layer, biases included."""
        q = self.query_heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        weights = self.hidden * (q + 2 * kv) + q * self.hidden
        if self.linear_biases or self.qkv_biases:
            weights += q + 2 * kv
        if self.linear_biases or self.output_bias:
            weights += self.hidden
        return weights

    @property
    def mlp_weights_per_expert(self) -> int:
        """Weights of one expert's MLP (of the MLP of a dense model), biases included."""
        columns = 2 if self.gated_mlp else 1
        weights = (columns + 1) * self.hidden * self.ffn_hidden
        if self.linear_biases or self.mlp_biases:
            weights += columns * self.ffn_hidden + self.hidden
        return weights

    @property
    def shared_mlp_weights_per_layer(self) -> int:
        """Weights of the always-active shared expert (gated, as Qwen2-MoE has it), with its gate."""
        if not self.shared_ffn_hidden:
            return 0
        return 3 * self.hidden * self.shared_ffn_hidden + self.hidden

    @property
    def router_weights_per_layer(self) -> int:
        """Weights that choose the experts, 0 for a dense model."""
        return self.hidden * self.experts if self.experts > 1 else 0

    @property
    def norm_weights_per_layer(self) -> int:
        """Weights of the two norms of a layer (LayerNorm has a bias as well) and of QK-norm."""
        return (4 if self.linear_biases else 2) * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def weights_per_layer(self) -> int:
        """All weights of one layer."""
        return (self.attention_weights_per_layer + self.experts * self.mlp_weights_per_expert
                + self.shared_mlp_weights_per_layer + self.router_weights_per_layer
                + self.norm_weights_per_layer)

    @property
    def embedding_weights(self) -> int:
        """Weights of the token and position embeddings."""
        return (self.vocab + self.learned_positions) * self.hidden

    @property
    def lm_head_weights(self) -> int:
        """Weights of the LM head that are not shared with the embedding."""
        return 0 if self.tied_embeddings else self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Number of weights of the whole model."""
        final_norm = (2 if self.linear_biases else 1) * self.hidden
        outside_layers = self.embedding_weights + self.lm_head_weights + final_norm
        return self.layers * self.weights_per_layer + outside_layers

    @property
    def active_parameters(self) -> int:
        """Weights that one token uses: of a mixture, the chosen experts only."""
        idle_experts = self.experts - self.experts_per_token
        return self.parameters - self.layers * idle_experts * self.mlp_weights_per_expert

    @property
    def layer_bytes(self) -> int:
        """Bytes of the weights of one layer."""
        return self.weights_per_layer * self.weight_bytes

    @property
    def weight_bytes_total(self) -> int:
        """Bytes of all weights of the model, held once."""
        return self.parameters * self.weight_bytes

    @property
    def projection_flops_per_token_per_layer(self) -> int:
        """FLOPs of the Q, K, V and output projections for one token in one layer."""
        q = self.query_heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        return 2 * self.hidden * (2 * q + 2 * kv)

    @property
    def mlp_flops_per_token_per_layer(self) -> int:
        """FLOPs of router, chosen experts and shared expert for one token in one layer."""
        experts = (3 if self.gated_mlp else 2) * self.hidden * self.ffn_hidden * self.experts_per_token
        return 2 * (experts + self.shared_mlp_weights_per_layer + self.router_weights_per_layer)

    @property
    def dense_flops_per_token_per_layer(self) -> int:
        """FLOPs of the projections and the MLP for one token in one layer."""
        return self.projection_flops_per_token_per_layer + self.mlp_flops_per_token_per_layer

    @property
    def head_flops_per_token(self) -> int:
        """FLOPs of the LM head for one token."""
        return 2 * self.vocab * self.hidden

    @property
    def dense_flops_per_token(self) -> int:
        """FLOPs of one token over all layers and the LM head, attention itself left out."""
        return self.layers * self.dense_flops_per_token_per_layer + self.head_flops_per_token

    def attention_flops(self, new_tokens: int, context_tokens: int) -> int:
        """FLOPs of causal attention of one layer for ``new_tokens`` after ``context_tokens``.

        Each new token sees the whole context, itself and the new tokens before it.
        """
        pairs = new_tokens * context_tokens + new_tokens * (new_tokens + 1) // 2
        return 4 * self.query_heads * self.head_dim * pairs

    def remote_bytes_per_token(self, query_heads: int) -> int:
        """Bytes on the wire for one token in one layer when ``query_heads`` are remote.

        d = (2 + 2/r) * h * d_head * bytes: the query and the output of every head, K and V
        of every group (reconstruction of the Hetis paper's transfer volume). Queries and
        outputs travel as activations, K and V as the cache stores them (ours; the two are
        equal in fp16).

        Raises:
            SpecError: ``query_heads`` is not a whole number of KV groups of this model.
        """
        groups, rest = divmod(query_heads, self.heads_per_group)
        if rest or not 0 <= groups <= self.kv_heads:
            raise SpecError("query_heads", query_heads,
                            f"a multiple of {self.heads_per_group} up to {self.query_heads}")
        return 2 * self.head_dim * (query_heads * self.activation_bytes + groups * self.kv_bytes)

    def partial_bytes_per_token(self, query_heads: int) -> int:
        """Bytes of one token's attention output in one layer, computed over part of its context only.

        The output of every head, normalised over that part, travels as an activation; the two
        softmax statistics that merging needs (maximum and sum, as in DistAttention, arXiv 2401.02669)
        in fp32, as kernels keep them. Both precisions are ours.
        """
        return query_heads * (self.head_dim * self.activation_bytes + SOFTMAX_STATISTICS_BYTES)
