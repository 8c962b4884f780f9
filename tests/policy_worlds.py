"""Instances, loads and clusters for tests of policies, and brute force over placements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from hypothesis import strategies as st

from hetis_sim.cost import RooflineCost
from hetis_sim.policies.base import EngineLimits, PlanningProblem
from hetis_sim.policies.hetis.attention import AttentionContext
from hetis_sim.policies.hetis.placing import Load
from hetis_sim.policies.plan import InstancePlan, Placement, StagePlan
from hetis_sim.policies.view import InstanceView, PositionCost, RequestView
from hetis_sim.spec.architectures import model
from hetis_sim.spec.cluster import ClusterSpec, HostSpec
from hetis_sim.spec.gpus import gpu
from hetis_sim.spec.links import link

BLOCK = 16


def cluster(*hosts: tuple[str, int], network: str = "ethernet-100g", inside: str = "pcie4x16") -> ClusterSpec:
    """Hosts given as (GPU, number)."""
    specs = tuple(HostSpec((gpu(name),) * count, link(inside)) for name, count in hosts)
    return ClusterSpec("test", specs, link(network))


def paper() -> ClusterSpec:
    """The testbed of the paper."""
    made = cluster(("a100-80gb", 4), ("rtx3090", 2), ("rtx3090", 2), ("p100-12gb", 4))
    slow = replace(made.hosts[-1], link=link("pcie3x16"))
    return replace(made, hosts=(*made.hosts[:-1], slow))


def problem(spec: ClusterSpec, name: str = "llama2-70b", prompt: float = 246,
            output: float = 326) -> PlanningProblem:
    """Planning on datasheet durations."""
    return PlanningProblem(spec, model(name), RooflineCost(), EngineLimits(), prompt, output)


def instance(owned: Sequence[Sequence[int]], layers: Sequence[int], workers: int) -> InstancePlan:
    """Stages by the groups that their ranks own; devices are numbered from 0, workers last."""
    stages: list[StagePlan] = []
    device = 0
    for groups, count in zip(owned, layers, strict=True):
        stages.append(StagePlan(tuple(range(device, device + len(groups))), count, tuple(groups)))
        device += len(groups)
    return InstancePlan(tuple(stages), tuple(range(device, device + workers)))


def view_of(plan: InstancePlan, costs: Sequence[PositionCost], running: Sequence[tuple[int, Placement]] = (),
            capacity: dict[int, int] | None = None) -> InstanceView:
    """A view of an instance that runs requests given as (context, placement)."""
    capacity = capacity or dict.fromkeys(plan.devices, 10**6)
    groups, tokens = [0] * len(plan.positions), [0] * len(plan.positions)
    free = dict(capacity)
    for context, placement in running:
        for position, n in zip(plan.positions, placement, strict=True):
            groups[position.index] += n
            tokens[position.index] += n * context
            free[position.device] -= n * position.layers * -(-context // BLOCK)
    cached = sum(context for context, _ in running)
    return InstanceView(0, plan, costs, groups, tokens, len(plan.stages), free, capacity, BLOCK, len(running),
                        0, 0, cached)


def request(number: int, tokens: int, placement: Placement | None = None) -> RequestView:
    """A request; it runs and may move where it has a placement."""
    return RequestView(number, float(number), tokens, tokens, int(placement is not None), placement,
                       movable=placement is not None)


def all_placements(plan: InstancePlan) -> Iterator[Placement]:
    """Every valid placement of one request."""
    heads = sum(plan.stages[0].owned_groups)
    by_stage: list[list[tuple[int, ...]]] = []
    for indices in plan.stage_positions:
        limits = [heads if plan.positions[p].remote else plan.positions[p].owned_groups for p in indices]
        by_stage.append([row for row in product(*(range(n + 1) for n in limits)) if sum(row) == heads])
    for rows in product(*by_stage):
        yield tuple(n for row in rows for n in row)


def fits(context: AttentionContext, free: dict[int, int], placement: Placement, blocks: int) -> bool:
    """Whether a placement's blocks find room."""
    need = dict.fromkeys(free, 0)
    for position, n in zip(context.plan.positions, placement, strict=True):
        need[position.device] += n * position.layers * blocks
    return all(units <= max(0, free[device]) for device, units in need.items())


def time_with(context: AttentionContext, load: Load, placed: Sequence[tuple[int, Placement]]) -> float:
    """F of a load and further requests, given as (context, placement)."""
    trial = load.copy()
    for tokens, placement in placed:
        trial.add(context, placement, tokens, 0)
    return context.total_time(trial.groups, trial.tokens)


def best_time(context: AttentionContext, load: Load, tokens: int, blocks: int) -> float | None:
    """The smallest F over all placements of one request that fit, by brute force."""
    times = [time_with(context, load, [(tokens, placement)]) for placement in all_placements(context.plan)
             if fits(context, load.free, placement, blocks)]
    return min(times, default=None)


def position_cost_strategy(remote: bool) -> st.SearchStrategy[PositionCost]:
    """Costs between a fast and a slow GPU, on a fast or slow wire."""
    slope, fixed = st.floats(1e-7, 2e-5), st.floats(0.0, 1e-4)
    per_token = st.floats(1e-10, 2e-7)
    if not remote:
        return st.builds(PositionCost, slope, per_token, fixed)
    return st.builds(PositionCost, slope, per_token, fixed, st.floats(0.0, 1e-5), st.floats(0.0, 2e-4))


def share_wires(costs: list[PositionCost], positions: Sequence[int]) -> None:
    """Put positions of a stage behind one network interface, with the wire of the first."""
    for p in positions:
        wire_s = len(positions) * costs[positions[0]].wire_s_per_group
        costs[p] = replace(costs[p], wire_s_per_group=wire_s, wire_sharers=len(positions))


@st.composite
def situations(draw: st.DrawFn, stages: int = 1, tight: bool = False) -> tuple[AttentionContext, Load, int]:
    """An instance of up to ``stages`` stages with a load, and the context of a request that arrives."""
    count = draw(st.integers(1, stages))
    heads = draw(st.sampled_from((2, 3, 4) if count > 1 else (2, 3, 4, 6)))
    owned = [draw(st.sampled_from([(heads,), (heads // 2, heads - heads // 2)])) for _ in range(count)]
    layers = [draw(st.integers(1, 40)) for _ in range(count)]
    plan = instance(owned, layers, draw(st.integers(1, 2 if count > 1 else 3)))
    costs = [draw(position_cost_strategy(position.remote)) for position in plan.positions]
    for indices in plan.stage_positions:
        share_wires(costs, [p for p in indices if plan.positions[p].remote and draw(st.booleans())])
    context = AttentionContext(plan, costs, count)
    groups = [draw(st.integers(0, 30)) for _ in plan.positions]
    tokens = [n * draw(st.integers(1, 2000)) for n in groups]
    most = 300 if tight else 10**6
    free = {device: draw(st.integers(0, most)) if tight else most for device in plan.devices}
    return context, Load(groups, tokens, free), draw(st.integers(1, 3000))
