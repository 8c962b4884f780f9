"""DistServe: pools that keep to themselves."""

from __future__ import annotations

from peer_runs import load, one_card, requests, serve
from policy_worlds import cluster, problem, request
from support_runs import assert_sound

from hetis_sim.control.state import Status
from hetis_sim.policies.distserve import DistServePolicy
from hetis_sim.policies.plan import Plan
from hetis_sim.sim.simulation import Simulation
from hetis_sim.spec.request import Request

PREFILL = one_card(0, 32, 32, "prefill", strength=2.0)
OTHER = one_card(1, 32, 32, "prefill", strength=1.0)
GIVEN = problem(cluster(("a100-40gb", 3)), "llama2-7b", prompt=400, output=60)


def served(workload: list[Request], *roles: str) -> Simulation:
    """A whole run on whole models on single cards."""
    plan = Plan(tuple(one_card(n, 32, 32, role) for n, role in enumerate(roles)))
    simulation = serve(DistServePolicy(), GIVEN, workload, plan=plan)
    assert_sound(simulation.recorder.records(), len(workload))
    assert all(state.status == Status.FINISHED for state in simulation.controller.states.values())
    return simulation


def test_a_prompt_joins_the_shortest_queue_for_its_strength() -> None:
    """Of the prefilling instances; an instance that does both counts among them."""
    policy = DistServePolicy()
    assert policy.route(request(0, 100), [load(PREFILL, 0, 300), load(OTHER, 1, 200)]) == 0
    assert policy.route(request(0, 100), [load(PREFILL, 0, 900), load(OTHER, 1, 200)]) == 1
    decode = one_card(2, 32, 32, "decode", strength=9.0)
    assert policy.route(request(0, 100), [load(decode, 2), load(OTHER, 1, 900)]) == 1


def test_a_decoding_instance_never_prefills_and_a_prefilling_one_never_decodes() -> None:
    """Not even under a burst."""
    simulation = served(requests(80, 200.0, 1500, 60), "prefill", "decode")
    steps = simulation.recorder.steps()
    assert set(steps.instance[steps.prefill_tokens > 0]) == {0}
    assert set(steps.instance[steps.decode_tokens > 0]) == {1}


def test_caches_are_pulled_once_they_are_whole() -> None:
    """No transfer begins before its prompt has been computed; each request has one."""
    simulation = served(requests(30, 5.0, 600, 40), "prefill", "decode", "prefill")
    records = simulation.recorder.records()
    first_token_s = dict(zip(records.requests["request_id"], records.requests["first_token_s"], strict=True))
    sent = records.transfers
    assert set(sent["request_id"]) == {r.request_id for r in simulation.given.workload if r.output_tokens > 1}
    for number, begun_s in zip(sent["request_id"], sent["start_s"], strict=True):
        assert begun_s >= first_token_s[number]


def test_a_cache_waits_where_it_was_computed_until_there_is_room() -> None:
    """First come, first served: the order of decoding is the order of the first tokens."""
    long = [Request(n, 0.01 * n, 1000, 700) for n in range(60)]
    simulation = served(long, "prefill", "decode")
    sent = simulation.recorder.records().transfers
    states, begun_s = simulation.controller.states, dict[int, float]()
    for start_s, number in sorted(zip(sent["start_s"], sent["request_id"], strict=True)):
        begun_s.setdefault(number, start_s)
    never_evicted = [n for n in begun_s if not states[n].preemptions]
    assert never_evicted == sorted(never_evicted)
    assert sum(begun_s[n] > states[n].first_token_s for n in never_evicted) > 5
