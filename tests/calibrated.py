"""Calibrated profiles of made-up devices, as a calibration run would write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hetis_sim.cost.calibration import FINGERPRINT, Calibration, fingerprint
from hetis_sim.cost.curve import Curve
from hetis_sim.cost.profile import SCHEMA
from hetis_sim.cost.tables import TokenTables
from hetis_sim.spec.model import ModelSpec

TOKENS = (1.0, 16.0, 256.0)
TINY_CONFIG = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
               "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
               "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
"""``config.json`` of a model that is measured in no time."""


def module(model: str, coefficients: Mapping[str, Any], **ranges: tuple[float, float]) -> dict[str, Any]:
    """One module of a profile."""
    return {"model": model, "status": "measured", "coefficients": dict(coefficients),
            "range": {key: list(ends) for key, ends in ranges.items()}, "held_out": None,
            "sources": [{"text": "a test"}]}


def device_profile(device: str, model: ModelSpec, second_s: float = 1e-3, tp: int = 1) -> dict[str, Any]:
    """Every module of a device; a layer of 16 tokens takes ``second_s``."""
    seconds = tuple(second_s * share for share in (0.5, 1.0, 8.0))
    table = TokenTables.dump_table(model, tp, Curve(TOKENS, seconds))
    tables = module("token_tables", {"tables": [table]}, tokens=(1, 256), tp=(tp, tp))
    prefill = {"head_dim": model.head_dim, "block": 1, "flops_per_s": 1e9, "block_flops_per_s": 1e15,
               "bytes_per_s": 1e9, "fixed_s": 1e-5, "sharpness": 8.0}
    decode = {"head_dim": model.head_dim, "heads_per_group": model.heads_per_group, "a_s_per_head": 1e-6,
              "b_s_per_byte": 1e-9, "c_s": 2e-5}
    return signed({
        "schema": SCHEMA, "name": f"mine-{device}", "device": device,
        "calibration": calibration(model).dump(),
        "modules": {
            "dense_layer": tables, "head": tables,
            "prefill_attention": module("flash_blocks", {"classes": [prefill]}, keys=(1, 256)),
            "decode_attention": module("linear", {"classes": [decode]}, rows=(1, 64),
                                       tokens_per_row=(1, 128)),
            "head_packing": module("per_message", {"gamma_s_per_byte": 1e-10, "beta_s": 1e-5})}})


def calibration(model: ModelSpec) -> Calibration:
    """How it was measured."""
    return Calibration("a machine", "", "2.13", "3.11", "2026-01-01", "float32", model.weight_bytes,
                       (model.name,))


def host_profile(model: ModelSpec, base_s: float = 5e-3) -> dict[str, Any]:
    """Host time of an iteration."""
    host = module("per_iteration", {"base_s": base_s, "per_sequence_s": 1e-5}, sequences=(1, 8))
    return signed({"schema": SCHEMA, "name": "mine-host", "device": "host",
                   "calibration": calibration(model).dump(), "modules": {"host_overhead": host}})


def links_profile(model: ModelSpec, link: str) -> dict[str, Any]:
    """Messages of one link."""
    transfer = module("links", {link: {"gamma_s_per_byte": 1e-9, "beta_s": 1e-4}})
    return signed({"schema": SCHEMA, "name": "mine-links", "device": "links",
                   "calibration": calibration(model).dump(), "modules": {"transfer": transfer}})


def signed(raw: dict[str, Any]) -> dict[str, Any]:
    """With the hash of its content."""
    return {**raw, FINGERPRINT: fingerprint(raw)}


def written(folder: Path, *profiles: dict[str, Any]) -> Path:
    """A folder of profiles."""
    folder.mkdir(parents=True, exist_ok=True)
    for raw in profiles:
        (folder / f"{raw['device']}.json").write_text(json.dumps(raw))
    return folder
