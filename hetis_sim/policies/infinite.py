"""Infinite-LLM: attention split by sequence; what an instance cannot hold is lent to creditors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hetis_sim.policies.base import PlanningProblem, Policy
from hetis_sim.policies.bundles import FREE_SHARE
from hetis_sim.policies.layout import gpu_types
from hetis_sim.policies.lending import LendingEstimator
from hetis_sim.policies.offload import WorkerWords, jobs_s, plan_of_best, positions_of, worker_cuts
from hetis_sim.policies.plan import InstancePlan, Plan
from hetis_sim.policies.ranges import AnyPlacement, token_split
from hetis_sim.policies.search import Layout, LayoutSearch
from hetis_sim.policies.settings import AdmissionSettings
from hetis_sim.policies.view import InstanceView, Move, RequestView
from hetis_sim.spec.errors import require
from hetis_sim.spec.lookup import require_int

WORDS = WorkerWords("weights, and the newest tokens", "creditor",
                    "cache and attention of older tokens that find no room with it")


@dataclass(frozen=True)
class InfiniteSettings(AdmissionSettings):
    """What a user may change.

    Attributes:
        relief_blocks: lending frees, if it can, this many blocks of growth for every running request
            (ours).
        recall: bring blocks back home when there is room again and the creditor is the slower one (ours).
    """

    relief_blocks: int = 4
    recall: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("policy.relief_blocks", self.relief_blocks, 1, 1 << 20)
        require(isinstance(self.recall, bool), "policy.recall", self.recall, "true or false")


class InfinitePolicy(Policy):
    """Infinite-LLM (Lin et al., arXiv 2401.02669v2, 2024).

    The paper: "Efficient LLM Service for Long Context with DistAttention and Distributed KVCache".

    From the source: attention of one request is divided by ranges of its tokens (blocks of them), each
    computed for all heads where it is held; the query goes there, a partial output with the softmax
    statistics comes back and is merged. An instance that runs out of cache (debtor) places blocks
    on others with memory to spare (creditors); a global manager pairs them greedily, by a model of
    performance, and blocks move while decoding goes on.

    Ours: creditors are cards without weights (attention workers of the instance they lend to). In the
    source they are instances that serve requests of their own; here a device belongs to one instance.
    Which cards are creditors, if any, and the layout of the others is searched for the highest capacity
    (:class:`LendingEstimator`). Older blocks are lent, the tail stays at home; a prompt that finds no
    room at home is lent in part at once. Of a debtor's requests the one with most cache at home lends,
    to the creditor that is done first with it: when home is about to be full, and while others wait for
    room there. Blocks come home again when nobody waits, there is room and the creditor is the slower one.

    Lending between instances that both serve would take: positions on devices of other instances in a
    plan; one ledger per device in place of one per instance; steps that end when another instance takes
    cache; a creditor whose own iterations are longer by what it computes for others; and both instances
    asked together who lends.
    """

    name: ClassVar[str] = "infinite"
    plans_for_rate: ClassVar[bool] = False
    settings_type: ClassVar[type] = InfiniteSettings
    splits_tokens = True

    def __init__(self, settings: InfiniteSettings | None = None) -> None:
        self.settings = settings or InfiniteSettings()
        self.preemption = self.settings.preemption_mode

    def plan(self, problem: PlanningProblem) -> Plan:
        """The division into instances and creditors of highest capacity.

        Raises:
            InfeasibleError: the model fits nowhere.
        """
        started = time.perf_counter()
        search = LayoutSearch(LendingEstimator(problem, FREE_SHARE))
        found: list[Layout] = []
        candidates = 0
        for primaries, creditors in worker_cuts(gpu_types(problem)):
            result = search.run(primaries, creditors)
            candidates += result.candidates
            found += result.layouts[:1]
        return plan_of_best(problem, found, candidates, time.perf_counter() - started, WORDS)

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> Sequence[AnyPlacement]:
        """The newest tokens at home, as many as fit there; the others with creditors."""
        desk = _Desk(view, self.settings.reserve_fraction if view.running else 0.0)
        placed: list[AnyPlacement] = []
        for request in requests:
            placement = desk.place(request.context_tokens)
            if placement is None:
                break
            if not placed:
                desk.keep_free(self.settings.reserve_fraction)
            placed.append(placement)
        return placed

    def relieve(self, view: InstanceView, device: int, running: Sequence[RequestView]) -> Move | None:
        """The oldest blocks at home of the request with most cache there go to a creditor."""
        plan = view.plan
        here = [p for p in plan.positions if p.device == device and not p.remote]
        if not here or not plan.attention_workers or not len(running):
            return None
        unit = here[0].owned_groups * here[0].layers
        wanted = self.settings.relief_blocks * len(running) - view.free_units[device] // unit
        return _lend(view, running, here[0].stage, wanted)

    def rebalance(self, view: InstanceView, running: Sequence[RequestView]) -> Move | None:
        """While requests wait, room at home; else blocks come home from the slowest creditor."""
        if not view.plan.attention_workers or not len(running):
            return None
        if view.waiting:
            return self._make_room(view, running)
        return self._recall(view, running) if self.settings.recall else None

    def _make_room(self, view: InstanceView, running: Sequence[RequestView]) -> Move | None:
        """Lend from the stage that has least room beyond its reserve, if that is next to none."""
        desk = _Desk(view, self.settings.reserve_fraction)
        stage = min(range(len(view.plan.stages)), key=lambda s: (desk.home_blocks(s), s))
        wanted = self.settings.relief_blocks * len(running) - desk.home_blocks(stage)
        return _lend(view, running, stage, wanted)

    def _recall(self, view: InstanceView, running: Sequence[RequestView]) -> Move | None:
        lenders = [r for r in running if r.movable and r.blocks and r.placement == view.plan.local_placement]
        if not lenders:
            return None
        desk = _Desk(view, self.settings.reserve_fraction)
        lent = {p for r in lenders for p, n in enumerate(r.blocks) if n}
        slowest = max(sorted(lent), key=desk.held_s)
        stage = view.plan.positions[slowest].stage
        # Room that the next relief would take again does not count.
        room = desk.home_blocks(stage) - 2 * self.settings.relief_blocks * len(running)
        if room <= 0 or desk.held_s(slowest) <= desk.home_s(stage):
            return None
        creditor = max((r for r in lenders if r.blocks[slowest]),
                       key=lambda r: (min(room, r.blocks[slowest]), -r.request_id))
        return _with_blocks(view.plan, creditor, {slowest: -min(room, creditor.blocks[slowest])})


def _lend(view: InstanceView, running: Sequence[RequestView], stage: int, wanted: int) -> Move | None:
    """Up to ``wanted`` blocks of the request with most cache at home in a stage go to a creditor."""
    desk = _Desk(view)
    able = [(blocks, r) for r in running if r.movable and (blocks := desk.lendable(r, stage)) > 0]
    if wanted <= 0 or not able:
        return None
    blocks, debtor = max(able, key=lambda item: (item[0], -item[1].request_id))
    lent = desk.lend(stage, min(blocks, wanted), partly=True)
    return _with_blocks(view.plan, debtor, lent) if lent else None


def _with_blocks(plan: InstancePlan, request: RequestView, more: dict[int, int]) -> Move:
    """A move that changes the blocks of ranges at some positions; the tail is at home."""
    blocks = list(request.blocks or [0] * len(plan.positions))
    for p, n in more.items():
        blocks[p] += n
    return Move(request.request_id, token_split(plan.local_placement, blocks))


class _Desk:
    """The load and the free cache of an instance while blocks are placed on it."""

    def __init__(self, view: InstanceView, reserve_fraction: float = 0.0) -> None:
        self._view = view
        self._plan = view.plan
        self._groups = list(view.groups)
        self._tokens = list(view.group_tokens)
        self._free = dict(view.free_units)
        self._kept: dict[int, int] = {}
        self.keep_free(reserve_fraction)
        self._heads = sum(view.plan.stages[0].owned_groups)
        self._jobs = positions_of(view.plan)

    def keep_free(self, share: float) -> None:
        """A share of every device's cache counts as not free from now on."""
        self._kept = {device: int(share * units) for device, units in self._view.capacity_units.items()}

    def lendable(self, request: RequestView, stage: int) -> int:
        """Blocks of a request that are at home in a stage and may leave; its last token stays."""
        if request.placement != self._plan.local_placement:
            return 0
        lent = sum(request.blocks[p] for p in self._plan.stage_positions[stage]) if request.blocks else 0
        return (request.context_tokens - 1) // self._view.block_tokens - lent

    def home_blocks(self, stage: int, *, reserve: bool = False) -> int:
        """Blocks for which the ranks of a stage have room, with what is kept free or without."""
        ranks = [self._plan.positions[p] for p in self._plan.stage_positions[stage]]
        return max(0, min((self._free[rank.device] - (0 if reserve else self._kept[rank.device]))
                          // (rank.owned_groups * rank.layers) for rank in ranks if not rank.remote))

    def place(self, tokens: int) -> AnyPlacement | None:
        """The placement of a new request, booked; None where it does not fit."""
        blocks = self._view.blocks(tokens + 1)
        most = max(0, blocks - 2)  # so that the last token is never lent, wherever the block ends
        before = (dict(self._free), self._groups[:], self._tokens[:])
        ranges = [0] * len(self._plan.positions)
        for stage, indices in enumerate(self._plan.stage_positions):
            short = max(0, blocks - self.home_blocks(stage))
            if short > most and self.home_blocks(stage, reserve=True) >= blocks - most:
                short = most  # the little that has to be at home may use what is kept free
            lent = self.lend(stage, short, partly=False) if short <= most else None
            if lent is None:
                self._free, self._groups, self._tokens = before
                return None
            for p, n in lent.items():
                ranges[p] = n
            for p in indices[:self._plan.stages[stage].tp]:
                rank = self._plan.positions[p]
                self._free[rank.device] -= rank.owned_groups * rank.layers * (blocks - short)
        return token_split(self._plan.local_placement, ranges)

    def lend(self, stage: int, blocks: int, *, partly: bool) -> dict[int, int] | None:
        """Blocks of one request by creditor, booked: one creditor if that has room, else several.

        None where they do not fit, unless some of them are enough.
        """
        lent: dict[int, int] = {}
        unit = self._heads * self._plan.stages[stage].layers
        workers = self._plan.stage_positions[stage][self._plan.stages[stage].tp:]
        while blocks:
            room = {p: self._room(p) // unit for p in workers}
            able = [p for p in workers if room[p] and p not in lent]
            whole = [p for p in able if room[p] >= blocks]
            if not able:
                break
            p = min(whole or able, key=lambda p: (self._done_s(p, min(room[p], blocks)), p))
            lent[p] = min(room[p], blocks)
            blocks -= lent[p]
        if blocks and not partly:
            return None
        for p, n in lent.items():
            self._free[self._plan.positions[p].device] -= n * unit
            self._groups[p] += self._heads
            self._tokens[p] += self._heads * n * self._view.block_tokens
        return lent

    def _room(self, p: int) -> int:
        device = self._plan.positions[p].device
        return max(0, self._free[device] - self._kept[device])

    def _done_s(self, p: int, blocks: int) -> float:
        """When a creditor is done with a layer of a stage, these blocks of another request included."""
        cost, lanes = self._view.costs[p], self._view.lanes
        more = cost.a_s_per_group + cost.still_wire_s_per_group
        more += cost.b_s_per_group_token * blocks * self._view.block_tokens
        opening = 0.0 if self._groups[p] else cost.c_s + cost.wire_fixed_s
        return self.held_s(p) + self._heads * more / lanes + opening

    def held_s(self, p: int) -> float:
        """When a creditor is done with a layer of a stage, its jobs for other stages included."""
        costs, lanes = self._view.costs, self._view.lanes
        total = 0.0
        if self._groups[p]:
            total = costs[p].still_wire_s_per_group * self._groups[p] / lanes + costs[p].wire_fixed_s
        here = self._jobs[self._plan.positions[p].device]
        return total + jobs_s(self._view, here, self._groups, self._tokens)

    def home_s(self, stage: int) -> float:
        """When the slowest rank of a stage is done with a layer."""
        costs, lanes = self._view.costs, self._view.lanes
        return max(costs[p].seconds(self._groups[p] / lanes, self._tokens[p] / lanes)
                   for p in self._plan.stage_positions[stage][:self._plan.stages[stage].tp])
