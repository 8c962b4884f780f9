"""Requests on their way from an instance that prefills to one that decodes.

A policy whose plan has such instances chooses the decoding one (``Policy.handoff``); its cache
is reserved there before a byte is sent. Policies that stream send the cache layer by layer
while the prompt is still being computed, where there is room at that time; otherwise the cache
stays where it was computed until it finds room, and is sent then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hetis_sim.control.placement import match
from hetis_sim.control.state import Landing, RequestState
from hetis_sim.control.step import Flow, Transfer
from hetis_sim.policies.base import Policy
from hetis_sim.policies.plan import InstancePlan

if TYPE_CHECKING:
    from hetis_sim.control.engine import Engine


class Handoffs:
    """The queue of prefilled requests that have no place to decode yet, and those under way."""

    def __init__(self, engines: Sequence[Engine], policy: Policy) -> None:
        self._engines = engines
        self._policy = policy
        self._targets = [engine for engine in engines if engine.plan.role == "decode"]
        self._waiting: deque[RequestState] = deque()
        self._refused_at = -1
        self._limits: tuple[int, ...] = ()

    @property
    def any(self) -> bool:
        """Whether the plan has instances that only decode."""
        return bool(self._targets)

    def learn_limits(self, limits: Sequence[int]) -> None:
        """Take over how many tokens a request may reach on each instance."""
        self._limits = tuple(limits)

    def longest_context(self) -> int:
        """Tokens that a request may reach on the roomiest decoding instance."""
        return max((self._limits[engine.index] for engine in self._targets), default=0)

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

    def retry(self) -> list[Transfer]:
        """Send whatever finds room by now, first come first served."""
        begun: list[Transfer] = []
        changes = sum(engine.changes for engine in self._targets)
        while self._waiting and changes != self._refused_at:
            transfer = self._begin(self._waiting[0], self._waiting[0].cached_tokens)
            if transfer is None:
                self._refused_at = changes
                break
            self._waiting.popleft()
            begun.append(transfer)
        return begun

    def _begin(self, state: RequestState, tokens: int) -> Transfer | None:
        """Reserve cache at the instance that the policy chooses, and describe the transfer."""
        assert state.shape is not None
        needed = state.request.total_tokens
        able = [engine for engine in self._targets if self._limits[engine.index] >= needed]
        for engine in able:
            engine.sync()
        source = self._engines[state.instance]
        request = source.request_view(state)
        chosen = able[self._policy.handoff(request, [engine.load() for engine in able])]
        view = chosen.view()
        placements = self._policy.dispatch([request], view)
        chosen.log.record("handoff", view, [request], placements)
        if not placements:
            return None
        held = chosen.books.hold(placements[0], tokens)
        chosen.landings[state.request_id] = held
        chosen.cap_open_steps()
        state.landing = Landing(chosen.index, held)
        flows = handoff_flows(source.plan, state.shape.group_tokens(tokens), chosen.plan,
                              held.shape.group_tokens(tokens), source.bytes_per_group_token)
        return Transfer(state.request_id, source.index, "handoff", flows, chosen.index)

    def arrived(self, state: RequestState) -> bool:
        """The cache is there; True when the request can join its lane now."""
        assert state.landing is not None
        state.landing.arrived = True
        return state.generated_base > 0 and state.prefilled_tokens >= state.context_tokens

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
