"""What each ``model_type`` of Hugging Face means, as fields of :class:`ModelSpec`.

Keys and their defaults are those of the configuration classes of ``transformers`` 4 and 5.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.lookup import require_int

Fields = dict[str, Any]


@dataclass(frozen=True)
class HubConfig:
    """Typed access to the keys of one file; ``label`` names it in errors."""

    values: Mapping[str, Any]
    label: str

    def get(self, name: str) -> Any:
        """The raw value, None where the key is absent or null."""
        return self.values.get(name)

    def error(self, name: str, allowed: str) -> SpecError:
        """An error on this key."""
        return SpecError(f"{self.label}:{name}", self.get(name), allowed)

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        return require_int(f"{self.label}:{name}", value, 1, 1 << 40)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def require(self, name: str, default: Any, allowed: Any, why: str) -> None:
        """Refuse any value of ``name`` but ``allowed``."""
        value = self.get(name)
        if (default if value is None else value) != allowed:
            raise self.error(name, f"{json.dumps(allowed)} ({why})")


def _decoder(config: HubConfig, tied: bool = False, head_dim: int | None = None) -> Fields:
    """The keys that all rotary decoders of ``transformers`` share."""
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    if head_dim is None:
        head_dim = _even_head_dim(config, "hidden_size", hidden, heads)
    return {
        "layers": config.count("num_hidden_layers"), "hidden": hidden, "query_heads": heads,
        "kv_heads": config.count("num_key_value_heads", heads),
        "head_dim": config.count("head_dim", head_dim),
        "ffn_hidden": config.count("intermediate_size"), "vocab": config.count("vocab_size"),
        "tied_embeddings": config.flag("tie_word_embeddings", tied),
        "context_limit_tokens": _rotary_context_limit(config),
    }


def _even_head_dim(config: HubConfig, key: str, hidden: int, heads: int) -> int:
    if config.get("head_dim") is None and hidden % heads:
        raise config.error(key, f"a multiple of the {heads} attention heads, or head_dim given")
    return max(1, hidden // heads)


def _rotary_context_limit(config: HubConfig) -> int:
    """Positions that the rotary embedding was made for, with linear, dynamic or YaRN scaling applied.

    As vLLM derives its longest context; other kinds of scaling are part of
    ``max_position_embeddings`` already.
    """
    positions = config.count("max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise config.error("rope_scaling", "null or a mapping")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("linear", "dynamic", "yarn"):
        return positions
    nested = HubConfig(scaling, f"{config.label}:rope_scaling")
    factor = nested.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 <= factor <= 1 << 20:
        raise nested.error("factor", "a number >= 1")
    if kind == "yarn":
        positions = nested.count("original_max_position_embeddings", positions)
    return int(positions * factor)


def _llama(config: HubConfig) -> Fields:
    bias = config.flag("attention_bias", False)
    return _decoder(config) | {"qkv_biases": bias, "output_bias": bias,
                               "mlp_biases": config.flag("mlp_bias", False)}


def _mistral(config: HubConfig) -> Fields:
    return _decoder(config)


def _gemma(config: HubConfig) -> Fields:
    bias = config.flag("attention_bias", False)
    return _decoder(config, tied=True, head_dim=256) | {"qkv_biases": bias, "output_bias": bias}


def _mixtral(config: HubConfig) -> Fields:
    return _decoder(config) | {"experts": config.count("num_local_experts"),
                               "experts_per_token": config.count("num_experts_per_tok")}


def _qwen2(config: HubConfig) -> Fields:
    return _decoder(config) | {"qkv_biases": True}


def _qwen3(config: HubConfig) -> Fields:
    bias = config.flag("attention_bias", False)
    return _decoder(config, head_dim=128) | {"qkv_biases": bias, "output_bias": bias, "qk_norm": True}


def _experts(config: HubConfig) -> Fields:
    """The expert layers of the Qwen mixtures, which must be all layers."""
    config.require("decoder_sparse_step", 1, 1, "layers without experts among others are not supported")
    config.require("mlp_only_layers", [], [], "layers without experts among others are not supported")
    return {"ffn_hidden": config.count("moe_intermediate_size"), "experts": config.count("num_experts"),
            "experts_per_token": config.count("num_experts_per_tok")}


def _qwen2_moe(config: HubConfig) -> Fields:
    return _decoder(config) | _experts(config) | {
        "qkv_biases": config.flag("qkv_bias", True),
        "shared_ffn_hidden": config.count("shared_expert_intermediate_size")}


def _qwen3_moe(config: HubConfig) -> Fields:
    return _qwen3(config) | _experts(config)


def _starcoder2(config: HubConfig) -> Fields:
    config.require("use_bias", True, True, "norms with biases but linear layers without are not supported")
    return _decoder(config, tied=True) | {"gated_mlp": False, "linear_biases": True}


def _gpt_neox(config: HubConfig) -> Fields:
    config.require("attention_bias", True, True, "norms with biases but attention without is not supported")
    return _decoder(config) | {"gated_mlp": False, "linear_biases": True}


def _opt(config: HubConfig) -> Fields:
    """OPT keeps two rows of position embedding for padding."""
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    config.require("do_layer_norm_before", True, True, "the post-norm OPT-350m is not supported")
    config.require("word_embed_proj_dim", hidden, hidden, "a projected embedding is not supported")
    config.require("enable_bias", True, True, "OPT without biases is not supported")
    config.require("layer_norm_elementwise_affine", True, True, "norms without weights are not supported")
    config.require("_remove_final_layer_norm", False, False, "OPT without its final norm is not supported")
    positions = config.count("max_position_embeddings")
    return {
        "layers": config.count("num_hidden_layers"), "hidden": hidden, "query_heads": heads,
        "kv_heads": heads, "head_dim": _even_head_dim(config, "hidden_size", hidden, heads),
        "ffn_hidden": config.count("ffn_dim"), "vocab": config.count("vocab_size"),
        "tied_embeddings": config.flag("tie_word_embeddings", True), "gated_mlp": False,
        "context_limit_tokens": positions, "learned_positions": positions + 2, "linear_biases": True,
    }


def _gpt2(config: HubConfig, multi_query: bool = False) -> Fields:
    hidden, heads = config.count("n_embd"), config.count("n_head")
    positions = config.count("n_positions")
    return {
        "layers": config.count("n_layer"), "hidden": hidden, "query_heads": heads,
        "kv_heads": 1 if multi_query else heads, "head_dim": _even_head_dim(config, "n_embd", hidden, heads),
        "ffn_hidden": config.count("n_inner", 4 * hidden), "vocab": config.count("vocab_size"),
        "tied_embeddings": config.flag("tie_word_embeddings", True),
        "context_limit_tokens": positions, "learned_positions": positions,
        "gated_mlp": False, "linear_biases": True,
    }


def _gpt_bigcode(config: HubConfig) -> Fields:
    return _gpt2(config, config.flag("multi_query", True))


FAMILIES: Mapping[str, Callable[[HubConfig], Fields]] = {
    "llama": _llama, "granite": _llama, "mistral": _mistral, "phi3": _mistral, "gemma": _gemma,
    "mixtral": _mixtral, "qwen2": _qwen2, "qwen3": _qwen3, "qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe,
    "starcoder2": _starcoder2, "gpt_neox": _gpt_neox, "opt": _opt, "gpt2": _gpt2, "gpt_bigcode": _gpt_bigcode,
}
"""Readers by ``model_type``."""
