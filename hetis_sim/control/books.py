"""The cache of one instance: who holds what where, on top of the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hetis_sim.control.lane import Lane
from hetis_sim.control.ledger import KvLedger, LedgerError, Units
from hetis_sim.control.loads import Loads
from hetis_sim.control.placement import PlacementError, PlacementShape, PlacementShapes
from hetis_sim.control.state import HeldCache, PendingMove, RequestState
from hetis_sim.control.step import Transfer
from hetis_sim.policies.plan import InstancePlan
from hetis_sim.policies.ranges import AnyPlacement
from hetis_sim.policies.view import Move


class CacheBooks:
    """Takes and gives the ledger's units for whole requests.

    A request outside a lane holds ``held_blocks`` blocks of every group of its shape;
    inside a lane the lane's growth keeps the ledger, and the request holds the blocks of
    its cached tokens. The loads' extras sum the former, ``extra_context`` their tokens.
    """

    def __init__(self, plan: InstancePlan, kv_heads: int, capacity_units: dict[int, int], block_tokens: int,
                 loads: Loads) -> None:
        self.plan = plan
        self.block_tokens = block_tokens
        self.shapes = PlacementShapes(plan, kv_heads, block_tokens)
        self.ledger = KvLedger([capacity_units[device] for device in plan.devices])
        self.loads = loads
        self.extra_context = 0

    def blocks(self, tokens: int) -> int:
        """Blocks of one group that ``tokens`` take."""
        return -(-tokens // self.block_tokens)

    def accept(self, state: RequestState, placement: AnyPlacement, tokens: int, staged: bool) -> None:
        """Hold cache for ``tokens`` of a request under a placement.

        ``staged`` also holds the remote groups at the primaries, until they are pushed.

        Raises:
            PlacementError: the placement is malformed.
            LedgerError: it does not fit.
        """
        shape = self._shape(placement, tokens)
        blocks = self.blocks(tokens)
        self.ledger.take(shape.units(blocks))
        if staged and shape.pushed:
            self.ledger.take(shape.staged(blocks))
            state.staged_blocks = blocks
        state.shape, state.held_blocks, state.cached_tokens = shape, blocks, tokens
        state.remote_share = self.shapes.remote_share(shape, tokens)
        self._count_extra(shape, tokens, 1)

    def _shape(self, placement: AnyPlacement, tokens: int) -> PlacementShape:
        """The shape of a placement for a request with so many tokens in cache."""
        shape = self.shapes.shape(placement)
        if shape.ranges is not None and shape.ranges.tokens > tokens:
            raise PlacementError(f"placement={placement} has {shape.ranges.tokens} tokens in ranges, "
                                 f"the request has {tokens}")
        return shape

    def fits(self, placement: AnyPlacement, tokens: int, staged: bool) -> bool:
        """Whether :meth:`accept` would succeed."""
        shape = self._shape(placement, tokens)
        blocks = self.blocks(tokens)
        if not staged or not shape.pushed:
            return self.ledger.fits(shape.units(blocks))
        both = dict(shape.units(blocks))
        for d, u in shape.staged(blocks):
            both[d] = both.get(d, 0) + u
        return self.ledger.fits(both.items())

    def _count_extra(self, shape: PlacementShape, tokens: int, sign: int) -> None:
        self.extra_context += sign * tokens
        groups, group_tokens = self.loads.extra_groups, self.loads.extra_tokens
        if shape.ranges is not None:
            for p, held in enumerate(shape.group_tokens(tokens)):
                groups[p] += sign * shape.groups[p]
                group_tokens[p] += sign * held
            return
        for p, g in shape.pairs:
            groups[p] += sign * g
            group_tokens[p] += sign * g * tokens

    def unstage(self, state: RequestState) -> None:
        """Give back the staging copy, if there is one."""
        if state.staged_blocks:
            assert state.shape is not None
            self.ledger.give(state.shape.staged(state.staged_blocks))
            state.staged_blocks = 0

    def join(self, state: RequestState, lane: Lane) -> None:
        """Hand the request's books over to a lane."""
        assert state.shape is not None
        self.unstage(state)
        self._count_extra(state.shape, state.cached_tokens, -1)
        lane.join(state)

    def leave(self, state: RequestState, lane: Lane) -> None:
        """Take the request's books back from a lane; its blocks stay held."""
        lane.leave(state)
        self.after_leaving(state)

    def after_leaving(self, state: RequestState) -> None:
        """The part of :meth:`leave` for a request that its lane has let go already."""
        assert state.shape is not None
        self.cancel_move(state)
        state.held_blocks = self.blocks(state.cached_tokens)
        self._count_extra(state.shape, state.cached_tokens, 1)

    def end(self, state: RequestState) -> None:
        """Give back all that a member held whom its lane has let go after its last token."""
        assert state.shape is not None
        self.cancel_move(state)
        self.ledger.give(state.shape.units(self.blocks(state.cached_tokens)))
        state.shape = None

    def release(self, state: RequestState) -> None:
        """Give back all that a request outside a lane holds."""
        assert state.shape is not None
        self.unstage(state)
        self.ledger.give(state.shape.units(state.held_blocks))
        self._count_extra(state.shape, state.cached_tokens, -1)
        state.shape = None
        state.held_blocks = 0

    def hold(self, placement: AnyPlacement, tokens: int) -> HeldCache:
        """Hold cache for a request that is still elsewhere.

        Raises:
            PlacementError, LedgerError: as for :meth:`accept`.
        """
        shape = self._shape(placement, tokens)
        held = HeldCache(shape, self.blocks(tokens), tokens)
        self.ledger.take(shape.units(held.blocks))
        self._count_extra(shape, tokens, 1)
        return held

    def drop(self, held: HeldCache) -> None:
        """Give back what :meth:`hold` has taken."""
        self.ledger.give(held.shape.units(held.blocks))
        self._count_extra(held.shape, held.tokens, -1)

    def begin_move(self, state: RequestState, lane: Lane, move: Move, transfer: Transfer,
                   growth: Sequence[int]) -> bool:
        """Reserve room for the heads that a move brings in; False if there is none.

        ``growth`` units per local device must stay free where they go.
        """
        assert state.shape is not None
        tokens = lane.cached_tokens(state)
        shape = self._shape(move.placement, tokens)
        gained, lost = _difference(self.plan, state.shape, shape, tokens, self.block_tokens)
        if not self.ledger.fits([(d, units + growth[d]) for d, units in gained]):
            return False
        self.ledger.take(gained)
        state.move = PendingMove(shape, gained, lost, self.blocks(tokens), transfer)
        return True

    def cancel_move(self, state: RequestState) -> None:
        """Give back what a move under way has reserved."""
        if state.move is not None:
            self.ledger.give(state.move.gained_units)
            state.move = None

    def finish_move(self, state: RequestState, lane: Lane) -> bool:
        """Switch a member to where its heads have arrived; False if its growth found no room."""
        move = state.move
        assert move is not None
        assert state.shape is not None
        tokens = lane.cached_tokens(state)
        gained, lost = _difference(self.plan, state.shape, move.shape, tokens, self.block_tokens)
        self.cancel_move(state)
        if not self.ledger.fits(gained):
            return False
        self.ledger.take(gained)
        self.ledger.give(lost)
        lane.swap_shape(state, move.shape)
        state.remote_share = self.shapes.remote_share(move.shape, tokens)
        return True

    def check(self, lanes: Sequence[Lane], others: Sequence[RequestState],
              landings: Iterable[HeldCache] = ()) -> None:
        """Recount everything held and compare with the ledger (invariant 3).

        Raises:
            LedgerError: the books do not balance.
        """
        want = [0] * len(self.ledger.used)

        def add(units: Units) -> None:
            for d, u in units:
                want[d] += u

        for lane in lanes:
            for state in lane.members.values():
                assert state.shape is not None
                add(state.shape.units(self.blocks(lane.cached_tokens(state))))
                if state.move is not None:
                    add(state.move.gained_units)
        for state in others:
            if state.shape is not None:
                add(state.shape.units(state.held_blocks))
                if state.staged_blocks:
                    add(state.shape.staged(state.staged_blocks))
        for held in landings:
            add(held.shape.units(held.blocks))
        if want != self.ledger.used:
            raise LedgerError(f"the ledger says {self.ledger.used} units are used, the requests hold {want}")


def _difference(plan: InstancePlan, old: PlacementShape, new: PlacementShape, tokens: int,
                block_tokens: int) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Units that a move of so many tokens gains and loses, per local device."""
    local = {device: index for index, device in enumerate(plan.devices)}
    # Ranges are whole blocks, so that a tail's last block is as full as that of the whole cache.
    whole = -(-tokens // block_tokens) * block_tokens
    before, after = old.group_tokens(whole), new.group_tokens(whole)
    gained: dict[int, int] = {}
    lost: dict[int, int] = {}
    for position in plan.positions:
        change = (after[position.index] - before[position.index]) // block_tokens * position.layers
        if change:
            side = gained if change > 0 else lost
            d = local[position.device]
            side[d] = side.get(d, 0) + abs(change)
    return tuple(sorted(gained.items())), tuple(sorted(lost.items()))
