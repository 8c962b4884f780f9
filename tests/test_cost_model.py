"""Durations: physics, monotony, linearity, memory, origin. Both cost models, shipped profiles."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis_sim.cost import HostOverhead, RooflineCost, RooflineSettings, load_cost_model, work
from hetis_sim.cost.floor import (
    all_reduce_floor_s,
    decode_floor_s_per_byte,
    dense_layer_floor_s,
    head_floor_s,
    prefill_attention_floor_s,
)
from hetis_sim.cost.model import AttentionCost, CostModel, TransferCost
from hetis_sim.run import simulate
from hetis_sim.spec.architectures import MODELS
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.gpus import GPUS
from hetis_sim.spec.links import LINKS

LLAMA = MODELS["llama2-70b"]
A100 = GPUS["a100-80gb"]
P100 = GPUS["p100-12gb"]
TOKENS = (1, 2, 7, 16, 17, 33, 64, 65, 128, 129, 300, 512, 1000, 1025, 2049, 5000, 9001, 33000, 70000)

# One instance of each for the whole file: they answer from memory.
COSTS: dict[str, CostModel] = {kind: load_cost_model(kind) for kind in ("profile", "roofline")}
both = pytest.mark.parametrize("kind", ["profile", "roofline"])
# Rounding of sums in floating point.
SLACK = 1.0 - 1e-9


@both
@pytest.mark.parametrize("model", ["llama2-70b", "opt-30b", "mixtral-8x7b"])
def test_dense_work_obeys_physics_on_every_card(kind: str, model: str) -> None:
    """No layer or head runs faster than its FLOPs at the peak or its weights at the bandwidth."""
    cost, spec = COSTS[kind], MODELS[model]
    broken = []
    for gpu in GPUS.values():
        for tokens in TOKENS:
            if cost.dense_layer_s(gpu, spec, tokens, 2) < dense_layer_floor_s(gpu, spec, tokens, 2) * SLACK:
                broken.append(f"layer of {tokens} on {gpu.name}")
            if cost.head_s(gpu, spec, tokens, 2) < head_floor_s(gpu, spec, tokens, 2) * SLACK:
                broken.append(f"head of {tokens} on {gpu.name}")
    assert broken == []


@both
def test_attention_obeys_physics_on_every_card(kind: str) -> None:
    """Prompts never beat the peaks; a byte of cache never costs less than its time on the bus."""
    cost = COSTS[kind]
    broken = []
    for gpu in GPUS.values():
        for name in ("llama-13b", "llama2-70b", "gemma-7b"):
            spec = MODELS[name]
            if cost.decode_attention(gpu, spec).b_s_per_byte < decode_floor_s_per_byte(gpu, spec) * SLACK:
                broken.append(f"decode of {name} on {gpu.name}")
            for new, context in ((1, 0), (1, 50000), (300, 0), (512, 4096), (4096, 0), (40000, 0)):
                seconds = cost.prefill_attention_layer_s(gpu, spec, spec.query_heads, new, context)
                bound = prefill_attention_floor_s(gpu, spec, spec.query_heads, new, context)
                if seconds < bound * SLACK:
                    broken.append(f"{new} after {context} of {name} on {gpu.name}")
    assert broken == []


@both
def test_links_obey_physics(kind: str) -> None:
    """No message or all-reduce moves its bytes faster than the line rate, on any link of the catalogue."""
    cost = COSTS[kind]
    for link in LINKS.values():
        message = cost.transfer(link)
        assert message.gamma_s_per_byte * link.bandwidth_bytes_per_s >= SLACK, link.name
        assert message.beta_s >= link.latency_s, link.name
        for gpu in (A100, GPUS["l40s"], GPUS["h200"]):
            for ranks in (2, 3, 4, 8, 16):
                for size in (1, 10_000, 5_000_000, 10**9, 10**11):
                    bound = all_reduce_floor_s(link, size, ranks)
                    seconds = cost.all_reduce_s(gpu, link, size, ranks)
                    assert seconds >= bound * SLACK, (link.name, size, ranks)


def test_the_floor_binds_where_a_profile_promises_too_much() -> None:
    """The shipped fit of a card is still held to a datasheet that says half the bandwidth."""
    slow = replace(A100, memory_bandwidth_bytes_per_s=A100.memory_bandwidth_bytes_per_s / 4)
    cost = COSTS["profile"]
    assert cost.dense_layer_s(slow, LLAMA, 1, 1) == pytest.approx(dense_layer_floor_s(slow, LLAMA, 1, 1))
    assert cost.decode_attention(slow, LLAMA).b_s_per_byte == decode_floor_s_per_byte(slow, LLAMA)


@both
@pytest.mark.parametrize("name", ["a100-80gb", "rtx3090", "p100-12gb", "t4", "mi300x"])
@pytest.mark.parametrize("model", ["llama2-70b", "mixtral-8x7b"])
def test_more_tokens_never_take_less_time(kind: str, name: str, model: str) -> None:
    """Dense layers, heads and whole prompts are non-decreasing in the number of tokens."""
    cost, gpu, spec = COSTS[kind], GPUS[name], MODELS[model]
    counts = [*range(1, 700), *range(700, 6000, 37), *range(6000, 70000, 1999)]
    for call in (lambda n: cost.dense_layer_s(gpu, spec, n, 4), lambda n: cost.head_s(gpu, spec, n, 4),
                 lambda n: cost.prefill_attention_layer_s(gpu, spec, 8, n, 0)):
        seconds = [call(n) for n in counts]
        assert all(later >= earlier * SLACK for earlier, later in pairwise(seconds))


@both
def test_a_shard_takes_less_than_the_whole(kind: str) -> None:
    """Sharding a large layer shortens it, and no more than by the degree."""
    cost = COSTS[kind]
    for tokens in (1, 64, 2048):
        whole = cost.dense_layer_s(A100, LLAMA, tokens, 1)
        for tp in (2, 4, 8):
            assert whole / tp * 0.95 < cost.dense_layer_s(A100, LLAMA, tokens, tp) < whole


@given(h=st.integers(1, 10**6), g=st.integers(0, 10**12), h2=st.integers(1, 10**6), g2=st.integers(0, 10**12))
def test_decode_attention_is_linear(h: int, g: int, h2: int, g2: int) -> None:
    """tau(x + y) = tau(x) + tau(y) - c, so that sums over iterations have a closed form."""
    tau = COSTS["profile"].decode_attention(A100, LLAMA)
    assert tau.seconds(h + h2, g + g2) == pytest.approx(tau.seconds(h, g) + tau.seconds(h2, g2) - tau.c_s)


def test_nothing_to_do_takes_no_time() -> None:
    """No heads, no bytes, no tokens, one rank: zero, not the fixed cost."""
    assert AttentionCost(1.0, 1.0, 1.0).seconds(0, 0) == 0.0
    assert TransferCost(1.0, 1.0).seconds(0) == 0.0
    for cost in COSTS.values():
        assert cost.dense_layer_s(A100, LLAMA, 0, 1) == 0.0
        assert cost.head_s(A100, LLAMA, 0, 1) == 0.0
        assert cost.prefill_attention_layer_s(A100, LLAMA, 0, 100, 0) == 0.0
        assert cost.prefill_attention_layer_s(A100, LLAMA, 8, 0, 100) == 0.0
        assert cost.all_reduce_s(A100, LINKS["nvlink3"], 10**6, 1) == 0.0
        assert cost.all_reduce_s(A100, LINKS["nvlink3"], 0, 4) == 0.0


@both
@pytest.mark.parametrize(("tokens", "tp"), [(-1, 1), (1, 0)])
def test_bad_counts_are_refused(kind: str, tokens: int, tp: int) -> None:
    """A negative token count or a degree below one is an error, not a duration."""
    with pytest.raises(SpecError):
        COSTS[kind].dense_layer_s(A100, LLAMA, tokens, tp)
    with pytest.raises(SpecError):
        COSTS[kind].head_s(A100, LLAMA, tokens, tp)


@both
def test_equal_questions_get_equal_answers(kind: str) -> None:
    """Answers do not depend on what was asked before, nor on which equal object asks."""
    cost, fresh = COSTS[kind], load_cost_model(kind)
    copy = replace(LLAMA)
    assert copy is not LLAMA
    first = fresh.dense_layer_s(A100, copy, 700, 2)
    assert first == cost.dense_layer_s(A100, LLAMA, 700, 2) == cost.dense_layer_s(replace(A100), copy, 700, 2)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of answers are dropped at the limit, and answers stay the same."""
    monkeypatch.setattr("hetis_sim.cost.memo.TABLE_LIMIT", 10)
    cost = RooflineCost()
    before = [cost.dense_layer_s(A100, LLAMA, n, 1) for n in range(1, 60)]
    assert before == [cost.dense_layer_s(A100, LLAMA, n, 1) for n in range(1, 60)]
    assert len(cost._dense) <= 11


def test_the_work_of_a_layer_matches_the_architecture() -> None:
    """FLOPs and weights of the counted products are those that the architecture has."""
    for name in ("llama2-70b", "opt-30b", "qwen3-32b", "mixtral-8x7b"):
        spec = MODELS[name]
        gemms = work.layer_gemms(spec, 64, 1)
        assert sum(g.flops for g in gemms) == pytest.approx(64 * spec.dense_flops_per_token_per_layer)
        if spec.experts == 1:
            counted = sum(g.weights for g in gemms)
            assert counted == pytest.approx(spec.weights_per_layer, rel=2e-4)  # norms and biases aside


@pytest.mark.parametrize("tokens", [1, 3, 50, 10_000])
def test_expected_experts(tokens: int) -> None:
    """One token touches its chosen experts; many touch nearly all, never more."""
    mixture = MODELS["mixtral-8x7b"]
    touched = work.expected_experts(mixture, tokens)
    assert mixture.experts_per_token <= touched + 1e-9
    assert touched <= mixture.experts
    if tokens == 1:
        assert touched == pytest.approx(mixture.experts_per_token)
    if tokens == 10_000:
        assert touched == pytest.approx(mixture.experts)


def test_uneven_shards_hold_at_least_one_kv_head() -> None:
    """Beyond H_kv shards KV heads are replicated: the shard's QKV product keeps one."""
    assert work.shard_kv_heads(LLAMA, 16) == 1
    assert work.layer_gemms(LLAMA, 1, 16)[0].n == (64 // 16 + 2) * 128


def test_the_roofline_is_the_larger_of_flops_and_bytes() -> None:
    """With full shares and no launch cost, thin products take their bytes and thick ones their FLOPs."""
    settings = RooflineSettings(gemm_compute=1.0, memory=1.0, kernel_s=0.0)
    cost = RooflineCost(settings)
    thin, thick = work.Gemm(1, 8192, 8192), work.Gemm(10**6, 8192, 8192)
    moved = 2 * (thin.weights + thin.activations)
    assert cost.gemm_s(A100, thin, LLAMA) == pytest.approx(moved / A100.memory_bandwidth_bytes_per_s)
    assert cost.gemm_s(A100, thick, LLAMA) == pytest.approx(thick.flops / A100.fp16_flops_per_s)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, math.nan, math.inf])
def test_shares_outside_zero_to_one_are_refused(value: float) -> None:
    """A roofline share must be in (0, 1]."""
    with pytest.raises(SpecError, match=r"cost\.roofline\.memory"):
        RooflineSettings(memory=value)


def test_host_overhead_is_a_setting_of_its_own() -> None:
    """It is linear in the sequences, enters no kernel, and is refused when negative."""
    host = HostOverhead(0.05, 1e-4)
    slow, fast = load_cost_model(host=host), COSTS["profile"]
    assert slow.host_overhead_s(100) == pytest.approx(0.06)
    assert slow.dense_layer_s(A100, LLAMA, 5, 1) == fast.dense_layer_s(A100, LLAMA, 5, 1)
    with pytest.raises(SpecError, match="host_overhead"):
        HostOverhead(-1.0)
    with pytest.raises(SpecError, match="per_prompt_s"):
        HostOverhead(per_prompt_s=-1.0)


def test_prompts_cost_the_host_more() -> None:
    """Iterations with prompts and each of them; none of it is in iterations without, and files keep it."""
    host = HostOverhead(0.05, 1e-4, prompt_step_s=0.002, per_prompt_s=3e-4)
    cost = load_cost_model(host=host)
    assert cost.host_overhead_s(10) == pytest.approx(0.051)
    assert cost.host_overhead_s(10, 4) == pytest.approx(0.051 + 0.0032)
    assert HostOverhead.parse(host.dump(), "host") == host
    beside = replace(host, overlap=True)
    assert beside.waited_s(10, 4) == 0.0
    assert beside.beside_s(10, 32, True, 4) == pytest.approx(host.seconds(10, 4))


def test_a_prompt_waits_for_its_hosts_time() -> None:
    """A request alone gets its first token later by it, and the others at the same pace."""
    words = ("policy=vllm", "cluster=single-a100", "model=llama3-8b", "rate=0.01", "requests=3")
    plain, slow = (simulate(*words, *more).requests for more in (
        (), ("cost.host_prompt_step_s=0.1", "cost.host_per_prompt_s=0.05")))
    assert (slow["ttft_s"] - plain["ttft_s"]).tolist() == pytest.approx([0.15] * 3)
    assert slow["tpot_s"].tolist() == pytest.approx(plain["tpot_s"].tolist())


@both
def test_every_module_says_where_it_comes_from(kind: str) -> None:
    """One row for each card and module, each link and the host; the kinds are the documented ones."""
    gpus = [A100, P100, GPUS["mi300x"]]
    rows = COSTS[kind].provenance(gpus, LLAMA, [LINKS["pcie4x16"], LINKS["xgmi-mi300x"]])
    modules = {(row.module, row.subject) for row in rows}
    for gpu in gpus:
        for module in ("gemm", "elementwise", "prefill_attention", "decode_attention", "all_reduce"):
            assert (module, gpu.name) in modules
    assert ("transfer", "pcie4x16") in modules
    assert ("host_overhead", "host") in modules
    assert {row.kind for row in rows} <= {"measured", "derived", "roofline", "setting"}
    found = {(row.module, row.subject): row.kind for row in rows}
    if kind == "profile":
        assert found["gemm", "a100-80gb"] == "measured"
        assert found["gemm", "p100-12gb"] == "derived"
    assert found["gemm", "mi300x"] == "roofline"
    assert found["transfer", "xgmi-mi300x"] == "roofline"


def test_a_slower_card_is_slower() -> None:
    """On the paper's testbed an A100 beats a 3090, and a 3090 a P100, in every module."""
    cost = COSTS["profile"]
    cards = [A100, GPUS["rtx3090"], P100]
    heads, cache = 64 * LLAMA.query_heads, 64 * 1000 * LLAMA.kv_bytes_per_token // LLAMA.layers
    for call in (lambda gpu: cost.dense_layer_s(gpu, LLAMA, 2048, 1),
                 lambda gpu: cost.dense_layer_s(gpu, LLAMA, 32, 1),
                 lambda gpu: cost.prefill_attention_layer_s(gpu, LLAMA, 64, 2048, 0),
                 lambda gpu: cost.decode_attention(gpu, LLAMA).seconds(heads, cache)):
        seconds = [call(gpu) for gpu in cards]
        assert seconds == sorted(seconds)
