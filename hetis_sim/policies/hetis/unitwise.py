"""Dispatcher and redispatcher for units of division other than heads (:mod:`.units`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hetis_sim.policies.hetis.attention import AttentionContext, ContextTable
from hetis_sim.policies.hetis.dispatcher import usable_load
from hetis_sim.policies.hetis.placing import Load
from hetis_sim.policies.hetis.redispatcher import Change, Redispatcher, Shares
from hetis_sim.policies.hetis.settings import HetisSettings
from hetis_sim.policies.hetis.units import Asked, TokenBlocks, Unit, WholeRequests, count_in, take_blocks
from hetis_sim.policies.ranges import AnyPlacement, computed_groups, group_blocks, group_tokens
from hetis_sim.policies.view import InstanceView, RequestView

UNITS: dict[str, type[Unit]] = {"request": WholeRequests, "sequence": TokenBlocks}


class UnitDispatcher:
    """Places the longest prefix of the waiting requests, one after the other."""

    def __init__(self, settings: HetisSettings, contexts: ContextTable) -> None:
        self.settings = settings
        self._contexts = contexts
        self._unit = UNITS[settings.granularity]()

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> list[AnyPlacement]:
        """Placements for the longest prefix that fits; see :meth:`Policy.dispatch`."""
        context = self._contexts.get(view)
        load = usable_load(view, self.settings.reserve_fraction if view.running else 0.0)
        nothing = [0] * context.positions
        placed: list[AnyPlacement] = []
        for request in requests:
            tokens, blocks = request.context_tokens, view.blocks(request.context_tokens + 1)
            placement = self._unit.place(context, load, Asked(tokens, blocks, view.block_tokens, nothing))
            if placement is None:
                break
            if not placed:
                load = usable_load(view, self.settings.reserve_fraction).copy()
            placed.append(placement)
            count_in(context, load, placement, tokens, view.block_tokens)
            take_blocks(context, load, placement, blocks)
        return placed


class UnitRedispatcher(Redispatcher):
    """The triggers of :class:`Redispatcher`; what moves is a request's share of a stage, or blocks of it."""

    def __init__(self, settings: HetisSettings, contexts: ContextTable) -> None:
        super().__init__(settings, contexts)
        self._unit = UNITS[settings.granularity]()

    def _shares(self, context: AttentionContext, view: InstanceView,
                movable: Sequence[RequestView]) -> Shares:
        plan = context.plan
        placed = [(p, request.context_tokens) for request in movable if (p := request.placed) is not None]
        held = [computed_groups(plan, p) for p, _ in placed]
        tokens = [group_tokens(plan, p, context_tokens, view.block_tokens) for p, context_tokens in placed]
        return np.array(held), np.array(tokens, dtype=np.float64)

    def _replace(self, context: AttentionContext, view: InstanceView, load: Load,
                 request: RequestView) -> Change | None:
        old, tokens, size = request.placed, request.context_tokens, view.block_tokens
        assert old is not None
        rest = load.copy()
        count_in(context, rest, old, tokens, size, -1)
        held = group_blocks(context.plan, old, view.blocks(tokens))
        new = self._unit.place(context, rest, Asked(tokens, view.blocks(tokens + 1), size, held))
        if new is None or new == old:
            return None
        count_in(context, rest, new, tokens, size)
        after = context.total_time(rest.groups, rest.tokens)
        return Change(request, new, after, _moved(context, view, old, new, tokens))

    def _growth(self, context: AttentionContext, view: InstanceView,
                running: Sequence[RequestView]) -> dict[int, int]:
        growth = dict.fromkeys(context.plan.devices, 0)
        # Token ranges do not grow, tails do.
        for request in running:
            for position, n in zip(context.plan.positions, request.placement or (), strict=False):
                growth[position.device] += n * position.layers
        return growth

    def _holds(self, context: AttentionContext, request: RequestView, here: Sequence[int]) -> bool:
        placed = request.placed
        return placed is not None and any(computed_groups(context.plan, placed)[p] for p in here)

    def _by_relief(self, context: AttentionContext, view: InstanceView, candidates: Sequence[RequestView],
                   here: Sequence[int], wanted: int) -> list[RequestView]:
        """Candidates that can free enough with the least cache first, then those that free most."""

        def key(request: RequestView) -> tuple[bool, int, int]:
            assert request.placed is not None
            held = group_blocks(context.plan, request.placed, view.blocks(request.context_tokens))
            freed = sum(held[p] * context.plan.positions[p].layers for p in here)
            return (freed < wanted, freed if freed >= wanted else -freed, request.request_id)

        return sorted(candidates, key=key)

    def _take_off(self, context: AttentionContext, view: InstanceView, request: RequestView,
                  here: Sequence[int], wanted: int, room: dict[int, int]) -> Change | None:
        """Cache off a device, as much as is wanted and the unit allows, to where F is smallest."""
        old, tokens, size = request.placed, request.context_tokens, view.block_tokens
        assert old is not None
        load = Load(list(view.groups), list(view.group_tokens), dict(room))
        count_in(context, load, old, tokens, size, -1)
        blocks = view.blocks(tokens)
        held = group_blocks(context.plan, old, blocks)
        asked = Asked(tokens, view.blocks(tokens + 1), size, held)
        new = self._unit.take_off(context, load, asked, old, here, wanted)
        if new is None:
            return None
        count_in(context, load, new, tokens, size)
        after = group_blocks(context.plan, new, blocks)
        freed = sum((held[p] - after[p]) * context.plan.positions[p].layers for p in here)
        if freed <= 0:
            return None
        return Change(request, new, context.total_time(load.groups, load.tokens),
                      _moved(context, view, old, new, tokens), freed)


def _moved(context: AttentionContext, view: InstanceView, old: AnyPlacement, new: AnyPlacement,
           tokens: int) -> int:
    """Group-layers times tokens that a move sends."""
    before, after = (group_tokens(context.plan, p, tokens, view.block_tokens) for p in (old, new))
    return sum(max(0, b - a) * position.layers
               for position, a, b in zip(context.plan.positions, before, after, strict=True))
