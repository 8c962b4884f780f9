"""What the workers hold, kept in step with the ledger.

The control plane books cache by counting; :class:`Mirror` looks at its requests after every
verb and says which tables are to be opened, grown, copied and closed on which device, so that
physical and booked cache are equal after each message. It decides nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from hetis_exec.covers import Cover, Covers, Extent, Journey, Key, every_key, extents, gathered, journeys
from hetis_exec.groups import Groups
from hetis_exec.holdings import Holding, Moving, Ops, Shipment
from hetis_exec.messages import (
    Await,
    Close,
    Drop,
    Expect,
    Forget,
    Grow,
    Join,
    Op,
    Open,
    Park,
    Send,
    Shed,
    Span,
)
from hetis_sim.control.engine import Engine
from hetis_sim.control.placement import PlacementShape
from hetis_sim.control.state import PendingMove, RequestState, Status
from hetis_sim.control.step import Transfer


class Mirror:
    """Follows one instance. ``hosts`` gives the host of every device of the cluster.

    Attributes:
        known: what each request holds on devices.
        landings: what is held for requests that another instance is still to hand over.
        parked: for requests in host memory, the positions whose hosts hold each block.
    """

    def __init__(self, engine: Engine, hosts: Sequence[int]) -> None:
        self._engine = engine
        self._hosts = hosts
        self.plan = engine.plan
        self._positions = engine.plan.positions
        self._block_tokens = engine.books.block_tokens
        self.covers = Covers(engine.plan, self._block_tokens)
        self.known: dict[int, Holding] = {}
        self.landings: dict[int, Holding] = {}
        self.parked: dict[int, Cover] = {}
        self._ops: defaultdict[int, Ops] = defaultdict(Ops)
        self._shipments: list[Shipment] = []
        self._tags = 0
        self._devices_at: dict[tuple[int, ...], tuple[int, ...]] = {}

    def follow(self) -> None:
        """Compare with the control plane and note what is to be done."""
        active = self._engine.active
        for request_id, held in list(self.known.items()):
            state = active.get(request_id)
            if state is None or state.shape is None or self._restarted(held, state):
                self._release(request_id, self.known.pop(request_id))
        self._follow_landings()
        for state in active.values():
            if state.shape is None:
                continue
            known = self.known.get(state.request_id)
            if known is None:
                self._admit(state, state.shape)
            elif not self._is_quiet(known, state):
                self._update(known, state)
        for request_id in [r for r in self.parked if r not in active]:
            self._forget(request_id)

    def take(self) -> tuple[dict[int, tuple[Op, ...]], list[Shipment]]:
        """What has been noted since the last call: operations by device, and shipments that they begin."""
        ops = {device: ops.in_order() for device, ops in self._ops.items()}
        shipments = self._shipments
        self._ops.clear()
        self._shipments = []
        return ops, shipments

    def devices(self, request_id: int, stage: int) -> tuple[int, ...]:
        """Device that holds each group of a request at a stage, its newest tokens at least."""
        return self._devices(self.known[request_id].cover.holders[stage])

    def _devices(self, places: tuple[int, ...]) -> tuple[int, ...]:
        found = self._devices_at.get(places)
        if found is None:
            found = self._devices_at[places] = tuple(self._positions[p].device for p in places)
        return found

    def spans(self, request_id: int, stage: int) -> tuple[Span, ...]:
        """Who holds the older tokens of a request at a stage, as far as these are divided."""
        held = self.known[request_id]
        older = held.cover.older[stage]
        if not older:
            return ()
        found = held.spans.get(stage)
        if found is None:
            ends = [b for b in range(1, len(older) + 1) if older[b:b + 1] != (older[b - 1],)]
            found = held.spans[stage] = tuple([Span(b * self._block_tokens, self._devices(older[b - 1]))
                                               for b in ends])
        return found

    def complete_tokens(self, state: RequestState) -> int:
        """Cached tokens of a request that have been computed; the iteration under way is not."""
        if state.status != Status.DECODE:
            return state.cached_tokens
        lane = self._engine.lanes[state.lane]
        under_way = lane.step is not None and lane.step.decoding > 0
        return lane.cached_tokens(state) - under_way

    # -- requests come and go --------------------------------------------------------------------

    @staticmethod
    def _restarted(held: Holding, state: RequestState) -> bool:
        """Whether its cache was given up and taken anew since the last look."""
        return state.preemptions != held.epoch and state.status != Status.SWAPPED

    def _blocks(self, state: RequestState) -> int:
        if state.status != Status.DECODE:
            return state.held_blocks
        return self._engine.books.blocks(self._engine.lanes[state.lane].cached_tokens(state))

    def _admit(self, state: RequestState, shape: PlacementShape) -> None:
        request_id = state.request_id
        before = self.parked.pop(request_id, None)
        cover = (self.covers.initial(shape) if before is None
                 else self.covers.rearranged(before, shape, state.cached_tokens))
        held = self.known[request_id] = Holding(state.preemptions, shape, cover, self._blocks(state),
                                                state.staged_blocks, self._next_tag())
        for part in extents(cover, held.blocks):
            self._open(request_id, self._with_staged(held, part), held.tag)
        for part in self._staged(held):
            self._open(request_id, part, held.tag)
        if before is not None:
            self._bring_back(state, before, held)

    def _follow_landings(self) -> None:
        """Hold cache for requests that are to come, and take over or give up what was held before."""
        landings = self._engine.landings
        for request_id, held in list(self.landings.items()):
            if landings.get(request_id) is held.landing:
                continue
            del self.landings[request_id]
            state = self._engine.active.get(request_id)
            if state is None:
                self._release(request_id, held)
            else:
                held.epoch, held.landing = state.preemptions, None
                self.known[request_id] = held
        for request_id, cache in landings.items():
            if request_id not in self.landings:
                held = self.landings[request_id] = Holding(0, cache.shape, self.covers.initial(cache.shape),
                                                           cache.blocks, 0, self._next_tag(), landing=cache)
                for part in extents(held.cover, held.blocks):
                    self._open(request_id, part, held.tag)

    def _release(self, request_id: int, held: Holding) -> None:
        places = {part.position for part in extents(held.cover, held.blocks)}
        places |= {part.position for part in self._staged(held)}
        places |= {position for _, position, _ in held.move.aside} if held.move else set()
        for device in sorted({self._positions[p].device for p in places}):
            self._ops[device].closes.append(Drop(request_id))

    def _forget(self, request_id: int) -> None:
        cover = self.parked.pop(request_id)
        for device in sorted({self._positions[part.position].device for part in extents(cover, 0)}):
            self._ops[device].closes.append(Forget(request_id))

    def _is_quiet(self, held: Holding, state: RequestState) -> bool:
        """Whether a request just decodes, in the blocks that it has: most do, most of the time."""
        return (held.move is None and state.move is None and not held.staged
                and state.status == Status.DECODE and self._blocks(state) == held.blocks)

    def _update(self, held: Holding, state: RequestState) -> None:
        move = held.move
        if move is not None and state.move is not move.pending:
            if state.shape is move.pending.shape:
                self._switch(held, state, move)
            else:
                self._cancel(held, state, move)
        self._grow(held, state)
        if held.staged and not state.staged_blocks:
            self._unstage(held, state)
        if state.move is not None and held.move is None:
            self._begin_move(held, state, state.move)
        if state.status == Status.SWAPPED and state.request_id not in self.parked:
            self._park(held, state)

    def _grow(self, held: Holding, state: RequestState) -> None:
        blocks = self._blocks(state)
        if blocks != held.blocks:
            held.blocks = blocks
            for stage, holders in enumerate(held.cover.holders):
                for position in sorted(set(holders)):
                    groups = tuple(g for g, p in enumerate(holders) if p == position)
                    self._at(position).opens.append(Grow(state.request_id, stage, groups, blocks))

    def _unstage(self, held: Holding, state: RequestState) -> None:
        for part in self._staged(held):
            self._at(part.position).closes.append(Close(state.request_id, part.stage, part.groups))
        for part in extents(held.cover, held.blocks):
            staged = self._with_staged(held, part)
            gone = sorted(set(range(staged.blocks)) - set(range(part.blocks))) + sorted(
                set(part.absent) - set(staged.absent))
            if gone:
                self._at(part.position).closes.append(
                    Shed(state.request_id, part.stage, part.groups, tuple(sorted(gone))))
        held.staged = 0

    # -- prompts on their way to attention workers ----------------------------------------------------

    def push(self, state: RequestState) -> int:
        """Begin the push of a prompt whose last piece is about to be computed.

        Returns:
            Its tag, or -1 if all of it stays at its ranks.
        """
        held = self.known[state.request_id]
        shipment = Shipment(held.tag, "push", state.request_id)
        for source, target, groups, tokens in self._pushes(state, held.cover):
            # A piece for every layer.
            layers = self._positions[target].layers
            self.carry(shipment, self.device(source), self.device(target), tokens, len(groups) * layers)
            shipment.expect(self.device(target), layers)
        if not shipment.flows:
            return -1
        self.ship(shipment)
        return held.tag

    def _pushes(self, state: RequestState, cover: Cover) -> Iterator[tuple[int, int, Groups, int]]:
        """(rank, attention worker, groups, tokens) for what does not stay at its rank, span by span."""
        for stage, indices in enumerate(self.plan.stage_positions):
            first = 0
            holders = self.devices(state.request_id, stage)
            for span in (*self.spans(state.request_id, stage), Span(state.context_tokens, holders)):
                tokens, first = span.last - first, span.last
                for rank in indices[:self.plan.stages[stage].tp] if tokens else ():
                    owned = self.covers.groups.owned(rank)
                    for device in sorted({span.holders[g] for g in owned} - {self.device(rank)}):
                        target = next(p for p in indices if self.device(p) == device)
                        yield rank, target, tuple(g for g in owned if span.holders[g] == device), tokens

    # -- prompts from other instances ----------------------------------------------------------------

    def expected(self, transfer: Transfer) -> tuple[Shipment, int]:
        """The shipment, empty as yet, that fills what is held for a handed over request; its tokens."""
        held = self.landings[transfer.request_id]
        assert held.landing is not None
        return Shipment(held.tag, "handoff", transfer.request_id, transfer=transfer), held.landing.tokens

    def send(self, position: int, op: Send) -> None:
        """Have a position send cache."""
        self._at(position).copies.append(op)

    # -- moves -------------------------------------------------------------------------------------

    def _begin_move(self, held: Holding, state: RequestState, pending: PendingMove) -> None:
        """Copy what there is room for ahead, while its request goes on decoding where it is."""
        tokens, tag = self.complete_tokens(state), self._next_tag()
        cover = self.covers.rearranged(held.cover, pending.shape, tokens)
        changes = self.covers.changes(held.cover, cover, pending.blocks)
        early = frozenset(key for key, at_once in changes.items() if at_once)
        aside = gathered(early, lambda key: cover.places(key[0], key[2])[key[1]])
        held.move = Moving(pending, cover, early, tokens, tag,
                           [(stage, target, groups) for (stage, target, _), groups in aside.items()])
        shipment = Shipment(tag, "move", state.request_id, transfer=pending.transfer)
        for (stage, target, blocks), groups in aside.items():
            part = Extent(stage, target, groups, blocks[-1] + 1,
                          tuple(sorted(set(range(blocks[-1])) - set(blocks))), False)
            self._open(state.request_id, part, tag, aside=True)
        for journey in journeys(held.cover, cover, early):
            first, last = self._tokens_of(journey, tokens)
            if last > first:
                self._send(shipment, state.request_id, journey, first, last, tag)
        if shipment.pieces:
            self.ship(shipment)

    def _tokens_of(self, journey: Journey, tokens: int) -> tuple[int, int]:
        """The tokens, of so many, that are in the blocks of a journey."""
        return journey.first * self._block_tokens, min(journey.last * self._block_tokens, tokens)

    def _send(self, shipment: Shipment, request_id: int, journey: Journey, first: int, last: int, tag: int, *,
              parked: bool = False) -> None:
        """Have some tokens of a journey copied, as part of a shipment."""
        stage, source, target, groups = journey[:4]
        origin = self._host(self.device(source)) if parked else self.device(source)
        self._at(source).copies.append(Send(request_id, stage, groups, first, last, self.device(target), tag,
                                            parked=parked))
        self.carry(shipment, origin, self.device(target), last - first,
                   len(groups) * self._positions[target].layers)
        shipment.expect(self.device(target), 1)

    def _switch(self, held: Holding, state: RequestState, move: Moving) -> None:
        """Cache is from now on where it has gone; what has been added meanwhile follows."""
        request_id, tokens, blocks = state.request_id, self.complete_tokens(state), self._blocks(state)
        changes = self.covers.changes(held.cover, move.cover, blocks)
        for journey in journeys(held.cover, move.cover, changes, move.early.__contains__):
            first, last = self._tokens_of(journey, tokens)
            first = max(first, move.copied) if journey.early else first
            if last > first:
                stage, source, target, groups = journey[:4]
                self._at(source).last_pieces.append(Send(request_id, stage, groups, first, last,
                                                         self.device(target), move.tag, final=True))
                self._at(target).expects.append(Await(request_id, stage, groups))
        self._give_up(request_id, held.cover, move.cover, [key for key in changes if key[2] < held.blocks])
        gaining = {(stage, move.cover.places(stage, b)[g], g) for stage, g, b in changes}
        for part in extents(move.cover, blocks):
            groups = tuple(g for g in part.groups if (part.stage, part.position, g) in gaining)
            if groups:
                layers = self._positions[part.position].layers
                self._at(part.position).opens.append(Join(request_id, part.stage, groups, layers, part.blocks,
                                                          move.tag, part.absent))
        held.cover, held.shape, held.move = move.cover, move.pending.shape, None
        held.spans.clear()

    def _give_up(self, request_id: int, old: Cover, new: Cover, changes: Iterable[Key]) -> None:
        """Free at every position what is elsewhere from now on."""
        staying = {(part.stage, part.position, g) for part in extents(new, 0) for g in part.groups}
        lost = gathered(changes, lambda key: old.places(key[0], key[2])[key[1]])
        for (stage, source, gone), groups in lost.items():
            kept = tuple(g for g in groups if (stage, source, g) in staying)
            closed = tuple(g for g in groups if g not in kept)
            if kept:
                self._at(source).closes.append(Shed(request_id, stage, kept, gone))
            if closed:
                self._at(source).closes.append(Close(request_id, stage, closed))

    def _cancel(self, held: Holding, state: RequestState, move: Moving) -> None:
        for stage, target, groups in move.aside:
            self._at(target).closes.append(Close(state.request_id, stage, groups, aside=True))
        held.move = None

    # -- host memory ---------------------------------------------------------------------------------

    def _park(self, held: Holding, state: RequestState) -> None:
        held.epoch = state.preemptions
        self.parked[state.request_id] = held.cover
        shipment = Shipment(self._next_tag(), "swap_out", state.request_id)
        for part in extents(held.cover, held.blocks):
            device = self.device(part.position)
            tokens = sum(max(0, min(self._block_tokens, state.cached_tokens - b * self._block_tokens))
                         for b in range(part.blocks) if b not in part.absent)
            self._at(part.position).copies.append(Park(state.request_id, part.stage, part.groups,
                                                       state.cached_tokens, shipment.tag))
            self.carry(shipment, device, self._host(device), tokens,
                       len(part.groups) * self._positions[part.position].layers)
            shipment.expect(device, 1)
        self.ship(shipment)

    def _bring_back(self, state: RequestState, before: Cover, held: Holding) -> None:
        shipment = Shipment(held.tag, "swap_in", state.request_id)
        for journey in journeys(before, held.cover, every_key(before, held.blocks)):
            first, last = self._tokens_of(journey, state.cached_tokens)
            if last > first:
                self._send(shipment, state.request_id, journey, first, last, held.tag, parked=True)
        for device in sorted({self.device(part.position) for part in extents(before, 0)}):
            self._ops[device].copies.append(Forget(state.request_id))
        self.ship(shipment)

    # -- helpers ---------------------------------------------------------------------------------------

    def _next_tag(self) -> int:
        self._tags += 1
        return self._tags

    def device(self, position: int) -> int:
        """The device of a position."""
        return self._positions[position].device

    def _host(self, device: int) -> int:
        return -1 - self._hosts[device]

    def _at(self, position: int) -> Ops:
        return self._ops[self.device(position)]

    def _open(self, request_id: int, part: Extent, tag: int, *, aside: bool = False) -> None:
        stage, position, groups, blocks, absent, _ = part
        self._at(position).opens.append(Open(request_id, stage, groups, self._positions[position].layers,
                                             blocks, tag, absent, aside))

    def carry(self, shipment: Shipment, source: int, target: int, tokens: int, group_layers: int) -> None:
        """Note bytes that a shipment carries from one device to another."""
        size_bytes = float(tokens * group_layers * self._engine.bytes_per_group_token)
        shipment.flows.append((source, target, size_bytes))

    def ship(self, shipment: Shipment) -> None:
        """Begin a shipment: its devices report when they have all of it."""
        for device, pieces in shipment.pieces.items():
            self._ops[device].expects.append(Expect(shipment.tag, pieces))
        self._shipments.append(shipment)

    def _with_staged(self, held: Holding, part: Extent) -> Extent:
        """The same with what is staged at the position: a rank has whole prompts of its groups then."""
        if not held.staged or self._positions[part.position].remote:
            return part
        return part._replace(blocks=max(part.blocks, held.staged), absent=())

    def _staged(self, held: Holding) -> Iterator[Extent]:
        """Groups that wait at their rank, of which nothing stays there."""
        if not held.staged:
            return
        staying = {(part.stage, part.position, g) for part in extents(held.cover, 0) for g in part.groups}
        for stage, indices in enumerate(self.plan.stage_positions):
            for rank in indices[:self.plan.stages[stage].tp]:
                groups = tuple(g for g in self.covers.groups.owned(rank) if (stage, rank, g) not in staying)
                if groups:
                    yield Extent(stage, rank, groups, held.staged, (), False)
