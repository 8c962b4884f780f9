"""What the scheduler promises: order, budgets, and who may decode when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from support_driver import SeamDriver
from support_policies import LocalPolicy
from support_runs import Scenario

from hetis_sim.control.state import RequestState, Status
from hetis_sim.control.step import Step, StepKind
from hetis_sim.policies.plan import Placement
from hetis_sim.policies.view import InstanceView, Move, RequestView

ROOMY = Scenario(blocks=400, block_tokens=4, policy=LocalPolicy(), batch_tokens=64, batch_requests=8)


class OneRemoteGroup(LocalPolicy):
    """Every request has one KV group of each stage on the first attention worker; moves bring it home."""

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
        return [self.away(view)] * len(super().dispatch(requests, view))

    @staticmethod
    def away(view: InstanceView) -> Placement:
        """The placement that every request begins with."""
        placement = list(view.plan.local_placement)
        for positions in view.plan.stage_positions:
            placement[positions.start] -= 1
            placement[positions.stop - 1] += 1
        return tuple(placement)

    def rebalance(self, view: InstanceView, running: Sequence[RequestView]) -> Move | None:
        for request in running:
            if request.movable and request.placement == self.away(view):
                return Move(request.request_id, view.plan.local_placement)
        return None


class AlwaysAway(OneRemoteGroup):
    """The same, whatever is free."""

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
        return [self.away(view)] * len(requests)


def asked(driver: SeamDriver, instance: int = 0) -> Step:
    """The next step, which must be there."""
    step = driver.ask(instance)
    assert step is not None
    return step


def members(driver: SeamDriver) -> set[int]:
    """Requests that decode."""
    return {i for lane in driver.engines[0].lanes for i in lane.members}


def prompts(step: Step) -> list[int]:
    """Requests of which a step computes prompts."""
    return [chunk.state.request_id for chunk in step.chunks]


def serve(driver: SeamDriver) -> Step:
    """Take one step to its end, and all transfers; one that waits for transfers is asked for again."""
    step = driver.ask(0)
    if step is not None:
        driver.complete(0)
    while driver.transfers:
        driver.arrive(0)
    return step or serve(driver)


def test_whole_prompts_go_before_decodes() -> None:
    """While somebody waits who fits, prompts are computed first, several at once within the budget."""
    driver = SeamDriver(ROOMY)
    for tokens in (30, 34, 1):
        driver.submit(tokens, 5)
    first = asked(driver)
    assert (first.kind, prompts(first), first.prefill_tokens) == (StepKind.PREFILL, [0, 1], 64)
    driver.complete(0)
    second = asked(driver)
    assert (second.kind, prompts(second)) == (StepKind.PREFILL, [2])
    driver.complete(0)
    third = asked(driver)
    assert (third.kind, third.decoding) == (StepKind.DECODE, 3)
    driver.submit(10, 5)
    driver.complete(0)
    assert prompts(asked(driver)) == [3]


def test_a_prompt_longer_than_the_budget_goes_alone() -> None:
    """The budget bounds what is put together, not what a single request may ask."""
    driver = SeamDriver(ROOMY)
    driver.submit(200, 2)
    driver.submit(1, 2)
    assert prompts(asked(driver)) == [0]


def test_a_batch_takes_no_more_requests_than_allowed() -> None:
    """The ninth request waits until one of eight has left."""
    driver = SeamDriver(ROOMY)
    for _ in range(9):
        driver.submit(1, 3)
    assert len(prompts(serve(driver))) == 8
    assert serve(driver).decoding == 8
    assert serve(driver).decoding == 8
    assert prompts(asked(driver)) == [8]


def test_nobody_passes_the_head_of_the_queue() -> None:
    """A request that finds no room keeps those behind it waiting, however small they are."""
    driver = SeamDriver(replace(ROOMY, blocks=20))
    driver.submit(40, 20)
    serve(driver)
    driver.submit(50, 2)
    driver.submit(1, 2)
    while driver.controller.states[0].status != Status.FINISHED:
        assert serve(driver).kind == StepKind.DECODE
    assert prompts(asked(driver)) == [1, 2]


@pytest.mark.parametrize("chunk_tokens", [7, 24])
def test_chunks_keep_within_the_budget_and_make_whole_prompts(chunk_tokens: int) -> None:
    """Every step computes at most the budget, decodes go first, and pieces follow one another."""
    driver = SeamDriver(replace(ROOMY, chunked=True, chunk_tokens=chunk_tokens))
    for tokens in (50, 3, 40, 17):
        driver.submit(tokens, 12)
    done = dict.fromkeys(driver.tokens, 0)
    kinds = set()
    while driver.left:
        decoding = members(driver)
        step = asked(driver)
        kinds.add(step.kind)
        assert step.decoding >= len(decoding - {s.request_id for s in driver.controller.states.values()
                                                if s.status == Status.FINISHED})
        assert step.prefill_tokens + step.decoding <= max(chunk_tokens, step.decoding)
        for chunk in step.chunks:
            assert chunk.context_tokens == done[chunk.state.request_id]
            done[chunk.state.request_id] += chunk.new_tokens
            assert chunk.last == (done[chunk.state.request_id] == chunk.state.request.prompt_tokens)
        driver.complete(0)
        driver.check()
    assert list(done.values()) == [50, 3, 40, 17]
    assert kinds == set(StepKind)


def test_a_prompt_whose_pieces_find_no_room_for_their_copy_is_computed_whole() -> None:
    """Until the last piece, remote heads are kept at the primaries too; nobody waits for room for that."""
    driver = SeamDriver(replace(ROOMY, blocks=10, workers=1, worker_blocks=100, moves_max=0, chunked=True,
                                chunk_tokens=12, policy=AlwaysAway()))
    driver.submit(8, 30)
    serve(driver)
    driver.submit(36, 9)
    step = serve(driver)
    assert prompts(step) == [1]
    assert step.prefill_tokens == 36
    driver.submit(20, 9)
    assert driver.left[-1].status == Status.WAITING
    driver.check()


def test_a_request_decodes_once_its_cache_has_arrived() -> None:
    """The prompt's remote heads travel while others decode; the request joins at the next boundary."""
    driver = SeamDriver(replace(ROOMY, workers=1, worker_blocks=100, moves_max=0, policy=OneRemoteGroup()))
    driver.submit(8, 50)
    serve(driver)
    assert serve(driver).decoding == 1
    driver.submit(8, 9)
    assert prompts(asked(driver)) == [1]
    push = driver.transfers[-1]
    assert (push.kind, push.request_id) == ("push", 1)
    driver.complete(0)
    for _ in range(3):
        step = asked(driver)
        assert step.decoding == 1
        assert 1 not in members(driver)
        driver.complete(0)
    step = asked(driver)
    driver.iterate(0, 2)
    driver.arrive(0)
    assert step.limit == step.issued, "a step under way ends at the next boundary for whom it has to let in"
    driver.complete(0)
    assert asked(driver).decoding == 2


def test_heads_switch_when_all_of_them_have_arrived() -> None:
    """A move reserves cache at once and does not stop decoding; the switch is at a boundary."""
    driver = SeamDriver(replace(ROOMY, workers=1, worker_blocks=100, interval=4, policy=OneRemoteGroup()))
    state = driver.submit(8, 60)
    serve(driver)
    before = OneRemoteGroup.away(driver.engines[0].view())
    home = driver.engines[0].plan.local_placement
    while not driver.transfers:
        asked(driver)
        driver.complete(0)
    assert driver.transfers[0].kind == "move"
    step = asked(driver)
    driver.iterate(0, 3)
    assert placement(state) == before
    driver.arrive(0)
    assert placement(state) == before
    assert step.limit == step.issued
    driver.complete(0)
    asked(driver)
    assert placement(state) == home
    assert state.moves == 1
    driver.check()


def placement(state: RequestState) -> Placement | None:
    """Where a request's heads are."""
    return state.shape.placement if state.shape is not None else None


def test_a_long_step_ends_with_the_first_request() -> None:
    """A collapsed step stands for the iterations to the first end, and no further."""
    driver = SeamDriver(ROOMY)
    for tokens in (20, 7, 30):
        driver.submit(4, tokens)
    serve(driver)
    step = asked(driver)
    assert step.limit == 6
    driver.iterate(0, 100)
    assert step.issued == 6
    driver.complete(0)
    assert [s.request_id for s in driver.left] == [0, 2]
    assert asked(driver).limit == 13


def test_single_iterations_on_request() -> None:
    """Without collapsing every step is one iteration."""
    driver = SeamDriver(ROOMY)
    driver.engines[0].settings = replace(driver.engines[0].settings, collapse=False)
    driver.submit(4, 9)
    serve(driver)
    assert asked(driver).limit == 1


def preempting(driver: SeamDriver) -> list[RequestState]:
    """Run until somebody has lost its cache; returns those who have."""
    while not (lost := [s for s in driver.left if s.preemptions]):
        serve(driver)
        driver.check()
    return lost


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_the_oldest_request_keeps_its_cache(mode: str) -> None:
    """When the cache runs out, younger requests give theirs up; the oldest is never among them."""
    driver = SeamDriver(replace(ROOMY, blocks=22, policy=LocalPolicy(mode)))  # type: ignore[arg-type]
    for _ in range(4):
        driver.submit(16, 40)
        driver.now_s += 1.0
    oldest = driver.controller.states[0]
    while driver.left:
        if oldest.status != Status.FINISHED:
            assert oldest.preemptions == 0
        serve(driver)
        driver.check()
    assert sum(s.preemptions for s in driver.controller.states.values()) > 0
    assert all(s.status == Status.FINISHED for s in driver.controller.states.values())


class OddOnesAway(LocalPolicy):
    """Requests of odd number are wholly at the first attention worker, the others at home."""

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
        home = view.plan.local_placement
        away = tuple(sum(home) if position.remote else 0 for position in view.plan.positions)
        return [away if request.request_id % 2 else home for request in requests]


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_who_has_no_cache_on_a_full_device_keeps_what_it_has(mode: str) -> None:
    """The latest arrival is not preempted, since its cache is at the worker, which has room."""
    policy = OddOnesAway(mode)  # type: ignore[arg-type]
    driver = SeamDriver(replace(ROOMY, blocks=12, workers=1, worker_blocks=400, policy=policy))
    for _ in range(4):
        driver.submit(16, 30)
        driver.now_s += 1
    assert [s.request_id for s in preempting(driver)] == [2]
    driver.drain()
    assert [s.preemptions for s in driver.controller.states.values() if s.request_id != 2] == [0, 0, 0]


def test_recomputing_starts_from_the_prompt_and_what_was_made() -> None:
    """A request without cache waits first in line and prefills its prompt with its own tokens."""
    driver = SeamDriver(replace(ROOMY, blocks=12))
    driver.submit(16, 30)
    driver.now_s += 1
    driver.submit(16, 30)
    (lost,) = preempting(driver)
    assert lost.status == Status.WAITING
    made = driver.tokens[lost.request_id]
    assert lost.context_tokens == 16 + made
    while driver.controller.states[0].status != Status.FINISHED:
        serve(driver)
    step = asked(driver)
    assert (prompts(step), step.prefill_tokens) == ([1], 16 + made)
    driver.complete(0)
    assert driver.tokens[1] == made + 1


def test_swapping_computes_nothing_again() -> None:
    """A request whose cache was parked in host memory goes on decoding when it is back."""
    driver = SeamDriver(replace(ROOMY, blocks=12, policy=LocalPolicy("swap")))
    driver.submit(16, 30)
    driver.now_s += 1
    driver.submit(16, 30)
    (lost,) = preempting(driver)
    memory = driver.engines[0].pressure._host_memory
    assert sum(memory.used_bytes) > 0
    computed = 0
    while driver.left:
        computed += serve(driver).prefill_tokens
    assert computed == 0
    assert lost.status == Status.FINISHED
    assert sum(memory.used_bytes) == 0


def test_full_host_memory_makes_swapping_recompute() -> None:
    """Where the host cannot hold the cache, the request computes it again instead."""
    driver = SeamDriver(replace(ROOMY, blocks=12, policy=LocalPolicy("swap"), host_bytes=10))
    driver.submit(16, 30)
    driver.now_s += 1
    driver.submit(16, 30)
    (lost,) = preempting(driver)
    assert lost.status == Status.WAITING
    driver.drain()


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_request_that_loses_its_cache_too_often_is_given_up(mode: str) -> None:
    """Preemptions are bounded by the setting; the end is a counted rejection with its reason."""
    scenario = replace(ROOMY, blocks=22, preemptions_max=1, policy=LocalPolicy(mode))  # type: ignore[arg-type]
    driver = SeamDriver(scenario)
    for _ in range(6):
        driver.submit(16, 60)
    driver.drain()
    states = driver.controller.states.values()
    given_up = [s for s in states if s.status == Status.REJECTED]
    assert given_up
    assert {s.reason for s in given_up} == {"preemption_limit"}
    assert max(s.preemptions for s in states) == 2
    assert all(s.preemptions <= 1 for s in states if s.status == Status.FINISHED)


def test_every_stage_has_a_batch_of_its_own_in_flight() -> None:
    """With three stages three micro-batches are under way, with each request in one of them."""
    driver = SeamDriver(replace(ROOMY, layers=(1, 2, 3), batch_requests=2))
    for _ in range(6):
        driver.submit(4, 10)
    lanes = set()
    for _ in range(3):
        lanes.add(asked(driver).lane)
    assert lanes == {0, 1, 2}
    assert driver.ask(0) is None
    while driver.steps:
        driver.complete(0)
    held = [set(lane.members) | {s.request_id for s in lane.joins} for lane in driver.engines[0].lanes]
    assert [len(requests) for requests in held] == [2, 2, 2]
    assert set.union(*held) == set(range(6))


def test_rejections_give_their_reason() -> None:
    """Longer than the model allows, or than the empty instance holds: said on arrival."""
    driver = SeamDriver(replace(ROOMY, blocks=20))
    assert driver.submit(4000, 97).reason == "context_limit"
    assert driver.submit(60, 21).reason == "cache_capacity"
    assert driver.submit(60, 19).reason == ""
    assert driver.controller.counts()["rejected"] == 2
    driver.drain()
