"""Requests on their way from an instance that prefills to one that decodes.

A policy whose plan has such instances chooses the decoding one (``Policy.handoff``); its cache
is reserved there before a byte is sent. Policies that stream send the cache layer by layer
while the prompt is still being computed, where there is room at that time; otherwise the cache
stays where it was computed until it finds room, and is sent then. Where pools mix, a request that
finds none decodes where its cache is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hetis_sim.control.placement import match
from hetis_sim.control.state import Landing, RequestState, Status
from hetis_sim.control.step import Flow, Transfer
from hetis_sim.policies.base import Policy
from hetis_sim.policies.plan import InstancePlan
from hetis_sim.policies.ranges import AnyPlacement

if TYPE_CHECKING:
    from hetis_sim.control.engine import Engine


class Handoffs:
    """The queue of prefilled requests that have no place to decode yet, and those under way.

    Attributes:
        any: whether the plan has instances that only decode.
        longest_context: tokens that a request may reach on the roomiest of them.
    """

    def __init__(self, engines: Sequence[Engine], policy: Policy) -> None:
        self._engines = engines
        self._policy = policy
        self._targets = [engine for engine in engines if engine.plan.role == "decode"]
        # Whose changes may make room for somebody who has been refused.
        self._watched = [engine for engine in engines
                         if engine.plan.role == "decode" or policy.mixes_pools]
        self._waiting: deque[RequestState] = deque()
        self._refused_at = -1
        self._limits: tuple[int, ...] = ()
        self.any = bool(self._targets)
        self.longest_context = 0

    def learn_limits(self, limits: Sequence[int]) -> None:
        """Take over how many tokens a request may reach on each instance."""
        self._limits = tuple(limits)
        self.longest_context = max((limits[engine.index] for engine in self._targets), default=0)

    def stream(self, state: RequestState) -> Transfer | None:
        """Begin to send a prompt's cache while it is computed, if there is room for it now."""
        if not self._policy.streams_handoff or self._waiting:
            return None
        return self._begin(state, state.context_tokens)

    def prefilled(self, state: RequestState) -> list[RequestState]:
        """A request has its first token; returns those that can join their lanes now."""
        if state.landing is None:
            self._waiting.append(state)
        elif state.landing.arrived:
            return [state]
        return []

    def retry(self, touched: list[int]) -> list[Transfer]:
        """Send whatever finds room by now, first come first served.

        Instances where a request goes on without a transfer are added to ``touched``.
        """
        begun: list[Transfer] = []
        changes = self._changes()
        while self._waiting and changes != self._refused_at:
            state = self._waiting[0]
            transfer = self._begin(state, state.cached_tokens)
            if transfer is not None:
                begun.append(transfer)
            elif self._policy.mixes_pools and self._may_stay(state):
                self._engines[state.instance].keep(state)
                touched.append(state.instance)
            else:
                self._refused_at = changes
                break
            self._waiting.popleft()
        return begun

    def _changes(self) -> int:
        return sum(engine.changes for engine in self._watched)

    def _able(self, state: RequestState) -> list[Engine]:
        """Decoding instances that can carry a request to its end."""
        needed = state.request.total_tokens
        return [engine for engine in self._targets if self._limits[engine.index] >= needed]

    def _begin(self, state: RequestState, tokens: int) -> Transfer | None:
        """Reserve cache at the instance that the policy chooses, and describe the transfer."""
        able = self._able(state)
        for engine in able:
            engine.sync()
        request = self._engines[state.instance].request_view(state)
        while able:
            index = self._policy.handoff(request, [engine.load() for engine in able])
            chosen = able.pop(index)
            view = chosen.view()
            placements = self._policy.dispatch([request], view)
            chosen.log.record("handoff", view, [request], placements)
            if placements:
                return self._reserve(state, chosen, placements[0], tokens)
        return None

    def _reserve(self, state: RequestState, chosen: Engine, placement: AnyPlacement,
                 tokens: int) -> Transfer:
        assert state.shape is not None
        source = self._engines[state.instance]
        held = chosen.books.hold(placement, tokens)
        chosen.landings[state.request_id] = held
        chosen.cap_open_steps()
        state.landing = Landing(chosen.index, held)
        flows = handoff_flows(source.plan, state.shape.group_tokens(tokens), chosen.plan,
                              held.shape.group_tokens(tokens), source.bytes_per_group_token)
        return Transfer(state.request_id, source.index, "handoff", flows, chosen.index)

    def _may_stay(self, state: RequestState) -> bool:
        """Whether a prefilled request decodes where it is: its policy would place it there anew.

        One that no decoding instance could ever hold stays in any case.
        """
        if not self._able(state):
            return True
        engine = self._engines[state.instance]
        engine.sync()
        view, request = engine.view(), engine.request_view(state)
        assert state.shape is not None
        free = dict(view.free_units)
        for d, units in state.shape.units(state.held_blocks):
            free[engine.plan.devices[d]] += units
        view = replace(view, free_units=free)
        placements = self._policy.dispatch([request], view)
        engine.log.record("stay", view, [request], placements)
        return bool(placements)

    def arrived(self, state: RequestState) -> bool:
        """The cache is there; True when the request can join its lane now."""
        assert state.landing is not None
        state.landing.arrived = True
        return state.generated_base > 0 and state.prefilled_tokens >= state.context_tokens

    def forget(self, state: RequestState) -> bool:
        """Strike a request that ends off the queue; whether it has been prefilled and was to go elsewhere."""
        if state in self._waiting:
            self._waiting.remove(state)
            self._refused_at = -1  # that was for whoever stood first before
            return True
        return state.status == Status.TRANSFER and state.landing is not None

    def cancel(self, state: RequestState) -> None:
        """A request has ended before its handoff did."""
        if state.landing is not None:
            target = self._engines[state.landing.instance]
            target.books.drop(target.landings.pop(state.request_id))
            target.membership_changed()
            state.landing = None

    def land(self, state: RequestState) -> None:
        """Give back the cache where the prompt was computed and join the decoding instance."""
        landing = state.landing
        assert landing is not None
        self._engines[state.instance].release(state)
        target = self._engines[landing.instance]
        state.landing = None
        target.land(state, target.landings.pop(state.request_id))


def handoff_flows(source: InstancePlan, given: Sequence[int], target: InstancePlan, taken: Sequence[int],
                  bytes_per_group_token: int) -> tuple[Flow, ...]:
    """Flows that carry a request's cache between instances with stages of their own.

    ``given`` and ``taken`` are group-tokens at their positions. Stages that share layers exchange
    those of these layers; the last of them is the tail.
    """
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    for s, t, layers in shared_layers(source, target):
        give = [[source.positions[p].device, given[p]] for p in source.stage_positions[s] if given[p]]
        take = [[target.positions[p].device, taken[p]] for p in target.stage_positions[t] if taken[p]]
        for a, b, amount in match(give, take):
            total, tail = sizes.get((a, b), (0, 0))
            sizes[a, b] = (total + amount * layers, tail + amount)
    return tuple(Flow(a, b, total * bytes_per_group_token, tail * bytes_per_group_token)
                 for (a, b), (total, tail) in sizes.items())


def shared_layers(source: InstancePlan, target: InstancePlan) -> list[tuple[int, int, int]]:
    """(stage of source, stage of target, layers they have in common), where there are any."""
    found: list[tuple[int, int, int]] = []
    start = 0
    for s, stage in enumerate(source.stages):
        first = 0
        for t, other in enumerate(target.stages):
            common = min(start + stage.layers, first + other.layers) - max(start, first)
            if common > 0:
                found.append((s, t, common))
            first += other.layers
        start += stage.layers
    return found
