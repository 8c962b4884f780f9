"""An instance before its layers are counted: which devices form which stage, and what they offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.costs import position_cost
from hetis_sim.policies.memory import (
    RUNTIME_BYTES,
    activation_bytes,
    attention_worker_reserve_bytes,
    stage_weight_bytes,
)
from hetis_sim.policies.plan import InstancePlan, StagePlan, even_groups
from hetis_sim.policies.view import PositionCost
from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.gpu import GpuSpec


@dataclass(frozen=True, slots=True)
class StageShape:
    """One tensor-parallel group.

    Attributes:
        devices: its ranks.
        gpu: their kind.
        link: the link of its collectives, None for one rank.
        hop: the link to the next stage, None for the last.
        owned: KV groups of each rank.
        layer_bytes: weights of one layer on each rank.
        room_bytes: on each rank, for layers and their cache.
        home: decode attention at a rank.
        away: (how many attention workers, their decode attention and wire for this stage).
    """

    devices: tuple[int, ...]
    gpu: GpuSpec
    link: LinkSpec | None
    hop: LinkSpec | None
    owned: tuple[int, ...]
    layer_bytes: tuple[int, ...]
    room_bytes: tuple[int, ...]
    home: PositionCost
    away: tuple[tuple[int, PositionCost], ...]

    @property
    def tp(self) -> int:
        """Tensor-parallel degree."""
        return len(self.devices)


@dataclass(frozen=True, slots=True)
class InstanceShape:
    """A pipeline of tensor-parallel groups and its attention workers.

    ``worker_bytes`` is the memory of the workers together that cache may use.
    """

    stages: tuple[StageShape, ...]
    workers: tuple[int, ...]
    worker_bytes: int

    def with_layers(self, layers: Sequence[int]) -> InstancePlan:
        """The plan of the instance for a split of the layers."""
        pairs = zip(self.stages, layers, strict=True)
        stages = tuple(StagePlan(stage.devices, n, stage.owned) for stage, n in pairs)
        return InstancePlan(stages, self.workers)


def instance_shape(problem: PlanningProblem, groups: Sequence[tuple[int, ...]],
                   workers: Sequence[int] = ()) -> InstanceShape:
    """The shape of an instance made of tensor-parallel ``groups`` in pipeline order."""
    cluster, model, limits = problem.cluster, problem.model, problem.limits
    single = tuple(StagePlan(group, 1, even_groups(model.kv_heads, len(group))) for group in groups)
    draft = InstancePlan(single, tuple(workers))
    last = len(groups) - 1
    stages: list[StageShape] = []
    for s, stage in enumerate(draft.stages):
        gpu = cluster.devices[stage.devices[0]].gpu
        budget = int(gpu.memory_bytes * limits.memory_utilization) - RUNTIME_BYTES
        budget -= activation_bytes(model, limits, stage.tp, s == last)
        two = StagePlan(stage.devices, 2, stage.owned_groups)
        layer, room = [], []
        for rank in range(stage.tp):
            once = stage_weight_bytes(model, stage, rank, s == 0, s == last)
            layer.append(stage_weight_bytes(model, two, rank, s == 0, s == last) - once)
            room.append(budget - (once - layer[-1]))
        hop = cluster.link(stage.devices[-1], groups[s + 1][0]) if s < last else None
        head = draft.positions[draft.stage_positions[s].start]
        home = position_cost(cluster, model, problem.cost, draft, head)
        link = cluster.slowest_link(stage.devices)
        stages.append(StageShape(stage.devices, gpu, link, hop, stage.owned_groups, tuple(layer), tuple(room),
                                 home, _away(problem, draft, s)))
    return InstanceShape(tuple(stages), tuple(workers), worker_bytes(problem, workers))


def _away(problem: PlanningProblem, draft: InstancePlan, s: int) -> tuple[tuple[int, PositionCost], ...]:
    """How many attention workers of each cost a stage has; equal ones have their cost worked out once."""
    cluster, stage = problem.cluster, draft.stages[s]
    kinds: dict[tuple[str, int, bool], list[int]] = {}
    indices = draft.stage_positions[s]
    for p in range(indices.start + stage.tp, indices.stop):
        device = draft.positions[p].device
        same_host = cluster.devices[device].host_id == cluster.devices[stage.devices[0]].host_id
        key = (cluster.devices[device].gpu.name, id(cluster.link(stage.devices[0], device)), same_host)
        kinds.setdefault(key, []).append(p)
    cost = problem.cost
    return tuple((len(found), position_cost(cluster, problem.model, cost, draft, draft.positions[found[0]]))
                 for found in kinds.values())


def worker_bytes(problem: PlanningProblem, workers: Sequence[int]) -> int:
    """Memory for cache on attention workers, together."""
    taken = RUNTIME_BYTES + attention_worker_reserve_bytes(problem.model, problem.limits)
    share = problem.limits.memory_utilization
    return sum(max(0, int(problem.cluster.devices[d].gpu.memory_bytes * share) - taken) for d in workers)
