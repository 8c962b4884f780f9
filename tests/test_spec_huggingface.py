"""Models read from Hugging Face config.json files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hetis_sim.spec.architectures import MODELS
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.families import FAMILIES
from hetis_sim.spec.huggingface import FILE_LIMIT_BYTES, load_huggingface, model_from_huggingface
from hetis_sim.spec.parse import model_from_mapping


def decoder(kind: str, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int,
            context: int, **more: Any) -> dict[str, Any]:
    """The keys that rotary decoders share."""
    return {"model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": ffn,
            "vocab_size": vocab, "max_position_embeddings": context, **more}


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The same file with one key left out."""
    return {name: value for name, value in config.items() if name != key}


LLAMA2_70B = decoder("llama", 8192, 80, 64, 8, 28672, 32000, 4096, tie_word_embeddings=False)
MISTRAL_V01 = decoder("mistral", 4096, 32, 32, 8, 14336, 32000, 32768, sliding_window=4096)
OPT_30B = {"model_type": "opt", "hidden_size": 7168, "num_hidden_layers": 48, "num_attention_heads": 56,
           "ffn_dim": 28672, "vocab_size": 50272, "max_position_embeddings": 2048,
           "do_layer_norm_before": True, "word_embed_proj_dim": 7168, "_remove_final_layer_norm": False}
QWEN3_30B = decoder("qwen3_moe", 2048, 48, 32, 4, 6144, 151936, 40960, head_dim=128, attention_bias=False,
                    moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, decoder_sparse_step=1,
                    mlp_only_layers=[], use_sliding_window=False, sliding_window=None, max_window_layers=48)
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
        "n_inner": None, "vocab_size": 50257}

# The keys of the published files that decide the architecture, and the entry that they must equal.
PUBLISHED = {
    "llama2-70b": LLAMA2_70B,
    "llama-13b": decoder("llama", 5120, 40, 40, 40, 13824, 32000, 2048),
    "llama3.1-8b": decoder("llama", 4096, 32, 32, 8, 14336, 128256, 131072, attention_bias=False,
                           rope_scaling={"rope_type": "llama3", "factor": 8.0,
                                         "original_max_position_embeddings": 8192}),
    "llama3.2-1b": decoder("llama", 2048, 16, 32, 8, 8192, 128256, 131072, head_dim=64,
                           tie_word_embeddings=True),
    "opt-30b": OPT_30B,
    "qwen2.5-7b": decoder("qwen2", 3584, 28, 28, 4, 18944, 152064, 32768, use_sliding_window=False,
                          sliding_window=131072, max_window_layers=28),
    "qwen3-8b": decoder("qwen3", 4096, 36, 32, 8, 12288, 151936, 40960, head_dim=128,
                        attention_bias=False, sliding_window=None),
    "qwen3-0.6b": decoder("qwen3", 1024, 28, 16, 8, 3072, 151936, 40960, head_dim=128,
                          tie_word_embeddings=True),
    "qwen3-30b-a3b": QWEN3_30B,
    "mistral-7b": decoder("mistral", 4096, 32, 32, 8, 14336, 32000, 32768, sliding_window=None),
    "mixtral-8x7b": decoder("mixtral", 4096, 32, 32, 8, 14336, 32000, 32768, num_local_experts=8,
                            num_experts_per_tok=2, sliding_window=None),
    "phi-4": decoder("phi3", 5120, 40, 40, 10, 17920, 100352, 16384, sliding_window=None),
    "gemma-7b": decoder("gemma", 3072, 28, 16, 16, 24576, 256000, 8192, head_dim=256),
    "gpt-neox-20b": without(decoder("gpt_neox", 6144, 44, 64, 0, 24576, 50432, 2048), "num_key_value_heads"),
    "starcoder": {"model_type": "gpt_bigcode", "n_embd": 6144, "n_layer": 40, "n_head": 48, "n_inner": 24576,
                  "n_positions": 8192, "vocab_size": 49152, "multi_query": True},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_file_and_catalogue_agree(name: str) -> None:
    """The published file of a model gives the very spec of the catalogue."""
    assert model_from_huggingface(PUBLISHED[name], name) == MODELS[name]


@pytest.mark.parametrize(("config", "parameters"), [
    (GPT2, 124_439_808),
    (decoder("starcoder2", 4608, 32, 36, 4, 18432, 49152, 4096, sliding_window=4096), 7_173_923_840),
    (decoder("qwen2_moe", 2048, 24, 16, 16, 5632, 151936, 8192, moe_intermediate_size=1408, num_experts=60,
             num_experts_per_tok=4, shared_expert_intermediate_size=5632, tie_word_embeddings=False,
             use_sliding_window=False, sliding_window=32768), 14_315_784_192),
])
def test_models_outside_the_catalogue_have_their_published_size(config: dict[str, Any],
                                                                parameters: int) -> None:
    """Families that no entry covers count every weight as well."""
    assert model_from_huggingface(config, "x").parameters == parameters


def test_every_family_is_exercised() -> None:
    """No reader goes untested; granite shares that of llama."""
    seen = {config["model_type"] for config in PUBLISHED.values()} | {"gpt2", "starcoder2", "qwen2_moe"}
    assert set(FAMILIES) - seen == {"granite"}


def test_biases_of_llama_files_count() -> None:
    """attention_bias adds q + k + v + o biases a layer, mlp_bias those of gate, up and down."""
    plain = model_from_huggingface(LLAMA2_70B, "x")
    attention = model_from_huggingface(LLAMA2_70B | {"attention_bias": True}, "x")
    mlp = model_from_huggingface(LLAMA2_70B | {"mlp_bias": True}, "x")
    assert attention.parameters - plain.parameters == 80 * (8192 + 1024 + 1024 + 8192)
    assert mlp.parameters - plain.parameters == 80 * (28672 + 28672 + 8192)


def test_head_dim_is_derived_where_it_is_absent() -> None:
    """hidden / heads, which must divide; KV heads default to the query heads."""
    derived = model_from_huggingface(without(LLAMA2_70B, "num_key_value_heads"), "x")
    assert (derived.head_dim, derived.kv_heads) == (128, 64)
    with pytest.raises(SpecError, match=r"config\.json:hidden_size=8191.*multiple of the 64 attention heads"):
        model_from_huggingface(LLAMA2_70B | {"hidden_size": 8191}, "x")
    odd = model_from_huggingface(LLAMA2_70B | {"hidden_size": 8191, "head_dim": 128}, "x")
    assert odd.attention_weights_per_layer == 8191 * (2 * 8192 + 2 * 1024)


@pytest.mark.parametrize(("scaling", "limit"), [
    (None, 4096), ({"type": "linear", "factor": 4.0}, 16384), ({"rope_type": "dynamic", "factor": 2}, 8192),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
    ({"rope_type": "llama3", "factor": 8.0}, 4096), ({"rope_type": "default"}, 4096),
])
def test_context_limit_follows_rope_scaling(scaling: dict[str, Any] | None, limit: int) -> None:
    """Linear, dynamic and YaRN scaling stretch the limit, others are in it already."""
    config = LLAMA2_70B | {"rope_scaling": scaling}
    assert model_from_huggingface(config, "x").context_limit_tokens == limit
    v5 = {**LLAMA2_70B, "rope_parameters": scaling or {"rope_type": "default"}}
    assert model_from_huggingface(v5, "x").context_limit_tokens == limit


def test_active_sliding_windows_are_refused_and_inactive_ones_read() -> None:
    """A window shorter than the context would bound the cache; a context within it makes it inactive."""
    with pytest.raises(SpecError, match=r"sliding_window=4096.*limit of 32768.*context_limit_tokens=4096"):
        model_from_huggingface(MISTRAL_V01, "x")
    within = model_from_huggingface(MISTRAL_V01, "mistral-7b", context_limit_tokens=4096)
    assert within == MODELS["mistral-7b"].with_context_limit(4096)
    qwen = PUBLISHED["qwen2.5-7b"] | {"sliding_window": 4096}
    assert model_from_huggingface(qwen, "qwen2.5-7b") == MODELS["qwen2.5-7b"]
    with pytest.raises(SpecError, match="sliding_window"):
        model_from_huggingface(qwen | {"use_sliding_window": True, "max_window_layers": 21}, "x")
    kinds = ["full_attention", "sliding_attention"] * 18
    mixed = PUBLISHED["qwen3-8b"] | {"sliding_window": 1024, "layer_types": kinds}
    with pytest.raises(SpecError, match="sliding_window=1024"):
        model_from_huggingface(mixed, "x")
    full = mixed | {"layer_types": ["full_attention"] * 36}
    assert model_from_huggingface(full, "qwen3-8b") == MODELS["qwen3-8b"]


@pytest.mark.parametrize(("config", "message"), [
    ({}, r"model_type=None.*one of llama"),
    (LLAMA2_70B | {"model_type": "lama"}, r"model_type='lama'.*did you mean .*llama"),
    (LLAMA2_70B | {"model_type": ["llama"]}, r"model_type=\['llama'\]"),
    ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, r"kv_lora_rank=512.*multi-latent attention"),
    (LLAMA2_70B | {"quantization_config": {"quant_method": "awq"}}, r"quantization_config=.*weight_bytes"),
    (LLAMA2_70B | {"is_encoder_decoder": True}, r"is_encoder_decoder=True.*only decoders"),
    (without(LLAMA2_70B, "hidden_size"), r"hidden_size=None.*whole number"),
    (without(LLAMA2_70B, "max_position_embeddings"), r"max_position_embeddings=None"),
    (LLAMA2_70B | {"num_hidden_layers": "80"}, r"num_hidden_layers='80'"),
    (LLAMA2_70B | {"num_hidden_layers": 0}, r"num_hidden_layers=0"),
    (LLAMA2_70B | {"num_hidden_layers": 80.0}, r"num_hidden_layers=80\.0"),
    (LLAMA2_70B | {"num_hidden_layers": 10**6}, r"model\.layers=1000000"),
    (LLAMA2_70B | {"num_key_value_heads": 7}, r"kv_heads=7.*divisor of query_heads=64"),
    (LLAMA2_70B | {"tie_word_embeddings": "no"}, r"tie_word_embeddings='no'.*true or false"),
    (LLAMA2_70B | {"rope_scaling": {"rope_type": "linear", "factor": "4"}}, r"rope_scaling:factor='4'"),
    (LLAMA2_70B | {"rope_scaling": "yarn"}, r"rope_scaling='yarn'"),
    (LLAMA2_70B | {"layer_types": ["linear_attention"]}, r"layer_types="),
    (OPT_30B | {"do_layer_norm_before": False}, r"do_layer_norm_before=False.*OPT-350m"),
    (OPT_30B | {"word_embed_proj_dim": 512}, r"word_embed_proj_dim=512"),
    (QWEN3_30B | {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
    (QWEN3_30B | {"decoder_sparse_step": 2}, r"decoder_sparse_step=2"),
    (QWEN3_30B | {"num_experts_per_tok": 129}, r"experts_per_token=129"),
])
def test_what_cannot_be_represented_is_refused_by_key_and_value(config: dict[str, Any], message: str) -> None:
    """The error names the key, the value and what is allowed."""
    with pytest.raises(SpecError, match=message):
        model_from_huggingface(config, "x")


def test_a_folder_and_its_file_give_the_same_model(tmp_path: Path) -> None:
    """A path may be the file or its folder, which names the model; a byte-order mark does no harm."""
    folder = tmp_path / "Llama-2-70b-hf"
    folder.mkdir()
    (folder / "config.json").write_text("\ufeff" + json.dumps(LLAMA2_70B), encoding="utf-8")
    spec = load_huggingface(folder)
    assert spec == load_huggingface(folder / "config.json")
    assert spec == replace(MODELS["llama2-70b"], name="Llama-2-70b-hf")
    (tmp_path / "mine.json").write_text(json.dumps(LLAMA2_70B), encoding="utf-8")
    assert load_huggingface(str(tmp_path / "mine.json")).name == "mine"
    mapping = {"name": "llama3-8b", "config": str(folder), "kv_bytes": 1, "context_limit_tokens": 2000}
    named = model_from_mapping(mapping)
    assert named == replace(spec, kv_bytes=1, context_limit_tokens=2000)
    assert model_from_mapping(mapping | {"name": "my-llama"}).name == "my-llama"


@pytest.mark.parametrize(("content", "message"), [
    (b"", "valid JSON"), (b'{"model_type": ', "valid JSON"), (b"\xff\xfe{}", "valid JSON"),
    (b"[1, 2]", "a JSON object"), (b"[" * 100_000, "valid JSON"), (b" " * (FILE_LIMIT_BYTES + 1), "at most"),
    (b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}", "valid JSON"),
])
def test_bad_files_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    """Whatever the file holds, the error names it."""
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(SpecError, match=rf"model\.config='.*config\.json'.*{message}"):
        load_huggingface(file)


def test_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    """A path that leads nowhere is named, also when a folder lacks its file."""
    with pytest.raises(SpecError, match=r"nowhere\.json'.*No such file"):
        load_huggingface(tmp_path / "nowhere.json")
    with pytest.raises(SpecError, match=r"config\.json'.*No such file"):
        model_from_mapping({"config": str(tmp_path)})


@pytest.mark.parametrize(("bad", "message"), [
    ({"name": "llama2-70"}, r"model\.name='llama2-70'.*did you mean llama2-70b"),
    ({"name": None}, r"model\.name=None"),
    ({"nam": "opt-30b"}, r"model\.nam='opt-30b'.*did you mean name"),
    ({"name": "opt-30b", "kv_bytes": 3}, r"model\.kv_bytes=3.*1, 2 or 4"),
    ({"name": "opt-30b", "weight_bytes": 0.5}, r"model\.weight_bytes=0\.5"),
    ({"name": "opt-30b", "context_limit_tokens": 0}, r"model\.context_limit_tokens=0"),
    ({"name": "opt-30b", "context_limit_tokens": 4096}, r"context_limit_tokens=4096.*<= 2048"),
    ({"config": 5}, r"model\.config=5"),
    ("llama2-70b", r"model='llama2-70b'.*a mapping"),
])
def test_bad_model_settings_are_refused_by_key_and_value(bad: Any, message: str) -> None:
    """The error names the key, the value and what is allowed."""
    with pytest.raises(SpecError, match=message):
        model_from_mapping(bad)


def test_settings_change_bytes_and_limit_only() -> None:
    """The catalogue's architecture stays, its precision and limit follow the settings."""
    settings = {"weight_bytes": 1, "kv_bytes": 1, "context_limit_tokens": 500}
    spec = model_from_mapping({"name": "llama3-8b", **settings})
    assert spec == replace(MODELS["llama3-8b"], **settings)
    assert spec.kv_bytes_per_token == 65_536
