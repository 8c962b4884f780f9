"""Splitwise: two pools whose machines help each other out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from peer_runs import load, one_card, requests, serve
from policy_worlds import cluster, paper, problem, request
from support_runs import assert_sound

from hetis_sim.control.state import Status
from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.plan import Plan
from hetis_sim.policies.registry import make_policy
from hetis_sim.policies.splitwise import SplitwisePolicy, SplitwiseSettings
from hetis_sim.sim.simulation import Simulation
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.request import Request

POLICY = SplitwisePolicy(SplitwiseSettings(queue_tokens=1000, evaluations=100))
PROMPTS = [one_card(n, 32, 32, "prefill", prompt_rate=1000.0) for n in range(2)]
DECODES = [one_card(n, 32, 32, "decode", prompt_rate=500.0) for n in range(2, 4)]


def small(memory_cut: float = 1.0) -> PlanningProblem:
    """A model of 7 billion weights on a host of four equal cards, with part of their memory."""
    given = problem(cluster(("a100-40gb", 4)), "llama2-7b", prompt=400, output=60)
    return replace(given, limits=replace(given.limits, memory_utilization=0.9 * memory_cut))


def two_pools(prefill: int = 1, decode: int = 1) -> Plan:
    """Whole models on single cards: the first prefill, the next decode."""
    return Plan(tuple(one_card(n, 32, 32, "prefill" if n < prefill else "decode", 10_000.0, 10_000.0)
                      for n in range(prefill + decode)))


def places(simulation: Simulation) -> dict[str, set[int]]:
    """Instances that have prefilled, and such that have decoded."""
    steps = simulation.recorder.steps()
    return {"prefill": set(steps.instance[steps.prefill_tokens > 0]),
            "decode": set(steps.instance[steps.decode_tokens > 0])}


def assert_all_finished(simulation: Simulation, count: int) -> None:
    """Nobody is lost or turned away, and the records are sound."""
    assert_sound(simulation.recorder.records(), count)
    assert all(state.status == Status.FINISHED for state in simulation.controller.states.values())


def test_a_prompt_joins_the_shortest_queue_of_the_prompt_pool() -> None:
    """By tokens over strength; decoding instances stay out of it while the queue is short."""
    loads = [load(PROMPTS[0], 0, 300), load(PROMPTS[1], 1, 200), *(load(d, d.devices[0]) for d in DECODES)]
    assert POLICY.route(request(0, 400), loads) == 1
    faster = replace(PROMPTS[0], prompt_rate=4000.0)
    assert POLICY.route(request(0, 400), [load(faster, 0, 300), *loads[1:]]) == 0


def test_prompts_overflow_where_the_queue_is_long() -> None:
    """To a decoding instance, one that mixes phases already before others."""
    busy = [load(p, p.devices[0], 3000) for p in PROMPTS]
    idle = [load(d, d.devices[0]) for d in DECODES]
    assert POLICY.route(request(0, 400), [*busy, *idle]) == 2
    mixing = load(DECODES[1], 3, 0, 500, guests=1)
    assert POLICY.route(request(0, 400), [*busy, idle[0], mixing]) == 3
    assert POLICY.route(request(0, 400), [*busy, idle[0], replace(mixing, waiting_tokens=900)]) == 2


def test_prompts_do_not_overflow_to_where_they_would_come_later() -> None:
    """A queue that is long by tokens may still be the shortest in time."""
    slow = [load(replace(d, prompt_rate=10.0), d.devices[0]) for d in DECODES]
    busy = [load(PROMPTS[0], 0, 3000), load(PROMPTS[1], 1, 2500)]
    assert POLICY.route(request(0, 400), [*busy, *slow]) == 1
    mixing = load(replace(DECODES[1], prompt_rate=10.0), 3, 0, 100, guests=1)
    assert POLICY.route(request(0, 400), [*busy, slow[0], mixing]) == 1


def test_all_queues_long_is_one_queue() -> None:
    """Then the prompt goes where it is computed first."""
    busy = [load(p, p.devices[0], 9000) for p in PROMPTS]
    full = [load(DECODES[0], 2, 2000), load(DECODES[1], 3, 1500)]
    assert POLICY.route(request(0, 400), [*busy, *full]) == 3


def test_a_prompt_that_finds_an_empty_queue_is_never_sent_away() -> None:
    """However long it is."""
    loads = [load(PROMPTS[0], 0), load(replace(DECODES[0], prompt_rate=4000.0), 2)]
    assert POLICY.route(request(0, 50_000), loads) == 0


def test_decoding_joins_the_least_tokens_for_its_strength() -> None:
    """Of equal instances the emptier, of unequal ones the stronger."""
    loads = [load(DECODES[0], 2, 0, 900), load(DECODES[1], 3, 0, 800)]
    assert POLICY.handoff(request(0, 100), loads) == 1
    strong = replace(DECODES[0], strength=2.0)
    assert POLICY.handoff(request(0, 100), [load(strong, 2, 0, 900), loads[1]]) == 0


def test_pools_keep_to_themselves_under_light_load() -> None:
    """One prefills, one decodes, and every cache travels while its prompt is computed."""
    simulation = serve(SplitwisePolicy(), small(), requests(40, 2.0, 400, 60), plan=two_pools())
    assert_all_finished(simulation, 40)
    assert places(simulation) == {"prefill": {0}, "decode": {1}}
    assert {instance.index for instance in simulation.controller.engines if instance.guests} == set()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_decoding_instance_takes_prompts_in_and_is_done_with_it(chunked: bool) -> None:
    """Under a burst of prompts both prefill; those that come when it is over go to the prompt pool again."""
    burst = [Request(n, 0.001 * n, 1500, 8) for n in range(60)]
    late = [Request(60 + n, 300.0 + n, 1500, 8) for n in range(5)]
    simulation = serve(POLICY, small(), burst + late, plan=two_pools(), chunked=chunked)
    assert_all_finished(simulation, 65)
    steps = simulation.recorder.steps()
    prefills = steps[steps.prefill_tokens > 0]
    assert set(prefills.instance[prefills.start_s < 290]) == {0, 1}
    assert set(prefills.instance[prefills.start_s > 290]) == {0}


def test_a_prompt_that_was_taken_in_decodes_there_without_a_transfer() -> None:
    """Caches travel only for what the prompt pool has computed."""
    burst = [Request(n, 0.001 * n, 1500, 8) for n in range(30)]
    simulation = serve(POLICY, small(), burst, plan=two_pools())
    records = simulation.recorder.records()
    steps = simulation.recorder.steps()
    computed = steps.prefill_tokens[steps.instance == 0].sum() / 1500
    assert 0 < computed < 30
    assert len(set(records.transfers["request_id"])) == computed
    engine = simulation.controller.engines[1]
    assert engine.guests, "those taken in are counted"
    assert engine.load().guests == 0, "until they have ended"


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_prompt_pool_decodes_where_the_decode_pool_is_full(chunked: bool, preemption: str) -> None:
    """And is done with it once there is room again."""
    policy = make_policy({"name": "splitwise", "preemption": preemption})
    long = [Request(n, 0.01 * n, 400, 700) for n in range(40)]
    late = [Request(40 + n, 400.0 + n, 400, 20) for n in range(5)]
    simulation = serve(policy, small(0.42), long + late, plan=two_pools(), chunked=chunked)
    assert_all_finished(simulation, 45)
    steps = simulation.recorder.steps()
    decodes = steps[steps.decode_tokens > 0]
    assert set(decodes.instance[decodes.start_s < 390]) == {0, 1}
    assert set(decodes.instance[decodes.start_s > 390]) == {1}


def test_two_instances_serve_more_than_their_phases_apart() -> None:
    """Where decoding is the narrow place, the prompt pool's help shortens the run."""
    workload = [Request(n, 0.01 * n, 100, 300) for n in range(40)]
    ends = {}
    for mixes in (True, False):
        policy = SplitwisePolicy(SplitwiseSettings(mixing=mixes))
        simulation = serve(policy, small(0.385), workload, plan=two_pools())
        assert_all_finished(simulation, 40)
        ends[mixes] = simulation.clock.now
    assert ends[True] < 0.8 * ends[False]


def test_a_request_that_no_decoding_instance_can_hold_stays_in_the_prompt_pool() -> None:
    """It is admitted, and decodes where its prompt was computed."""
    given = small()
    cards = replace(given.cluster.hosts[0].gpus[1], memory_bytes=int(16.4 * 2**30))
    host = replace(given.cluster.hosts[0], gpus=(given.cluster.hosts[0].gpus[0], cards))
    given = replace(given, cluster=replace(given.cluster, hosts=(host,)))
    policy = SplitwisePolicy(SplitwiseSettings(reserve_fraction=0.9))  # asks for more room than there is
    simulation = serve(policy, given, [Request(0, 0.0, 3000, 50), Request(1, 0.0, 20, 5)], plan=two_pools())
    in_prompt_pool, in_decode_pool = simulation.controller.context_limits
    assert in_decode_pool < 3000 < in_prompt_pool
    assert_all_finished(simulation, 2)
    assert simulation.controller.states[0].instance == 0


@pytest.mark.parametrize("name", ["llama2-13b", "llama2-70b"])
@pytest.mark.slow
def test_prompts_are_for_high_end_cards(name: str) -> None:
    """On the paper's testbed; A100s help the decode pool where it would serve less without, or nothing."""
    given = problem(paper(), name)
    plan = SplitwisePolicy(SplitwiseSettings(high_end_bias=100.0)).plan(given)
    kinds = {role: {given.cluster.devices[d].gpu.name for instance in plan.instances for d in instance.devices
                    if instance.role == role} for role in ("prefill", "decode")}
    assert kinds["prefill"] == {"a100-80gb"}
    apart = SplitwisePolicy(SplitwiseSettings(high_end_bias=100.0, share_kinds=False)).plan(given)
    served = [float(found.search["requests_per_s"]) for found in (plan, apart)]
    assert ("a100-80gb" in kinds["decode"]) == (served[0] > 1.05 * served[1] or name == "llama2-70b")


@pytest.mark.parametrize(("key", "value"), [
    ("high_end_bias", -0.1), ("high_end_bias", float("inf")), ("queue_tokens", -1), ("queue_tokens", 1.5),
    ("reserve_fraction", 0.95), ("preemption", "drop"), ("evaluations", 0), ("seed", -1), ("seed", True),
    ("mixing", 1),
])
def test_settings_out_of_range_are_refused_by_name(key: str, value: object) -> None:
    """With what is allowed."""
    with pytest.raises(SpecError, match=rf"policy\.{key}=.* is not allowed: must be"):
        make_policy({"name": "splitwise", key: value})
