"""Who is let in: from the queue of an instance to the prompts of its next step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetis_sim.control.lane import Lane
from hetis_sim.control.placement import PlacementError
from hetis_sim.control.state import RequestState, Status
from hetis_sim.control.step import Chunk, Transfer
from hetis_sim.policies.ranges import AnyPlacement

if TYPE_CHECKING:
    from hetis_sim.control.engine import Engine


class Admission:
    """Asks the policy where the cache of waiting requests shall live, and gives it to them.

    First come, first served: when the head of the queue finds no room, nobody passes it, and
    the engine is ``blocked`` until cache has been given back.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def whole_prompts(self, lane: Lane, now_s: float) -> list[Chunk]:
        """Whole prompts from the head of the queue, as many as the token budget and the cache allow."""
        engine = self._engine
        limits = engine.settings.limits
        # A lane takes no more than its share: the fullest one sets the pace of the pipeline.
        held = sum([other.load for other in engine.lanes]) + len(engine.waiting)
        share = min(limits.max_batch_requests, -(-held // len(engine.lanes)))
        batch: list[RequestState] = []
        tokens = 0
        for state in engine.waiting:
            if not engine.sees(state, lane):
                return []
            tokens += state.context_tokens
            full = len(batch) + lane.load >= share
            if full or (batch and tokens > limits.max_batch_tokens):
                break
            batch.append(state)
        if not batch:
            engine.blocked = all(other.load >= limits.max_batch_requests for other in engine.lanes)
        admitted = self._admit(batch, lane, now_s)
        return [Chunk(state, state.context_tokens, 0, True) for state in admitted]

    def _admit(self, batch: list[RequestState], lane: Lane, now_s: float,
               budget: int | None = None) -> list[RequestState]:
        """Give cache to the longest prefix of ``batch`` that fits, and take it off the queue.

        ``budget`` is the number of tokens of it that can be computed at once, None for all.
        """
        if not batch:
            return []
        engine = self._engine
        view = engine.view()
        requests = [engine.request_view(state) for state in batch]
        placements = engine.policy.dispatch(requests, view)
        engine.log.record("dispatch", view, requests, placements)
        admitted = [state for state, placement in zip(batch, placements, strict=False)
                    if self._accept(state, placement, lane, now_s, budget)]
        if len(admitted) < len(batch):
            engine.blocked = True
        if not admitted and not engine.active and not engine.landings:
            raise PlacementError(f"policy {engine.policy.name!r} places request {batch[0].request_id} "
                                 f"({batch[0].context_tokens} tokens) nowhere on the empty instance "
                                 f"{engine.index}")
        return admitted

    def _accept(self, state: RequestState, placement: AnyPlacement, lane: Lane, now_s: float,
                budget: int | None) -> bool:
        engine = self._engine
        if engine.waiting[0] is not state:
            return False
        staged = budget is not None and state.context_tokens > budget
        if staged and not engine.books.fits(placement, state.context_tokens, staged):
            # Whole, it streams to the workers and needs no copy, for which there may never be room.
            staged, state.whole = False, True
        engine.books.accept(state, placement, state.context_tokens, staged)
        engine.waiting.popleft()
        engine.waiting_tokens -= state.context_tokens
        engine.active[state.request_id] = state
        if engine.plan.role == "decode":
            engine.guests.add(state.request_id)
        state.status, state.lane, state.prefilled_tokens = Status.PREFILL, lane.index, 0
        if state.first_scheduled_s != state.first_scheduled_s:
            state.first_scheduled_s = now_s
        lane.prefilling += 1
        return True

    def pieces(self, lane: Lane, budget: int, now_s: float) -> list[Chunk]:
        """Prompt tokens up to a budget: of prompts begun before, then of the head of the queue."""
        engine = self._engine
        chunks: list[Chunk] = []
        for state in lane.partial:
            if budget > 0:
                chunks.append(_chunk(state, budget))
                budget -= chunks[-1].new_tokens
        while (budget > 0 and engine.waiting and not engine.blocked
               and lane.load < engine.settings.limits.max_batch_requests):
            state = engine.waiting[0]
            if not engine.sees(state, lane):
                break
            if not self._admit([state], lane, now_s, budget):
                break
            lane.partial.append(state)
            chunks.append(_chunk(state, budget))
            budget -= chunks[-1].new_tokens
        lane.partial = [c.state for c in chunks if not c.last] + lane.partial[len(chunks):]
        return chunks

    def push(self, state: RequestState) -> Transfer | None:
        """Send a prompt's remote heads to their workers, layer by layer as the prefill computes.

        The last layer of each stage can only follow the step.
        """
        engine = self._engine
        assert state.shape is not None
        if not state.shape.pushed:
            return None
        flows = engine.books.shapes.push_flows(state.shape, state.context_tokens,
                                               engine.bytes_per_group_token)
        if not flows:
            # A tail elsewhere that is empty as yet: with nothing on the way, nothing would arrive.
            return None
        state.in_flight_transfers += 1
        return Transfer(state.request_id, engine.index, "push", flows)


def _chunk(state: RequestState, budget: int) -> Chunk:
    """The next piece of a prompt, within a budget of tokens."""
    left = state.context_tokens - state.prefilled_tokens
    new = left if state.whole else min(left, budget)
    return Chunk(state, new, state.prefilled_tokens, new == left)
