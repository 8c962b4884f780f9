"""What engines do differently: hosts beside the devices, joint kernels, patience, single messages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from support import TINY, ConstantCost, gpu
from support_mesh import PIPELINE, MeshScenario
from support_policies import LocalPolicy
from support_runs import Scenario

from hetis_sim.config import compose
from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.cost.graphs import GraphSteps
from hetis_sim.cost.host import HostOverhead
from hetis_sim.cost.load import load_cost_model
from hetis_sim.cost.model import AttentionCost, CostModel
from hetis_sim.cost.roofline import RooflineCost
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.run import prepare
from hetis_sim.sim.simulation import Simulation
from hetis_sim.spec.errors import InfeasibleError, SpecError
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.gpus import GPUS
from hetis_sim.spec.model import ModelSpec
from hetis_sim.spec.request import Request

COST = ConstantCost()
GROUPS = TINY.kv_heads


def prefill_s(tokens: int) -> float:
    """Whole prompts of ``tokens`` together."""
    each = COST.dense_s + COST.dense_s_per_token * tokens + COST.prefill_s_per_token * tokens
    return COST.host_s + 6 * each + COST.last_s


def attention_s(contexts: list[int]) -> float:
    """Decode attention of one layer over tokens in cache, those of this iteration included."""
    cost, size = COST.attention, TINY.kv_bytes_per_token_per_layer_per_group
    heads = TINY.heads_per_group * GROUPS * len(contexts)
    return cost.a_s_per_head * heads + cost.b_s_per_byte * size * GROUPS * sum(contexts) + cost.c_s


def decode_s(contexts: list[int]) -> float:
    """An iteration."""
    dense = COST.dense_s + COST.dense_s_per_token * len(contexts)
    return COST.host_s + 6 * (dense + attention_s(contexts)) + COST.last_s


@dataclass(frozen=True)
class BusyHost(ConstantCost):
    """A host that has ``beside_s`` to do beside each stage, and attention that is slower beside prompts."""

    beside_s: float = 0.0
    mixed: AttentionCost = ConstantCost.attention
    graph_tokens: int = 0
    prompt_sizes: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    prompts: int = 0

    def host_beside_s(self, sequences: int, layers: int, leads: bool, prompts: int = 0,
                      eager: bool = False) -> float:
        return 0.0 if not eager and self.graph_tokens else self.beside_s

    def graph_steps(self) -> GraphSteps:
        return GraphSteps(self.graph_tokens, self.prompt_sizes, self.batch_sizes, self.prompts)

    def mixed_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        return self.mixed


def run(prompts: list[int], outputs: list[int], arrivals_s: list[float], cost: CostModel = COST, *,
        collapse: bool = True, chunked: bool = False, chunk_tokens: int = 24, layers: tuple[int, ...] = (6,),
        **settings: object) -> Recorder:
    """A run of requests of given lengths at given times, every head at home."""
    scenario = Scenario(blocks=2000, cost=cost, policy=LocalPolicy(), batch_tokens=4096, chunked=chunked,
                        chunk_tokens=chunk_tokens, layers=layers)
    lengths = enumerate(zip(arrivals_s, prompts, outputs, strict=True))
    requests = [Request(i, now_s, prompt, output) for i, (now_s, prompt, output) in lengths]
    given = scenario.given(collapse, debug=True)
    return Simulation(replace(given, workload=requests,
                              settings=replace(given.settings, **settings))).run()  # type: ignore[arg-type]


# -- hosts -------------------------------------------------------------------------------


def test_an_iteration_takes_as_long_as_its_host() -> None:
    """With 50 ms of host time beside about 8 ms of work, each step takes 50 ms and what is waited for."""
    row = run([10], [4], [0.0], BusyHost(beside_s=0.05)).records().requests
    assert row["first_token_s"][0] == pytest.approx(0.05 + COST.host_s, rel=1e-12)
    assert row["finish_s"][0] == pytest.approx(4 * (0.05 + COST.host_s), rel=1e-12)


def test_short_prompts_that_are_graphs_do_not_wait_for_their_host() -> None:
    """On one device with the whole model; longer ones do, and those of several stages."""
    first_s = {}
    for tokens in (0, 9, 10):
        row = run([10], [1], [0.0], BusyHost(beside_s=0.05, graph_tokens=tokens)).records().requests
        first_s[tokens] = row["first_token_s"][0]
    assert first_s[10] == pytest.approx(prefill_s(10), rel=1e-9)
    assert first_s[0] == first_s[9] == pytest.approx(0.05 + COST.host_s, rel=1e-9)
    staged = run([10], [1], [0.0], BusyHost(beside_s=0.05, graph_tokens=10), layers=(3, 3))
    assert staged.records().requests["first_token_s"][0] > 2 * 0.05


def test_graphs_compute_the_rows_that_they_were_recorded_for() -> None:
    """Dense modules take as long as for the size above; attention, and steps that are no graphs, do not."""
    def first_and_last_s(lengths: list[int], **graphs: object) -> tuple[float, float]:
        cost = BusyHost(graph_tokens=20, **graphs)  # type: ignore[arg-type]
        row = run(lengths, [2] * len(lengths), [0.0] * len(lengths), cost).records().requests
        return row["first_token_s"][0], row["finish_s"][0]

    plain_s = first_and_last_s([10])
    rounded_s = first_and_last_s([10], prompt_sizes=(4, 16, 20))
    assert rounded_s[0] - plain_s[0] == pytest.approx(6 * 6 * COST.dense_s_per_token, rel=1e-9)
    assert rounded_s[1] - rounded_s[0] == pytest.approx(plain_s[1] - plain_s[0], rel=1e-9)
    exact_s = first_and_last_s([16], prompt_sizes=(4, 16, 20))
    assert exact_s == pytest.approx(first_and_last_s([16]), rel=1e-12)
    longer_s = first_and_last_s([30], prompt_sizes=(4, 16, 20))
    assert longer_s == pytest.approx(first_and_last_s([30]), rel=1e-12)
    many_s = first_and_last_s([5, 5], prompt_sizes=(4, 16, 20), prompts=1)
    assert many_s == pytest.approx(first_and_last_s([5, 5]), rel=1e-12)
    batch_s = first_and_last_s([10], batch_sizes=(4,))
    assert batch_s[0] == plain_s[0]
    assert batch_s[1] - plain_s[1] == pytest.approx(3 * 6 * COST.dense_s_per_token, rel=1e-9)


def test_a_host_that_is_faster_than_the_devices_costs_nothing() -> None:
    """The same times as without one, to the last bit."""
    quick = run([10, 7], [9, 5], [0.0, 0.01], BusyHost(beside_s=1e-3)).records().requests
    none = run([10, 7], [9, 5], [0.0, 0.01]).records().requests
    assert np.array_equal(quick["finish_s"], none["finish_s"])


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("layers", [(6,), (3, 3)])
def test_collapsed_steps_agree_beside_a_busy_host(layers: tuple[int, ...], chunked: bool) -> None:
    """Attention outgrows the host's time in the middle of a run; closed form and loop agree to 1e-9."""
    cost = BusyHost(beside_s=9e-3 if len(layers) == 1 else 4.6e-3)
    runs = [run([40, 300], [400, 30], [0.0, 0.3], cost, collapse=collapse, chunked=chunked, layers=layers)
            for collapse in (True, False)]
    for name in ("first_token_s", "finish_s"):
        one, other = (found.records().requests[name] for found in runs)
        assert np.allclose(one, other, rtol=1e-9)
    steps = runs[0].steps()
    # What the host adds is in its own column, and parts still sum to the whole.
    assert (steps["host_s"] > COST.host_s * steps["iterations"] * (1 + 1e-9)).any()
    parts = steps[[name for name in steps.columns if name.endswith("_s")]].drop(
        columns=["start_s", "end_s"]).sum(axis=1)
    assert np.allclose(parts, steps["end_s"] - steps["start_s"], rtol=1e-9)


def test_overlap_hides_scheduling_and_launches_run_ahead() -> None:
    """Overlapped time is waited for nowhere; it runs beside the stage that leads, launches beside each."""
    host = HostOverhead(2e-3, 1e-5, 1e-4, True)
    assert host.waited_s(100) == 0.0
    assert host.beside_s(100, 10, True) == pytest.approx(3e-3 + 1e-3)
    assert host.beside_s(100, 10, False) == pytest.approx(1e-3)
    plain = HostOverhead(2e-3, 1e-5)
    assert (plain.waited_s(100), plain.beside_s(100, 10, True)) == (pytest.approx(3e-3), 0.0)
    assert "beside the devices" in host.provenance().note
    with pytest.raises(SpecError, match="launch_s_per_layer"):
        HostOverhead(launch_s_per_layer=-1.0)


def test_nodes_of_a_mesh_wait_for_their_hosts() -> None:
    """Every node is a process of its own."""
    slow = MeshScenario(PIPELINE, cost=BusyHost(beside_s=0.02), requests=3).simulation(debug=True).run()
    quick = MeshScenario(PIPELINE, requests=3).simulation(debug=True).run()
    assert slow.records().requests["finish_s"].max() > 1.5 * quick.records().requests["finish_s"].max()
    assert (slow.steps()["host_s"] + slow.steps()["dense_s"] >= 0.015).all()


# -- kernels -----------------------------------------------------------------------------


def test_decoding_takes_longer_in_a_kernel_with_prompts() -> None:
    """Only in mixed steps, and only where the engine is said to join them."""
    tripled = AttentionCost(*(3 * c for c in (COST.attention.a_s_per_head, COST.attention.b_s_per_byte,
                                              COST.attention.c_s)))
    times = [run([10, 10], [5, 1], [0.0, prefill_s(10) + 1e-4], BusyHost(mixed=tripled), chunked=True,
                 joint_attention=joint).records().requests["first_token_s"][1] for joint in (False, True)]
    assert times[1] - times[0] == pytest.approx(6 * 2 * attention_s([12]), rel=1e-9)
    alone = run([10], [5], [0.0], BusyHost(mixed=tripled), chunked=True, joint_attention=True)
    assert alone.records().requests["finish_s"][0] == pytest.approx(
        prefill_s(10) + sum(decode_s([n]) for n in range(11, 15)), rel=1e-12)


@pytest.mark.parametrize("card", ["rtx-pro-6000", "rtx4090", "a100-80gb", "h100-sxm"])
def test_a_tile_of_a_joint_kernel_costs_as_much_as_its_rows(card: str) -> None:
    """Never less than alone; half of 128 rows of a prompt, or all of them once for each group on Hopper."""
    cost, one = load_cost_model(), GPUS[card]
    model = prepare(compose("model=llama3-8b", "cluster=single-a100", "policy=vllm")).model
    alone, joint = cost.decode_attention(one, model), cost.mixed_attention(one, model)
    assert joint.b_s_per_byte >= alone.b_s_per_byte
    heads, context = 32 * model.query_heads, 2048
    rise = (cost.prefill_attention_layer_s(one, model, heads, 128, context)
            - cost.prefill_attention_layer_s(one, model, heads, 128, 512))
    group_s = joint.b_s_per_byte * model.kv_bytes_per_token_per_layer_per_group
    share = 1 / model.heads_per_group if card == "h100-sxm" else 0.5
    assert group_s == pytest.approx(max(share * rise / (1536 * 32 * model.kv_heads),
                                        alone.b_s_per_byte
                                        * model.kv_bytes_per_token_per_layer_per_group), rel=1e-9)


def test_a_cache_that_is_copied_is_read_and_written_once_more_each_time() -> None:
    """Two copies make five times the traffic."""
    card, plain, copied = gpu("card", 1 << 34), RooflineCost(), load_cost_model("roofline", cache_copies=2.0)
    once, often = plain.decode_attention(card, TINY), copied.decode_attention(card, TINY)
    assert often.b_s_per_byte == pytest.approx(5 * once.b_s_per_byte)
    assert (often.a_s_per_head, often.c_s) == (once.a_s_per_head, once.c_s)
    limited = load_cost_model("roofline", cache_copies=2.0, cache_copy_bytes_per_s=1e9)
    slow = limited.decode_attention(card, TINY)
    assert slow.b_s_per_byte == pytest.approx(once.b_s_per_byte + 4e-9)
    with pytest.raises(SpecError, match=r"cost\.cache_copies"):
        load_cost_model(cache_copies=-1.0)
    with pytest.raises(SpecError, match=r"cost\.cache_copy_bytes_per_s"):
        load_cost_model(cache_copies=1.0, cache_copy_bytes_per_s=-1.0)


# -- scheduling --------------------------------------------------------------------------


def test_asynchronous_scheduling_sees_arrivals_one_step_later() -> None:
    """A newcomer waits for the step under way and for the next one; on an idle instance for none."""
    middle = prefill_s(10) + 0.5 * decode_s([11])
    rows = run([10, 7], [6, 1], [0.0, middle], async_scheduling=True).records().requests
    assert rows["first_scheduled_s"][0] == 0.0
    assert rows["first_scheduled_s"][1] == pytest.approx(prefill_s(10) + decode_s([11]) + decode_s([12]),
                                                         rel=1e-12)
    alone = run([10, 7], [1, 1], [0.0, 0.5 * prefill_s(10)], async_scheduling=True).records().requests
    assert alone["first_scheduled_s"][1] == pytest.approx(prefill_s(10), rel=1e-12)


def test_patience_lets_decoding_go_on_until_enough_wait() -> None:
    """Of four that decode, one that waits holds them up after 12 iterations: 4 * (24 - 13) // 24 is 1."""
    decoding = prefill_s(40) + 0.5 * decode_s([11, 11, 11, 11])
    rows = run([10] * 5, [60] * 4 + [1], [0.0] * 4 + [decoding], prompt_patience=24).records().requests
    before = prefill_s(40) + sum(decode_s([n] * 4) for n in range(11, 11 + 12))
    assert rows["first_scheduled_s"][4] == pytest.approx(before, rel=1e-9)
    eager = run([10] * 5, [60] * 4 + [1], [0.0] * 4 + [decoding]).records().requests
    assert eager["first_scheduled_s"][4] == pytest.approx(prefill_s(40) + decode_s([11] * 4), rel=1e-12)


@pytest.mark.parametrize(("share", "iterations"), [(0.0, 1), (3.0, None)])
def test_decoding_has_a_pause_after_prompts(share: float, iterations: int | None) -> None:
    """Enough wait at once: without a pause they are heeded after one iteration, with one when it is over."""
    prompts_s = prefill_s(20)
    rows = run([10] * 4, [200] * 4, [0.0] * 2 + [0.5 * prompts_s] * 2, prompt_patience=24,
               prompt_pause_share=share).records().requests
    waited_s = rows["first_scheduled_s"][2] - prompts_s
    steps = [decode_s([n, n]) for n in range(11, 200)]
    if iterations is None:
        iterations = next(n for n in range(1, 200) if sum(steps[:n]) >= share * prompts_s)
        assert iterations > 1
    assert waited_s == pytest.approx(sum(steps[:iterations - (share == 0.0)]), rel=1e-9)


def test_patience_ends_where_one_request_decodes() -> None:
    """A single one is held up at once."""
    rows = run([10, 7], [9, 1], [0.0, prefill_s(10) + 1e-4], prompt_patience=24).records().requests
    assert rows["first_scheduled_s"][1] == pytest.approx(prefill_s(10) + decode_s([11]), rel=1e-12)


@pytest.mark.parametrize(("words", "key"), [
    ({"prompt_patience": -1}, "prompt_patience"), ({"prompt_pause_share": -0.5}, "prompt_pause_share"),
    ({"joint_attention": True}, "joint_attention"),
    ({"prompt_patience": 4, "chunked_prefill": True}, "prompt_patience"),
    ({"mesh_poll_s": float("nan")}, "mesh_poll_s"), ({"mesh_message_s": -1.0}, "mesh_message_s")])
def test_settings_that_make_no_sense_are_named(words: dict[str, object], key: str) -> None:
    """With what is allowed."""
    with pytest.raises(SpecError, match=rf"scheduler\.{key}"):
        SchedulerSettings(**words)  # type: ignore[arg-type]


# -- memory ------------------------------------------------------------------------------

WORDS = ("model=llama3-8b", "cluster=single-a100", "policy=vllm", "cost.kind=roofline", "requests=5")


def test_a_given_cache_replaces_what_memory_would_hold() -> None:
    """In whole blocks, for every layer and group; in a mesh as well."""
    prepared = prepare(compose(*WORDS, "scheduler.cache_tokens=41408"))
    model = prepared.model
    for _, ledger in prepared.controller().ledgers():
        assert list(ledger.capacity) == [41408 // 16 * model.kv_heads * model.layers]
    mesh = prepare(compose(*WORDS, "policy=helix", "scheduler.cache_tokens=8000"))
    assert [list(ledger.capacity) for _, ledger in mesh.controller().ledgers()] == [
        [500 * model.kv_heads * model.layers]]


def test_a_cache_larger_than_memory_is_refused() -> None:
    """With what is left beside the weights."""
    with pytest.raises(InfeasibleError, match=r"scheduler\.cache_tokens=2000000 take .* weights .* are left"):
        prepare(compose(*WORDS, "scheduler.cache_tokens=2000000"))
    with pytest.raises(SpecError, match=r"scheduler\.cache_tokens"):
        prepare(compose(*WORDS, "scheduler.cache_tokens=-1"))


# -- messages ----------------------------------------------------------------------------


def test_requests_part_where_their_messages_come_one_by_one() -> None:
    """Of a batch that arrives bit by bit, an idle node begins with those that are there when it looks."""
    scenario = MeshScenario(PIPELINE, requests=6, rate=1e9, prompt_max=4, output_max=12, batch_tokens=400)

    def steps(**settings: float) -> Recorder:
        simulation = scenario.simulation(debug=True)
        given = replace(simulation.given, settings=replace(simulation.given.settings, **settings))
        return Simulation(given).run()

    together, apart = steps(), steps(mesh_message_s=2e-3)
    looked = steps(mesh_message_s=2e-3, mesh_poll_s=0.05)
    # Who looks seldom finds all of them together again.
    assert len(apart.steps()) > len(together.steps()) >= len(looked.steps())
    for found in (apart, looked):
        assert (found.requests()["status"] == "finished").all()
    assert looked.records().requests["finish_s"].max() > together.records().requests["finish_s"].max()
