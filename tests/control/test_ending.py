"""Requests that end early, in whatever state they are."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from support_driver import SeamDriver
from support_mesh import DIAMOND, MeshScenario
from support_policies import LocalPolicy
from support_runs import Scenario

from hetis_sim.control.invariants import check_controller
from hetis_sim.control.mesh.controller import MeshController
from hetis_sim.control.state import Ending, RequestState, Status
from hetis_sim.spec.errors import SpecError

Condition = Callable[[SeamDriver, RequestState], bool]


def computed(driver: SeamDriver, state: RequestState) -> bool:
    """Whether a step under way has something of a request."""
    return any(state in members or any(chunk.state is state for chunk in step.chunks)
               for step, members in driver.steps)


def flying(kind: str) -> Condition:
    """A request with a transfer of a kind under way."""
    return lambda driver, state: any(t.kind == kind and t.request_id == state.request_id
                                     for t in driver.transfers)


def both(*conditions: Condition) -> Condition:
    """Several at once."""
    return lambda driver, state: all(condition(driver, state) for condition in conditions)


def status(*wanted: Status) -> Condition:
    """A request at one of these stations."""
    return lambda driver, state: state.status in wanted


def idle(driver: SeamDriver, state: RequestState) -> bool:
    """No step computes anything of it."""
    return not computed(driver, state)


def parked(driver: SeamDriver, state: RequestState) -> bool:
    """Its cache is in host memory."""
    return any(state in engine.pressure.swapped for engine in driver.engines)


def joining(driver: SeamDriver, state: RequestState) -> bool:
    """Its cache is complete, and its lane's step goes on without it."""
    return any(state in lane.joins for engine in driver.engines for lane in engine.lanes)


def switching(driver: SeamDriver, state: RequestState) -> bool:
    """Moved heads have arrived."""
    return any(state in lane.switches for engine in driver.engines for lane in engine.lanes)


def awaiting_room(driver: SeamDriver, state: RequestState) -> bool:
    """Prefilled, and no instance that decodes has had room for it."""
    return (state.status == Status.TRANSFER and state.landing is None and not joining(driver, state)
            and driver.engines[state.instance].plan.role == "prefill")


ROOMY = Scenario(layers=(2, 4), workers=1)
CHUNKS = Scenario(layers=(2, 4), workers=1, chunked=True, chunk_tokens=6)
MOVES = Scenario(layers=(2, 4), workers=2, interval=1)
SWAPS = Scenario(layers=(2, 4), blocks=20, preemption="swap")
POOLS = Scenario(instances=2, roles=("prefill", "decode"))
TIGHT_POOLS = Scenario(instances=2, roles=("prefill", "decode"), blocks=18)
STREAMS = Scenario(instances=2, roles=("prefill", "decode"), streams_handoff=True)

STATES: dict[str, tuple[Scenario, Condition]] = {
    "waiting": (ROOMY, status(Status.WAITING)),
    "prefill": (ROOMY, both(status(Status.PREFILL), computed)),
    "piece of a prompt": (CHUNKS, both(status(Status.PREFILL), computed)),
    "between pieces": (CHUNKS, both(status(Status.PREFILL), idle)),
    "push": (ROOMY, both(flying("push"), status(Status.TRANSFER))),
    "joining": (ROOMY, joining),
    "decode": (ROOMY, both(status(Status.DECODE), computed)),
    "decode, idle": (ROOMY, both(status(Status.DECODE), idle)),
    "move": (MOVES, flying("move")),
    "switching": (MOVES, switching),
    "swap out": (SWAPS, flying("swap_out")),
    "swapped": (SWAPS, both(parked, status(Status.SWAPPED))),
    "swap in": (SWAPS, flying("swap_in")),
    "awaiting room": (TIGHT_POOLS, awaiting_room),
    "handoff": (POOLS, flying("handoff")),
    "stream": (STREAMS, both(flying("handoff"), computed)),
}


def reach(scenario: Scenario, condition: Condition) -> tuple[SeamDriver, RequestState]:
    """Drive at random until a request is in some state."""
    for seed in range(30):
        random, driver = Random(seed), SeamDriver(scenario)
        for _ in range(400):
            found = [state for state in driver.left if condition(driver, state)]
            if found:
                return driver, random.choice(found)
            action = random.randrange(5)
            driver.now_s += 0.1
            if action == 0:
                driver.submit(random.randint(1, 30), random.randint(2, 30))
            elif action == 1 and driver.transfers and random.random() < 0.5:
                driver.arrive(random.randrange(len(driver.transfers)))
            elif action == 2 and driver.steps:
                driver.complete(random.randrange(len(driver.steps)))
            else:
                driver.ask(random.randrange(len(driver.engines)))
    raise AssertionError("no request comes into this state")


@pytest.mark.parametrize("reason", ["stop", "aborted"])
@pytest.mark.parametrize("name", STATES)
def test_a_request_ends_in_any_state(name: str, reason: Ending) -> None:
    """At once, or with the step that computes it; it holds nothing then, and all others go on."""
    driver, state = reach(*STATES[name])
    under_way = computed(driver, state)
    made = driver.tokens[state.request_id]
    driver.finish(state.request_id, reason)
    driver.check()
    assert (state.status < Status.FINISHED) == under_way
    for index in reversed(range(len(driver.steps))):
        driver.iterate(index, 100)
        driver.complete(index)
        driver.check()
    assert state.status == (Status.FINISHED if reason == "stop" and state.generated_base else Status.REJECTED)
    assert state.reason == reason
    assert made <= driver.tokens[state.request_id] == state.generated_base <= made + 1
    assert state.shape is None
    assert state.swap is None
    assert state.landing is None
    driver.drain()
    assert driver.ended == set(driver.tokens)
    memory = driver.engines[0].pressure._host_memory
    assert not any(memory.used_bytes)


def test_whoever_waits_behind_it_moves_up() -> None:
    """A prompt that found no room keeps all others waiting, until it is given up."""
    driver = SeamDriver(Scenario(blocks=12, policy=LocalPolicy()))
    first, second, third = (driver.submit(tokens, 8) for tokens in (30, 36, 4))
    while driver.ask(0):
        driver.complete(0)
        if second.status == Status.WAITING and driver.engines[0].blocked:
            break
    assert (first.status, second.status, third.status) == (Status.DECODE, Status.WAITING, Status.WAITING)
    driver.finish(second.request_id, "aborted")
    driver.ask(0)
    assert third.status == Status.PREFILL
    driver.drain()


def test_one_that_has_ended_stays_as_it_is() -> None:
    """The last token and the word that nobody wants it may cross."""
    driver = SeamDriver(ROOMY)
    state = driver.submit(4, 1)
    driver.drain()
    ended = state.finish_s
    driver.now_s += 1.0
    driver.finish(state.request_id, "aborted")
    assert (state.status, state.reason, state.finish_s) == (Status.FINISHED, "", ended)


def test_the_last_token_of_all_is_no_early_end() -> None:
    """A request whose last token comes with the step under way finishes, whoever gives it up meanwhile."""
    driver = SeamDriver(ROOMY)
    state = driver.submit(4, 1)
    driver.ask(0)
    driver.finish(state.request_id, "aborted")
    driver.complete(0)
    assert (state.status, state.reason) == (Status.FINISHED, "")


def test_only_known_requests_end_for_known_reasons() -> None:
    """Anything else is an error of the caller."""
    driver = SeamDriver(ROOMY)
    driver.submit(4, 4)
    with pytest.raises(SpecError, match="request_id=7"):
        driver.controller.finish(7, "stop", 0.0)
    with pytest.raises(SpecError, match="reason='bored'"):
        driver.controller.finish(0, "bored", 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("reason", ["stop", "aborted"])
@pytest.mark.parametrize("seed", range(4))
def test_requests_end_early_in_a_mesh(seed: int, reason: Ending) -> None:
    """With their round, or at once where they wait; whoever was short of a block goes on."""
    simulation = MeshScenario(DIAMOND, blocks=20, rate=60.0, seed=seed).simulation(debug=True)
    controller = simulation.controller
    assert isinstance(controller, MeshController)
    told: dict[int, float] = {}
    random = Random(seed)

    def give_up() -> None:
        waiting = [s for s in controller.states.values() if s.status < Status.FINISHED]
        if waiting:
            state = random.choice(waiting)
            told[state.request_id] = simulation.clock.now
            simulation._news(controller.finish(state.request_id, reason, simulation.clock.now))
            check_controller(controller)
            simulation.clock.call(simulation.clock.now + 0.05, give_up)

    simulation.clock.call(0.3, give_up)
    simulation.run()
    early = [controller.states[request_id] for request_id in told]
    assert len(early) > 8
    assert {s.reason for s in early} <= {reason, ""}
    assert sum(s.reason == reason for s in early) > 4
