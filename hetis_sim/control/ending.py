"""Requests that end before they have all the tokens they were submitted for.

Whoever sees the texts knows more than the control plane: that one is complete, or that nobody waits for
it any more. Such a request ends at once wherever it is, unless a step computes it: then it ends with that
step's iteration, whose token it still gets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetis_sim.control.lane import Lane
from hetis_sim.control.state import Ending, RequestState, Status, close
from hetis_sim.control.step import Step

if TYPE_CHECKING:
    from hetis_sim.control.engine import Engine


class Endings:
    """Ends requests of one instance, now or at the end of the step under way."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._awaited: list[RequestState] = []

    def end(self, state: RequestState, reason: Ending, now_s: float, queued: bool) -> None:
        """End a request that has not ended.

        ``queued``: it has been prefilled here and waits for its way to another instance.
        """
        engine = self._engine
        engine.log.record("finish", engine.load(), [engine.request_view(state)], reason)
        state.ending = reason
        if self._computed(state):
            engine.interrupt(engine.lanes[state.lane])
            self._awaited.append(state)
            return
        self._let_go(state, queued)
        engine.news.touched.append(engine.index)
        self.over(state, now_s)

    def step_over(self, step: Step, now_s: float) -> None:
        """End the decoding requests whose last iteration has been executed with this step."""
        if not self._awaited:
            return
        lane = self._engine.lanes[step.lane]
        for state in list(self._awaited):
            if state.request_id in lane.members:
                self._leave(state, lane)
                state.last_token_s = now_s
                self.over(state, now_s)

    def over(self, state: RequestState, now_s: float) -> None:
        """A request has ended, early or not, and holds nothing any more."""
        engine = self._engine
        engine.active.pop(state.request_id, None)
        if state in self._awaited:
            self._awaited.remove(state)
        ended = engine.news.finished if close(state, now_s) else engine.news.rejected
        ended.append(state)
        engine.membership_changed()

    def _computed(self, state: RequestState) -> bool:
        """Whether the step under way has something of this request."""
        if state.status not in (Status.PREFILL, Status.DECODE):
            return False
        step = self._engine.lanes[state.lane].step
        if step is None:
            return False
        return step.decoding > 0 if state.status == Status.DECODE else any(
            chunk.state is state for chunk in step.chunks)

    def _let_go(self, state: RequestState, queued: bool) -> None:
        """Give back what a request holds that nothing computes at the moment."""
        engine = self._engine
        match state.status:
            case Status.WAITING:
                engine.waiting.remove(state)
                engine.waiting_tokens -= state.context_tokens
            case Status.SWAPPED:
                engine.pressure.forget(state)
            case Status.DECODE:
                self._leave(state, engine.lanes[state.lane])
            case _:
                engine.pressure.swapped_in(state)
                lane = engine.lanes[state.lane]
                lane.forget(state)
                lane.prefilling -= not queued
                engine.books.release(state)

    def _leave(self, state: RequestState, lane: Lane) -> None:
        lane.leave(state)
        lane.forget(state)
        self._engine.books.end(state)
