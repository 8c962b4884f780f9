"""Lamina: decode attention of whole requests on memory-optimised GPUs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hetis_sim.policies.admission import usable_units
from hetis_sim.policies.base import PlanningProblem, Policy, PreemptionMode
from hetis_sim.policies.bundles import FREE_SHARE
from hetis_sim.policies.estimate import Estimator
from hetis_sim.policies.layout import gpu_types
from hetis_sim.policies.offload import OffloadEstimator, worker_cuts
from hetis_sim.policies.plan import InstancePlan, Placement, Plan
from hetis_sim.policies.pools import does_not_fit
from hetis_sim.policies.search import Layout, LayoutSearch
from hetis_sim.policies.shape import instance_shape
from hetis_sim.policies.view import InstanceView, RequestView
from hetis_sim.spec.errors import InfeasibleError, require, require_finite

ALL = 1 << 30


@dataclass(frozen=True)
class LaminaSettings:
    """What a user may change.

    Attributes:
        offload: ``all``: every request is offloaded as long as a worker has room, as in the source;
            ``balanced`` (ours): a request stays with the primaries where its attention is done
            earlier then.
        reserve_fraction: share of each device's cache that admission leaves free for growth (ours, as
            for Hetis).
        preemption: ``recompute`` or ``swap``.
    """

    offload: str = "balanced"
    reserve_fraction: float = 0.05
    preemption: str = "recompute"

    def __post_init__(self) -> None:
        require_finite("policy.reserve_fraction", self.reserve_fraction, 0.0, 0.9)
        require(self.offload in ("balanced", "all"), "policy.offload", self.offload, "one of balanced, all")
        require(self.preemption in ("recompute", "swap"), "policy.preemption", self.preemption,
                "one of recompute, swap")


class LaminaPolicy(Policy):
    """Lamina (Chen et al., "Model-attention disaggregation", arXiv 2405.01814, 2024).

    From the source: projections and MLP on compute-optimised GPUs, cache and attention of decoding on
    memory-optimised ones. The unit of offloading is the request: in every stage all its heads are at
    one worker, or all with the primaries.

    Ours: prompts are computed by the primaries, which send their caches to the worker; a request goes
    where its attention is done first, worker or home (``offload: all`` keeps to the workers while they
    have room); which cards are workers, at least one for every instance, is searched for the highest
    capacity by the estimates that Hetis is planned with. Heads of a request are never divided between
    workers and never move, which is what sets Hetis apart.
    """

    name: ClassVar[str] = "lamina"
    settings_type: ClassVar[type] = LaminaSettings

    def __init__(self, settings: LaminaSettings | None = None) -> None:
        self.settings = settings or LaminaSettings()
        self.preemption: PreemptionMode = "swap" if self.settings.preemption == "swap" else "recompute"

    def plan(self, problem: PlanningProblem) -> Plan:
        """The division into primaries and attention workers of highest capacity.

        Raises:
            InfeasibleError: the model fits nowhere.
        """
        started = time.perf_counter()
        found, candidates = self._search(problem)
        if not found:
            raise InfeasibleError(does_not_fit(problem))
        found.sort(key=lambda layout: layout.cost_s)
        best = found[0]
        figures = {"seconds": round(time.perf_counter() - started, 4), "candidates": candidates,
                   "requests_per_s": 1.0 / best.cost_s, "best": [layout.describe() for layout in found[:3]]}
        instances = tuple(instance_shape(problem, draft.groups, draft.workers).with_layers(estimate.layers)
                          for draft, estimate in zip(best.drafts, best.estimates, strict=True))
        return Plan(instances, _reasons(problem, instances, best), figures)

    def _search(self, problem: PlanningProblem) -> tuple[list[Layout], int]:
        """The best layout of every cut, and how many were looked at."""
        estimates = OffloadEstimator if self.settings.offload == "all" else Estimator
        search = LayoutSearch(estimates(problem, FREE_SHARE))
        found: list[Layout] = []
        candidates = 0
        for primaries, workers in worker_cuts(gpu_types(problem)):
            result = search.run(primaries, workers, keep=ALL)
            candidates += result.candidates
            if workers:
                served = (x for x in result.layouts if all(draft.workers for draft in x.drafts))
                found += [layout for layout in (next(served, None),) if layout is not None]
            elif not found:
                # Without workers only where there is no other way.
                found = result.layouts[:1]
        return found, candidates

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
        """Every request wholly at one worker, or wholly with the primaries, stage by stage."""
        reserve, balanced = self.settings.reserve_fraction, self.settings.offload == "balanced"
        desk = _Desk(view, usable_units(view, reserve if view.running else 0.0))
        placed: list[Placement] = []
        for request in requests:
            placement = desk.place(request.context_tokens, balanced=balanced)
            if placement is None:
                break
            if not placed and not view.running:
                desk.keep_free(reserve)
            placed.append(placement)
        return placed


class _Desk:
    """The load and the free cache of an instance while requests are placed on it."""

    def __init__(self, view: InstanceView, free: dict[int, int]) -> None:
        self._view = view
        self._plan = view.plan
        self._groups = list(view.groups)
        self._tokens = list(view.group_tokens)
        self._free = free
        self._heads = sum(view.plan.stages[0].owned_groups)
        self._positions_of: dict[int, list[int]] = {device: [] for device in view.plan.devices}
        for position in view.plan.positions:
            self._positions_of[position.device].append(position.index)

    def keep_free(self, share: float) -> None:
        """Take a share of every device's cache out of what is free."""
        for device, units in self._view.capacity_units.items():
            self._free[device] -= int(share * units)

    def place(self, tokens: int, *, balanced: bool) -> Placement | None:
        """Groups of one request at every position, booked; None where it does not fit."""
        placement = [0] * len(self._plan.positions)
        blocks = self._view.blocks(tokens + 1)
        free = dict(self._free)
        for indices in self._plan.stage_positions:
            row = self._stage(indices, tokens, blocks, free, balanced)
            if row is None:
                return None
            for p, n in row:
                placement[p] = n
                free[self._plan.positions[p].device] -= n * self._plan.positions[p].layers * blocks
        self._free = free
        for p, n in enumerate(placement):
            self._groups[p] += n
            self._tokens[p] += n * tokens
        return tuple(placement)

    def _stage(self, indices: range, tokens: int, blocks: int, free: dict[int, int],
               balanced: bool) -> list[tuple[int, int]] | None:
        """(position, groups) of the request in one stage."""
        positions = self._plan.positions
        unit = positions[indices.start].layers * blocks
        home = [(p, positions[p].owned_groups) for p in indices if not positions[p].remote]
        fits_home = all(n * unit <= free[positions[p].device] for p, n in home)
        away = [p for p in indices if positions[p].remote and self._heads * unit <= free[positions[p].device]]
        if not away:
            return home if fits_home else None
        best = min(away, key=lambda p: (self._away_s(p, tokens), p))
        if balanced and fits_home and self._home_s(home, tokens) <= self._away_s(best, tokens):
            return home
        return [(best, self._heads)]

    def _away_s(self, p: int, tokens: int) -> float:
        """When a worker is done with a layer of a stage, this request and its other jobs included."""
        costs, lanes = self._view.costs, self._view.lanes
        total = costs[p].wire_s_per_group * (self._groups[p] + self._heads) / lanes + costs[p].wire_fixed_s
        total += self._heads * (costs[p].a_s_per_group + costs[p].b_s_per_group_token * tokens) / lanes
        if not self._groups[p]:
            total += costs[p].c_s
        for other in self._positions_of[self._plan.positions[p].device]:
            if self._groups[other]:
                cost = costs[other]
                total += cost.c_s + (cost.a_s_per_group * self._groups[other]
                                     + cost.b_s_per_group_token * self._tokens[other]) / lanes
        return total

    def _home_s(self, home: Sequence[tuple[int, int]], tokens: int) -> float:
        """When the slowest rank is done with a layer, this request included."""
        costs, lanes = self._view.costs, self._view.lanes
        return max(costs[p].seconds((self._groups[p] + n) / lanes, (self._tokens[p] + n * tokens) / lanes)
                   for p, n in home)


def _reasons(problem: PlanningProblem, instances: Sequence[InstancePlan], best: Layout) -> dict[int, str]:
    """One sentence for every device."""
    reasons: dict[int, str] = {}
    for i, instance in enumerate(instances):
        for s, stage in enumerate(instance.stages):
            text = (f"primary (instance {i}, stage {s}, {stage.layers} of {instance.layers} layers): "
                    f"dense modules on the high-end cards; {best.describe()}")
            reasons |= dict.fromkeys(stage.devices, text)
        text = f"attention worker (instance {i}): cache and decode attention of whole requests"
        reasons |= dict.fromkeys(instance.attention_workers, text)
    for device in problem.cluster.devices:
        reasons.setdefault(device.device_id, "not used")
    return dict(sorted(reasons.items()))
