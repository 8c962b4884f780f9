"""Times of small runs, worked out on paper."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from support import BENT, TINY, ConstantCost
from support_policies import LocalPolicy
from support_runs import Scenario

from hetis_sim.cost.model import AttentionCost, TransferCost
from hetis_sim.metrics.records import Records
from hetis_sim.policies.plan import Placement
from hetis_sim.policies.ranges import TokenSplit
from hetis_sim.policies.view import InstanceView, RequestView
from hetis_sim.sim.simulation import Simulation
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.request import Request

COST = ConstantCost()
KV = TINY.kv_bytes_per_token_per_layer_per_group
GROUPS = TINY.kv_heads
HEADS = TINY.heads_per_group


def records(prompts: list[int], outputs: list[int], arrivals_s: list[float], **changes: object) -> Records:
    """A run of requests of given lengths at given times, every head at home."""
    scenario = replace(Scenario(blocks=2000, cost=COST, policy=LocalPolicy(), batch_tokens=4096), **changes)
    lengths = enumerate(zip(arrivals_s, prompts, outputs, strict=True))
    requests = [Request(i, now_s, prompt, output) for i, (now_s, prompt, output) in lengths]
    return Simulation(replace(scenario.given(debug=True), workload=requests)).run().records()


def prefill_s(tokens: int, layers: int = 6, *, first: bool = True, last: bool = True) -> float:
    """Whole prompts of ``tokens`` together through a stage."""
    each = COST.dense_s + COST.dense_s_per_token * tokens + COST.prefill_s_per_token * tokens
    return COST.host_s * first + layers * each + COST.last_s * last


def attention_s(contexts: list[int], groups: int = GROUPS) -> float:
    """Decode attention of one layer over tokens in cache, those of this iteration included."""
    cost = COST.attention
    heads = HEADS * groups * len(contexts)
    return cost.a_s_per_head * heads + cost.b_s_per_byte * KV * groups * sum(contexts) + cost.c_s


def decode_s(contexts: list[int], layers: int = 6, *, first: bool = True, last: bool = True) -> float:
    """An iteration through a stage."""
    dense = COST.dense_s + COST.dense_s_per_token * len(contexts)
    return COST.host_s * first + layers * (dense + attention_s(contexts)) + COST.last_s * last


def test_one_request_alone() -> None:
    """Prefill, then one iteration for each further token over a cache that grows by one."""
    row = records([10], [4], [2.0]).requests
    assert row["first_scheduled_s"][0] == 2.0
    assert row["first_token_s"][0] == pytest.approx(2.0 + prefill_s(10), rel=1e-12)
    assert row["finish_s"][0] == pytest.approx(
        2.0 + prefill_s(10) + decode_s([11]) + decode_s([12]) + decode_s([13]), rel=1e-12)


def test_a_newcomer_is_prefilled_between_two_iterations() -> None:
    """It waits for the iteration under way; the others wait for its prompt; then they decode together."""
    middle = prefill_s(10) + decode_s([11]) * 0.5
    rows = records([10, 7], [4, 2], [0.0, middle]).requests
    begin = prefill_s(10) + decode_s([11])
    assert rows["first_scheduled_s"][1] == pytest.approx(begin, rel=1e-12)
    assert rows["first_token_s"][1] == pytest.approx(begin + prefill_s(7), rel=1e-12)
    both = begin + prefill_s(7) + decode_s([12, 8])
    assert rows["finish_s"][1] == pytest.approx(both, rel=1e-12)
    assert rows["finish_s"][0] == pytest.approx(both + decode_s([13]), rel=1e-12)


def test_chunks_share_steps_with_decodes() -> None:
    """A mixed step computes decodes and a piece of a prompt at once, dense work over all its tokens."""
    middle = prefill_s(10) + decode_s([11]) * 0.5
    rows = records([10, 10], [5, 1], [0.0, middle], chunked=True, chunk_tokens=10).requests
    begin = prefill_s(10) + decode_s([11])

    def mixed_s(new: int, context: int) -> float:
        dense = COST.dense_s + COST.dense_s_per_token * (new + 1) + COST.prefill_s_per_token * new
        return COST.host_s + 6 * (dense + attention_s([context])) + COST.last_s

    # Nine tokens beside one decode, then the last one.
    end = begin + mixed_s(9, 12) + mixed_s(1, 13)
    assert rows["first_token_s"][1] == pytest.approx(end, rel=1e-12)
    assert rows["finish_s"][0] == pytest.approx(end + decode_s([14]), rel=1e-12)


def hop_s(tokens: int) -> float:
    """Activations on their way to the next stage."""
    return COST.wire.seconds(tokens * TINY.hidden * TINY.activation_bytes)


def test_two_stages_overlap_two_batches() -> None:
    """While one micro-batch is in the second stage, the other is in the first."""
    rows = records([10, 10], [1, 1], [0.0, 0.0], layers=(2, 4), batch_requests=1).requests
    first, second = prefill_s(10, 2, last=False), prefill_s(10, 4, first=False)
    assert second > first > 0
    done = first + hop_s(10) + second
    assert rows["first_token_s"][0] == pytest.approx(done, rel=1e-12)
    assert rows["first_scheduled_s"][1] == pytest.approx(first, rel=1e-12)
    assert rows["first_token_s"][1] == pytest.approx(done + second, rel=1e-12)


def test_tensor_parallel_ranks_share_heads_and_reduce_twice_a_layer() -> None:
    """Each of two ranks attends to its own heads; two all-reduces follow in every layer."""
    row = records([10], [2], [0.0], tp=2).requests
    reduce_s = 6 * 2 * COST.reduce_s
    dense = 6 * (COST.dense_s + COST.dense_s_per_token + attention_s([11], GROUPS // 2))
    decode = COST.host_s + dense + COST.last_s + reduce_s
    assert row["finish_s"][0] - row["first_token_s"][0] == pytest.approx(decode, rel=1e-12)


class Split(LocalPolicy):
    """Half of the groups at the attention worker."""

    def dispatch(self, requests: list[RequestView], view: InstanceView) -> list[Placement]:
        return [(GROUPS // 2, GROUPS // 2)] * len(super().dispatch(requests, view))


def test_remote_heads_take_their_attention_and_two_messages() -> None:
    """A layer waits for the slower of local attention, and remote attention with its way there and back."""
    row = records([10], [2], [0.0], workers=1, worker_blocks=2000, policy=Split()).requests
    half = GROUPS // 2
    wire = COST.wire.gamma_s_per_byte * half * TINY.remote_bytes_per_token(HEADS) + 2 * COST.wire.beta_s
    layer = COST.dense_s + COST.dense_s_per_token + attention_s([11], half) + wire
    decode = COST.host_s + 6 * layer + COST.last_s
    begin = row["first_token_s"][0] + push_s(10, half)
    assert row["finish_s"][0] - begin == pytest.approx(decode, rel=1e-9)


def test_attention_follows_the_curve_of_its_batch() -> None:
    """A line through what the batch takes when it forms and with a quarter more cache, anew at a change.

    It rises at least as what no batch is faster than.
    """
    def curve_s(requests: int, tokens: float) -> float:
        return BENT.seconds(HEADS * GROUPS * requests, KV * GROUPS * tokens)

    def iteration_s(contexts: list[int], formed: int) -> float:
        requests, tokens = len(contexts), sum(contexts)
        grown = max(BENT.least().b_s_per_byte * KV * GROUPS,
                    (curve_s(requests, 1.25 * formed) - curve_s(requests, formed)) / (0.25 * formed))
        bent_s = curve_s(requests, formed) + grown * (tokens - formed)
        return decode_s(contexts) + 6 * (bent_s - attention_s(contexts))

    rows = records([10, 6], [4, 3], [0.0, 0.0], cost=ConstantCost(attention=BENT)).requests
    together = prefill_s(16) + iteration_s([11, 7], 18) + iteration_s([12, 8], 18)
    assert rows["finish_s"][1] == pytest.approx(together, rel=1e-12)
    assert rows["finish_s"][0] == pytest.approx(together + iteration_s([13], 13), rel=1e-12)


def test_batches_of_one_request_keep_a_line_of_their_own() -> None:
    """The bend is that of several."""
    lone = AttentionCost(1e-6, 1e-10, 1e-4)
    bent = replace(BENT, lone=lone)
    row = records([10], [2], [0.0], cost=ConstantCost(attention=bent)).requests
    layer = COST.dense_s + COST.dense_s_per_token + lone.seconds(HEADS * GROUPS, KV * GROUPS * 11)
    decode = COST.host_s + 6 * layer + COST.last_s
    assert row["finish_s"][0] == pytest.approx(prefill_s(10) + decode, rel=1e-12)


PACKING = TransferCost(1e-8, 1e-3)
SENDING = TransferCost(3e-8, 2e-3)


@dataclass(frozen=True)
class Packing(ConstantCost):
    """A rank that is busy with every message."""

    def head_packing(self, gpu: GpuSpec) -> TransferCost:
        return PACKING

    def cache_packing(self, gpu: GpuSpec) -> TransferCost:
        return SENDING


def test_a_rank_is_busy_with_cache_that_leaves() -> None:
    """In every layer of the prompt, before it goes on; the record has it beside attention."""
    plain, packed = (records([10], [1], [0.0], workers=1, worker_blocks=2000, policy=Split(), cost=cost)
                     for cost in (COST, Packing()))
    seconds = 6 * SENDING.beta_s + SENDING.gamma_s_per_byte * 6 * 10 * KV * (GROUPS // 2)
    later = packed.requests["first_token_s"][0] - plain.requests["first_token_s"][0]
    assert later == pytest.approx(seconds, rel=1e-9)
    assert packed.steps["head_transfer_s"][0] == pytest.approx(seconds, rel=1e-9)
    assert packed.steps["attention_s"][0] == pytest.approx(plain.steps["attention_s"][0], rel=1e-9)


class Ranged(LocalPolicy):
    """The oldest block of four tokens at the attention worker, all others at home."""

    splits_tokens = True

    def dispatch(self, requests: list[RequestView], view: InstanceView) -> list[TokenSplit]:
        split = TokenSplit(view.plan.local_placement, (*[0] * view.plan.stages[0].tp, 1))
        return [split] * len(super().dispatch(requests, view))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_token_range_computes_all_heads_and_sends_them_back_to_be_merged(tp: int) -> None:
    """Its four tokens do not grow. Queries go out; outputs and two numbers a head come back, to be merged."""
    runs = [records([10], [n], [0.0], workers=1, worker_blocks=2000, policy=Ranged(), tp=tp) for n in (2, 3)]
    output = HEADS * TINY.head_dim * TINY.activation_bytes
    partial = output + HEADS * 2 * 4
    wire = COST.wire.gamma_s_per_byte * GROUPS * (output + partial) + 2 * COST.wire.beta_s
    # A rank reads its own partial result and the worker's, and writes one as large.
    merge = 3 * GROUPS // tp * COST.attention.b_s_per_byte * partial + COST.attention.c_s
    remote = attention_s([4]) + wire
    assert remote > attention_s([9], GROUPS // tp)
    layer = COST.dense_s + COST.dense_s_per_token + remote + merge
    decode = COST.host_s + 6 * layer + COST.last_s + (6 * 2 * COST.reduce_s if tp > 1 else 0.0)
    shorter, longer = (run.requests["finish_s"][0] for run in runs)
    assert longer - shorter == pytest.approx(decode, rel=1e-9)
    assert runs[0].transfers["size_bytes"].sum() == 6 * 4 * KV * GROUPS
    assert runs[0].requests["remote_share"][0] == pytest.approx(0.4)


class TailAway(LocalPolicy):
    """The two oldest blocks of four tokens at home, all others at the attention worker."""

    splits_tokens = True

    def dispatch(self, requests: list[RequestView], view: InstanceView) -> list[TokenSplit]:
        kv_heads = sum(view.plan.local_placement)
        return [TokenSplit((0, kv_heads), (2, 0))] * len(super().dispatch(requests, view))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_tail_elsewhere_may_begin_empty(chunked: bool) -> None:
    """A prompt that its ranges at home take up sends nothing, and decodes without waiting for that."""
    found = records([8], [5], [0.0], workers=1, worker_blocks=2000, policy=TailAway(), chunked=chunked)
    assert found.requests["output_tokens"].tolist() == [5]
    assert not len(found.transfers)


def push_s(tokens: int, groups: int) -> float:
    """How long after the prefill its remote cache is there: the last layer, or all if that is later."""
    size = tokens * KV * groups
    tail = size * COST.wire.gamma_s_per_byte
    whole = 6 * size * COST.wire.gamma_s_per_byte
    return max(tail, whole - prefill_s(tokens)) + COST.wire.beta_s
