"""A driver without a clock: calls the verbs of a controller in whatever order a test wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support import TINY
from support_policies import SpyPolicy, spread
from support_runs import Scenario

from hetis_sim.control.controller import Controller
from hetis_sim.control.engine import Engine
from hetis_sim.control.invariants import check_controller
from hetis_sim.control.placement import PlacementShape
from hetis_sim.control.state import Ending, RequestState, Status
from hetis_sim.control.step import Outcome, Step, Transfer
from hetis_sim.control.timing import InstanceTimer
from hetis_sim.policies.view import RequestView
from hetis_sim.spec.request import Request


def held_blocks(engine: Engine, shape: PlacementShape, blocks: int) -> list[int]:
    """Blocks of one group at every position, counted one by one."""
    return spread(engine.plan, TINY.kv_heads, shape.placement, shape.ranges.blocks if shape.ranges else (),
                  blocks)


class SeamDriver:
    """Executes steps and transfers one by one and counts the tokens of every request by itself.

    Attributes:
        controller: what is driven.
        tokens: tokens made by each request, those of iterations under way included.
        steps: steps under way, each with the requests that decode in it.
        transfers: transfers under way.
        told: requests that were told to end early, and why.
        ended: requests that the controller has said to have ended.
    """

    def __init__(self, scenario: Scenario,
                 make: Callable[..., Controller] = Controller) -> None:
        given = scenario.given()
        self.now_s = 0.0
        self.tokens: dict[int, int] = {}
        self.steps: list[tuple[Step, list[RequestState]]] = []
        self.transfers: list[Transfer] = []
        self.told: dict[int, str] = {}
        self.ended: set[int] = set()
        policy = SpyPolicy(scenario.decider(), self.saw)
        timers = [InstanceTimer(given.cluster, TINY, given.cost, plan) for plan in given.plan.instances]
        self.controller = make(given.cluster, TINY, policy, given.plan, timers, given.settings)

    @property
    def engines(self) -> list[Engine]:
        """One per instance."""
        return self.controller.engines

    @property
    def left(self) -> list[RequestState]:
        """Requests that have not ended."""
        return [s for s in self.controller.states.values() if s.status < Status.FINISHED]

    def saw(self, question: str, about: tuple[Any, ...]) -> None:
        """A policy is never told of more or fewer tokens than were made."""
        for item in about:
            for view in [item] if isinstance(item, RequestView) else item if isinstance(item, list) else []:
                if isinstance(view, RequestView) and view.request_id in self.tokens:
                    made = self.tokens[view.request_id]
                    assert view.generated_tokens == made, question
                    # The latest token has no cache yet; a request on its way may be shown without it.
                    assert view.context_tokens - view.prompt_tokens in (made, made - 1), question

    # -- the verbs ---------------------------------------------------------------------------

    def submit(self, prompt_tokens: int, output_tokens: int) -> RequestState:
        """A request arrives now."""
        request = Request(len(self.tokens), self.now_s, prompt_tokens, output_tokens)
        self.tokens[request.request_id] = 0
        state = self.controller.submit(request, self.now_s)
        if state.instance >= 0:
            self.news(self.controller.news(state.instance))
        return state

    def ask(self, instance: int) -> Step | None:
        """Ask an instance for a step, and begin it."""
        step = self.controller.next_step(instance, self.now_s)
        self.news(self.controller.news(instance))
        if step is None:
            return None
        lane = self.engines[instance].lanes[step.lane]
        members = list(lane.members.values()) if step.decoding else []
        lane.fresh = []
        assert len(members) == step.decoding
        assert 1 == step.issued <= step.limit
        self.steps.append((step, members))
        self._count(members, 1)
        self.transfers += step.transfers
        return step

    def iterate(self, index: int, iterations: int) -> None:
        """Begin further iterations of a step, as far as its limit allows."""
        step, members = self.steps[index]
        iterations = min(iterations, step.limit - step.issued)
        step.issued += iterations
        self._count(members, iterations)

    def complete(self, index: int) -> None:
        """A step has been executed as far as it was begun."""
        step, _ = self.steps.pop(index)
        for chunk in step.chunks:
            if chunk.last:
                self.tokens[chunk.state.request_id] += 1
        step.limit = step.issued
        self.news(self.controller.complete(step, self.now_s))

    def arrive(self, index: int) -> None:
        """A transfer has ended."""
        transfer = self.transfers.pop(index)
        self.news(self.controller.arrived(transfer, self.now_s))

    def finish(self, request_id: int, reason: Ending) -> None:
        """End a request early, wherever it is."""
        self.told[request_id] = reason
        self.news(self.controller.finish(request_id, reason, self.now_s))

    def news(self, outcome: Outcome) -> None:
        """Requests end once, with exactly the tokens they asked for unless they are told to end."""
        self.transfers += outcome.transfers
        for state in (*outcome.finished, *outcome.rejected):
            assert state.request_id not in self.ended
            self.ended.add(state.request_id)
        for state in outcome.finished:
            assert state.status == Status.FINISHED
            made, told = self.tokens[state.request_id], self.told.get(state.request_id)
            assert made == state.request.output_tokens or (told == "stop" and made > 0)
        for state in outcome.rejected:
            assert state.status == Status.REJECTED
            assert state.reason
            assert state.reason in (self.told.get(state.request_id), "preemption_limit")
            assert self.told.get(state.request_id) != "stop" or not self.tokens[state.request_id]

    def _count(self, members: list[RequestState], iterations: int) -> None:
        for state in members:
            self.tokens[state.request_id] += iterations

    # -- what must hold ------------------------------------------------------------------------

    def check(self) -> None:
        """The controller's own checks, and the same from this driver's counts alone."""
        check_controller(self.controller)
        for state in self.controller.states.values():
            assert self.tokens[state.request_id] <= state.request.output_tokens
        for engine in self.engines:
            self._check_cache(engine)

    def _check_cache(self, engine: Engine) -> None:
        used = dict.fromkeys(engine.plan.devices, 0)
        for state in engine.active.values():
            if state.shape is None:
                continue
            made = self.tokens[state.request_id]
            # The latest token is not in cache before the next iteration; a prefill computes all.
            cached = state.request.prompt_tokens + made - (state.status != Status.PREFILL)
            blocks = -(-cached // engine.settings.limits.block_tokens)
            units = held_blocks(engine, state.shape, blocks)
            for position in engine.plan.positions:
                p, layers = position.index, position.layers
                used[position.device] += units[p] * layers
                if not position.remote and state.staged_blocks:
                    used[position.device] += (position.owned_groups * blocks - units[p]) * layers
                if state.move is not None:
                    then = held_blocks(engine, state.shape, state.move.blocks)[p]
                    gained = held_blocks(engine, state.move.shape, state.move.blocks)[p] - then
                    used[position.device] += max(0, gained) * layers
        for held in engine.landings.values():
            for position, units in zip(engine.plan.positions, held_blocks(engine, held.shape, held.blocks),
                                       strict=True):
                used[position.device] += units * position.layers
        assert dict(zip(engine.plan.devices, engine.books.ledger.used, strict=True)) == used

    def drain(self) -> None:
        """Carry everything out until no request is left, and see that nothing remains held."""
        still = 0
        while self.left:
            made = sum(self.tokens.values()), len(self.left)
            self.now_s += 1.0
            waiting = bool(self.transfers or self.steps)
            while self.transfers:
                self.arrive(0)
            while self.steps:
                self.iterate(0, 1 << 20)
                self.complete(0)
            steps = [self.ask(instance) for instance in range(len(self.engines))]
            assert waiting or any(steps) or self.transfers or not self.left, \
                "requests are left at a standstill"
            still = still + 1 if made == (sum(self.tokens.values()), len(self.left)) else 0
            assert still < 200, "much moves, but no request makes a token any more"
        self.check()
        for engine in self.engines:
            assert not any(engine.books.ledger.used)
            assert not engine.landings
            assert not engine.pressure.swapped
            while self.steps:
                self.complete(0)
            assert engine.pressure.moves == sum(t.kind == "move" and t.instance == engine.index
                                                for t in self.transfers)
