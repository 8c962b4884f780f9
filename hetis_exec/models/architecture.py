"""What must be known of a model to compute it, beyond the sizes in its :class:`ModelSpec`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hetis_sim.spec.errors import require, require_finite
from hetis_sim.spec.families import HubConfig
from hetis_sim.spec.huggingface import CONFIG_FILE, model_from_huggingface, read_config
from hetis_sim.spec.model import ModelSpec

ACTIVATIONS = ("silu", "relu", "gelu", "gelu_pytorch_tanh")
ROTARY = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = (*ROTARY, "opt")
OPT_OFFSET = 2
"""Rows of OPT's position embedding that are meant for padding."""

ELEMENT_TYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Types of weights, activations and cache, one for a whole run, with the bytes of an element."""

ELEMENT_BYTES = ELEMENT_TYPES["float32"]
"""Of the type that is used where nothing else is asked for: CPUs compute attention faster in float32
than in bfloat16."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        kind: ``default``, ``linear`` (positions divided by ``factor``), or ``llama3`` (low frequencies
            divided by ``factor``, those between the two wavelength limits by something in between), or
            ``yarn`` (the same with limits in numbers of rotations, and larger logits).
        low, high: ``original_positions`` over these are the wavelength limits; with ``yarn`` these are the
            rotations within the original positions.
        whole: the limits of ``yarn`` are rounded to whole pairs of dimensions.
        scale: of queries and keys, for ``yarn``.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_positions: int = 8192
    whole: bool = True
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder-only transformer with pre-norms.

    Attributes:
        spec: sizes, biases and QK-norm.
        layer_norm: LayerNorm with biases instead of RMSNorm.
        norm_epsilon: of every norm.
        activation: of the MLP.
        rope: None where positions are learned.
        position_offset: row of a learned embedding that belongs to position 0.
        opt_names: tensors are called as OPT calls them, otherwise as Llama does.
    """

    spec: ModelSpec
    layer_norm: bool
    norm_epsilon: float
    activation: str
    rope: Rope | None
    opt_names: bool
    position_offset: int = 0

    def __post_init__(self) -> None:
        spec = self.spec
        require(spec.experts == 1 and not spec.shared_ffn_hidden, "model.experts", spec.experts, "1 (dense)")
        require(self.rope is None or spec.head_dim % 2 == 0, "model.head_dim", spec.head_dim, "even (rotary)")
        require(self.layer_norm == spec.linear_biases == (not spec.gated_mlp) == (self.rope is None),
                "model.name", spec.name,
                "a gated decoder with rotary positions (Llama, Mistral, Qwen) or one with learned positions, "
                "biases and LayerNorm (OPT)")


def made_up(spec: ModelSpec, element_bytes: int = ELEMENT_BYTES) -> Architecture:
    """An architecture of the given sizes, for random weights.

    Raises:
        SpecError: it would be neither a rotary decoder like Llama nor one like OPT.
    """
    spec = replace(spec, weight_bytes=element_bytes, kv_bytes=element_bytes)
    if spec.learned_positions:
        return Architecture(spec, True, 1e-5, "relu", None, True,
                            spec.learned_positions - spec.context_limit_tokens)
    return Architecture(spec, False, 1e-6, "silu", Rope(), False)


def read_architecture(folder: str | Path, name: str | None = None,
                      context_limit_tokens: int | None = None) -> Architecture:
    """The architecture of a Hugging Face model folder.

    Raises:
        SpecError: no readable ``config.json``, or a model that is not computed here.
    """
    file = Path(folder).expanduser() / CONFIG_FILE
    config = HubConfig(read_config(file), str(file))
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise config.error("model_type", f"one of {', '.join(FAMILIES)} to be computed")
    spec = model_from_huggingface(config.values, name or file.resolve().parent.name, label=config.label,
                                  context_limit_tokens=context_limit_tokens,
                                  weight_bytes=ELEMENT_BYTES, kv_bytes=ELEMENT_BYTES)
    if kind == "opt":
        return Architecture(spec, True, 1e-5, _activation(config, "activation_function", "relu"), None, True,
                            OPT_OFFSET)
    epsilon = _number(config, "rms_norm_eps", 1e-6)
    return Architecture(spec, False, epsilon, _activation(config, "hidden_act", "silu"), _rope(config), False)


def _activation(config: HubConfig, key: str, default: str) -> str:
    value = config.get(key)
    found = default if value is None else {"gelu_new": "gelu_pytorch_tanh"}.get(value, value)
    if found not in ACTIVATIONS:
        raise config.error(key, f"one of {', '.join(ACTIVATIONS)}")
    return found


def _rope(config: HubConfig) -> Rope:
    """The keys of ``transformers`` 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
    theta = _number(config, "rope_theta", 10_000.0)
    # model_from_huggingface has looked whether it is a mapping.
    values: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = HubConfig(values, f"{config.label}:rope_parameters")
    theta = _number(nested, "rope_theta", theta)
    for keys in (config, nested):
        keys.require("partial_rotary_factor", 1, 1, "a rotation of part of each head is not computed")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    factor = _number(nested, "factor")
    if kind == "linear":
        return Rope(theta, kind, factor)
    if kind == "llama3":
        low, high = _number(nested, "low_freq_factor"), _number(nested, "high_freq_factor")
        if high <= low:
            raise nested.error("high_freq_factor", f"more than low_freq_factor={low}")
        return Rope(theta, kind, factor, low, high, nested.count("original_max_position_embeddings"))
    if kind == "yarn":
        return _yarn(config, nested, theta)
    raise nested.error("rope_type", "default, linear, llama3 or yarn to be computed")


def _yarn(config: HubConfig, nested: HubConfig, theta: float) -> Rope:
    """YaRN (Peng et al. 2023), with the keys and defaults of ``transformers``."""
    if nested.get("original_max_position_embeddings") is None:
        original = config.count("max_position_embeddings")
    else:
        original = nested.count("original_max_position_embeddings")
    factor = _number(nested, "factor", config.count("max_position_embeddings") / original)
    fast, slow = _number(nested, "beta_fast", 32.0), _number(nested, "beta_slow", 1.0)
    if fast <= slow:
        raise nested.error("beta_fast", f"more than beta_slow={slow}")
    whole = nested.get("truncate")
    if whole not in (None, True, False):
        raise nested.error("truncate", "true or false")
    if nested.get("mscale") is not None and nested.get("mscale_all_dim") is not None:
        scale = (_attention_scale(factor, _number(nested, "mscale"))
                 / _attention_scale(factor, _number(nested, "mscale_all_dim")))
    else:
        scale = _attention_scale(factor, 1.0)
    return Rope(theta, "yarn", factor, slow, fast, original, whole is not False,
                _number(nested, "attention_factor", scale))


def _attention_scale(factor: float, weight: float) -> float:
    """How much larger queries and keys are over contexts ``factor`` times as long."""
    return 1.0 + 0.1 * weight * math.log(factor) if factor > 1.0 else 1.0


def _number(config: HubConfig, key: str, default: float | None = None) -> float:
    """A finite number above 0."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    require_finite(f"{config.label}:{key}", value, 0.0, open_low=True)
    return float(value)
