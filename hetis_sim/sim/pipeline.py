"""The stages of one instance and the micro-batches that flow through them.

Stages serve micro-batches in the order in which they entered, so the times of a step follow
from when each stage is next free: no event per stage. Decode iterations whose course cannot
change before a given moment are run in a loop here, or summed in closed form where there is
one stage, instead of being events of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from hetis_sim.control.envelope import Line, envelope, envelope_sum
from hetis_sim.control.step import Step
from hetis_sim.control.timing import StepTiming
from hetis_sim.metrics.recorder import Recorder


class LaneRun:
    """A step under way in one lane.

    Attributes:
        step, timing: what runs, and how long its stages take.
        first_n: iterations that the lane had issued before the step.
        begun_s: when the step entered the first stage.
        ready_s: when its last issued iteration leaves the last stage.
        last_token_s: when the lane's members had their latest token.
        weight: members that had it in this lane, and so wait from then on.
    """

    __slots__ = ("begun_s", "first_n", "last_token_s", "ready_s", "step", "timing", "weight")

    def __init__(self, step: Step, timing: StepTiming, first_n: int, last_token_s: float,
                 weight: int) -> None:
        self.step = step
        self.timing = timing
        self.first_n = first_n
        self.begun_s = math.nan
        self.ready_s = math.nan
        self.last_token_s = last_token_s
        self.weight = weight

    @property
    def open(self) -> bool:
        """Whether another iteration may be issued without asking the controller."""
        return self.step.issued < self.step.limit


class Pipeline:
    """When each stage is next free, and the arithmetic of passing through."""

    def __init__(self, stages: int, recorder: Recorder) -> None:
        self.free_s = [0.0] * stages
        self.busy_s = [0.0] * stages
        self._recorder = recorder

    def enter(self, run: LaneRun, now_s: float) -> None:
        """Send the first iteration of a step through the stages."""
        run.begun_s = now_s
        self._pass(run, now_s, run.first_n)
        if run.step.decoding:
            self._gap(run)

    def _pass(self, run: LaneRun, start_s: float, n: int) -> None:
        free, busy_s = self.free_s, self.busy_s
        t = start_s
        for s, (busy, lines, hop) in enumerate(run.timing.stages):
            if lines:
                busy += envelope(lines, n)
            begin = free[s] if free[s] > t else t
            end = begin + busy
            free[s] = end
            busy_s[s] += busy
            t = end + hop
        run.ready_s = t

    def _gap(self, run: LaneRun) -> None:
        gap = run.ready_s - run.last_token_s
        if run.weight:
            self._recorder.itl(gap, gap, 1, run.weight)
        run.last_token_s = run.ready_s
        run.weight = run.step.decoding

    def run_ahead(self, runs: list[LaneRun], now_s: float, horizon_s: float,
                  turn: tuple[float, int] | None) -> float:
        """Issue iterations of open decode steps that begin now or before ``horizon_s``.

        Stops where a step has issued its last iteration, whose end may change anything that
        begins later, and where a lane between steps comes first (``turn``, its place in
        line). Returns when to look again.
        """
        closing_s = min((run.ready_s for run in runs if not run.open), default=math.inf)
        waiting = [run for run in runs if run.open]
        if len(self.free_s) == 1 and waiting and turn is None and math.isinf(closing_s):
            return self._jump(waiting[0], now_s, horizon_s)
        while waiting:
            run = min(waiting, key=_turn)
            if turn is not None and turn < _turn(run):
                return min(max(self.free_s[0], turn[0]), closing_s)
            start = self.free_s[0] if self.free_s[0] > run.ready_s else run.ready_s
            if start >= closing_s or (start >= horizon_s and start > now_s):
                return min(start, closing_s)
            self._pass(run, start, run.first_n + run.step.issued)
            run.step.issued += 1
            self._gap(run)
            if not run.open:
                waiting.remove(run)
                closing_s = min(closing_s, run.ready_s)
        if turn is not None:
            closing_s = min(closing_s, max(self.free_s[0], turn[0]))
        return closing_s

    def _jump(self, run: LaneRun, now_s: float, horizon_s: float) -> float:
        """The single-stage case in closed form: as many iterations as begin before the horizon."""
        start = max(self.free_s[0], run.ready_s)
        if start >= horizon_s and start > now_s:
            return start
        step, (busy, lines, hop) = run.step, run.timing.stages[0]
        n = run.first_n + step.issued

        def span(count: int) -> float:
            return count * (busy + hop) + envelope_sum(lines, n, count)

        count = _last_before(span, step.limit - step.issued, horizon_s - start)
        whole_s = span(count)
        self.busy_s[0] += whole_s - count * hop
        step.issued += count
        self._record_jump(run, start + span(1), lines, busy + hop, n, count)
        run.ready_s = run.last_token_s = start + whole_s
        self.free_s[0] = run.ready_s - hop
        return run.ready_s

    def _record_jump(self, run: LaneRun, first_ready: float, lines: tuple[Line, ...], base: float, n: int,
                     count: int) -> None:
        gap = first_ready - run.last_token_s
        if run.weight:
            self._recorder.itl(gap, gap, 1, run.weight)
        run.weight = run.step.decoding
        if count > 1:
            self._record_gaps(lines, base, n + 1, count - 1, run.weight)

    def _record_gaps(self, lines: tuple[Line, ...], base: float, n: int, count: int, weight: int) -> None:
        """Gaps of consecutive iterations; in pieces wherever another position becomes the slowest."""
        first, last = envelope(lines, n), envelope(lines, n + count - 1)
        half = count // 2
        if count <= 2 or len(lines) == 1 or math.isclose(
                envelope(lines, n + half), first + (last - first) * half / (count - 1), rel_tol=1e-9):
            self._recorder.itl(base + first, base + last, count, weight)
            return
        self._record_gaps(lines, base, n, half, weight)
        self._record_gaps(lines, base, n + half, count - half, weight)


def _turn(run: LaneRun) -> tuple[float, int]:
    return run.ready_s, run.step.lane


def _last_before(span: Callable[[int], float], most: int, room_s: float) -> int:
    """Largest count in 1..most whose last iteration begins before ``room_s`` has passed."""
    if span(most - 1) < room_s:
        return most
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        if span(middle - 1) < room_s:
            low = middle
        else:
            high = middle
    return low
