"""Which cards compute attention only, for systems that offload to them, and how long that takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.estimate import Estimate, Estimator
from hetis_sim.policies.layers import split_layers
from hetis_sim.policies.layout import GpuType
from hetis_sim.policies.phases import ranks
from hetis_sim.policies.plan import InstancePlan, Plan
from hetis_sim.policies.pools import does_not_fit
from hetis_sim.policies.search import Layout
from hetis_sim.policies.shape import InstanceShape, StageShape, instance_shape
from hetis_sim.policies.view import InstanceView
from hetis_sim.spec.errors import InfeasibleError

CUTS_MOST = 16
ROUNDING = 1e-9


class WorkerWords(NamedTuple):
    """What reasons say: ``dense`` of primaries, ``role`` and ``duty`` of the other cards in use."""

    dense: str
    role: str
    duty: str


class OffloadEstimator(Estimator):
    """Estimates of instances whose workers serve as many requests as they have room for.

    The estimates that Hetis is planned with offload what does not fit and what gains by it.
    """

    def at(self, shape: InstanceShape, lane_batch: int, requests: int,
           layers: Sequence[int] | None = None) -> Estimate | None:
        """See :meth:`Estimator.at`."""
        if not shape.workers:
            return super().at(shape, lane_batch, requests, layers)
        if layers is None:
            loads = [self._stage_load(shape, s, lane_batch, requests) for s in range(len(shape.stages))]
            layers = split_layers(loads, self.problem.model.layers, shape.worker_bytes)
        attention = None if layers is None else self._attention(shape, layers, requests)
        if layers is None or attention is None:
            return None
        return self._estimate(shape, tuple(layers), attention, lane_batch, requests)

    def _attention(self, shape: InstanceShape, layers: Sequence[int], requests: int) -> list[float] | None:
        """Seconds of one layer, by stage; None where the primaries cannot hold what the workers cannot."""
        kv_heads, lanes = self.problem.model.kv_heads, len(shape.stages)
        away = min(float(requests), shape.worker_bytes / (self.group_bytes * kv_heads * sum(layers)))
        home = requests - away
        for stage, n in zip(shape.stages, layers, strict=True):
            for room, weights, owned in ranks(stage):
                if room * (1.0 + ROUNDING) < n * (weights + self.group_bytes * owned * home):
                    return None
        groups = kv_heads * away / lanes
        jobs = sum(self._job_s(stage, groups) for stage in shape.stages)
        times: list[float] = []
        for stage in shape.stages:
            share = groups / sum(n for n, _ in stage.away)
            wire = max(cost.wire_fixed_s + cost.wire_s_per_group * share for _, cost in stage.away)
            own = max(stage.owned) * home / lanes
            times.append(max(stage.home.seconds(own, own * self.context), wire + jobs))
        return times

    def _job_s(self, stage: StageShape, groups: float) -> float:
        """Time of the workers for one layer of a stage, evenly loaded."""
        rate = sum(n / (cost.a_s_per_group + cost.b_s_per_group_token * self.context)
                   for n, cost in stage.away)
        return max(cost.c_s for _, cost in stage.away) + groups / rate


def worker_cuts(types: Sequence[GpuType]) -> Iterator[tuple[list[GpuType], list[GpuType]]]:
    """High-end cards as primaries, the others as workers: cuts between cards, and between kinds.

    The last cut leaves no workers.
    """
    cards = [device for kind in types for device in kind.devices]
    step = max(1, -(-len(cards) // CUTS_MOST))
    ends: set[int] = set()
    for kind in types:
        ends.add(max(ends, default=0) + len(kind.devices))
    for cut in range(1, len(cards) + 1):
        if cut % step == 0 or cut in ends:
            yield _some(types, cards[:cut]), _some(types, cards[cut:])


def _some(types: Sequence[GpuType], devices: Sequence[int]) -> list[GpuType]:
    """The kinds, less the cards that are not among ``devices``."""
    wanted = set(devices)
    kept: list[GpuType] = []
    for kind in types:
        hosts = [tuple(device for device in host if device in wanted) for host in kind.hosts]
        if any(hosts):
            kept.append(replace(kind, hosts=tuple(host for host in hosts if host)))
    return kept


def plan_of_best(problem: PlanningProblem, found: Sequence[Layout], candidates: int, seconds: float,
                 words: WorkerWords) -> Plan:
    """The plan of the layout that costs least; of equal ones the first.

    Args:
        problem: cluster, model and workload.
        found: layouts to choose from.
        candidates, seconds: what the search looked at and took.
        words: for the reasons of the plan.

    Raises:
        InfeasibleError: there is no layout, for the model fits nowhere.
    """
    if not found:
        raise InfeasibleError(does_not_fit(problem))
    ordered = sorted(found, key=lambda layout: layout.cost_s)
    best = ordered[0]
    figures = {"seconds": round(seconds, 4), "candidates": candidates, "requests_per_s": 1.0 / best.cost_s,
               "best": [layout.describe() for layout in ordered[:3]]}
    instances = tuple(instance_shape(problem, draft.groups, draft.workers).with_layers(estimate.layers)
                      for draft, estimate in zip(best.drafts, best.estimates, strict=True))
    return Plan(instances, _reasons(problem, instances, best, words), figures)


def _reasons(problem: PlanningProblem, instances: Sequence[InstancePlan], best: Layout,
             words: WorkerWords) -> dict[int, str]:
    """One sentence for every device."""
    reasons: dict[int, str] = {}
    for i, instance in enumerate(instances):
        for s, stage in enumerate(instance.stages):
            text = (f"primary (instance {i}, stage {s}, {stage.layers} of {instance.layers} layers): "
                    f"{words.dense}; {best.describe()}")
            reasons |= dict.fromkeys(stage.devices, text)
        reasons |= dict.fromkeys(instance.attention_workers, f"{words.role} (instance {i}): {words.duty}")
    for device in problem.cluster.devices:
        reasons.setdefault(device.device_id, "not used")
    return dict(sorted(reasons.items()))


def positions_of(plan: InstancePlan) -> dict[int, list[int]]:
    """Positions of every device of an instance."""
    found: dict[int, list[int]] = {device: [] for device in plan.devices}
    for position in plan.positions:
        found[position.device].append(position.index)
    return found


def jobs_s(view: InstanceView, positions: Sequence[int], groups: Sequence[int],
           tokens: Sequence[int]) -> float:
    """Time of one job for each of a device's positions, under a load; without the wire."""
    total = 0.0
    for p in positions:
        if groups[p]:
            cost = view.costs[p]
            busy = cost.a_s_per_group * groups[p] + cost.b_s_per_group_token * tokens[p]
            total += cost.c_s + busy / view.lanes
    return total
