"""What an instance does when its cache runs short, and when its heads sit badly.

Order of means, mildest first: ask the policy ahead of time for a move that relieves the
device that will fill first; at the moment a device is full, wait for a move or a swap that
is about to free it; preempt. The oldest request of an instance is never preempted for
another one, so one request always makes progress and every run ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, overload

from hetis_sim.control.lane import Lane
from hetis_sim.control.placement import staying
from hetis_sim.control.state import RequestState, Status, SwappedCache
from hetis_sim.control.step import Flow, Transfer
from hetis_sim.control.swap import HostMemory
from hetis_sim.policies.ranges import AnyPlacement
from hetis_sim.policies.view import Move, RequestView

if TYPE_CHECKING:
    from hetis_sim.control.engine import Engine


class RunningViews(Sequence[RequestView]):
    """Views of the decoding requests, made only when a policy looks at them."""

    def __init__(self, engine: Engine, states: Sequence[RequestState]) -> None:
        self._engine = engine
        self._states = states
        self._views: list[RequestView] | None = None

    def _made(self) -> list[RequestView]:
        if self._views is None:
            self._views = [self._engine.request_view(state) for state in self._states]
        return self._views

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[RequestView]:
        return iter(self._made())

    @overload
    def __getitem__(self, index: int) -> RequestView: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[RequestView]: ...

    def __getitem__(self, index: int | slice) -> RequestView | Sequence[RequestView]:
        return self._made()[index]


class Pressure:
    """Moves, preemptions and swaps of one instance.

    Attributes:
        swapped: requests whose cache waits in host memory, oldest preemption first.
        moves: moves under way.
        refusals: devices for which the policy knew no move, until membership changes.
    """

    def __init__(self, engine: Engine, host_memory: HostMemory) -> None:
        self._engine = engine
        self._host_memory = host_memory
        self.swapped: deque[RequestState] = deque()
        self.moves = 0
        self.refusals: set[int] = set()
        self._freeing: dict[int, tuple[tuple[int, int], ...]] = {}

    # -- moves of heads ------------------------------------------------------------------

    def look_ahead(self) -> None:
        """Ask the policy for a move: to relieve a device that fills soon, or for speed."""
        engine = self._engine
        if self.moves >= engine.settings.moves_max:
            return
        device = self._filling_soon()
        if device is not None and self._relieve(device):
            return
        view = engine.view()
        running = self._running()
        move = engine.policy.rebalance(view, running)
        if engine.log.enabled:
            engine.log.record("rebalance", view, list(running), move)
        if move is not None:
            self._begin_move(move)

    def _filling_soon(self) -> int | None:
        """The local device with the least time left, if that is under two intervals."""
        engine = self._engine
        horizon = 2 * engine.settings.rebalance_interval / engine.settings.limits.block_tokens
        soonest, found = horizon, None
        for d in range(len(engine.books.ledger.used)):
            growth = engine.cycle_units[d]
            if growth and engine.books.ledger.free(d) / growth < soonest:
                soonest, found = engine.books.ledger.free(d) / growth, d
        return found

    def _relieve(self, d: int) -> bool:
        engine = self._engine
        if self.moves >= engine.settings.moves_max or d in self.refusals:
            return False
        device = engine.plan.devices[d]
        view = engine.view()
        running = self._running()
        move = engine.policy.relieve(view, device, running)
        if engine.log.enabled:
            engine.log.record("relieve", view, list(running), move)
        if move is not None and self._begin_move(move):
            return True
        self.refusals.add(d)
        return False

    def _running(self) -> RunningViews:
        states = [state for lane in self._engine.lanes for state in lane.members.values()]
        return RunningViews(self._engine, states)

    def _begin_move(self, move: Move) -> bool:
        engine = self._engine
        state = engine.active.get(move.request_id)
        if state is None or state.status != Status.DECODE or state.move is not None or state.shape is None:
            return False
        lane = engine.lanes[state.lane]
        shapes = engine.books.shapes
        flows = shapes.move_flows(state.shape, shapes.shape(move.placement), lane.cached_tokens(state),
                                  engine.bytes_per_group_token)
        transfer = Transfer(state.request_id, engine.index, "move", flows)
        if not flows or not engine.books.begin_move(state, lane, move, transfer,
                                                          engine.cycle_units):
            return False
        self.moves += 1
        engine.news.transfers.append(transfer)
        return True

    # -- room for the next iteration -----------------------------------------------------

    def make_room(self, lane: Lane, now_s: float) -> bool:
        """See to it that the lane's next iteration fits; False if it has to wait."""
        while lane.members:
            short = self._short_device(lane)
            if short is None:
                return True
            if self._about_to_free(short) or self._relieve(short):
                return False
            victim = self._victim(lane, short)
            if victim is None:
                return False
            self._preempt(victim, lane, now_s)
        return False

    def _short_device(self, lane: Lane) -> int | None:
        need = lane.next_units()
        return None if need is None else self._engine.books.ledger.short_device(need)

    def _about_to_free(self, d: int) -> bool:
        """Whether a move or a swap under way will give back cache of this device."""
        if any(d == device for units in self._freeing.values() for device, _ in units):
            return True
        return any(state.move is not None and any(d == device for device, _ in state.move.lost_units)
                   for lane in self._engine.lanes for state in lane.members.values())

    def _victim(self, lane: Lane, d: int) -> RequestState | None:
        """The member to preempt; None when the lane holds only the oldest request of a busy instance.

        Members with cache on the device come first: to preempt another one frees nothing there.
        """
        engine = self._engine
        oldest = min(engine.active.values(), key=lambda s: (s.request.arrival_s, s.request_id))
        others = [s for s in lane.members.values() if s is not oldest]
        candidates = [s for s in others if s.shape and any(d == device for device, _ in s.shape.block_units)]
        candidates = candidates or others
        if candidates:
            device = engine.plan.devices[d]
            views = [engine.request_view(state) for state in candidates]
            chosen = engine.policy.victim(device, views)
            engine.log.record("preempt", engine.view(), views, chosen.request_id)
            return lane.members[chosen.request_id]
        alone = len(engine.active) - len(self.swapped) == 1
        return oldest if alone and oldest.request_id in lane.members else None

    # -- preemption ----------------------------------------------------------------------

    def _preempt(self, state: RequestState, lane: Lane, now_s: float) -> None:
        engine = self._engine
        if lane.issued > state.joined_at:
            state.last_token_s = lane.ready_at_s
        engine.books.leave(state, lane)
        state.preemptions += 1
        state.context_tokens = state.request.prompt_tokens + state.generated_base
        swapped = (engine.policy.preemption == "swap" and len(engine.active) > 1
                   and state.preemptions <= engine.settings.preemptions_max and self._swap_out(state))
        if not swapped:
            engine.books.release(state)
            del engine.active[state.request_id]
            state.status, state.lane = Status.WAITING, -1
            if state.preemptions > engine.settings.preemptions_max:
                engine.drop(state, "preemption_limit", now_s)
            elif engine.plan.role == "decode":
                engine.news.evicted.append(state)
            else:
                engine.waiting.appendleft(state)
                engine.waiting_tokens += state.context_tokens
        engine.membership_changed()
        # What was just taken away must not be given back before somebody else has left.
        engine.blocked = self._somebody_runs()

    def _somebody_runs(self) -> bool:
        return len(self._engine.active) > len(self.swapped)

    def _swap_out(self, state: RequestState) -> bool:
        """Begin to copy a request's cache to the memory of its hosts; False if they are full."""
        engine = self._engine
        assert state.shape is not None
        per_host: dict[int, float] = {}
        flows = []
        for position, held in zip(engine.plan.positions, state.shape.group_tokens(state.cached_tokens),
                                  strict=True):
            if not held:
                continue
            host = self._host_memory.host(position.device)
            amount = engine.bytes_per_group_token * held * position.layers
            per_host[host] = per_host.get(host, 0.0) + amount
            flows.append(Flow(position.device, -1 - host, amount))
        host_bytes = tuple(sorted(per_host.items()))
        if not self._host_memory.take(host_bytes):
            return False
        state.swap = SwappedCache(state.shape, host_bytes)
        state.status = Status.SWAPPED
        self._freeing[state.request_id] = tuple(state.shape.units(state.held_blocks))
        engine.news.transfers.append(Transfer(state.request_id, engine.index, "swap_out", tuple(flows)))
        return True

    def swapped_out(self, state: RequestState) -> None:
        """The copy has arrived: the devices' cache is free."""
        del self._freeing[state.request_id]
        self._engine.books.release(state)
        state.lane = -1
        self.swapped.append(state)
        if not self._somebody_runs():
            self._engine.blocked = False

    def forget(self, state: RequestState) -> None:
        """Give up a preempted request's cache, in host memory or on its way there."""
        if self._freeing.pop(state.request_id, None) is not None:
            self._engine.books.release(state)
        else:
            self.swapped.remove(state)
        self.swapped_in(state)

    def swap_in(self, lane: Lane) -> None:
        """Bring back swapped requests, first out first in, as far as the policy places them."""
        engine = self._engine
        while self.swapped and not engine.blocked and lane.load < engine.settings.limits.max_batch_requests:
            state = self.swapped[0]
            view = engine.view()
            request = state.view(state.generated_base)
            placements = engine.policy.dispatch([request], view)
            engine.log.record("swap_in", view, [request], placements)
            if not placements or not self._may_return(placements[0], state.cached_tokens):
                engine.blocked = self._somebody_runs()
                return
            self.swapped.popleft()
            assert state.swap is not None
            engine.books.accept(state, placements[0], state.cached_tokens, staged=False)
            state.status, state.lane = Status.TRANSFER, lane.index
            lane.prefilling += 1
            state.in_flight_transfers += 1
            engine.news.transfers.append(
                Transfer(state.request_id, engine.index, "swap_in", self._flows_back(state)))

    def _may_return(self, placement: AnyPlacement, tokens: int) -> bool:
        """Whether everybody else keeps room for a next block: else two requests could swap places forever."""
        if not self._somebody_runs():
            return True
        books = self._engine.books
        need = list(self._engine.cycle_units)
        for d, units in books.shapes.shape(placement).units(books.blocks(tokens)):
            need[d] += units
        return books.ledger.fits(enumerate(need))

    def swapped_in(self, state: RequestState) -> None:
        """The copy has arrived, or nobody wants it any more: the hosts' memory is free."""
        if state.swap is not None:
            self._host_memory.give(state.swap.host_bytes)
            state.swap = None

    def _flows_back(self, state: RequestState) -> tuple[Flow, ...]:
        """From host memory to wherever the heads now live, each group from where it was parked."""
        engine = self._engine
        assert state.swap is not None
        assert state.shape is not None
        size, tokens, old = engine.bytes_per_group_token, state.cached_tokens, state.swap.shape
        moved = engine.books.shapes.move_flows(old, state.shape, tokens, size)
        flows = [Flow(-1 - self._host_memory.host(flow.source), flow.target, flow.size_bytes)
                 for flow in moved]
        for position, stay in zip(engine.plan.positions, staying(old, state.shape, tokens), strict=True):
            if stay:
                host = self._host_memory.host(position.device)
                flows.append(Flow(-1 - host, position.device, size * stay * position.layers))
        return tuple(flows)
