"""Cache books under any sequence of events, against a model that counts every request anew."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import instance_plan
from support_policies import draw_placement, draw_split, spread

from hetis_sim.control.books import CacheBooks
from hetis_sim.control.lane import Lane
from hetis_sim.control.ledger import KvLedger, LedgerError
from hetis_sim.control.loads import Loads
from hetis_sim.control.state import RequestState
from hetis_sim.control.step import Transfer
from hetis_sim.policies.ranges import AnyPlacement, TokenSplit
from hetis_sim.policies.view import Move
from hetis_sim.spec.request import Request

KV_HEADS = 4
PLANS = (instance_plan(0, 9, (3,)), instance_plan(0, 9, (2, 1), 2, 1), instance_plan(0, 9, (1, 2, 3), 1, 2))
SEEDS = st.integers(0, 10**9)


@dataclass
class Held:
    """What the model knows of one request."""

    state: RequestState
    placement: AnyPlacement
    tokens: int
    made: int = 1
    lane: int | None = None
    staged: bool = False
    move: AnyPlacement | None = None
    move_blocks: int = 0

    @property
    def tail(self) -> tuple[int, ...]:
        """Groups that grow at each position."""
        return self.placement.tail if isinstance(self.placement, TokenSplit) else self.placement


class BooksMachine(RuleBasedStateMachine):
    """Requests take cache, decode in lanes, move and leave; every sum is recounted after every event."""

    @initialize(plan=st.sampled_from(PLANS), block_tokens=st.sampled_from([1, 3, 16]),
                room=st.integers(0, 40), seed=SEEDS)
    def begin(self, plan: object, block_tokens: int, room: int, seed: int) -> None:
        random = Random(seed)
        self.plan, self.block_tokens = plan, block_tokens
        self.capacity = {device: random.randint(0, 12 * (room + 1)) for device in plan.devices}
        self.loads = Loads(len(plan.stages), len(plan.positions))
        self.books = CacheBooks(plan, KV_HEADS, self.capacity, block_tokens, self.loads)
        self.cycle_units = [0] * len(plan.devices)
        self.lanes = [Lane(n, self.loads, block_tokens, self.cycle_units) for n in range(len(plan.stages))]
        self.held: dict[int, Held] = {}
        self.peak = dict.fromkeys(plan.devices, 0)
        self.next_id = 0

    # -- the model -------------------------------------------------------------------------

    def blocks(self, tokens: int) -> int:
        return (tokens + self.block_tokens - 1) // self.block_tokens

    def draw(self, seed: int, tokens: int) -> AnyPlacement:
        random = Random(seed)
        if random.random() < 0.5:
            return draw_placement(self.plan, KV_HEADS, random)
        return draw_split(self.plan, KV_HEADS, (tokens - 1) // self.block_tokens, random)

    def held_at(self, placement: AnyPlacement, count: int, size: int = 1) -> list[int]:
        """KV heads times blocks, or tokens with the size of a block, at every position."""
        tail, ranges = ((placement.tail, placement.blocks) if isinstance(placement, TokenSplit)
                        else (placement, ()))
        return spread(self.plan, KV_HEADS, tail, ranges, count, size)

    def units(self, held: list[int]) -> dict[int, int]:
        """Units per device of blocks at every position."""
        found = dict.fromkeys(self.plan.devices, 0)
        for position, n in zip(self.plan.positions, held, strict=True):
            found[position.device] += n * position.layers
        return found

    def taken(self, placement: AnyPlacement, blocks: int) -> dict[int, int]:
        return self.units(self.held_at(placement, blocks))

    def staging(self, placement: AnyPlacement, blocks: int) -> dict[int, int]:
        """What primaries keep until it is pushed."""
        held = self.held_at(placement, blocks)
        return self.units([max(0, p.owned_groups * blocks - n)
                           for p, n in zip(self.plan.positions, held, strict=True)])

    def gain(self, old: AnyPlacement, new: AnyPlacement, blocks: int) -> dict[int, int]:
        before, after = self.held_at(old, blocks), self.held_at(new, blocks)
        return self.units([max(0, n - o) for o, n in zip(before, after, strict=True)])

    def grown(self, held: Held, iterations: int) -> dict[int, int]:
        now = self.taken(held.placement, self.blocks(held.tokens))
        then = self.taken(held.placement, self.blocks(held.tokens + iterations))
        return {device: then[device] - now[device] for device in now}

    def used(self) -> dict[int, int]:
        """Units in use per device, request by request and block by block."""
        parts = []
        for held in self.held.values():
            parts.append(self.taken(held.placement, self.blocks(held.tokens)))
            if held.staged:
                parts.append(self.staging(held.placement, self.blocks(held.tokens)))
            if held.move is not None:
                parts.append(self.gain(held.placement, held.move, held.move_blocks))
        return {device: sum(part[device] for part in parts) for device in self.plan.devices}

    def fits(self, *more: dict[int, int]) -> bool:
        used = self.used()
        return all(used[d] + sum(part[d] for part in more) <= self.capacity[d] for d in self.plan.devices)

    def pick(self, seed: int, *, decoding: bool, moving: bool | None = None) -> Held | None:
        able = [held for held in self.held.values() if (held.lane is not None) == decoding
                and (moving is None or (held.move is not None) == moving)]
        return Random(seed).choice(able) if able else None

    def remember_peak(self) -> None:
        for device, units in self.used().items():
            self.peak[device] = max(self.peak[device], units)

    # -- what happens ----------------------------------------------------------------------

    @rule(seed=SEEDS, tokens=st.integers(1, 50), output=st.integers(2, 40), staged=st.booleans())
    def accept(self, seed: int, tokens: int, output: int, staged: bool) -> None:
        placement = self.draw(seed, tokens)
        state = RequestState(Request(self.next_id, 0.0, tokens, output), generated_base=1)
        self.next_id += 1
        more = [self.taken(placement, self.blocks(tokens))]
        if staged:
            more.append(self.staging(placement, self.blocks(tokens)))
        assert self.books.fits(placement, tokens, staged) == self.fits(*more)
        if self.fits(*more):
            self.books.accept(state, placement, tokens, staged)
            self.held[state.request_id] = Held(state, placement, tokens, staged=staged)
            self.remember_peak()

    @rule(seed=SEEDS)
    def join(self, seed: int) -> None:
        held = self.pick(seed, decoding=False)
        if held is not None and held.made < held.state.request.output_tokens:
            held.lane = seed % len(self.lanes)
            held.staged = False
            self.books.join(held.state, self.lanes[held.lane])

    @rule(lane=st.integers(0, 2), iterations=st.integers(1, 40))
    def advance(self, lane: int, iterations: int) -> None:
        lane %= len(self.lanes)
        members = [held for held in self.held.values() if held.lane == lane]
        if members:
            iterations = min(iterations, *(h.state.request.output_tokens - h.made for h in members))
        grown = [self.grown(h, iterations) for h in members]
        if iterations and self.fits(*grown):
            self.lanes[lane].advance(iterations, self.books.ledger)
            for held in members:
                held.tokens += iterations
                held.made += iterations
            self.remember_peak()

    @rule(lane=st.integers(0, 2))
    def finish(self, lane: int) -> None:
        lane %= len(self.lanes)
        done = {i for i, held in self.held.items()
                if held.lane == lane and held.made == held.state.request.output_tokens}
        popped = self.lanes[lane].pop_finished()
        assert {state.request_id for state in popped} == done
        for state in popped:
            self.books.after_leaving(state)
            self.outside(self.held[state.request_id])

    @rule(seed=SEEDS)
    def leave(self, seed: int) -> None:
        held = self.pick(seed, decoding=True)
        if held is not None:
            self.books.leave(held.state, self.lanes[held.lane])
            self.outside(held)

    def outside(self, held: Held) -> None:
        held.lane = held.move = None
        assert held.state.cached_tokens == held.tokens
        assert held.state.generated_base == held.made

    @rule(seed=SEEDS)
    def release(self, seed: int) -> None:
        held = self.pick(seed, decoding=False)
        if held is not None:
            self.books.release(held.state)
            del self.held[held.state.request_id]

    @rule(seed=SEEDS)
    def begin_move(self, seed: int) -> None:
        held = self.pick(seed, decoding=True, moving=False)
        if held is None:
            return
        target = self.draw(seed, held.tokens)
        blocks = self.blocks(held.tokens)
        room = self.fits(self.gain(held.placement, target, blocks))
        transfer = Transfer(held.state.request_id, 0, "move", ())
        none = [0] * len(self.plan.devices)
        begun = self.books.begin_move(held.state, self.lanes[held.lane], Move(held.state.request_id, target),
                                      transfer, none)
        assert begun == room
        if begun:
            held.move, held.move_blocks = target, blocks
            self.remember_peak()

    @rule(seed=SEEDS)
    def finish_move(self, seed: int) -> None:
        held = self.pick(seed, decoding=True, moving=True)
        if held is None:
            return
        reserved, held.move_blocks = held.move_blocks, 0
        blocks = self.blocks(held.tokens)
        target, held.move = held.move, None
        room = self.fits(self.gain(held.placement, target, blocks))
        held.move, held.move_blocks = target, reserved
        assert self.books.finish_move(held.state, self.lanes[held.lane]) == room
        if room:
            held.move_blocks = blocks
            self.remember_peak()
            held.placement = held.move
        held.move = None

    @rule(seed=SEEDS)
    def cancel_move(self, seed: int) -> None:
        held = self.pick(seed, decoding=True)
        if held is not None:
            self.books.cancel_move(held.state)
            held.move = None

    # -- what must hold --------------------------------------------------------------------

    @invariant()
    def free_and_used_make_the_capacity(self) -> None:
        ledger = self.books.ledger
        assert dict(zip(self.plan.devices, ledger.used, strict=True)) == self.used()
        for d, device in enumerate(self.plan.devices):
            assert ledger.free(d) == self.capacity[device] - ledger.used[d] >= 0
            assert ledger.peak[d] == self.peak[device]
        self.books.check(self.lanes, [h.state for h in self.held.values() if h.lane is None])

    @invariant()
    def loads_are_sums_over_requests(self) -> None:
        groups, tokens = self.loads.total()
        want_groups, want_tokens = [0] * len(self.plan.positions), [0] * len(self.plan.positions)
        for held in self.held.values():
            here = self.held_at(held.placement, held.tokens, self.block_tokens)
            for p, n in enumerate(here):
                full = KV_HEADS if self.plan.positions[p].remote else self.plan.positions[p].owned_groups
                want_groups[p] += held.tail[p] or (full if n else 0)
                want_tokens[p] += n
        assert (groups, tokens) == (want_groups, want_tokens)
        lanes = sum(lane.offset_sum + lane.issued * len(lane.members) for lane in self.lanes)
        assert lanes + self.books.extra_context == sum(held.tokens for held in self.held.values())

    @invariant()
    def lanes_know_their_members(self) -> None:
        cycle = dict.fromkeys(self.plan.devices, 0)
        for lane in self.lanes:
            members = {i: held for i, held in self.held.items() if held.lane == lane.index}
            assert set(lane.members) == set(members)
            opening = dict.fromkeys(self.plan.devices, 0)
            for held in members.values():
                assert lane.cached_tokens(held.state) == held.tokens
                for device, units in self.grown(held, 1).items():
                    opening[device] += units
                for device, units in self.grown(held, self.block_tokens).items():
                    cycle[device] += units
            need = lane.next_units() or [0] * len(self.plan.devices)
            assert dict(zip(self.plan.devices, need, strict=True)) == opening
            if members:
                assert lane.next_finish() == min(h.state.request.output_tokens - h.made
                                                 for h in members.values())
        assert dict(zip(self.plan.devices, self.cycle_units, strict=True)) == cycle

    @precondition(lambda self: self.held)
    @invariant()
    def heads_are_all_somewhere(self) -> None:
        for held in self.held.values():
            assert held.state.shape is not None
            here = held.state.shape.group_tokens(held.tokens)
            assert here == self.held_at(held.placement, held.tokens, self.block_tokens)
            for positions in self.plan.stage_positions:
                assert sum(held.state.shape.placement[p] for p in positions) == KV_HEADS
                assert sum(here[p] for p in positions) == KV_HEADS * held.tokens

    def teardown(self) -> None:
        """When everybody has gone, nothing is held."""
        if not hasattr(self, "held"):
            return
        for held in list(self.held.values()):
            if held.lane is not None:
                self.books.leave(held.state, self.lanes[held.lane])
            self.books.release(held.state)
        assert not any(self.books.ledger.used)
        assert not any(self.cycle_units)


BooksMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None,
                                          derandomize=True)
test_books_balance_after_every_event = BooksMachine.TestCase


def test_a_ledger_refuses_to_overdraw_or_to_take_back_too_much() -> None:
    """More than the capacity cannot be taken and more than was taken cannot be given back."""
    ledger = KvLedger([5, 2])
    ledger.take([(0, 2), (1, 1)], 2)
    assert ledger.used == [4, 2]
    assert not ledger.fits([(0, 2)])
    with pytest.raises(LedgerError, match="device 0 of the instance would hold 6 of 5 units"):
        ledger.take([(0, 2)])
    with pytest.raises(LedgerError, match="returned 1 units more than it held"):
        ledger.give([(1, 3)])
