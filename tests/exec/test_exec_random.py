"""Random plans, policies, settings and networks: whatever the executor is put through, it holds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from exec_meshes import CHAIN, DIAMOND, FORK, OVERLAP, meshed
from exec_toys import Fixed, expected_tokens, given, pipeline, pools, threads, workload
from support_policies import WanderPolicy

from hetis_exec.driver import Executor, ExecutorInput
from hetis_exec.messages import CacheData, Message
from hetis_exec.replay import replay
from hetis_exec.sources import Arrival, Ended, Trace
from hetis_exec.transport import Delay
from hetis_sim.control.state import RequestState
from hetis_sim.policies.base import Policy
from hetis_sim.policies.plan import InstancePlan, Placement, Plan, StagePlan
from hetis_sim.policies.view import InstanceLoad, InstanceView, Move, RequestView

PLANS = (
    pipeline([[0]], [4], [1, 2]),
    pipeline([[0], [1]], [3, 1], [2]),
    pipeline([[0, 1]], [4], [2, 3], owned=[[3, 1]]),
    pipeline([[0, 1], [2]], [2, 2], [3, 4], owned=[[2, 2], [4]]),
    pipeline([[0], [1], [2]], [1, 2, 1], [3]),
    pipeline([[0, 1, 2]], [4], [3, 4, 5], owned=[[2, 1, 1]]),
    Plan((InstancePlan((StagePlan((0,), 4, (4,)),), (1,)),
          InstancePlan((StagePlan((2,), 2, (4,)), StagePlan((3,), 2, (4,))), (4,)))),
)
POOL_PLANS = (
    pools(("prefill", pipeline([[0, 1]], [4], owned=[[3, 1]])),
          ("decode", pipeline([[2], [3]], [1, 3], [4]))),
    pools(("prefill", pipeline([[0], [1]], [3, 1])), ("decode", pipeline([[2, 3]], [4], owned=[[1, 3]]))),
    pools(("prefill", pipeline([[0]], [4])), ("prefill", pipeline([[1], [2]], [2, 2])),
          ("decode", pipeline([[3]], [4], [4, 5])), ("decode", pipeline([[6], [7]], [2, 2]))),
    pools(("prefill", pipeline([[0]], [4])), ("decode", pipeline([[1, 2, 3]], [4], owned=[[2, 1, 1]])),
          ("both", pipeline([[4]], [4], [5]))),
)


class Whims(Fixed):
    """Places and moves heads at random, but the same for the same question."""

    name = "whims"

    def __init__(self, seed: int, preemption: str, moves: bool, streams: bool = False,
                 mixes: bool = False) -> None:
        super().__init__(None, preemption)
        self.streams_handoff = streams
        self.mixes_pools = mixes
        self.seed = seed
        self.moves = moves

    def route(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        return (request.request_id + request.preemptions) % len(instances)

    def handoff(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        return request.request_id % len(instances)

    def _place(self, view: InstanceView, *question: object) -> Placement:
        rng = random.Random(f"{self.seed}:{question}")
        placement = [0] * len(view.plan.positions)
        for indices in view.plan.stage_positions:
            workers = [p for p in indices if view.plan.positions[p].remote]
            for p in indices:
                if not workers:
                    placement[p] = view.plan.positions[p].owned_groups
                    continue
                for _ in range(view.plan.positions[p].owned_groups):
                    placement[rng.choice(workers) if rng.random() < 0.6 else p] += 1
        return tuple(placement)

    def choice(self, request: RequestView, view: InstanceView) -> Placement:
        for attempt in range(6):
            placement = self._place(view, request.request_id, request.preemptions, attempt)
            if view.fits(placement, request.context_tokens + 1):
                return placement
        return view.plan.local_placement

    def rebalance(self, view: InstanceView, running: Sequence[RequestView]) -> Move | None:
        return self._move(view, running, "rebalance")

    def relieve(self, view: InstanceView, device: int, running: Sequence[RequestView]) -> Move | None:
        return self._move(view, running, f"relieve {device}") if view.context_tokens % 3 else None

    def _move(self, view: InstanceView, running: Sequence[RequestView], why: str) -> Move | None:
        movable = [request for request in running if request.movable] if self.moves else []
        if not movable:
            return None
        chosen = movable[view.context_tokens % len(movable)]
        return Move(chosen.request_id, self._place(view, chosen.request_id, chosen.generated_tokens, why))


def random_wires(seed: int, rng: random.Random) -> Delay | None:
    """Links of different speed, for cache alone or for everything."""
    kind = rng.choice(("none", "cache", "all"))
    delays: dict[tuple[int, int, bool], float] = {}

    def delay_s(sender: int, target: int, message: Message) -> float:
        link = (sender, target, isinstance(message, CacheData))
        if link not in delays:
            slow = kind == "all" or link[2]
            delays[link] = random.Random(f"{seed}{link}").choice((0.0, 0.0005, 0.002)) if slow else 0.0
        return delays[link]

    return None if kind == "none" else delay_s


def random_input(seed: int, rng: random.Random, kind: str) -> ExecutorInput:
    """Everything else."""
    pooled = kind == "pools"
    plan = rng.choice(POOL_PLANS if pooled else PLANS)
    devices = 1 + max(device for instance in plan.instances for device in instance.devices)
    requests = workload(rng.randint(3, 10), (1, rng.choice((8, 30))), (1, rng.choice((6, 24))),
                        rng.choice((0.0, 0.0005, 0.003)), seed)
    if kind == "mesh":
        return meshed(rng.choice((FORK, CHAIN, DIAMOND, OVERLAP)), requests, tp=rng.choice((1, 1, 2)),
                      blocks=rng.choice((16, 20, 30, 100)), seed=seed)
    policy: Policy = Whims(seed, rng.choice(("swap", "recompute")), rng.random() < 0.8,
                           pooled and rng.random() < 0.6, pooled and rng.random() < 0.4)
    if kind == "parts":
        policy = WanderPolicy(seed, rng.choice((0.0, 0.5, 0.9)), rng.choice(("swap", "recompute")),
                              ranges=0.7)
    return given(plan, policy, requests,
                 units=rng.choice((150, 200, 260, 400, 1000)),
                 hosts=rng.choice(((devices,), (1,) * devices, (devices - 1, 1))),
                 chunked_prefill=rng.random() < 0.4, chunk_tokens=rng.choice((6, 16, 40)),
                 moves_max=rng.choice((1, 2, 3)), rebalance_interval=rng.choice((1, 2, 5)))


class Capricious:
    """Calls a text complete with every ninth kind of token, and gives up some requests at any time."""

    poll_s = 0.001

    def __init__(self, seed: int, what: ExecutorInput) -> None:
        self._seed = seed
        self._trace = Trace(what.requests)
        rng = random.Random(f"{seed} ends")
        given_up = [request for request in what.requests if rng.random() < 0.3]
        self._ends = sorted((request.arrival_s + rng.choice((0.0, 0.002, 0.01, 0.03)), request.request_id)
                            for request in given_up)

    def completes(self, token: int) -> bool:
        """Whether a text ends with a token."""
        return (token + self._seed) % 9 == 0

    # What a listener does.

    def began(self) -> None:
        pass

    def token(self, request_id: int, token: int) -> bool:
        return self.completes(token)

    def ended(self, state: RequestState) -> None:
        pass

    # What a source does.

    def next_s(self) -> float:
        return min(self._trace.next_s(), self._ends[0][0] if self._ends else math.inf)

    def take(self, start_s: float) -> Arrival | Ended:
        if self._ends and self._ends[0][0] < self._trace.next_s():
            return Ended(self._ends.pop(0)[1], "aborted")
        return self._trace.take(start_s)

    def due(self, now_s: float) -> int:
        return self._trace.due(now_s)

    @property
    def over(self) -> bool:
        return self._trace.over


def check(seed: int, kind: str = "pipelines", early: bool = False) -> int:
    """Tokens are right, cache is free at the end, and the simulator decides the same; early ends."""
    rng = random.Random(seed)
    what = random_input(seed, rng, kind)
    whims = Capricious(seed, what) if early else None
    executor = Executor(what, threads(random_wires(seed, rng)), listener=whims, source=whims)
    result = executor.run()
    wanted = expected_tokens(what)
    if whims is not None:
        wanted = {request_id: tokens[:next((n for n, token in enumerate(tokens, 1) if whims.completes(token)),
                                           len(tokens))] for request_id, tokens in wanted.items()}
    assert result.tokens == {request_id: wanted[request_id] for request_id in result.tokens}
    states = executor.controller.states.values()
    reasons = {"cache_capacity", "aborted"} if early else {"cache_capacity"}
    assert {state.reason for state in states if state.request_id not in result.tokens} <= reasons
    assert all(worker.cache.pool.used_units == 0 for worker in executor.crew.workers.values())
    simulation = replay(what, result.record)
    assert simulation.recorder.requests().equals(result.recorder.requests())
    return len(result.record.ends)


KINDS = ("pipelines", "pools", "parts", "mesh")
"""Whole contexts; prompts and decoding apart; contexts that are divided by tokens; nodes and paths."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_any_run_holds(seed: int, kind: str) -> None:
    """A few random runs."""
    check(seed, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_any_run_with_early_ends_holds(seed: int, kind: str) -> None:
    """A few random runs in which texts are complete early, or given up."""
    assert check(seed, kind, early=True) > 0


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 300, 10))
def test_many_runs_hold(first: int) -> None:
    """Many random runs."""
    for seed in range(first, first + 10):
        check(seed, KINDS[seed % 4], early=seed % 3 == 0)
