"""Small clusters, plans and policies for tests of the executor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from hetis_exec.crew import ThreadCrew, WorkerSpec
from hetis_exec.driver import ExecutionResult, Executor, ExecutorInput
from hetis_exec.messages import CacheData
from hetis_exec.places import devices_of
from hetis_exec.toy_model import ToyModel
from hetis_exec.transport import Delay, InProcessTransport
from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.cost.roofline import RooflineCost
from hetis_sim.policies.base import EngineLimits, PlanningProblem, Policy
from hetis_sim.policies.memory import cache_bytes, mesh_cache_bytes, unit_bytes
from hetis_sim.policies.plan import InstancePlan, Placement, Plan, StagePlan
from hetis_sim.policies.ranges import AnyPlacement, token_split
from hetis_sim.policies.view import InstanceLoad, InstanceView, Move, RequestView
from hetis_sim.spec.cluster import ClusterSpec, HostSpec, LinkSpec
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec
from hetis_sim.spec.request import Request

MODEL = ModelSpec("toy", layers=4, hidden=24, query_heads=8, kv_heads=4, head_dim=6, ffn_hidden=40, vocab=89,
                  context_limit_tokens=256, weight_bytes=4, kv_bytes=4)
LIMITS = EngineLimits(block_tokens=4, max_batch_requests=16, max_batch_tokens=128, memory_utilization=1.0)
LINK = LinkSpec("toy-link", 1e10, 1e-6)

# -- clusters and plans --------------------------------------------------------------------------------


def cluster_for(plan: Plan, units: int | Mapping[int, int], hosts: Sequence[int] = (),
                model: ModelSpec = MODEL) -> ClusterSpec:
    """A cluster on which every device of the plan has room for exactly so many units of cache.

    ``hosts`` gives the number of devices of each host; by default there is one host.
    """
    number = 1 + max(devices_of(plan))
    wanted = units if isinstance(units, Mapping) else dict.fromkeys(range(number), units)
    large = 1 << 34
    roomy = ClusterSpec("roomy", (HostSpec((_gpu("roomy", large),) * number, LINK),), LINK)
    memory = [large] * number
    teams = [cache_bytes(roomy, model, LIMITS, instance) for instance in plan.instances]
    if plan.mesh is not None:
        teams.append(mesh_cache_bytes(roomy, model, LIMITS, plan.mesh))
    for team in teams:
        for device, left in team.items():
            memory[device] = large - left + wanted[device] * unit_bytes(model, LIMITS)
    gpus = [_gpu(f"toy{device}", memory[device]) for device in range(number)]
    ends = np.cumsum(list(hosts) or [number]).tolist()
    return ClusterSpec("toys", tuple(HostSpec(tuple(gpus[a:b]), LINK)
                                     for a, b in zip([0, *ends[:-1]], ends, strict=True)), LINK)


def _gpu(name: str, memory_bytes: int) -> GpuSpec:
    return GpuSpec(name, memory_bytes, 1e11, 1e13, 1e13, 5e12)


def pipeline(stages: Sequence[Sequence[int]], layers: Sequence[int], workers: Sequence[int] = (),
             owned: Sequence[Sequence[int]] = ()) -> Plan:
    """One instance: devices, layers and groups owned in each stage, and attention workers."""
    owned = owned or [[MODEL.kv_heads // len(devices)] * len(devices) for devices in stages]
    parts = [StagePlan(tuple(devices), count, tuple(groups))
             for devices, count, groups in zip(stages, layers, owned, strict=True)]
    return Plan((InstancePlan(tuple(parts), tuple(workers)),))


# -- policies --------------------------------------------------------------------------------------------


class Fixed(Policy):
    """Every request gets the same placement, if it fits; by default it stays at the ranks."""

    name = "fixed"

    def __init__(self, placement: Placement | None = None, preemption: str = "recompute") -> None:
        self.placement = placement
        self.preemption = preemption  # type: ignore[assignment]

    def plan(self, problem: PlanningProblem) -> Plan:
        raise AssertionError("the test has a plan")

    def choice(self, request: RequestView, view: InstanceView) -> AnyPlacement:
        return self.placement or view.plan.local_placement

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> list[AnyPlacement]:
        placed: list[AnyPlacement] = []
        free = dict(view.free_units)
        for request in requests:
            choice = self.choice(request, view)
            need = view.units_needed(choice, request.context_tokens + 1)
            if any(units > free[device] for device, units in need.items()):
                break
            for device, units in need.items():
                free[device] -= units
            placed.append(choice)
        return placed


class Turning(Fixed):
    """Begins with one of some placements and moves the heads of running requests on to the next."""

    name = "turning"

    def __init__(self, placements: Sequence[Placement], preemption: str = "recompute") -> None:
        super().__init__(placements[0], preemption)
        self.placements = tuple(placements)

    def choice(self, request: RequestView, view: InstanceView) -> Placement:
        return self.placements[request.request_id % len(self.placements)]

    def rebalance(self, view: InstanceView, running: Sequence[RequestView]) -> Move | None:
        movable = [request for request in running if request.movable]
        if not movable:
            return None
        chosen = movable[view.context_tokens % len(movable)]
        at = self.placements.index(chosen.placement)
        return Move(chosen.request_id, self.placements[(at + 1) % len(self.placements)])


class Dividing(Fixed):
    """Divides the tokens of every request, and moves them on from one division to the next.

    A layout has the tail's groups at each position, and eighths of the whole blocks that are in a range
    there. ``moves`` is false where everybody stays.
    """

    name = "dividing"
    splits_tokens = True

    def __init__(self, layouts: Sequence[tuple[Placement, Sequence[int]]], preemption: str = "recompute", *,
                 moves: bool = False) -> None:
        super().__init__(None, preemption)
        self.layouts = tuple(layouts)
        self.moves = moves

    def layout(self, number: int, tokens: int, block_tokens: int) -> AnyPlacement:
        tail, eighths = self.layouts[number % len(self.layouts)]
        whole = (tokens - 1) // block_tokens
        return token_split(tail, [whole * n // 8 for n in eighths])

    def choice(self, request: RequestView, view: InstanceView) -> AnyPlacement:
        return self.layout(request.request_id, request.context_tokens, view.block_tokens)

    def rebalance(self, view: InstanceView, running: Sequence[RequestView]) -> Move | None:
        movable = [request for request in running if request.movable]
        if not movable or not self.moves:
            return None
        chosen = movable[view.context_tokens % len(movable)]
        tokens = chosen.context_tokens - 1
        for number in range(len(self.layouts)):
            found = self.layout(chosen.request_id + chosen.context_tokens + number, tokens, view.block_tokens)
            if found != chosen.placed:
                return Move(chosen.request_id, found)
        return None


class Handing(Fixed):
    """Prompts are computed in one pool and decoded in another, where decode instances take turns.

    ``streams`` sends cache while prompts are computed, ``mixes`` lets either pool do the other's work.
    """

    name = "handing"

    def __init__(self, preemption: str = "recompute", *, streams: bool = False, mixes: bool = False) -> None:
        super().__init__(None, preemption)
        self.streams_handoff = streams
        self.mixes_pools = mixes

    def choice(self, request: RequestView, view: InstanceView) -> Placement:
        """As many groups as there are go from every rank to attention workers, where there are any."""
        workers = [p for p in view.plan.positions if p.remote]
        placement = list(view.plan.local_placement)
        for p in workers:
            rank = next(q for q in view.plan.stage_positions[p.stage] if placement[q])
            placement[rank] -= 1
            placement[p.index] += 1
        return tuple(placement)

    def handoff(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        return request.request_id % len(instances)


class Relieving(Fixed):
    """Takes one group off a device that fills up, to the attention worker with most room."""

    name = "relieving"

    def relieve(self, view: InstanceView, device: int, running: Sequence[RequestView]) -> Move | None:
        for request in running:
            for p in view.plan.positions:
                if not request.movable or p.device != device or p.remote or not request.placement[p.index]:
                    continue
                remote = [q for q in view.plan.positions if q.remote and q.stage == p.stage]
                target = max(remote, key=lambda q: view.free_units[q.device])
                placement = list(request.placement)
                placement[p.index] -= 1
                placement[target.index] += 1
                return Move(request.request_id, tuple(placement))
        return None


def pools(*instances: tuple[str, Plan]) -> Plan:
    """Several instances of one plan each, with roles."""
    return Plan(tuple(replace(plan.instances[0], role=role) for role, plan in instances))


# -- runs --------------------------------------------------------------------------------------------------


def workload(count: int, prompt: tuple[int, int] = (3, 30), output: tuple[int, int] = (1, 14),
             gap_s: float = 0.002, seed: int = 5) -> list[Request]:
    """Requests of lengths in the given ranges, at even distances."""
    rng = np.random.default_rng(seed)
    return [Request(n, n * gap_s, int(rng.integers(*prompt, endpoint=True)),
                    int(rng.integers(*output, endpoint=True))) for n in range(count)]


def given(plan: Plan, policy: Policy, requests: Sequence[Request], units: int | Mapping[int, int] = 4000,
          hosts: Sequence[int] = (), **changes: Any) -> ExecutorInput:
    """The input of a run; ``changes`` go to the scheduler's settings or to the executor."""
    own = {key: changes.pop(key) for key in ("timeout_s", "seed", "model", "backend", "throttles", "cores")
           if key in changes}
    settings = SchedulerSettings(limits=LIMITS, **{"rebalance_interval": 2, **changes})
    model = own.pop("model", MODEL)
    cluster = cluster_for(plan, units, hosts, model)
    return ExecutorInput(cluster, model, RooflineCost(), policy, plan, requests, settings, log_decisions=True,
                         debug=True, **{"timeout_s": 10.0, **own})


def slow_cache(seconds: float) -> Delay:
    """Cache takes its time, so that steps go on meanwhile."""
    return lambda sender, target, message: seconds if isinstance(message, CacheData) else 0.0


def threads(delay: Delay | None = None) -> Callable[[Sequence[WorkerSpec]], ThreadCrew]:
    """Workers as threads, with messages on a wire of some length."""
    return lambda specs: ThreadCrew(specs, InProcessTransport(delay))


def run(what: ExecutorInput, delay: Delay | None = None) -> tuple[Executor, ExecutionResult]:
    """Run to the end on threads."""
    executor = Executor(what, threads(delay))
    return executor, executor.run()


def expected_tokens(what: ExecutorInput) -> dict[int, list[int]]:
    """What one process without any cache generates for every request."""
    return {request.request_id: _generated(what.model, what.seed, tuple(what.prompt(request).tolist()),
                                           request.output_tokens) for request in what.requests}


@cache
def _generated(model: ModelSpec, seed: int, prompt: tuple[int, ...], count: int) -> list[int]:
    return ToyModel(model, seed).generate(np.array(prompt), count)
