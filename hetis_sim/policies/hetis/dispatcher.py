"""Assigns the heads of arriving requests to primary and attention workers."""

from __future__ import annotations

from collections.abc import Sequence

from hetis_sim.policies.apportion import apportion
from hetis_sim.policies.hetis.attention import AttentionContext, ContextTable
from hetis_sim.policies.hetis.placing import Load, place
from hetis_sim.policies.hetis.settings import HetisSettings
from hetis_sim.policies.plan import Placement
from hetis_sim.policies.view import InstanceView, RequestView


class Dispatcher:
    """Places the longest prefix of the waiting requests that the free cache holds.

    Requests are placed one after the other (see :mod:`.placing`). When many are admitted
    together, the linear program of the paper places them jointly, and its rounded answer is
    taken where attention is faster with it.
    """

    def __init__(self, settings: HetisSettings, contexts: ContextTable) -> None:
        self.settings = settings
        self._contexts = contexts
        self._static: dict[int, tuple[AttentionContext, dict[int, int], Placement]] = {}

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
        """Placements for the longest prefix that fits; see :meth:`Policy.dispatch`."""
        context = self._contexts.get(view)
        load = usable_load(view, self.settings.reserve_fraction if view.running else 0.0)
        room = sum(units for units in load.free.values() if units > 0)
        placed: list[Placement] = []
        for request in requests:
            blocks = view.blocks(request.context_tokens + 1)
            need = blocks * context.units_per_block
            if room < need:
                break
            placement = self._place(context, view, load, request.context_tokens, blocks)
            if placement is None:
                break
            placed.append(placement)
            if len(placed) == len(requests):
                break
            if len(placed) == 1:
                load = usable_load(view, self.settings.reserve_fraction).copy()
            load.add(context, placement, request.context_tokens, blocks)
            room = sum(units for units in load.free.values() if units > 0)
        many = len(placed) >= self.settings.lp_min_requests
        if many and context.workers and self.settings.dispatch == "lp":
            return self._jointly(context, view, requests, placed)
        return placed

    def _place(self, context: AttentionContext, view: InstanceView, load: Load, tokens: int,
               blocks: int) -> Placement | None:
        if self.settings.dispatch != "static":
            return place(context, load, tokens, blocks)
        placement = self._static_placement(context, view)
        need = view.units_needed(placement, tokens + 1)
        return placement if all(units <= load.free[device] for device, units in need.items()) else None

    def _jointly(self, context: AttentionContext, view: InstanceView, requests: Sequence[RequestView],
                 placed: list[Placement]) -> list[Placement]:
        from hetis_sim.policies.hetis.joint import place_jointly

        items = [(request.context_tokens, view.blocks(request.context_tokens + 1))
                 for request in requests[:len(placed)]]
        return place_jointly(context, usable_load(view, self.settings.reserve_fraction), items, placed)

    def _static_placement(self, context: AttentionContext, view: InstanceView) -> Placement:
        """One split for all requests: groups in proportion to the cache for them at each position.

        The cache of an attention worker counts for every stage by its layers.
        """
        known = self._static.get(view.index)
        if known is not None and known[0] is context and known[1] is view.capacity_units:
            return known[2]
        capacity = view.capacity_units
        placement: list[int] = []
        for stage in context.stages:
            weights = [capacity[rank.device] / stage.layers for rank in stage.local]
            weights += [capacity[remote.device] / context.layers for remote in stage.remote]
            limits = list(stage.owned) + [context.kv_heads] * len(stage.remote)
            placement += apportion(weights, limits, context.kv_heads)
        self._static[view.index] = (context, capacity, tuple(placement))
        return tuple(placement)


def usable_load(view: InstanceView, reserve_fraction: float) -> Load:
    """The load of a view, with the free units that a reserve leaves; sequences are not copied."""
    if not reserve_fraction:
        return Load(view.groups, view.group_tokens, view.free_units)
    capacity = view.capacity_units
    free = {d: units - int(reserve_fraction * capacity[d]) for d, units in view.free_units.items()}
    return Load(view.groups, view.group_tokens, free)
