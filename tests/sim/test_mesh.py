"""Whole runs of meshes: what must hold of every record, and runs worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from support import TINY, ConstantCost, sized_cluster, tiny_plan
from support_mesh import (
    DIAMOND,
    EVENT_BUDGET,
    ONE,
    OVERLAP,
    PIPELINE,
    MeshPolicy,
    MeshScenario,
    mesh_scenarios,
)
from support_policies import LocalPolicy
from support_runs import assert_sound, event_hash

from hetis_sim.control.mesh.controller import MeshController
from hetis_sim.control.mesh.engine import MeshEngine
from hetis_sim.cost.model import AttentionCost, TransferCost
from hetis_sim.policies.memory import unit_bytes
from hetis_sim.sim.simulation import Simulation, SimulationInput
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.request import Request

FREE_WIRE = ConstantCost(wire=TransferCost(0.0, 0.0))


def engine_of(simulation: Simulation) -> MeshEngine:
    """The engine of a mesh's simulation."""
    assert isinstance(simulation.controller, MeshController)
    return simulation.controller.engine


@settings(max_examples=40)
@given(mesh_scenarios())
def test_nobody_is_lost_and_times_add_up(scenario: MeshScenario) -> None:
    """Invariants 1 to 5 and 11, after every event and of the record."""
    simulation = scenario.simulation(debug=True)
    assert_sound(simulation.run().records(), scenario.requests)
    engine = engine_of(simulation)
    assert not engine.active and not engine.waiting and not engine.stalled
    assert not any(engine.books.ledger.used) and not any(engine.books.requests)
    assert not any(engine.routing.queued_tokens)


@settings(max_examples=20)
@given(mesh_scenarios())
def test_a_run_repeats_to_the_bit(scenario: MeshScenario) -> None:
    """Invariant 8."""
    one, other = scenario.simulation(log=True), scenario.simulation(log=True)
    assert event_hash(one.run().records()) == event_hash(other.run().records())
    assert one.controller.log.lines == other.controller.log.lines


@settings(max_examples=20)
@given(mesh_scenarios())
def test_no_node_idles_while_somebody_waits_there(scenario: MeshScenario) -> None:
    """Invariant 6: whenever time goes on, every node with a queue computes."""
    simulation = scenario.simulation()
    engine, clock = engine_of(simulation), simulation.clock
    step, idle = clock.step, []

    def watched() -> None:
        if clock.peek() > clock.now:
            idle.extend(n for n, queue in enumerate(engine.queues)
                        if queue.step is None and (queue.prompts or queue.tokens))
        step()

    clock.step = watched  # type: ignore[method-assign]
    simulation.run()
    assert idle == []


@pytest.mark.parametrize("seed", range(3))
def test_one_node_at_batch_1_is_an_instance_of_one_stage(seed: int) -> None:
    """The mesh's engine and the one of pipelines give every request the same times."""
    scenario = MeshScenario(ranges=ONE, batch_requests=1, hosts=False, seed=seed, cost=FREE_WIRE, rate=4.0)
    mesh = scenario.simulation().run().records().requests
    plan, engine = tiny_plan(), scenario.settings()
    cluster = sized_cluster(plan, scenario.blocks, limits=engine.limits)
    lanes = Simulation(SimulationInput(cluster, TINY, scenario.cost, LocalPolicy(), plan, scenario.workload(),
                                       engine, EVENT_BUDGET)).run().records().requests
    for name in ("first_scheduled_s", "first_token_s", "finish_s"):
        np.testing.assert_allclose(mesh[name], lanes[name], rtol=1e-9, err_msg=name)


def test_a_lone_request_by_hand() -> None:
    """Two nodes in two hosts: a prompt of 5 tokens, then 2 tokens more."""
    cost = ConstantCost()
    scenario = MeshScenario(ranges=PIPELINE, requests=1)
    simulation = Simulation(replace(scenario.simulation().given, workload=[Request(0, 1.0, 5, 3)]))
    found = simulation.run().records().requests
    wire, attention = cost.wire, cost.attention
    ids = wire.seconds(4)
    hidden = TINY.hidden * TINY.activation_bytes
    prompt = 2 * cost.host_s + 6 * (cost.dense_s + 5 * cost.dense_s_per_token + 5 * cost.prefill_s_per_token)
    first = 1.0 + wire.seconds(20) + prompt + cost.last_s + wire.seconds(5 * hidden) + ids
    finish = first
    for context in (6, 7):
        size = context * TINY.kv_heads * TINY.kv_bytes_per_token_per_layer_per_group
        layer = cost.dense_s + cost.dense_s_per_token + attention.seconds(TINY.query_heads, size)
        finish += ids + 2 * cost.host_s + 6 * layer + cost.last_s + wire.seconds(hidden) + ids
    assert found["first_token_s"][0] == pytest.approx(first, rel=1e-12)
    assert found["finish_s"][0] == pytest.approx(finish, rel=1e-12)


def test_prompts_and_tokens_take_turns_at_a_node() -> None:
    """After a batch of prompts comes one of whoever waits for a token."""
    simulation = MeshScenario(ranges=ONE, hosts=False, rate=200.0, batch_tokens=40, requests=30,
                              blocks=400).simulation()
    steps = simulation.run().records().steps
    kinds = steps["kind"].tolist()
    waiting = [b for a, b in pairwise(kinds) if a == 0]
    assert 0 in kinds and waiting.count(0) <= 1  # only while nobody has a token yet


def test_a_node_in_the_middle_passes_the_layers_that_are_left() -> None:
    """Paths through overlapping nodes pass every layer once, and cache is held for those alone."""
    simulation = MeshScenario(ranges=OVERLAP, policy=MeshPolicy(3)).simulation(debug=True)
    engine = engine_of(simulation)
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    make = engine.books.path

    def noted(edges: tuple[int, ...]) -> object:
        path = make(edges)
        seen.add((path.nodes, path.layers))
        return path

    engine.books.path = noted  # type: ignore[method-assign, assignment]
    simulation.run()
    assert all(sum(layers) == TINY.layers for _, layers in seen)
    ranges = [[OVERLAP[n][1] for n in nodes] for nodes, _ in seen]
    assert any(list(layers) != whole for (_, layers), whole in zip(seen, ranges, strict=True))


def test_short_cache_preempts_and_all_ends() -> None:
    """With cache for two requests the latest lose theirs; everybody finishes."""
    simulation = MeshScenario(blocks=18, rate=60.0, block_tokens=4, output_max=40, prompt_max=30,
                              policy=MeshPolicy(1), requests=40).simulation(debug=True)
    requests = simulation.run().records().requests
    assert requests["preemptions"].sum() > 0
    assert (requests["status"] == 0).all()


def test_paths_are_logged() -> None:
    """One line for every question about a path, with its edges, or null while none is open."""
    simulation = MeshScenario().simulation(log=True)
    simulation.run()
    lines = [json.loads(line) for line in simulation.controller.log.lines]
    assert {line["kind"] for line in lines} == {"path"}
    assert {request for line in lines if line["decision"] for request in line["requests"]} == set(range(24))


def test_too_long_requests_are_turned_away_with_a_reason() -> None:
    """Longer than the widest path: ``cache_capacity``."""
    simulation = MeshScenario(blocks=5, block_tokens=4).simulation(debug=True)
    assert engine_of(simulation).longest_context == 20
    requests = simulation.run().records().requests
    total = requests["prompt_tokens"] + requests["output_tokens"]
    assert ((requests["status"] != 0) == (total > 20)).all()


def test_messages_share_wires() -> None:
    """Two messages of one sender take twice the time of one; the latency is paid once each."""
    simulation = MeshScenario(cost=ConstantCost(wire=TransferCost(1e-6, 1e-3))).simulation()
    links, arrived = simulation.instances[0]._links, []  # type: ignore[union-attr]
    clock = simulation.clock
    for target in (1, 2):
        links.send(0, target, 5000.0, lambda alone_s: arrived.append((clock.now, alone_s)))
    clock.run(until=0.05)
    assert arrived == [(pytest.approx(0.006), pytest.approx(0.006)),
                       (pytest.approx(0.011), pytest.approx(0.006))]


def test_cut_prompts_are_refused() -> None:
    """The error names the key."""
    given_ = MeshScenario(ranges=DIAMOND).simulation().given
    cut = replace(given_, settings=replace(given_.settings, chunked_prefill=True))
    with pytest.raises(SpecError, match=r"scheduler\.chunked_prefill"):
        Simulation(cut)


def test_attention_is_the_slowest_ranks() -> None:
    """Cache of a node with two ranks is read by both at once."""
    cost = ConstantCost(dense_s=0.0, dense_s_per_token=0.0, last_s=0.0, host_s=0.0, reduce_s=0.0,
                        attention=AttentionCost(0.0, 1e-6, 0.0), wire=TransferCost(0.0, 0.0))
    times = []
    for tp in (1, 2):
        scenario = MeshScenario(ranges=ONE, tp=tp, requests=1, cost=cost, hosts=False)
        requests = scenario.simulation().run().records().requests
        times.append(requests["finish_s"][0] - requests["first_token_s"][0])
    assert times[0] == pytest.approx(2 * times[1])
    assert unit_bytes(TINY, scenario.settings().limits) > 0
