"""What the workers hold, kept in step with the ledger.

The control plane books cache by counting; :class:`Mirror` looks at its requests after every
verb and says which tables are to be opened, grown, copied and closed on which device, so that
physical and booked cache are equal after each message. It decides nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from hetis_exec.errors import ExecutorError
from hetis_exec.groups import Change, GroupMap, Holders
from hetis_exec.holdings import Groups, Holding, Moving, Ops, Shipment
from hetis_exec.messages import Await, Close, Drop, Expect, Forget, Grow, Op, Open, Park, Send
from hetis_sim.control.engine import Engine
from hetis_sim.control.placement import PlacementShape
from hetis_sim.control.state import PendingMove, RequestState, Status
from hetis_sim.control.step import Transfer
from hetis_sim.policies.plan import Placement


class Mirror:
    """Follows one instance. ``hosts`` gives the host of every device of the cluster.

    Attributes:
        known: what each request holds on devices.
        landings: what is held for requests that another instance is still to hand over.
        parked: for requests in host memory, the positions whose hosts hold each group.
    """

    def __init__(self, engine: Engine, hosts: Sequence[int]) -> None:
        self._engine = engine
        self._hosts = hosts
        self.plan = engine.plan
        self._positions = engine.plan.positions
        self.groups = GroupMap(engine.plan)
        self.known: dict[int, Holding] = {}
        self.landings: dict[int, Holding] = {}
        self.parked: dict[int, Holders] = {}
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
        """Device that holds each group of a request at a stage."""
        places = self.known[request_id].holders[stage]
        found = self._devices_at.get(places)
        if found is None:
            found = self._devices_at[places] = tuple(self._positions[p].device for p in places)
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
        request_id, placement = state.request_id, _placement(state.request_id, shape)
        before = self.parked.pop(request_id, None)
        holders = (self.groups.initial(placement) if before is None
                   else self.groups.rearranged(before, placement))
        held = self.known[request_id] = Holding(state.preemptions, shape, holders, self._blocks(state),
                                                state.staged_blocks, self._next_tag())
        for stage, position, groups in self._held(holders):
            self._open(request_id, stage, position, groups, held.blocks, held.tag)
        if held.staged:
            for stage, position, groups in self._staged(holders):
                self._open(request_id, stage, position, groups, held.staged, held.tag)
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
                holders = self.groups.initial(_placement(request_id, cache.shape))
                held = self.landings[request_id] = Holding(0, cache.shape, holders, cache.blocks, 0,
                                                           self._next_tag(), landing=cache)
                for stage, position, groups in self._held(holders):
                    self._open(request_id, stage, position, groups, held.blocks, held.tag)

    def _release(self, request_id: int, held: Holding) -> None:
        places = {p for stage in held.holders for p in stage}
        places |= {p for _, p, _ in self._staged(held.holders)} if held.staged else set()
        places |= {change.target for change in held.move.changes} if held.move else set()
        for device in sorted({self._positions[p].device for p in places}):
            self._ops[device].closes.append(Drop(request_id))

    def _forget(self, request_id: int) -> None:
        holders = self.parked.pop(request_id)
        for device in sorted({self._positions[p].device for stage in holders for p in stage}):
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
            for stage, position, groups in self._held(held.holders):
                self._at(position).opens.append(Grow(state.request_id, stage, groups, blocks))

    def _unstage(self, held: Holding, state: RequestState) -> None:
        held.staged = 0
        for stage, position, groups in self._staged(held.holders):
            self._at(position).closes.append(Close(state.request_id, stage, groups))

    # -- prompts on their way to attention workers ----------------------------------------------------

    def push(self, state: RequestState) -> int:
        """Begin the push of a prompt whose last piece is about to be computed.

        Returns:
            Its tag, or -1 if every head stays at its rank.
        """
        held = self.known[state.request_id]
        shipment = Shipment(held.tag, "push", state.request_id)
        for source, target, groups in self._pushes(held.holders):
            # A piece for every layer.
            layers = self._positions[target].layers
            self.carry(shipment, self.device(source), self.device(target), state.context_tokens,
                        len(groups) * layers)
            shipment.expect(self.device(target), layers)
        if not shipment.flows:
            return -1
        self.ship(shipment)
        return held.tag

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
        """Copy the early groups ahead, while their request goes on decoding where it is."""
        holders = self.groups.rearranged(held.holders, pending.shape.placement)
        changes = self.groups.changes(held.holders, holders)
        move = held.move = Moving(pending, holders, changes, self.complete_tokens(state), self._next_tag())
        shipment = Shipment(move.tag, "move", state.request_id, transfer=pending.transfer)
        for stage, source, target, groups in _routes(c for c in changes if c.early):
            self._open(state.request_id, stage, target, groups, pending.blocks, move.tag)
            self._at(source).copies.append(Send(state.request_id, stage, groups, 0, move.copied,
                                                self.device(target), move.tag))
            self.carry(shipment, self.device(source), self.device(target), move.copied,
                        len(groups) * self._positions[target].layers)
            shipment.expect(self.device(target), 1)
        self.ship(shipment)

    def _switch(self, held: Holding, state: RequestState, move: Moving) -> None:
        """Heads are from now on where they have gone; what has been added meanwhile follows."""
        request_id, tokens, blocks = state.request_id, self.complete_tokens(state), self._blocks(state)
        for early in (True, False):
            for stage, source, target, groups in _routes(c for c in move.changes if c.early is early):
                first = move.copied if early else 0
                self._at(source).last_pieces.append(Send(request_id, stage, groups, first, tokens,
                                                         self.device(target), move.tag, final=True))
                self._at(source).closes.append(Close(request_id, stage, groups))
                if early:
                    self._at(target).opens.append(Grow(request_id, stage, groups, blocks))
                else:
                    self._open(request_id, stage, target, groups, blocks, move.tag)
                self._at(target).expects.append(Await(request_id, stage, groups))
        held.holders, held.shape, held.move = move.holders, move.pending.shape, None

    def _cancel(self, held: Holding, state: RequestState, move: Moving) -> None:
        for stage, _, target, groups in _routes(c for c in move.changes if c.early):
            self._at(target).closes.append(Close(state.request_id, stage, groups))
        held.move = None

    # -- host memory ---------------------------------------------------------------------------------

    def _park(self, held: Holding, state: RequestState) -> None:
        held.epoch = state.preemptions
        self.parked[state.request_id] = held.holders
        shipment = Shipment(self._next_tag(), "swap_out", state.request_id)
        for stage, position, groups in self._held(held.holders):
            device = self.device(position)
            self._at(position).copies.append(Park(state.request_id, stage, groups, state.cached_tokens,
                                                  shipment.tag))
            self.carry(shipment, device, self._host(device), state.cached_tokens,
                        len(groups) * self._positions[position].layers)
            shipment.expect(device, 1)
        self.ship(shipment)

    def _bring_back(self, state: RequestState, before: Holders, held: Holding) -> None:
        shipment = Shipment(held.tag, "swap_in", state.request_id)
        for stage, source, target, groups in _routes(_all_groups(before, held.holders)):
            self._at(source).copies.append(Send(state.request_id, stage, groups, 0, state.cached_tokens,
                                                self.device(target), held.tag, parked=True))
            self.carry(shipment, self._host(self.device(source)), self.device(target), state.cached_tokens,
                        len(groups) * self._positions[target].layers)
            shipment.expect(self.device(target), 1)
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

    def _open(self, request_id: int, stage: int, position: int, groups: Groups, blocks: int,
              tag: int) -> None:
        layers = self._positions[position].layers
        self._at(position).opens.append(Open(request_id, stage, groups, layers, blocks, tag))

    def carry(self, shipment: Shipment, source: int, target: int, tokens: int, group_layers: int) -> None:
        """Note bytes that a shipment carries from one device to another."""
        size_bytes = float(tokens * group_layers * self._engine.bytes_per_group_token)
        shipment.flows.append((source, target, size_bytes))

    def ship(self, shipment: Shipment) -> None:
        """Begin a shipment: its devices report when they have all of it."""
        for device, pieces in shipment.pieces.items():
            self._ops[device].expects.append(Expect(shipment.tag, pieces))
        self._shipments.append(shipment)

    def _held(self, holders: Holders) -> Iterator[tuple[int, int, Groups]]:
        """(stage, position, groups) for every position that holds any."""
        for stage, places in enumerate(holders):
            for position in sorted(set(places)):
                yield stage, position, tuple(g for g, p in enumerate(places) if p == position)

    def _pushes(self, holders: Holders) -> Iterator[tuple[int, int, Groups]]:
        """(rank, attention worker, groups) for the groups that do not stay at their rank."""
        for places, indices in zip(holders, self.plan.stage_positions, strict=True):
            for rank in indices:
                owned = self.groups.owned(rank)
                for target in sorted({places[g] for g in owned} - {rank}):
                    yield rank, target, tuple(g for g in owned if places[g] == target)

    def _staged(self, holders: Holders) -> Iterator[tuple[int, int, Groups]]:
        """(stage, rank, groups) that wait at their rank until they are pushed."""
        for stage, indices in enumerate(self.plan.stage_positions):
            for rank in indices:
                groups = tuple(g for g in self.groups.owned(rank) if holders[stage][g] != rank)
                if groups:
                    yield stage, rank, groups


def _placement(request_id: int, shape: PlacementShape) -> Placement:
    """Groups at every position.

    Raises:
        ExecutorError: the cache is split by tokens.
    """
    if shape.ranges is not None:
        raise ExecutorError(f"request {request_id} is given token ranges; workers here attend to whole "
                            "contexts")
    return shape.placement


def _routes(changes: Iterable[Change]) -> Iterator[tuple[int, int, int, Groups]]:
    """(stage, source, target, groups) of changes, those of one route together."""
    routes: dict[tuple[int, int, int], list[int]] = {}
    for change in changes:
        routes.setdefault((change.stage, change.source, change.target), []).append(change.group)
    for (stage, source, target), groups in sorted(routes.items()):
        yield stage, source, target, tuple(groups)


def _all_groups(old: Holders, new: Holders) -> Iterator[Change]:
    """Where every group goes, those that stay included."""
    for stage, (before, after) in enumerate(zip(old, new, strict=True)):
        for group, (source, target) in enumerate(zip(before, after, strict=True)):
            yield Change(stage, group, source, target, True)
