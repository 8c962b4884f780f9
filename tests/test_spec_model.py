"""Architectures against published figures, and what follows from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis_sim.spec.architectures import MODELS, model
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.model import ModelSpec

# Totals of the published safetensors files, or of the papers where those give exact counts.
PUBLISHED_PARAMETERS = {
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672, "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192, "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248, "llama3.1-70b": 70_553_706_496, "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824, "llama3.3-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008, "opt-125m": 125_239_296, "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984, "opt-13b": 12_853_473_280, "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352, "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624, "qwen3-235b-a22b": 235_093_634_560, "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552, "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112,
    "phi-4": 14_659_507_200, "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896,
    "gpt-neox-20b": 20_554_567_680, "starcoder": 15_517_456_384,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED_PARAMETERS.items())
def test_parameters_equal_the_published_count(name: str, parameters: int) -> None:
    """The number of weights is the published one, to the last weight."""
    assert model(name).parameters == parameters


@pytest.mark.parametrize(("name", "billions"), [("opt-2.7b", 2.7), ("opt-30b", 29.97), ("opt-66b", 66)])
def test_models_without_an_exact_figure_have_the_size_of_their_name(name: str, billions: float) -> None:
    """Where only a rounded size is published, ours rounds to it."""
    assert model(name).parameters == pytest.approx(billions * 1e9, rel=0.02)


def test_every_model_is_held_against_a_figure() -> None:
    """No architecture enters the catalogue without a figure that it must meet."""
    assert set(MODELS) - set(PUBLISHED_PARAMETERS) == {"opt-2.7b", "opt-30b", "opt-66b"}


@pytest.mark.parametrize(("name", "kv_bytes"), [
    ("llama-13b", 819_200), ("opt-30b", 1_376_256), ("llama2-70b", 327_680), ("llama3-8b", 131_072),
    ("qwen2.5-7b", 57_344), ("mixtral-8x7b", 131_072), ("starcoder", 20_480),
])
def test_kv_bytes_per_token(name: str, kv_bytes: int) -> None:
    """Cache bytes of a token are the published ones; a one-byte cache halves them."""
    assert model(name).kv_bytes_per_token == kv_bytes
    assert replace(model(name), kv_bytes=1).kv_bytes_per_token * 2 == kv_bytes


@pytest.mark.parametrize(("name", "active_billions"), [
    ("mixtral-8x7b", 12.9), ("mixtral-8x22b", 39.1), ("qwen3-30b-a3b", 3.35), ("qwen3-235b-a22b", 22.2),
])
def test_active_parameters_of_mixtures(name: str, active_billions: float) -> None:
    """The weights that one token uses are those the authors state."""
    assert model(name).active_parameters == pytest.approx(active_billions * 1e9, rel=0.005)


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.name)
def test_flops_of_a_token_are_twice_the_weights_it_meets(spec: ModelSpec) -> None:
    """Every active weight but the looked-up embeddings is multiplied and added once a token."""
    met = spec.active_parameters - spec.embedding_weights - spec.lm_head_weights + spec.vocab * spec.hidden
    assert spec.dense_flops_per_token == pytest.approx(2 * met, rel=0.001)
    assert spec.dense_flops_per_token <= 2 * met


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.name)
def test_parts_sum_to_the_whole(spec: ModelSpec) -> None:
    """FLOPs are those of the modules, cache that of the groups, bytes those of the weights."""
    layer_flops = spec.projection_flops_per_token_per_layer + spec.mlp_flops_per_token_per_layer
    assert spec.dense_flops_per_token == spec.layers * layer_flops + spec.head_flops_per_token
    group_bytes = spec.kv_bytes_per_token_per_layer_per_group
    assert spec.kv_bytes_per_token == spec.layers * spec.kv_heads * group_bytes
    assert spec.heads_per_group * spec.kv_heads == spec.query_heads
    assert spec.weight_bytes_total == 2 * spec.parameters
    assert replace(spec, weight_bytes=4).layer_bytes == 2 * spec.layer_bytes


def test_projection_flops_of_a_known_layer() -> None:
    """Llama-2-70B: 2 * 8192 * (8192 + 2 * 1024 + 8192) for the projections, 6 * 8192 * 28672 for the MLP."""
    spec = model("llama2-70b")
    assert spec.projection_flops_per_token_per_layer == 301_989_888
    assert spec.mlp_flops_per_token_per_layer == 1_409_286_144


@given(new=st.integers(1, 60), context=st.integers(0, 60))
def test_attention_flops_count_every_causal_pair(new: int, context: int) -> None:
    """The closed form equals the count over pairs, and chunks sum to the whole prompt."""
    spec = model("llama3-8b")
    pairs = sum(context + position + 1 for position in range(new))
    assert spec.attention_flops(new, context) == 4 * 32 * 128 * pairs
    half = new // 2
    chunks = spec.attention_flops(half, context) + spec.attention_flops(new - half, context + half)
    assert chunks == spec.attention_flops(new, context)


def test_bytes_on_the_wire_of_remote_heads() -> None:
    """d = (2 + 2/r) * h * d_head * bytes; queries and outputs stay 16-bit beside an fp8 cache."""
    grouped, plain = model("llama2-70b"), model("llama-13b")
    assert grouped.remote_bytes_per_token(16) == (2 + 2 / 8) * 16 * 128 * 2
    assert plain.remote_bytes_per_token(3) == (2 + 2) * 3 * 128 * 2
    assert replace(grouped, kv_bytes=1).remote_bytes_per_token(16) == 2 * 16 * 128 * 2 + 2 * 2 * 128
    assert replace(plain, weight_bytes=4, kv_bytes=4).remote_bytes_per_token(3) == 4 * 3 * 128 * 4
    assert grouped.remote_bytes_per_token(0) == 0


@pytest.mark.parametrize("query_heads", [-8, 1, 12, 72])
def test_heads_that_are_not_whole_groups_are_refused(query_heads: int) -> None:
    """Heads travel in whole KV groups of the model."""
    with pytest.raises(SpecError, match="query_heads"):
        model("llama2-70b").remote_bytes_per_token(query_heads)


@pytest.mark.parametrize(("field", "value"), [
    ("layers", 0), ("hidden", -1), ("head_dim", 1.5), ("vocab", True), ("query_heads", 10), ("kv_heads", 3),
    ("experts_per_token", 2), ("experts", 0), ("weight_bytes", 3), ("kv_bytes", 0), ("kv_bytes", 2.0),
    ("shared_ffn_hidden", -1), ("layers", 10**9), ("context_limit_tokens", "4096"),
])
def test_impossible_architectures_are_refused_by_name(field: str, value: object) -> None:
    """A field outside its range is named in the error."""
    with pytest.raises(SpecError, match=r"model\.(kv_heads|experts_per_token|\w+)="):
        replace(model("llama2-70b"), **{field: value})


def test_context_limit_may_be_changed_but_not_beyond_learned_positions() -> None:
    """Rotary models take any limit, learned positions are rows of a table."""
    assert model("llama2-7b").with_context_limit(100_000).context_limit_tokens == 100_000
    assert model("opt-30b").with_context_limit(1000).context_limit_tokens == 1000
    with pytest.raises(SpecError, match="2048"):
        model("opt-30b").with_context_limit(2049)
    with pytest.raises(SpecError, match="context_limit_tokens"):
        model("llama2-7b").with_context_limit(0)


def test_unknown_model_names_the_near_matches() -> None:
    """A slip of the hand is answered with what was probably meant."""
    with pytest.raises(SpecError, match=r"model\.name='llama-70b'.*did you mean .*llama2-70b"):
        model("llama-70b")
    assert model(" Llama2_70B ") is MODELS["llama2-70b"]
