"""One instance in simulated time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from hetis_sim.control.controller import Controller
from hetis_sim.control.envelope import envelope_sum
from hetis_sim.control.lane import Lane
from hetis_sim.control.step import Outcome, Step
from hetis_sim.control.timing import InstanceTimer
from hetis_sim.control.watch import StepWatch
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.sim.clock import Clock
from hetis_sim.sim.network import Network, Wire
from hetis_sim.sim.pipeline import LaneRun, Pipeline
from hetis_sim.sim.traffic import InstanceTraffic, RemoteWires, WireBytes, remote_wires
from hetis_sim.spec.errors import HetisError
from hetis_sim.spec.model import ModelSpec

if TYPE_CHECKING:
    from hetis_sim.control.engine import Engine


class StuckError(HetisError):
    """A driver or scheduler makes no progress: a defect of the program."""


class Instance:
    """Asks its engine for steps, sends them through the pipeline and reports their ends.

    Args:
        news: called with what each verb of the controller has set off.
        horizon: the earliest time at which anything outside may happen.
        network: carries the transfers that stream with steps.
        watch: told of every step that has ended.
    """

    def __init__(self, clock: Clock, controller: Controller, engine: Engine, timer: InstanceTimer,
                 recorder: Recorder, news: Callable[[Outcome], None], horizon: Callable[[], float],
                 network: Network, watch: StepWatch) -> None:
        self._clock = clock
        self._watch = watch
        self._controller = controller
        self._engine = engine
        self._timer = timer
        self._recorder = recorder
        self._news = news
        self._horizon = horizon
        self._network = network
        self.pipeline = Pipeline(len(timer.plan.stages), recorder)
        self.worker_busy_s = [0.0] * len(timer.plan.attention_workers)
        lanes = len(engine.lanes)
        self._runs: list[LaneRun | None] = [None] * lanes
        self._last_token_s = [0.0] * lanes
        self._round_s = [0.0] * lanes
        self._round_version = [-1] * lanes
        self._declined = False
        self._alarm_s = math.inf
        self._traffic: dict[Wire, float] = {}
        self._traffic_of = (-1, -1)
        self._remote_wires = remote_wires(timer.plan, network, *timer.wire_bytes_per_group)
        self.traffic = InstanceTraffic(timer)

    def ring(self) -> None:
        """Something has changed: look again, after everything else that happens now."""
        self._declined = False
        self._set_alarm(self._clock.now)

    def _set_alarm(self, time_s: float) -> None:
        time_s = max(time_s, self._clock.now)
        if time_s < self._alarm_s:
            self._alarm_s = time_s
            self._clock.call(time_s, self._alarm)

    def _alarm(self) -> None:
        """Work if this is the alarm that was set last: former ones ring in vain."""
        if self._clock.now == self._alarm_s:
            self._alarm_s = math.inf
            self.work()

    # -- steps -----------------------------------------------------------------------------

    def work(self) -> None:
        """Finish what has ended, begin what can begin, run ahead, and wake again when it matters."""
        now = self._clock.now
        self.finish_steps(now)
        self.begin_steps(now)
        wake_s = self.run_ahead(now)
        if wake_s < math.inf:
            self._set_alarm(wake_s)

    def finish_steps(self, now: float) -> None:
        """Report the steps that have ended, in the order in which they did."""
        while True:
            first: LaneRun | None = None
            for run in self._runs:
                if (run is not None and run.ready_s <= now and run.step.issued >= run.step.limit
                        and (first is None or run.ready_s < first.ready_s)):
                    first = run
            if first is None:
                return
            self._finish(first)

    def _finish(self, run: LaneRun) -> None:
        lane = run.step.lane
        self._runs[lane] = None
        self._record(run)
        self._last_token_s[lane] = run.last_token_s
        self._declined = False
        self._news(self._controller.complete(run.step, run.ready_s))

    def begin_steps(self, now: float) -> None:
        """While the first stage is free, ask for the step of the lane whose turn it is.

        A lane whose step may go on keeps its turn, unless the engine has somebody to admit.
        """
        for _ in range(10_000):
            if self.pipeline.free_s[0] > now:
                return
            admits = self._engine.admits
            turn = self._turn(admits)
            if turn is None or turn[0] > now:
                return
            run = self._runs[turn[1]]
            if run is not None:
                if not admits:
                    return
                run.step.limit = run.step.issued
            else:
                step = self._controller.next_step(self._engine.index, now)
                # What the engine has set off may bring the instance new work at once.
                self._declined = step is None
                self._news(self._controller.news(self._engine.index))
                if step is not None:
                    self._enter(step, now)
            # A decision for one lane may have cut short the step of another.
            self.finish_steps(now)
        raise StuckError(f"instance {self._engine.index} begins steps without end at {now} s")

    def _turn(self, admits: bool) -> tuple[float, int] | None:
        """Who enters the first stage next: (when it became ready, lane), of open and waiting lanes.

        Once the engine has declined, lanes between steps are out until something changes.
        """
        found: tuple[float, int] | None = None
        for index, run in enumerate(self._runs):
            if run is not None:
                if run.step.issued >= run.step.limit:
                    continue
                ready_s = run.ready_s
            elif self._declined:
                continue
            else:
                lane = self._engine.lanes[index]
                if not (admits or lane.has_work):
                    continue
                ready_s = lane.ready_at_s
            if found is None or ready_s < found[0]:
                found = (ready_s, index)
        return found

    def _enter(self, step: Step, now: float) -> None:
        lane, loads = self._engine.lanes[step.lane], self._engine.loads
        timing = self._timer.prefill(step, lane, loads) if step.chunks else self._timer.decode(lane, loads)
        run = LaneRun(step, timing, lane.issued, self._last_token_s[step.lane], step.decoding)
        self._runs[step.lane] = run
        if step.decoding:
            run.first_n -= 1
            self._enter_decoding(run, lane, now)
        else:
            self.pipeline.enter(run, now)
        for transfer in step.transfers:
            self._network.start(transfer, run.ready_s)

    def _enter_decoding(self, run: LaneRun, lane: Lane, now: float) -> None:
        fresh, lane.fresh = lane.fresh, []
        run.weight -= len(fresh)
        self.pipeline.enter(run, now)
        for state in fresh:
            gap = run.ready_s - state.last_token_s
            self._recorder.itl(gap, gap, 1, 1)
        if self._round_version[lane.index] != lane.version:
            self._round_version[lane.index], self._round_s[lane.index] = lane.version, run.ready_s - now

    def run_ahead(self, now: float) -> float:
        """Run what cannot be influenced any more; returns when to look again."""
        admits = self._engine.admits
        turn = self._turn(admits)
        runs = [run for run in self._runs if run is not None]
        if turn is None:
            return min([run.ready_s for run in runs], default=math.inf)
        if admits or self._runs[turn[1]] is None:
            ends = min([run.ready_s for run in runs if not run.open], default=math.inf)
            return min(ends, max(self.pipeline.free_s[0], turn[0]))
        rival = None
        if len(self._runs) > 1 and not self._declined:
            idle = [lane for lane, run in zip(self._engine.lanes, self._runs, strict=True) if run is None]
            rival = min([(lane.ready_at_s, lane.index) for lane in idle if lane.has_work], default=None)
        return self.pipeline.run_ahead(runs, now, self._horizon(), rival)

    # -- records -----------------------------------------------------------------------------

    def _record(self, run: LaneRun) -> None:
        step, timing = run.step, run.timing
        count, fixed = step.issued, timing.fixed
        local, exposed = timing.prefill_s * count, timing.sending_s
        if step.decoding:
            for lines in timing.lines.stages:
                own = envelope_sum(lines.local, run.first_n, count)
                local += own
                if lines.remote:
                    exposed += envelope_sum(lines.both, run.first_n, count) - own
            middle = run.first_n + (count - 1) / 2
            for n, (start, slope) in enumerate(timing.lines.workers):
                if start:
                    self.worker_busy_s[n] += count * (start + slope * middle)
        host_s = fixed.host_s * count
        if timing.host_beside:
            for (_, held, _), lines in zip(timing.stages, timing.lines.stages, strict=True):
                host_s += (envelope_sum(held, run.first_n, count)
                           - envelope_sum(lines.both, run.first_n, count))
        parts = (host_s, fixed.dense_s * count, fixed.collective_s * count, local, exposed,
                 fixed.total_hop_s * count)
        # What is left is time spent waiting for a stage; rounding must not make it negative.
        waiting = max(0.0, run.ready_s - run.begun_s - sum(parts))
        self.traffic.add(timing.lines, step.prefill_tokens + step.decoding * count, count)
        self._watch.note(step, timing.lines, run.first_n, count)
        self._recorder.step(self._engine.index, step.lane, step.kind, run.begun_s, run.ready_s, count,
                            step.decoding, step.prefill_tokens, step.decoding * count, *parts, waiting)

    def busy(self, now_s: float) -> Iterator[tuple[int, float]]:
        """Devices and the seconds that they have computed; a stage may know its work for some time ahead."""
        plan, pipeline = self._timer.plan, self.pipeline
        for stage, told_s, free_s in zip(plan.stages, pipeline.busy_s, pipeline.free_s, strict=True):
            computed_s = told_s - (free_s - now_s) if free_s > now_s else told_s
            for device in stage.devices:
                yield device, computed_s
        yield from zip(plan.attention_workers, self.worker_busy_s, strict=True)

    def add_traffic(self, traffic: WireBytes, model: ModelSpec) -> None:
        """Add the bytes that the steps so far have put on wires, cache left out."""
        self.traffic.add_to(traffic, self._network, model)

    def foreground(self) -> dict[Wire, float]:
        """Bytes per second that decode's head traffic puts on each wire.

        Queries, keys and values go out and the outputs come back, once per layer and
        iteration of every lane; a token range gets no key and value, but sends statistics.
        The time of a round is that of the slowest lane in its first iteration with its present
        members, which does not depend on how far it has run ahead.
        """
        state = (self._engine.changes, sum(self._round_version))
        if self._traffic_of != state:
            self._traffic_of = state
            self._traffic = self._head_traffic()
        return self._traffic

    def _head_traffic(self) -> dict[Wire, float]:
        rounds = (s for s, lane in zip(self._round_s, self._engine.lanes, strict=True) if lane.members)
        period_s = max(rounds, default=0.0)
        rates: dict[Wire, float] = {}
        if period_s <= 0:
            return rates
        loads, timer = self._engine.loads, self._timer
        _add_rates(rates, loads.groups.sum(axis=0).tolist(), self._remote_wires, period_s)
        if loads.ranged:
            still, merged = timer.still_bytes_per_group, timer.merged_bytes_per_group
            for held, sizes in ((loads.still, still), (loads.merged, merged)):
                _add_rates(rates, held.sum(axis=0).tolist(), remote_wires(timer.plan, self._network, *sizes),
                           period_s)
        return rates


def _add_rates(rates: dict[Wire, float], held: list[int], remote_wires: RemoteWires, period_s: float) -> None:
    for p, wires in remote_wires:
        groups = held[p]
        if groups:
            for wire, bytes_per_group in wires:
                rates[wire] = rates.get(wire, 0.0) + groups * bytes_per_group / period_s
