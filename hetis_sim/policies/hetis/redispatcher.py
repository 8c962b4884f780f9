"""Moves heads of running requests: for speed, and to free cache on a device that fills up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hetis_sim.policies.hetis.attention import AttentionContext, ContextTable
from hetis_sim.policies.hetis.dispatcher import usable_load
from hetis_sim.policies.hetis.filling import fill_shared, interface_of
from hetis_sim.policies.hetis.ideal import attention_exceeds
from hetis_sim.policies.hetis.placing import Load, place
from hetis_sim.policies.hetis.settings import HetisSettings
from hetis_sim.policies.plan import Placement, Position
from hetis_sim.policies.ranges import AnyPlacement
from hetis_sim.policies.view import InstanceView, Move, RequestView

TRIALS = 8
"""Requests that are tried in full, those with the largest possible benefit first (ours)."""


Shares = tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.float64]]]
"""Groups and group-tokens by request and position."""


class Change(NamedTuple):
    """A possible move: what it does to F (seconds times micro-batches), and what travels."""

    request: RequestView
    placement: AnyPlacement
    time: float
    moved: int
    freed: int = 0


class Redispatcher:
    """Both triggers of the paper. One request moves at a time; heads that stay are reused."""

    def __init__(self, settings: HetisSettings, contexts: ContextTable) -> None:
        self.settings = settings
        self._contexts = contexts

    def rebalance(self, view: InstanceView, running: Sequence[RequestView]) -> Move | None:
        """Trigger 1: attention takes more than (1 + theta) times the ideal.

        The request whose move shortens F most is moved; of equal ones that with the least
        cache on the wire, then the lowest id. None where no move saves ``min_benefit``.
        """
        context = self._contexts.get(view)
        if not self.settings.redispatch or not context.workers or not len(running):
            return None
        now = context.total_time(view.groups, view.group_tokens)
        if not attention_exceeds(context, view, now, 1.0 + self.settings.theta):
            return None
        movable = [request for request in running if request.movable and request.placement]
        load = usable_load(view, self.settings.reserve_fraction)
        best: Change | None = None
        target = now * (1.0 - self.settings.min_benefit)
        shares = self._shares(context, view, movable) if movable else None
        least = _least_possible(context, view, movable, shares) if shares else []
        for floor, request in least[:TRIALS]:
            if floor >= min(target, best.time if best else now):
                break
            change = self._replace(context, view, load, request)
            if change is not None and change.time < target and (best is None or _faster(change, best)):
                best = change
        return Move(best.request.request_id, best.placement) if best else None

    def _shares(self, context: AttentionContext, view: InstanceView,
                movable: Sequence[RequestView]) -> Shares:
        """What each request adds to the load."""
        held = _matrix(movable)
        tokens = np.array([request.context_tokens for request in movable], dtype=np.float64)
        return held, held * tokens[:, None]

    def _replace(self, context: AttentionContext, view: InstanceView, load: Load,
                 request: RequestView) -> Change | None:
        """The request placed anew, cache that stays taking no new room."""
        old, tokens = request.placement, request.context_tokens
        assert old is not None
        rest = load.copy()
        rest.add(context, old, tokens, 0, sign=-1)
        new = place(context, rest, tokens, view.blocks(tokens + 1), old)
        if new is None or new == old:
            return None
        rest.add(context, new, tokens, 0)
        after = context.total_time(rest.groups, rest.tokens)
        return Change(request, new, after, _moved(context, old, new, tokens))

    def relieve(self, view: InstanceView, device: int, running: Sequence[RequestView]) -> Move | None:
        """Trigger 2: ``device`` runs out. Only requests with cache there are candidates.

        A move takes groups of one request off the device until every request there can grow by
        ``relief_blocks``. Among moves that achieve it the one after which F is smallest is
        chosen, otherwise the one that frees most; with ``eviction: lifo`` the latest arrival.
        """
        context = self._contexts.get(view)
        if not self.settings.redispatch or not context.workers:
            return None
        growth = self._growth(context, view, running)
        wanted = self.settings.relief_blocks * growth[device] - view.free_units[device]
        here = [p.index for p in context.plan.positions if p.device == device]
        candidates = [request for request in running
                      if request.movable and self._holds(context, request, here)]
        if wanted <= 0 or not candidates:
            return None
        room = {d: units - growth[d] for d, units in view.free_units.items()}
        lifo = self.settings.eviction == "lifo"
        best: Change | None = None
        ordered = (_by_arrival(candidates) if lifo else
                   self._by_relief(context, view, candidates, here, wanted)[:TRIALS])
        for request in ordered:
            change = self._take_off(context, view, request, here, wanted, room)
            if change is not None and (best is None or _better_relief(change, best, wanted)):
                best = change
                if lifo:
                    break
        return Move(best.request.request_id, best.placement) if best else None

    # What depends on the unit of division.

    def _growth(self, context: AttentionContext, view: InstanceView,
                running: Sequence[RequestView]) -> dict[int, int]:
        """Units per device for one block more of everything there that grows."""
        growth = dict.fromkeys(context.plan.devices, 0)
        for position in context.plan.positions:
            growth[position.device] += view.groups[position.index] * position.layers
        return growth

    def _holds(self, context: AttentionContext, request: RequestView, here: Sequence[int]) -> bool:
        """Whether a request has cache at one of these positions."""
        return request.placement is not None and any(request.placement[p] for p in here)

    def _by_relief(self, context: AttentionContext, view: InstanceView, candidates: Sequence[RequestView],
                   here: Sequence[int], wanted: int) -> list[RequestView]:
        """Candidates that can free enough with the fewest groups first, then those that free most."""
        layers = [context.plan.positions[p].layers for p in here]

        def key(request: RequestView) -> tuple[bool, float, int]:
            assert request.placement is not None
            blocks = view.blocks(request.context_tokens)
            freed = blocks * sum(request.placement[p] * n for p, n in zip(here, layers, strict=True))
            return (freed < wanted, -blocks if freed >= wanted else -freed, request.request_id)

        return sorted(candidates, key=key)

    def _take_off(self, context: AttentionContext, view: InstanceView, request: RequestView,
                  here: Sequence[int], wanted: int, room: dict[int, int]) -> Change | None:
        """What frees as much as is wanted, or as it can, at the positions ``here``."""
        return _take_off(context, view, request, here, wanted, room)


def _faster(change: Change, best: Change) -> bool:
    """The order of benefits; times that differ by rounding only count as equal."""
    if abs(change.time - best.time) > 1e-9 * best.time:
        return change.time < best.time
    return (change.moved, change.request.request_id) < (best.moved, best.request.request_id)


def _better_relief(change: Change, best: Change, wanted: int) -> bool:
    """The order of moves for memory: enough, or most, freed first; then as fast as can be."""
    if (change.freed >= wanted) != (best.freed >= wanted):
        return change.freed >= wanted
    if change.freed < wanted and change.freed != best.freed:
        return change.freed > best.freed
    return _faster(change, best)


def _moved(context: AttentionContext, old: Placement, new: Placement, tokens: int) -> int:
    """Group-layers times tokens that a move sends."""
    return tokens * sum(max(0, new[p.index] - old[p.index]) * p.layers for p in context.plan.positions)


def _least_possible(context: AttentionContext, view: InstanceView,
                    movable: Sequence[RequestView], shares: Shares) -> list[tuple[float, RequestView]]:
    """F without each request at all, which no move of it can undercut; smallest first."""
    held, tokens = shares
    times = _total_times(context, np.array(view.groups) - held, np.array(view.group_tokens) - tokens)
    order = np.lexsort((np.array([request.request_id for request in movable]), times))
    return [(float(times[i]), movable[i]) for i in order[:TRIALS]]


def _matrix(requests: Sequence[RequestView]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Groups by request and position."""
    width = len(requests[0].placement or ())
    flat: Iterable[int] = (n for request in requests for n in request.placement or ())
    return np.fromiter(flat, dtype=np.int64, count=width * len(requests)).reshape(len(requests), width)


def _total_times(context: AttentionContext, groups: np.ndarray[Any, np.dtype[np.int64]],
                 tokens: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """:meth:`AttentionContext.total_time` of many loads, one a row."""
    used = groups > 0
    a, b, fixed, wire, wire_fixed = context.table
    jobs = np.where(used, a * groups + b * tokens + fixed, 0.0)
    waits = np.where(used, wire * groups + wire_fixed, 0.0)
    busy = sum((jobs[:, stage.middle:stage.last] for stage in context.stages), np.zeros((len(groups), 1)))
    total = np.zeros(len(groups))
    for stage in context.stages:
        here = slice(stage.middle, stage.last)
        if stage.shared:
            through = [stage.middle + w for w in stage.shared]
            waits[:, through] += stage.shared_wire * groups[:, through].sum(axis=1, keepdims=True)
        worst = jobs[:, stage.first:stage.middle].max(axis=1)
        if stage.remote:
            remote = np.where(used[:, here], busy + waits[:, here], 0.0).max(axis=1)
            worst = np.maximum(worst, remote)
        total += stage.layers * worst
    return total


def _by_arrival(candidates: Sequence[RequestView]) -> list[RequestView]:
    """The latest first."""
    return sorted(candidates, key=lambda r: (-r.arrival_s, -r.request_id))


def _take_off(context: AttentionContext, view: InstanceView, request: RequestView, here: Sequence[int],
              wanted: int, room: dict[int, int]) -> Change | None:
    """Move groups of a request off the positions ``here``, to where they complete first."""
    old, tokens = request.placement, request.context_tokens
    assert old is not None
    held_blocks, blocks = view.blocks(tokens), view.blocks(tokens + 1)
    load = Load(list(view.groups), list(view.group_tokens), dict(room))
    new = list(old)
    freed = 0
    for p in here:
        position = context.plan.positions[p]
        most = min(new[p], -(-(wanted - freed) // (held_blocks * position.layers)))
        if most <= 0:
            continue
        row = [0] * context.positions
        row[p] = most
        load.add(context, row, tokens, 0, sign=-1)
        gained, units = _elsewhere(context, position, new, load, tokens, blocks, most)
        load.add(context, gained, tokens, blocks)
        row[p] = most - units
        load.add(context, row, tokens, 0)
        new = [n + more for n, more in zip(new, gained, strict=True)]
        new[p] -= units
        freed += units * held_blocks * position.layers
    if not freed:
        return None
    return Change(request, tuple(new), context.total_time(load.groups, load.tokens),
                  _moved(context, old, tuple(new), tokens), freed)


def _elsewhere(context: AttentionContext, position: Position, placement: Sequence[int], load: Load,
               tokens: int, blocks: int, most: int) -> tuple[list[int], int]:
    """Up to ``most`` groups of a stage away from ``position``: by position, and how many found room."""
    stage = context.stages[position.stage]
    unit = blocks * stage.layers
    busy, wires = context.remote_load(load.groups, load.tokens)
    sent = stage.sent(load.groups)
    start: list[float] = []
    step: list[float] = []
    limit: list[int] = []
    for p, rank in enumerate(stage.local, stage.first):
        start.append(rank.a * load.groups[p] + rank.b * load.tokens[p] + rank.fixed)
        step.append(rank.a + rank.b * tokens)
        limit.append(min(rank.owned - placement[p], max(0, load.free[rank.device]) // unit))
    for d, remote in enumerate(stage.remote):
        start.append(busy[d] + (wires[stage.index][d] if wires[stage.index][d] >= 0.0
                                else remote.fixed + remote.wire_fixed + (sent if remote.shared else 0.0)))
        step.append(remote.a + remote.b * tokens + (0.0 if remote.shared else remote.wire))
        limit.append(max(0, load.free[remote.device]) // unit)
    limit[position.index - stage.first] = 0
    units = min(most, sum(limit))
    filled = fill_shared(start, step, limit, units, interface_of(stage, wires[stage.index]))
    counts = filled[0] if filled else [0] * len(limit)
    gained = [0] * context.positions
    gained[stage.first:stage.last] = counts
    return gained, sum(counts)
