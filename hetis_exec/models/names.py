"""What the tensors of a checkpoint are called, and their shapes."""

from __future__ import annotations

from typing import NamedTuple

from hetis_exec.models.architecture import Architecture

Shapes = dict[str, tuple[int, ...]]


class LayerNames(NamedTuple):
    """Modules of one layer; ``.weight`` and ``.bias`` are appended. ``gate`` is empty without one."""

    attention_norm: str
    query: str
    key: str
    value: str
    output: str
    query_norm: str
    key_norm: str
    mlp_norm: str
    gate: str
    up: str
    down: str


class ModelNames(NamedTuple):
    """Modules of a model; ``positions`` is empty where they are not learned."""

    embedding: str
    positions: str
    final_norm: str
    head: str


def model_names(architecture: Architecture) -> ModelNames:
    """Modules outside of the layers."""
    if architecture.opt_names:
        return ModelNames("model.decoder.embed_tokens", "model.decoder.embed_positions",
                          "model.decoder.final_layer_norm", "lm_head")
    return ModelNames("model.embed_tokens", "", "model.norm", "lm_head")


def layer_names(architecture: Architecture, layer: int) -> LayerNames:
    """Modules of a layer."""
    if architecture.opt_names:
        at = f"model.decoder.layers.{layer}."
        return LayerNames(at + "self_attn_layer_norm", at + "self_attn.q_proj", at + "self_attn.k_proj",
                          at + "self_attn.v_proj", at + "self_attn.out_proj", "", "",
                          at + "final_layer_norm", "", at + "fc1", at + "fc2")
    at = f"model.layers.{layer}."
    return LayerNames(at + "input_layernorm", at + "self_attn.q_proj", at + "self_attn.k_proj",
                      at + "self_attn.v_proj", at + "self_attn.o_proj", at + "self_attn.q_norm",
                      at + "self_attn.k_norm", at + "post_attention_layernorm", at + "mlp.gate_proj",
                      at + "mlp.up_proj", at + "mlp.down_proj")


def tensor_shapes(architecture: Architecture) -> Shapes:
    """Every tensor that a checkpoint must hold. A tied head is none of its own."""
    spec, names = architecture.spec, model_names(architecture)
    shapes: Shapes = {f"{names.embedding}.weight": (spec.vocab, spec.hidden)}
    if names.positions:
        shapes[f"{names.positions}.weight"] = (spec.learned_positions, spec.hidden)
    if not spec.tied_embeddings:
        shapes[f"{names.head}.weight"] = (spec.vocab, spec.hidden)
    _norm(shapes, architecture, names.final_norm)
    for layer in range(spec.layers):
        _layer(shapes, architecture, layer_names(architecture, layer))
    return shapes


def _layer(shapes: Shapes, architecture: Architecture, names: LayerNames) -> None:
    spec = architecture.spec
    q, kv = spec.query_heads * spec.head_dim, spec.kv_heads * spec.head_dim
    qkv_biases = spec.linear_biases or spec.qkv_biases
    mlp_biases = spec.linear_biases or spec.mlp_biases
    _norm(shapes, architecture, names.attention_norm)
    _norm(shapes, architecture, names.mlp_norm)
    _linear(shapes, names.query, q, spec.hidden, qkv_biases)
    _linear(shapes, names.key, kv, spec.hidden, qkv_biases)
    _linear(shapes, names.value, kv, spec.hidden, qkv_biases)
    _linear(shapes, names.output, spec.hidden, q, spec.linear_biases or spec.output_bias)
    if spec.qk_norm:
        shapes[f"{names.query_norm}.weight"] = shapes[f"{names.key_norm}.weight"] = (spec.head_dim,)
    for name in (names.gate, names.up) if spec.gated_mlp else (names.up,):
        _linear(shapes, name, spec.ffn_hidden, spec.hidden, mlp_biases)
    _linear(shapes, names.down, spec.hidden, spec.ffn_hidden, mlp_biases)


def _norm(shapes: Shapes, architecture: Architecture, name: str) -> None:
    shapes[f"{name}.weight"] = (architecture.spec.hidden,)
    if architecture.layer_norm:
        shapes[f"{name}.bias"] = (architecture.spec.hidden,)


def _linear(shapes: Shapes, name: str, rows: int, columns: int, bias: bool) -> None:
    shapes[f"{name}.weight"] = (rows, columns)
    if bias:
        shapes[f"{name}.bias"] = (rows,)
