"""Lamina: decode attention on memory-optimised GPUs, by whole request."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from hetis_sim.policies.admission import usable_units
from hetis_sim.policies.apportion import apportion
from hetis_sim.policies.base import PlanningProblem, Policy
from hetis_sim.policies.bundles import FREE_SHARE
from hetis_sim.policies.estimate import Estimator
from hetis_sim.policies.layout import gpu_types
from hetis_sim.policies.offload import (
    OffloadEstimator,
    WorkerWords,
    jobs_s,
    plan_of_best,
    positions_of,
    worker_cuts,
)
from hetis_sim.policies.plan import Placement, Plan
from hetis_sim.policies.search import Layout, LayoutSearch
from hetis_sim.policies.settings import AdmissionSettings
from hetis_sim.policies.view import InstanceView, RequestView
from hetis_sim.spec.errors import require

ALL = 1 << 30
PARTITION = ("request", "head")
OFFLOAD = ("balanced", "all")
WORDS = WorkerWords("dense modules on the high-end cards", "attention worker",
                    "cache and decode attention only")


@dataclass(frozen=True)
class LaminaSettings(AdmissionSettings):
    """What a user may change.

    Attributes:
        partition: ``request``: all heads of a request are at one worker; ``head``: the heads of every
            request are divided over all workers of its instance, as the source decided.
        offload: ``all``: requests are offloaded as long as the workers have room, as in the source;
            ``balanced`` (ours): a request stays with the primaries where its attention is done
            earlier then.
    """

    partition: str = "request"
    offload: str = "balanced"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, allowed in (("partition", PARTITION), ("offload", OFFLOAD)):
            value = getattr(self, key)
            require(value in allowed, f"policy.{key}", value, f"one of {', '.join(allowed)}")


Row = list[tuple[int, int]]
"""Groups of one request in one stage, as (position, groups)."""

Choose = Callable[[int, int, bool, Sequence[Row], Mapping[int, int]], Row | None]
"""A row for a stage, of (stage, tokens, whether it fits at home, rows that fit away, free units)."""


class LaminaPolicy(Policy):
    """Lamina (Chen et al., arXiv 2405.01814v2, 2025).

    The paper: "Efficient Heterogeneous Large Language Model Decoding with Model-Attention Disaggregation".

    From the source: weights and all dense modules on computation-optimised GPUs; cache and decode attention
    on memory-optimised ones, which the micro-batches of an instance share; the cache of a prompt is sent to
    them layer by layer while it is computed; how many of each (its degrees of parallelism) is chosen for
    the model and the workload. Two ways to divide attention over the memory-optimised GPUs are described:
    by request, and by head, evenly, which the source takes, since contexts of different length
    unbalance the first.

    Ours: whole requests are the default (``partition: request``), as the counterpart of Hetis's heads;
    ``partition: head`` is the source's choice, with shares in proportion to the cache of unequal workers.
    Primaries keep the requests whose attention they finish sooner (``offload: balanced``), and with
    ``offload: all`` those that find no room at the workers; in the source they hold no cache at all.
    Prompts are computed by the primaries, which the source leaves to other machines. Which cards are
    workers, at least one for every instance, is searched for the highest capacity by the estimates that
    Hetis is planned with. The source's rotation of micro-batches over replicas of the model is not modelled
    (the stages of an instance take turns), nor are its network stack and its early sending of queries.
    Heads never move while a request runs.
    """

    name: ClassVar[str] = "lamina"
    plans_for_rate: ClassVar[bool] = False
    settings_type: ClassVar[type] = LaminaSettings

    def __init__(self, settings: LaminaSettings | None = None) -> None:
        self.settings = settings or LaminaSettings()
        self.preemption = self.settings.preemption_mode

    def plan(self, problem: PlanningProblem) -> Plan:
        """The division into primaries and attention workers of highest capacity.

        Raises:
            InfeasibleError: the model fits nowhere.
        """
        started = time.perf_counter()
        found, candidates = self._search(problem)
        return plan_of_best(problem, found, candidates, time.perf_counter() - started, WORDS)

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
        """Placements for the longest prefix that fits; in each stage all of a request is at home or away."""
        reserve = self.settings.reserve_fraction
        desk = _Desk(view, usable_units(view, reserve if view.running else 0.0), self.settings)
        placed: list[Placement] = []
        for request in requests:
            placement = desk.place(request)
            if placement is None:
                break
            if not placed and not view.running:
                desk.keep_free(reserve)
            placed.append(placement)
        return placed


class _Desk:
    """The load and the free cache of an instance while requests are placed on it."""

    def __init__(self, view: InstanceView, free: dict[int, int], settings: LaminaSettings) -> None:
        self._view = view
        self._positions = view.plan.positions
        self._groups = list(view.groups)
        self._tokens = list(view.group_tokens)
        self._free = free
        self._balanced = settings.offload == "balanced"
        self._home = [_rows(view, indices, remote=False) for indices in view.plan.stage_positions]
        self._away = [self._choices(indices, settings.partition) for indices in view.plan.stage_positions]
        self._jobs = positions_of(view.plan)

    def _choices(self, indices: range, partition: str) -> list[Row]:
        """The ways in which a stage's heads may be away."""
        workers = _rows(self._view, indices, remote=True)
        heads = sum(self._view.plan.stages[0].owned_groups)
        if partition == "request" or not workers:
            return [[(p, heads)] for p, _ in workers]
        room = [self._view.capacity_units[self._positions[p].device] for p, _ in workers]
        counts = apportion(room, [heads] * len(room), heads)
        return [[(p, n) for (p, _), n in zip(workers, counts, strict=True) if n]]

    def keep_free(self, share: float) -> None:
        """Take a share of every device's cache out of what is free."""
        for device, units in self._view.capacity_units.items():
            self._free[device] -= int(share * units)

    def place(self, request: RequestView) -> Placement | None:
        """Groups of one request at every position, booked; None where it does not fit.

        Where the stages' own choices do not fit together, as many as can stay at home.
        """
        tokens, blocks = request.context_tokens, self._view.blocks(request.context_tokens + 1)
        choose = self._sooner if self._balanced else self._away_first
        placement = self._placed(tokens, blocks, choose) or self._placed(tokens, blocks, self._packed)
        if placement is None:
            return None
        for p, n in enumerate(placement):
            self._groups[p] += n
            self._tokens[p] += n * tokens
            self._free[self._positions[p].device] -= n * self._positions[p].layers * blocks
        return placement

    def _placed(self, tokens: int, blocks: int, choose: Choose) -> Placement | None:
        """A row for every stage, one after the other, the deepest first; None where one finds no room."""
        free, placement = dict(self._free), [0] * len(self._positions)
        stages = self._view.plan.stages
        for s in sorted(range(len(stages)), key=lambda s: (-stages[s].layers, s)):
            def fits(row: Row) -> bool:
                return all(self._units(p, n, blocks) <= free[self._positions[p].device] for p, n in row)

            row = choose(s, tokens, fits(self._home[s]), [row for row in self._away[s] if fits(row)], free)
            if row is None:
                return None
            for p, n in row:
                placement[p] = n
                free[self._positions[p].device] -= self._units(p, n, blocks)
        return tuple(placement)

    def _units(self, p: int, groups: int, blocks: int) -> int:
        return groups * blocks * self._positions[p].layers

    def _away_first(self, s: int, tokens: int, fits_home: bool, away: Sequence[Row],
                    free: Mapping[int, int]) -> Row | None:
        """At the worker that is done first, at home where none has room."""
        home = self._home[s] if fits_home else None
        return min(away, key=lambda row: self._away_s(row, tokens), default=home)

    def _sooner(self, s: int, tokens: int, fits_home: bool, away: Sequence[Row],
                free: Mapping[int, int]) -> Row | None:
        """At home where the primaries are done before any worker."""
        best = self._away_first(s, tokens, fits_home, away, free)
        if best is not None and fits_home and away and (
                self._home_s(self._home[s], tokens) <= self._away_s(best, tokens)):
            return self._home[s]
        return best

    def _packed(self, s: int, tokens: int, fits_home: bool, away: Sequence[Row],
                free: Mapping[int, int]) -> Row | None:
        """At home where there is room, or else where most is free."""
        if fits_home:
            return self._home[s]
        return max(away, key=lambda row: min(free[self._positions[p].device] for p, _ in row), default=None)

    def _away_s(self, row: Row, tokens: int) -> float:
        """When the workers are done with a layer of a stage, this request and their other jobs included."""
        return max(self._worker_s(p, n, tokens) for p, n in row)

    def _worker_s(self, p: int, groups: int, tokens: int) -> float:
        cost, lanes = self._view.costs[p], self._view.lanes
        total = cost.wire_s_per_group * (self._groups[p] + groups) / lanes + cost.wire_fixed_s
        total += groups * (cost.a_s_per_group + cost.b_s_per_group_token * tokens) / lanes
        if not self._groups[p]:
            total += cost.c_s
        return total + jobs_s(self._view, self._jobs[self._positions[p].device], self._groups, self._tokens)

    def _home_s(self, home: Row, tokens: int) -> float:
        """When the slowest rank is done with a layer, this request included."""
        costs, lanes = self._view.costs, self._view.lanes
        return max(costs[p].seconds((self._groups[p] + n) / lanes, (self._tokens[p] + n * tokens) / lanes)
                   for p, n in home)


def _rows(view: InstanceView, indices: range, *, remote: bool) -> Row:
    """The attention workers of a stage, or its ranks with the groups that they own."""
    positions = [view.plan.positions[p] for p in indices]
    return [(position.index, position.owned_groups) for position in positions if position.remote is remote]
