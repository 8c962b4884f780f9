"""From the ``config.json`` of a Hugging Face model folder to a :class:`ModelSpec`.

What the simulator cannot represent is refused by name rather than approximated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.families import FAMILIES, HubConfig
from hetis_sim.spec.lookup import near_matches
from hetis_sim.spec.model import ModelSpec

CONFIG_FILE = "config.json"

FILE_LIMIT_BYTES = 1 << 20
"""A longer file is not a config.json; published ones are a few kB."""


def model_from_huggingface(values: Mapping[str, Any], name: str, *, context_limit_tokens: int | None = None,
                           weight_bytes: int = 2, kv_bytes: int = 2, label: str = "config.json") -> ModelSpec:
    """The architecture that a parsed ``config.json`` describes.

    Args:
        values: the file's content.
        name: of the resulting spec.
        context_limit_tokens: replaces the limit of the file; at most the window makes a
            sliding window inactive.
        weight_bytes: as in :class:`ModelSpec`; the file's dtype is not read.
        kv_bytes: as in :class:`ModelSpec`.
        label: names the file in errors.

    Raises:
        SpecError: missing or malformed keys, or an architecture that is not supported.
    """
    config = HubConfig(values, label)
    _refuse_unsupported(config)
    kind = config.get("model_type")
    reader = FAMILIES.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise config.error("model_type", near_matches(str(kind), FAMILIES))
    spec = ModelSpec(name=name, weight_bytes=weight_bytes, kv_bytes=kv_bytes, **reader(config))
    if context_limit_tokens is not None:
        spec = spec.with_context_limit(context_limit_tokens)
    _refuse_active_window(config, spec)
    return spec


def _refuse_unsupported(config: HubConfig) -> None:
    for key in ("kv_lora_rank", "q_lora_rank"):
        if config.get(key) is not None:
            raise config.error(key, "absent (multi-latent attention has no KV heads to place; not supported)")
    if config.get("quantization_config") is not None:
        raise config.error("quantization_config", "absent: take the unquantized model's file and set "
                                                  "model.weight_bytes=1 for 8-bit weights")
    config.require("is_encoder_decoder", False, False, "only decoders are supported")


def _refuse_active_window(config: HubConfig, spec: ModelSpec) -> None:
    """A window shorter than the context would bound a request's cache, which the ledger does not model."""
    window = config.get("sliding_window")
    layer_types = config.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or not set(map(str, layer_types)) <= {
                "full_attention", "sliding_attention"}:
            raise config.error("layer_types", "a list of full_attention and sliding_attention")
        windowed = "sliding_attention" in layer_types
    elif str(config.get("model_type")).startswith("qwen"):
        windowed = (config.flag("use_sliding_window", False)
                    and config.count("max_window_layers", 28) < spec.layers)
    else:
        windowed = config.get("model_type") in ("mistral", "mixtral", "phi3", "starcoder2")
    limit = spec.context_limit_tokens
    if windowed and window is not None and config.count("sliding_window") < limit:
        raise config.error("sliding_window", f"null or at least the context limit of {limit} tokens; "
                                             f"model.context_limit_tokens={window} makes it inactive")


def load_huggingface(path: str | Path, name: str | None = None, *, context_limit_tokens: int | None = None,
                     weight_bytes: int = 2, kv_bytes: int = 2) -> ModelSpec:
    """The architecture of a ``config.json``, or of the model folder that holds one.

    Without a ``name`` the model is called after its folder, or after the file where that is
    not called ``config.json``.

    Raises:
        SpecError: the file is missing, too large, not JSON or not supported; the text names it.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / CONFIG_FILE
    values = read_config(file)
    if name is None:
        name = (file.resolve().parent.name if file.name == CONFIG_FILE else file.stem) or "model"
    return model_from_huggingface(values, name, context_limit_tokens=context_limit_tokens,
                                  weight_bytes=weight_bytes, kv_bytes=kv_bytes, label=str(file))


def read_config(file: Path) -> dict[str, Any]:
    """The content of a ``config.json``.

    Raises:
        SpecError: it is missing, too large or not a JSON object.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(FILE_LIMIT_BYTES + 1)
    except OSError as error:
        raise SpecError("model.config", str(file), f"a readable file ({error.strerror})") from error
    if len(content) > FILE_LIMIT_BYTES:
        raise SpecError("model.config", str(file), f"a config.json of at most {FILE_LIMIT_BYTES} bytes")
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SpecError("model.config", str(file), f"valid JSON in UTF-8 ({error})") from error
    if not isinstance(values, dict):
        raise SpecError("model.config", str(file), "a JSON object")
    return values
