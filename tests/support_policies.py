"""Policies for tests: heads anywhere that is valid, moves at random, all of it pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from hetis_sim.policies.base import PlanningProblem, Policy, PreemptionMode
from hetis_sim.policies.plan import InstancePlan, Placement, Plan
from hetis_sim.policies.ranges import AnyPlacement, token_split
from hetis_sim.policies.view import InstanceLoad, InstanceView, Move, RequestView

PREEMPTIONS_AT_RANDOM = 2


def draw_placement(plan: InstancePlan, kv_heads: int, random: Random) -> Placement:
    """Any valid placement: ranks keep some of their groups, workers share the others."""
    placement: list[int] = []
    for stage in plan.stages:
        kept = [random.randint(0, owned) if plan.attention_workers else owned for owned in stage.owned_groups]
        shares = [0] * len(plan.attention_workers)
        for _ in range(kv_heads - sum(kept)):
            shares[random.randrange(len(shares))] += 1
        placement += kept + shares
    return tuple(placement)


def draw_split(plan: InstancePlan, kv_heads: int, most: int, random: Random) -> AnyPlacement:
    """Any valid placement with up to ``most`` blocks in ranges: at workers, and at home where no tail is."""
    tail: list[int] = []
    blocks: list[int] = []
    for stage in plan.stages:
        holders = random.sample(range(len(plan.attention_workers) + 1), len(plan.attention_workers) + 1)
        last, left = holders.pop(), most
        row = [0] * len(plan.attention_workers)
        home = 0
        for holder in holders:
            n = random.randint(0, left)
            left -= n
            if holder:
                row[holder - 1] = n
            else:
                home = n
        away = [0] * len(plan.attention_workers)
        if last:
            away[last - 1] = kv_heads
        tail += [*([0] * stage.tp if last else stage.owned_groups), *away]
        blocks += [*[home] * stage.tp, *row]
    return token_split(tuple(tail), blocks)


def spread(plan: InstancePlan, kv_heads: int, tail: Placement, ranges: Sequence[int], count: int,
           size: int = 1) -> list[int]:
    """KV heads times blocks (of ``size`` tokens: tokens) at every position, counted one by one."""
    found = [0] * len(plan.positions)
    for stage, indices in zip(plan.stages, plan.stage_positions, strict=True):
        home = list(indices)[:stage.tp]
        holders = [home] * (ranges[indices.start] if ranges else 0)
        for p in list(indices)[stage.tp:]:
            holders += [[p]] * (ranges[p] if ranges else 0)
        for n in range(count):
            if n // size < len(holders):
                for p in holders[n // size]:
                    found[p] += kv_heads if plan.positions[p].remote else plan.positions[p].owned_groups
            else:
                for p in indices:
                    found[p] += tail[p]
    return found


class LocalPolicy(Policy):
    """Every head at home; ``preemption`` as given. The plan is made by the test."""

    name = "local"

    def __init__(self, preemption: PreemptionMode = "recompute") -> None:
        self.preemption = preemption

    def plan(self, problem: PlanningProblem) -> Plan:
        raise AssertionError("tests make their own plans")


class WanderPolicy(LocalPolicy):
    """Draws every decision from a generator seeded by what the decision is about.

    A request that has lost its cache a few times, and request 0, which stands for any when the
    longest context is found, are placed the same way always, so that they fit in the end.

    Args:
        moving: share of the questions for a move that are answered with one.
        ranges: share of the placements drawn that may have token ranges.
    """

    name = "wander"

    def __init__(self, seed: int = 0, moving: float = 0.7, preemption: PreemptionMode = "recompute",
                 streams_handoff: bool = False, mixes_pools: bool = False, kv_heads: int = 4,
                 ranges: float = 0.0) -> None:
        super().__init__(preemption)
        self.ranges = ranges
        self.splits_tokens = ranges > 0
        self.streams_handoff = streams_handoff
        self.mixes_pools = mixes_pools
        self.seed = seed
        self.moving = moving
        self.kv_heads = kv_heads

    def random(self, *about: int) -> Random:
        """A generator for one decision."""
        return Random(repr((self.seed, about)))

    def route(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        return self.random(1, request.request_id).randrange(len(instances))

    def handoff(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        return self.random(6, request.request_id).randrange(len(instances))

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> Sequence[AnyPlacement]:
        placed: list[AnyPlacement] = []
        free = dict(view.free_units)
        for request in requests:
            for placement in self._wishes(request, view):
                need = view.units_needed(placement, request.context_tokens + 1)
                if all(units <= free[device] for device, units in need.items()):
                    break
            else:
                break
            for device, units in need.items():
                free[device] -= units
            placed.append(placement)
        return placed

    def _wishes(self, request: RequestView, view: InstanceView) -> list[AnyPlacement]:
        wishes: list[AnyPlacement] = []
        if request.request_id and request.preemptions <= PREEMPTIONS_AT_RANDOM:
            random = self.random(2, request.request_id, request.preemptions)
            wishes.append(self._draw(request, view, random))
        return [*wishes, view.plan.local_placement]

    def rebalance(self, view: InstanceView, running: Sequence[RequestView]) -> Move | None:
        return self._move(3, [r for r in running if r.movable], view)

    def relieve(self, view: InstanceView, device: int, running: Sequence[RequestView]) -> Move | None:
        there = [p.index for p in view.plan.positions if p.device == device]
        return self._move(4, [r for r in running if r.movable and r.placement is not None
                              and any(r.placement[p] or (r.blocks and r.blocks[p]) for p in there)], view)

    def _move(self, kind: int, movable: Sequence[RequestView], view: InstanceView) -> Move | None:
        if not movable or not view.plan.attention_workers:
            return None
        random = self.random(kind, *(r.generated_tokens for r in movable))
        chosen = movable[random.randrange(len(movable))]
        if random.random() > self.moving:
            return None
        return Move(chosen.request_id, self._draw(chosen, view, random))

    def _draw(self, request: RequestView, view: InstanceView, random: Random) -> AnyPlacement:
        if not self.ranges or random.random() >= self.ranges:
            return draw_placement(view.plan, self.kv_heads, random)
        most = (request.context_tokens - 1) // view.block_tokens
        return draw_split(view.plan, self.kv_heads, most, random)

    def victim(self, device: int, candidates: Sequence[RequestView]) -> RequestView:
        return self.random(5, device, *(r.request_id for r in candidates)).choice(candidates)


class SpyPolicy(Policy):
    """Asks another policy, and tells ``saw`` what was asked: (question, everything handed over)."""

    name = "spy"

    def __init__(self, inner: Policy, saw: Callable[[str, tuple[Any, ...]], None]) -> None:
        self.inner = inner
        self.saw = saw
        self.preemption = inner.preemption
        self.streams_handoff = inner.streams_handoff
        self.mixes_pools = inner.mixes_pools

    def plan(self, problem: PlanningProblem) -> Plan:
        self.saw("plan", (problem,))
        return self.inner.plan(problem)

    def route(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        self.saw("route", (request, instances))
        return self.inner.route(request, instances)

    def handoff(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        self.saw("handoff", (request, instances))
        return self.inner.handoff(request, instances)

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
        self.saw("dispatch", (requests, view))
        return self.inner.dispatch(requests, view)

    def rebalance(self, view: InstanceView, running: Sequence[RequestView]) -> Move | None:
        self.saw("rebalance", (view, running))
        return self.inner.rebalance(view, running)

    def relieve(self, view: InstanceView, device: int, running: Sequence[RequestView]) -> Move | None:
        self.saw("relieve", (view, device, running))
        return self.inner.relieve(view, device, running)

    def victim(self, device: int, candidates: Sequence[RequestView]) -> RequestView:
        self.saw("victim", (device, candidates))
        return self.inner.victim(device, candidates)
