"""A micro-batch: the requests that decode together, and their sums.

The sums make an iteration cost the same whatever the batch holds (:mod:`.loads`). With n
iterations issued, a member's cached tokens are ``offset + n``; so the members whose next
token opens a new block are those with ``offset % block_tokens == -n % block_tokens``.
"""

from __future__ import annotations

from heapq import heappop, heappush

from hetis_sim.control.ledger import KvLedger
from hetis_sim.control.loads import Loads
from hetis_sim.control.placement import PlacementShape, Ranges
from hetis_sim.control.state import RequestState
from hetis_sim.control.step import Step


class Lane:
    """One micro-batch of an instance.

    ``cycle_units`` sums, over all lanes, the units that block_tokens iterations open.

    Attributes:
        members: decoding requests by id, in order of joining.
        issued: iterations begun; the cache of their tokens is accounted for.
        step: the step under way, None between steps.
        ready_at_s: when the last step ended; the order in which lanes take turns.
        joins: requests whose cache is ready, waiting for the next iteration boundary.
        partial: requests whose prompt is only in part prefilled (chunked prefill).
        prefilling: requests of the prefill under way, or between prefill and decode.
        groups, base: this lane's rows of the instance's loads.
        ranged: members with token ranges.
        switches: requests whose moved heads have arrived, waiting for the same.
        fresh: members that have had no token in this lane yet; the driver empties it.
        offset_sum: sum of the members' offsets.
        rebalance_at: iterations issued at which the policy is asked again.
        prompted_at, prompts_begun_s: iterations issued when prompts were last computed, and when they began.
        patient_until_s: no prompts before this time while anybody decodes.
        version: changes with membership.
    """

    def __init__(self, index: int, loads: Loads, block_tokens: int, cycle_units: list[int]) -> None:
        self.index = index
        self.members: dict[int, RequestState] = {}
        self.issued = 0
        self.step: Step | None = None
        self.ready_at_s = 0.0
        self.joins: list[RequestState] = []
        self.switches: list[RequestState] = []
        self.fresh: list[RequestState] = []
        self.partial: list[RequestState] = []
        self.prefilling = 0
        self.groups = loads.groups[index]
        self.base = loads.base[index]
        self._loads = loads
        self.ranged = 0
        self.offset_sum = 0
        self.version = 0
        self.rebalance_at = 0
        self.prompted_at = 0
        self.prompts_begun_s = self.patient_until_s = 0.0
        self._block_tokens = block_tokens
        devices = len(cycle_units)
        self._crossing: list[list[int]] = [[0] * devices for _ in range(block_tokens)]
        self._crossing_members = [0] * block_tokens
        self._own_cycle = [0] * devices
        self._cycle_units = cycle_units
        self._finishes: list[tuple[int, int]] = []

    @property
    def load(self) -> int:
        """Requests that belong to this lane, decoding or about to."""
        return len(self.members) + self.prefilling

    @property
    def has_work(self) -> bool:
        """Whether a step could be made without admitting anybody."""
        return bool(self.members or self.joins or self.partial)

    def cached_tokens(self, state: RequestState) -> int:
        """Tokens of a member in cache, the iteration under way included."""
        return state.offset + self.issued

    def join(self, state: RequestState) -> None:
        """Make a request, whose cache is complete, a member from the next iteration on."""
        state.lane = self.index
        state.joined_at = self.issued
        state.offset = state.cached_tokens - self.issued
        self.members[state.request_id] = state
        self.fresh.append(state)
        assert state.shape is not None
        self._add(state.shape, state.offset, 1)
        heappush(self._finishes, (self._finishes_at(state), state.request_id))

    def leave(self, state: RequestState) -> None:
        """Take a member out; its books go back to the state."""
        del self.members[state.request_id]
        if state in self.fresh:
            self.fresh.remove(state)
        assert state.shape is not None
        self._add(state.shape, state.offset, -1)
        state.cached_tokens = self.cached_tokens(state)
        state.generated_base += self.issued - state.joined_at

    def forget(self, state: RequestState) -> None:
        """Strike a request that ends off the lists of those to be seen to at the next boundary or step."""
        for waiting in (self.joins, self.switches, self.partial):
            if state in waiting:
                waiting.remove(state)

    def swap_shape(self, state: RequestState, shape: PlacementShape) -> None:
        """Account for a member under another placement."""
        assert state.shape is not None
        self._add(state.shape, state.offset, -1)
        state.shape = shape
        self._add(shape, state.offset, 1)

    def _add(self, shape: PlacementShape, offset: int, sign: int) -> None:
        if sign > 0:
            self.groups += shape.vector
            self.base += shape.vector * offset
        else:
            self.groups -= shape.vector
            self.base -= shape.vector * offset
        if shape.ranges is not None:
            self._add_ranges(shape.ranges, sign)
        self.offset_sum += sign * offset
        key = offset % self._block_tokens
        self._crossing_members[key] += sign
        crossing = self._crossing[key]
        own, total = self._own_cycle, self._cycle_units
        for d, u in shape.block_units:
            u *= sign
            crossing[d] += u
            own[d] += u
            total[d] += u
        self.version += 1

    def _add_ranges(self, ranges: Ranges, sign: int) -> None:
        loads, index = self._loads, self.index
        loads.still[index] += sign * ranges.still
        loads.merged[index] += sign * ranges.merged
        self.base += sign * ranges.group_tokens
        loads.ranged += sign
        self.ranged += sign

    def next_units(self) -> list[int] | None:
        """Units per local device that the next iteration needs, None where it needs none."""
        key = -self.issued % self._block_tokens
        return self._crossing[key] if self._crossing_members[key] else None

    def advance(self, iterations: int, ledger: KvLedger) -> None:
        """Begin iterations: take the blocks that their tokens open.

        Raises:
            LedgerError: there is no room; callers check before.
        """
        full, rest = divmod(iterations, self._block_tokens)
        if full:
            ledger.take_of_each([units * full for units in self._own_cycle])
        keys = [-n % self._block_tokens for n in range(self.issued, self.issued + rest)]
        needs = [self._crossing[key] for key in keys if self._crossing_members[key]]
        if needs:
            ledger.take_of_each(needs[0] if len(needs) == 1 else map(sum, zip(*needs, strict=True)))
        self.issued += iterations
        self._loads.issued[self.index] = self.issued

    @staticmethod
    def _finishes_at(state: RequestState) -> int:
        """Iterations issued by the lane when the member has its last token."""
        return state.joined_at + state.request.output_tokens - state.generated_base

    def next_finish(self) -> int:
        """Iterations that may be issued before a member has its last token; large if none."""
        finishes = self._finishes
        while finishes:
            at, request_id = finishes[0]
            state = self.members.get(request_id)
            if state is not None and at == self._finishes_at(state):
                return at - self.issued
            heappop(finishes)
        return 1 << 40

    def pop_finished(self) -> list[RequestState]:
        """Members that have all their tokens, taken out of the lane."""
        done: list[RequestState] = []
        while self._finishes and self.next_finish() <= 0 and self._finishes:
            _, request_id = heappop(self._finishes)
            state = self.members[request_id]
            self.leave(state)
            done.append(state)
        return done
