"""A recorded run, repeated in the simulator with the durations that were measured.

The simulator is the usual one, with its own control plane, instances and SimPy clock; it is
only told the measured times: when requests came in, when each step left the first stage and
the last one, when transfers ended. If the control plane decides by what it is shown and by
nothing else, it makes the same decisions again, byte for byte.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict

from hetis_exec.driver import ExecutorInput
from hetis_exec.errors import ReplayError
from hetis_exec.mesh.fleet import node_record
from hetis_exec.records import RunRecord, StepRecord
from hetis_sim.control.engine import Engine
from hetis_sim.control.mesh.controller import MeshController
from hetis_sim.control.mesh.timing import NodeParts
from hetis_sim.control.mesh.walk import Message, NodeStep
from hetis_sim.control.state import Ending
from hetis_sim.control.step import Transfer
from hetis_sim.control.timing import InstanceTimer
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.sim.arrivals import OpenArrivals
from hetis_sim.sim.instance import Instance
from hetis_sim.sim.mesh import Mesh, NodeRun
from hetis_sim.sim.network import Network
from hetis_sim.sim.pipeline import LaneRun, Pipeline
from hetis_sim.sim.simulation import Simulation, SimulationInput
from hetis_sim.spec.request import Request

EVENTS_PER_RECORD = 50


def replay(given: ExecutorInput, record: RunRecord) -> Replay:
    """Repeat a run and compare its decisions.

    Returns:
        The simulation, at its end.

    Raises:
        ReplayError: the control plane does or decides something else than in the recorded run.
    """
    simulation = Replay(given, record)
    simulation.run()
    compare_decisions(record.decisions, simulation.controller.log.lines)
    return simulation


def compare_decisions(recorded: list[str], replayed: list[str]) -> None:
    """Compare two decision logs byte for byte.

    Raises:
        ReplayError: they differ; the text shows the first difference.
    """
    for number, (before, now) in enumerate(zip(recorded, replayed, strict=False)):
        if before != now:
            raise ReplayError(f"decision {number} differs:\nrecorded {before}\nreplayed {now}")
    if len(recorded) != len(replayed):
        raise ReplayError(f"{len(recorded)} decisions were recorded, {len(replayed)} were made in the replay")


class Replay(Simulation):
    """The simulation of a recorded run."""

    def __init__(self, given: ExecutorInput, record: RunRecord) -> None:
        self._record = record
        budget = 1000 + EVENTS_PER_RECORD * (len(record.requests) + len(record.steps) + len(record.arrivals)
                                            + len(record.ends))
        super().__init__(SimulationInput(
            given.cluster, given.model, given.cost, given.policy, given.plan, (), given.step_settings, budget,
            log_decisions=True, debug=given.debug))

    def make_network(self) -> Network:
        given = self.given
        return RecordedNetwork(self._record, self.clock, given.cluster, given.cost, dict,
                               self._transfer_ended)

    def make_instance(self, engine: Engine, timer: InstanceTimer) -> Instance:
        instance = super().make_instance(engine, timer)
        instance.pipeline = RecordedPipeline(self._record, engine.index, len(engine.plan.stages),
                                             self.recorder)
        return instance

    def make_mesh(self, controller: MeshController) -> Mesh:
        given = self.given
        return RecordedMesh(self._record, self.clock, controller, controller.timer, self.recorder, self._news,
                            given.cluster, given.cost, self.network)

    def make_arrivals(self) -> OpenArrivals:
        arrivals = OpenArrivals(self.clock, (), self._submit)
        arrivals.next_s = math.inf
        for request, submitted_s in self._record.requests:
            self._plan(request, submitted_s)
        for request_id, reason, told_s in self._record.ends:
            self._plan_end(request_id, reason, told_s)
        return arrivals

    def _plan(self, request: Request, submitted_s: float) -> None:
        self.clock.call(submitted_s, lambda: self._submit(request), priority=1)

    def _plan_end(self, request_id: int, reason: Ending, told_s: float) -> None:
        def end() -> None:
            outcome = self.controller.finish(request_id, reason, self.clock.now)
            mesh = self.instances[0]
            if isinstance(mesh, Mesh):
                mesh.carry_out(outcome)
                mesh.ring()
            else:
                self._news(outcome)

        self.clock.call(told_s, end, priority=1)


class RecordedPipeline(Pipeline):
    """Steps take as long as they took."""

    def __init__(self, record: RunRecord, instance: int, stages: int, recorder: Recorder) -> None:
        super().__init__(stages, recorder)
        self._steps = deque(step for step in record.steps if step.instance == instance)

    def enter(self, run: LaneRun, now_s: float) -> None:
        """Look up when the step left the first stage and the last one.

        Raises:
            ReplayError: the recorded run did something else at this point.
        """
        made = StepRecord.of(run.step, now_s)
        if not self._steps:
            raise ReplayError(f"the replay goes on where the recorded run had ended, with {asdict(made)}")
        recorded = self._steps.popleft()
        check_same(recorded, made)
        run.begun_s = now_s
        run.ready_s = _or_never(recorded.ended_s)
        self.free_s[0] = _or_never(recorded.free_s)
        if run.step.decoding:
            self._gap(run)


class RecordedMesh(Mesh):
    """Steps take as long as they took, and messages are there when they were."""

    def __init__(self, record: RunRecord, *parts: object) -> None:
        super().__init__(*parts)  # type: ignore[arg-type]
        self._message_s = self._poll_s = 0.0
        self._steps: dict[int, deque[StepRecord]] = {}
        for step in record.steps:
            self._steps.setdefault(step.instance, deque()).append(step)
        self._times: dict[int, deque[float]] = {}
        for request_id, _, ended_s in record.arrivals:
            self._times.setdefault(request_id, deque()).append(ended_s)

    def ends_s(self, step: NodeStep, parts: NodeParts, now_s: float) -> float:
        """Look up when a step ended.

        Raises:
            ReplayError: the recorded run did something else at this point.
        """
        made, steps = node_record(step, now_s), self._steps.get(step.node)
        if not steps:
            raise ReplayError(f"the replay goes on where the recorded run had ended, with {asdict(made)}")
        recorded = steps.popleft()
        check_same(recorded, made)
        return _or_never(recorded.ended_s)

    def send(self, message: Message, run: NodeRun | None) -> None:
        """Look up when a message arrived; one that had not when the run was over never does."""
        times = self._times.get(message.walks[0].state.request_id)
        if times:
            arrived_s = times.popleft()
            hop_s = 0.0 if run is None else arrived_s - run.ended_s
            self._clock.call(arrived_s, lambda: self._arrived(message, run, hop_s), priority=1)


def check_same(recorded: StepRecord, made: StepRecord) -> None:
    """Compare a step with what was recorded.

    Raises:
        ReplayError: it is another one, or begins at another time.
    """
    if not made.holds_the_same(recorded) or made.begun_s != recorded.begun_s:
        raise ReplayError("the replay makes another step:\n"
                          f"recorded {asdict(recorded)}\nmade     {asdict(made)}")


class RecordedNetwork(Network):
    """Transfers end when they ended."""

    def __init__(self, record: RunRecord, *parts: object) -> None:
        super().__init__(*parts)  # type: ignore[arg-type]
        self._times: dict[tuple[int, str], deque[float]] = {}
        for request_id, kind, ended_s in record.arrivals:
            self._times.setdefault((request_id, kind), deque()).append(ended_s)

    def start(self, transfer: Transfer, step_ends_s: float = 0.0) -> None:
        """Look up when the transfer ended; one that had not when the run was over never does."""
        times = self._times.get((transfer.request_id, transfer.kind))
        if times:
            begun_s = self._clock.now
            self._clock.call(times.popleft(), lambda: self._arrived(transfer, begun_s), priority=1)


def _or_never(time_s: float) -> float:
    """A time that was not recorded, because the run was over before, never comes."""
    return math.inf if math.isnan(time_s) else time_s
