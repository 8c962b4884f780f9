"""Architectures of decoder-only transformers and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from hetis_sim.spec.errors import require


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
        learned_positions: rows of a learned position embedding, 0 for rotary.
        linear_biases: biases on the linear layers as OPT has them.
        qkv_biases: biases on Q, K and V only, as Qwen2 has them.
        weight_bytes, kv_bytes: bytes of one weight and of one cache element (2 for fp16).
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

    def __post_init__(self) -> None:
        for key in ("layers", "hidden", "query_heads", "kv_heads", "head_dim", "ffn_hidden", "vocab",
                    "context_limit_tokens", "experts", "experts_per_token", "weight_bytes", "kv_bytes"):
            require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), ">= 1")
        require(self.query_heads % self.kv_heads == 0, "model.kv_heads", self.kv_heads,
                f"a divisor of query_heads={self.query_heads}")
        require(self.experts_per_token <= self.experts, "model.experts_per_token",
                self.experts_per_token, f"<= experts={self.experts}")

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
        if self.linear_biases:
            weights += q + 2 * kv + self.hidden
        elif self.qkv_biases:
            weights += q + 2 * kv
        return weights

    @property
    def mlp_weights_per_expert(self) -> int:
        """Weights of one expert's MLP (of the MLP of a dense model), biases included."""
        weights = (3 if self.gated_mlp else 2) * self.hidden * self.ffn_hidden
        if self.linear_biases:
            weights += self.ffn_hidden + self.hidden
        return weights

    @property
    def shared_mlp_weights_per_layer(self) -> int:
        """Weights of the always-active shared expert, with its gate."""
        if not self.shared_ffn_hidden:
            return 0
        return 3 * self.hidden * self.shared_ffn_hidden + self.hidden

    @property
    def router_weights_per_layer(self) -> int:
        """Weights that choose the experts, 0 for a dense model."""
        return self.hidden * self.experts if self.experts > 1 else 0

    @property
    def norm_weights_per_layer(self) -> int:
        """Weights of the two norms of a layer (LayerNorm has a bias as well)."""
        return (4 if self.linear_biases else 2) * self.hidden

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
        return self.layers * self.weights_per_layer + self.embedding_weights + self.lm_head_weights + final_norm

    @property
    def layer_bytes(self) -> int:
        """Bytes of the weights of one layer."""
        return self.weights_per_layer * self.weight_bytes

    @property
    def dense_flops_per_token_per_layer(self) -> int:
        """FLOPs of the projections and the active experts for one token in one layer."""
        q = self.query_heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        attention = self.hidden * (q + 2 * kv) + q * self.hidden
        mlp = (3 if self.gated_mlp else 2) * self.hidden * self.ffn_hidden * self.experts_per_token
        shared = 3 * self.hidden * self.shared_ffn_hidden
        return 2 * (attention + mlp + shared + self.router_weights_per_layer)

    def attention_flops(self, new_tokens: int, context_tokens: int) -> int:
        """FLOPs of causal attention of one layer for ``new_tokens`` after ``context_tokens``.

        Each new token sees the whole context, itself and the new tokens before it.
        """
        pairs = new_tokens * context_tokens + new_tokens * (new_tokens + 1) // 2
        return 4 * self.query_heads * self.head_dim * pairs

    def remote_bytes_per_token(self, query_heads: int) -> int:
        """Bytes on the wire for one token in one layer when ``query_heads`` are remote.

        d = (2 + 2/r) * h * d_head * bytes: the query and the output of every head, K and V
        of every group (reconstruction of the Hetis paper's transfer volume).
        """
        groups = query_heads // self.heads_per_group
        return (2 * query_heads + 2 * groups) * self.head_dim * self.kv_bytes
