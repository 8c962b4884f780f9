"""Checks that a policy keeps the rules of the interface; for one's own policies too.

    from hetis_sim.policies.check import check_policy
    check_policy(MyPolicy(), problem)

Plans must be possible on the cluster; placements complete, within what ranks own and within
the free cache; moves movable; and every decision a pure function of its arguments.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hetis_sim.policies.base import PlanningProblem, Policy
from hetis_sim.policies.check_mesh import MeshBench, check_mesh_plan, mesh_signature
from hetis_sim.policies.costs import position_costs
from hetis_sim.policies.memory import cache_bytes, cache_units
from hetis_sim.policies.plan import InstancePlan, Plan
from hetis_sim.policies.ranges import (
    AnyPlacement,
    TokenSplit,
    computed_groups,
    full_groups,
    group_blocks,
    group_tokens,
    split_fault,
    token_split,
)
from hetis_sim.policies.view import InstanceLoad, InstanceView, Move, RequestView
from hetis_sim.spec.errors import HetisError


class ConformanceError(HetisError, AssertionError):
    """A policy breaks a rule of the interface; the text names the rule and the case."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was checked: the plan, and how many decisions of each kind.

    For a mesh ``dispatched`` counts the requests that asked for a path and ``placed`` those that got one.
    """

    plan: Plan
    dispatched: int
    placed: int
    moves: int


def check_policy(policy: Policy, problem: PlanningProblem, *, seed: int = 0, rounds: int = 30) -> CheckReport:
    """Check a policy on one planning problem and on random states of the instances it plans.

    Args:
        policy: the policy.
        problem: a cluster, model and workload that it should be able to plan for.
        seed: of the random states.
        rounds: states for each distinct instance.

    Raises:
        ConformanceError: a rule is broken.
        InfeasibleError: the policy finds no plan, which is no breach.
    """
    plan = policy.plan(problem)
    check_plan(plan, problem)
    again = policy.plan(problem)
    _require((again.instances, again.mesh) == (plan.instances, plan.mesh), "plan is repeatable",
             "two calls differ")
    _check_host_order(policy, problem, plan)
    if not policy.plans_for_rate:
        other = policy.plan(replace(problem, rate_per_s=2.0 * (problem.rate_per_s or 1.0)))
        _require((other.instances, other.mesh) == (plan.instances, plan.mesh),
                 "one plan for all rates where plans_for_rate is False", "twice the rate has another plan")
    dispatched = placed = moves = 0
    if plan.mesh is not None:
        mesh = MeshBench(policy, problem, plan.mesh, seed, _require)
        mesh.check_empty()
        for _ in range(rounds):
            mesh.check_state()
        return CheckReport(plan, mesh.asked, mesh.opened, 0)
    for index, instance in enumerate(_distinct(plan)):
        bench = _Bench(policy, problem, instance, index, random.Random(f"{seed}/{index}"))
        bench.check_empty()
        for _ in range(rounds):
            bench.check_state()
        dispatched, placed, moves = dispatched + bench.dispatched, placed + bench.placed, moves + bench.moves
    _check_choices(policy, problem, plan, random.Random(f"{seed}/choices"), rounds)
    return CheckReport(plan, dispatched, placed, moves)


def check_plan(plan: Plan, problem: PlanningProblem) -> None:
    """Check that a plan can be carried out.

    Raises:
        ConformanceError: it cannot.
    """
    cluster, model = problem.cluster, problem.model
    known = set(range(len(cluster.devices)))
    if plan.mesh is not None:
        check_mesh_plan(plan.mesh, problem, _require)
    for number, instance in enumerate(plan.instances):
        where = f"instance {number}"
        _require(set(instance.devices) <= known, "devices exist", f"{where}: {instance.devices}")
        _require(instance.layers == model.layers, "layers sum to the model's",
                 f"{where}: {[stage.layers for stage in instance.stages]} for {model.layers}")
        for stage in instance.stages:
            _require(sum(stage.owned_groups) == model.kv_heads, "owned groups sum to the KV heads",
                     f"{where}: {stage.owned_groups} for {model.kv_heads}")
        for device, left in cache_bytes(cluster, model, problem.limits, instance).items():
            _require(left >= 0, "weights fit", f"{where}: device {device} lacks {-left} bytes")
    _require(set(plan.reasons) <= known, "reasons are for devices", str(sorted(plan.reasons)))


def _check_host_order(policy: Policy, problem: PlanningProblem, plan: Plan) -> None:
    """The plan does not depend on the order in which hosts are listed, but for their numbers."""
    cluster = problem.cluster
    if cluster.host_links:
        return
    turned = replace(problem, cluster=replace(cluster, hosts=cluster.hosts[::-1]))
    other = policy.plan(turned)
    _require(_signature(plan, problem) == _signature(other, turned), "host order does not matter",
             f"{_signature(plan, problem)} became {_signature(other, turned)} with the hosts in reverse")


def _signature(plan: Plan, problem: PlanningProblem) -> list[tuple[object, ...]]:
    devices = problem.cluster.devices
    found: list[tuple[object, ...]] = mesh_signature(plan.mesh, problem) if plan.mesh is not None else []
    for instance in plan.instances:
        stages = tuple((devices[stage.devices[0]].gpu.name, stage.tp, stage.layers)
                       for stage in instance.stages)
        workers = tuple(sorted(devices[d].gpu.name for d in instance.attention_workers))
        found.append((stages, workers, instance.role))
    return sorted(found)


def _distinct(plan: Plan) -> list[InstancePlan]:
    """One instance of each form."""
    found: dict[tuple[object, ...], InstancePlan] = {}
    for instance in plan.instances:
        form = (tuple((stage.tp, stage.layers) for stage in instance.stages), len(instance.attention_workers),
                instance.role)
        found.setdefault(form, instance)
    return list(found.values())


class _Bench:
    """One instance in random states."""

    def __init__(self, policy: Policy, problem: PlanningProblem, plan: InstancePlan, index: int,
                 rng: random.Random) -> None:
        self.policy = policy
        self.problem = problem
        self.plan = plan
        self.rng = rng
        self.costs = position_costs(problem.cluster, problem.model, problem.cost, plan)
        self.full = cache_units(problem.cluster, problem.model, problem.limits, plan)
        self.capacity = self.full
        self.most = full_groups(plan)
        self.empty = self._view(index, [])
        self.dispatched = self.placed = self.moves = 0

    def _view(self, index: int, running: Sequence[RequestView]) -> InstanceView:
        groups, tokens = [0] * len(self.plan.positions), [0] * len(self.plan.positions)
        free, block = dict(self.capacity), self.problem.limits.block_tokens
        for request in running:
            placed, context = request.placed, request.context_tokens
            assert placed is not None
            groups = [a + b for a, b in zip(groups, computed_groups(self.plan, placed), strict=True)]
            held = group_tokens(self.plan, placed, context, block)
            tokens = [a + b for a, b in zip(tokens, held, strict=True)]
            for position, n in zip(self.plan.positions, group_blocks(self.plan, placed, -(-context // block)),
                                   strict=True):
                free[position.device] -= n * position.layers
        return InstanceView(index, self.plan, self.costs, groups, tokens, len(self.plan.stages), free,
                            self.capacity, block, len(running), 0, 0, sum(r.context_tokens for r in running))

    def check_empty(self) -> None:
        """A request of one token always has a place on the empty instance."""
        request = RequestView(0, 0.0, 1, 1)
        placed = self._dispatch([request], self.empty)
        _require(len(placed) == 1, "a short request fits on the empty instance", f"instance {self.plan}")

    def check_state(self) -> None:
        """A random load, on as much cache as there is or on a small part of it; then every decision on it."""
        share = self.rng.choice((1, 1, 20, 100))
        self.capacity = {device: units // share for device, units in self.full.items()}
        self.empty = self._view(self.empty.index, [])
        running = self._random_load()
        view = self._view(self.empty.index, running)
        new = [self._random_request(10_000 + i) for i in range(self.rng.randint(1, 12))]
        self._dispatch(new, view)
        self._check_move("rebalance", view, running, self._pure("rebalance", view, running), None)
        device = self.rng.choice(self.plan.devices)
        short = replace(view, free_units={**view.free_units, device: 0})
        self._check_move("relieve", short, running, self._pure("relieve", short, running, device), device)
        if running:
            victim = self.policy.victim(device, running)
            _require(victim in running, "the victim is one of the candidates", str(victim))

    def _random_request(self, number: int) -> RequestView:
        longest = self.problem.model.context_limit_tokens
        tokens = max(1, min(longest - 1, int(self.rng.expovariate(1.0 / self.rng.choice((50, 500, 3000))))))
        return RequestView(number, float(number), tokens, tokens)

    def _random_load(self) -> list[RequestView]:
        """Running requests: some where the policy puts them, some anywhere."""
        running: list[RequestView] = []
        view = self.empty
        for number in range(self.rng.choice((0, 1, 5, 40))):
            request = self._random_request(number)
            chosen: AnyPlacement | None
            if self.rng.random() < 0.5:
                chosen = next(iter(self.policy.dispatch([request], view)), None)
            else:
                chosen = self._anywhere(request.context_tokens)
            if chosen is None or not view.fits(chosen, request.context_tokens + 1):
                break
            movable = self.rng.random() < 0.9
            tail, blocks = (chosen.tail, chosen.blocks) if isinstance(chosen, TokenSplit) else (chosen, ())
            running.append(replace(request, placement=tail, blocks=blocks, generated_tokens=1,
                                   movable=movable))
            view = self._view(self.empty.index, running)
        return running

    def _anywhere(self, tokens: int) -> AnyPlacement:
        if self.policy.splits_tokens and self.plan.attention_workers and self.rng.random() < 0.5:
            return self._ranges_anywhere(tokens)
        placement = [0] * len(self.plan.positions)
        for indices in self.plan.stage_positions:
            open_ = [p for p in indices for _ in range(self._limit(p))]
            for p in self.rng.sample(open_, self.problem.model.kv_heads):
                placement[p] += 1
        return tuple(placement)

    def _ranges_anywhere(self, tokens: int) -> AnyPlacement:
        """The tail at home, older blocks at workers."""
        blocks = [0] * len(self.plan.positions)
        for stage, indices in zip(self.plan.stages, self.plan.stage_positions, strict=True):
            left = (tokens - 1) // self.problem.limits.block_tokens
            for p in indices[stage.tp:]:
                blocks[p] = self.rng.randint(0, left)
                left -= blocks[p]
        return token_split(self.plan.local_placement, blocks)

    def _limit(self, p: int) -> int:
        return self.most[p]

    def _dispatch(self, requests: list[RequestView], view: InstanceView) -> Sequence[AnyPlacement]:
        before = copy.deepcopy((view, requests))
        placed = self.policy.dispatch(requests, view)
        again = self.policy.dispatch(requests, view)
        _require(again == placed, "dispatch is pure", f"two calls differ on {view}")
        _require((view, requests) == before, "dispatch leaves its arguments alone", str(view))
        _require(len(placed) <= len(requests), "dispatch places a prefix", f"{len(placed)}/{len(requests)}")
        free = dict(view.free_units)
        for request, placement in zip(requests, placed, strict=False):
            self._check_placement("dispatch", placement, request.context_tokens)
            for device, units in view.units_needed(placement, request.context_tokens + 1).items():
                free[device] -= units
        _require(all(units >= min(0, view.free_units[d]) for d, units in free.items()),
                 "placements fit the free cache", f"{placed} on {view.free_units}")
        self.dispatched += len(requests)
        self.placed += len(placed)
        return placed

    def _check_placement(self, decision: str, chosen: AnyPlacement, tokens: int) -> None:
        placement = chosen.tail if isinstance(chosen, TokenSplit) else chosen
        if isinstance(chosen, TokenSplit):
            fault = split_fault(self.plan, chosen)
            _require(not fault, f"{decision} gives ranges that keep the rules", f"{chosen} {fault}")
            held = group_blocks(self.plan, chosen, (tokens - 1) // self.problem.limits.block_tokens)
            _require(min(held) >= 0, f"{decision} leaves a token to the tail", f"{chosen}, {tokens} tokens")
            _require(self.policy.splits_tokens, "splits_tokens says that there are ranges", str(chosen))
        whole = type(placement) is tuple and all(type(n) is int for n in placement)
        _require(whole and len(placement) == len(self.plan.positions),
                 f"{decision} gives a tuple with a whole number for every position", repr(placement))
        for stage, indices in enumerate(self.plan.stage_positions):
            _require(sum(placement[p] for p in indices) == self.problem.model.kv_heads,
                     f"{decision} places all heads of every stage", f"stage {stage} of {placement}")
        _require(all(0 <= placement[p.index] <= self._limit(p.index) for p in self.plan.positions),
                 f"{decision} gives ranks only heads that they own", str(placement))

    def _pure(self, decision: str, view: InstanceView, running: list[RequestView],
              *device: int) -> Move | None:
        before = copy.deepcopy((view, running))
        decide = getattr(self.policy, decision)
        move: Move | None = decide(view, *device, running)
        _require(decide(view, *device, running) == move, f"{decision} is pure", f"two calls differ on {view}")
        _require((view, running) == before, f"{decision} leaves its arguments alone", str(view))
        return move

    def _check_move(self, decision: str, view: InstanceView, running: list[RequestView], move: Move | None,
                    device: int | None) -> None:
        if move is None:
            return
        self.moves += 1
        request = next((r for r in running if r.request_id == move.request_id), None)
        _require(request is not None and request.movable, f"{decision} moves a movable request", str(move))
        assert request is not None
        old_placement = request.placed
        assert old_placement is not None
        self._check_placement(decision, move.placement, request.context_tokens)
        _require(move.placement != old_placement, f"{decision} moves something", str(move))
        blocks = view.blocks(request.context_tokens)
        gained: dict[int, int] = {}
        change: dict[int, int] = {}
        before, after = (group_blocks(self.plan, p, blocks) for p in (old_placement, move.placement))
        for position, new, old in zip(self.plan.positions, after, before, strict=True):
            units = (new - old) * position.layers
            gained[position.device] = gained.get(position.device, 0) + max(0, units)
            change[position.device] = change.get(position.device, 0) + units
        _require(all(units <= max(0, view.free_units[d]) for d, units in gained.items()),
                 f"{decision} moves heads to where there is room", f"{move} on {view.free_units}")
        _require(device is None or change[device] < 0, "relieve frees the device", f"{move} for {device}")


def _check_choices(policy: Policy, problem: PlanningProblem, plan: Plan, rng: random.Random,
                   rounds: int) -> None:
    """``route`` over those who take prompts, ``handoff`` over those who only decode, under random loads."""
    full = [cache_units(problem.cluster, problem.model, problem.limits, instance)
            for instance in plan.instances]
    for _ in range(rounds):
        loads = [InstanceLoad(index, instance, units, rng.randrange(50), rng.randrange(5),
                              rng.choice((0, rng.randrange(20_000))), rng.randrange(100_000))
                 for index, (instance, units) in enumerate(zip(plan.instances, full, strict=True))]
        tokens = rng.randint(1, problem.model.context_limit_tokens - 1)
        request = RequestView(rng.randrange(10_000), rng.random(), tokens, tokens)
        decoding = [load for load in loads if load.plan.role == "decode"]
        _check_choice(policy, "route", request,
                      [load for load in loads if load.plan.role != "decode" or policy.mixes_pools])
        if decoding:
            _check_choice(policy, "handoff", replace(request, generated_tokens=1), decoding)


def _check_choice(policy: Policy, decision: str, request: RequestView, loads: list[InstanceLoad]) -> None:
    before = copy.deepcopy((request, loads))
    decide = getattr(policy, decision)
    chosen = decide(request, loads)
    _require(type(chosen) is int and 0 <= chosen < len(loads), f"{decision} names an instance",
             f"{chosen!r} of {len(loads)}")
    _require(decide(request, loads) == chosen, f"{decision} is pure", f"two calls differ on {loads}")
    _require((request, loads) == before, f"{decision} leaves its arguments alone", str(loads))


def _require(holds: bool, rule: str, case: str) -> None:
    if not holds:
        raise ConformanceError(f"rule broken: {rule}; {case}")
