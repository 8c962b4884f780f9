"""A run in simulated time: arrivals, instances and the network around one controller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hetis_sim.control.controller import Controller
from hetis_sim.control.decisions import DecisionLog
from hetis_sim.control.engine import Engine
from hetis_sim.control.invariants import check_controller
from hetis_sim.control.make import make_controller
from hetis_sim.control.mesh.controller import MeshController
from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.control.state import RequestState, Status
from hetis_sim.control.step import NOTHING, Outcome, Transfer
from hetis_sim.control.timing import InstanceTimer
from hetis_sim.control.watch import StepWatch
from hetis_sim.cost.model import CostModel
from hetis_sim.cost.outside import RangeWatch
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.policies.base import Policy
from hetis_sim.policies.memory import unit_bytes
from hetis_sim.policies.plan import Plan
from hetis_sim.sim.arrivals import Arrivals, ClosedArrivals, OpenArrivals, UserLoop
from hetis_sim.sim.clock import Clock
from hetis_sim.sim.instance import Instance, StuckError
from hetis_sim.sim.mesh import Mesh
from hetis_sim.sim.network import Network, Wire
from hetis_sim.sim.traffic import WireBytes
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.model import ModelSpec
from hetis_sim.spec.request import Request

PROGRESS_EVERY = 50


@dataclass(frozen=True, slots=True)
class SimulationInput:
    """All that determines a run: same input, same output.

    ``believed`` are the durations that the policy goes by where they are not the true ones of ``cost``.
    """

    cluster: ClusterSpec
    model: ModelSpec
    cost: CostModel
    policy: Policy
    plan: Plan
    workload: Sequence[Request] | UserLoop
    settings: SchedulerSettings
    event_budget: int
    log_decisions: bool = False
    debug: bool = False
    believed: CostModel | None = None


class Simulation:
    """Runs a plan on a workload.

    With ``debug`` the invariants are checked after every event. ``progress`` is told the
    number of ended requests now and then. ``watch`` holds what the steps of instances asked the cost model
    for outside the ranges that it was fitted on.
    """

    def __init__(self, given: SimulationInput, progress: Callable[[int], None] | None = None) -> None:
        self.given = given
        self._progress = progress
        self._ends = 0
        self.clock = Clock(given.event_budget)
        self.controller: Controller | MeshController = make_controller(
            given.cluster, given.model, given.cost, given.policy, given.plan, given.settings,
            DecisionLog(given.log_decisions), given.believed)
        self._handoffs = any(instance.role != "both" for instance in given.plan.instances)
        self._unit_bytes = unit_bytes(given.model, given.settings.limits)
        self.recorder = self._make_recorder()
        self.network = self.make_network()
        self._cache_bytes: dict[tuple[int, int], float] = {}
        self.watch = RangeWatch(given.cost)
        self.instances = self._make_instances()
        self._changes = -1
        self.arrivals = self.make_arrivals()

    def _make_instances(self) -> Sequence[Instance | Mesh]:
        """The driver of every replica, or the one of the mesh."""
        controller = self.controller
        if isinstance(controller, MeshController):
            return [self.make_mesh(controller)]
        self._lanes = controller
        return [self.make_instance(engine, engine.timer) for engine in controller.engines]

    # Where durations come from; a replay overrides these with what was measured.

    def make_network(self) -> Network:
        """What carries transfers."""
        given = self.given
        return Network(self.clock, given.cluster, given.cost, self._foreground, self._transfer_ended)

    def make_instance(self, engine: Engine, timer: InstanceTimer) -> Instance:
        """The driver of one replica."""
        return Instance(self.clock, self._lanes, engine, timer, self.recorder, self._news, self._horizon,
                        self.network, StepWatch(self.watch, self.given.cluster, engine.plan))

    def make_mesh(self, controller: MeshController) -> Mesh:
        """The driver of a mesh."""
        given = self.given
        return Mesh(self.clock, controller, controller.timer, self.recorder, self._news, given.cluster,
                    given.cost, self.network)

    def make_arrivals(self) -> Arrivals:
        """What submits the requests."""
        workload = self.given.workload
        if isinstance(workload, Sequence):
            return OpenArrivals(self.clock, workload, self._submit)
        return ClosedArrivals(self.clock, workload, self._submit)

    def _make_recorder(self) -> Recorder:
        devices = self.given.cluster.devices
        capacity = dict.fromkeys(range(len(devices)), 0)
        for ids, ledger in self.controller.ledgers():
            capacity.update(zip(ids, ledger.capacity, strict=True))
        return Recorder(devices=[device.label for device in devices],
                        capacity_bytes=[float(units * self._unit_bytes) for units in capacity.values()])

    def run(self) -> Recorder:
        """Run to the end of the workload.

        Raises:
            StuckError: requests are left although nothing can happen any more.
            EventBudgetError: the run takes more events than allowed; what has ended is in ``recorder``.
        """
        try:
            self.clock.run()
        finally:
            self._record_busy()
            self._record_peaks()
            self._record_wires()
        counts = self.controller.counts()
        if counts["submitted"] != counts["finished"] + counts["rejected"]:
            raise StuckError(f"the simulation has come to a halt at {self.clock.now:.3f} s with {counts}")
        return self.recorder

    # -- what happens ------------------------------------------------------------------------

    def _submit(self, request: Request) -> None:
        state = self.controller.submit(request, self.clock.now)
        if state.status == Status.REJECTED:
            self._ended(state)
        else:
            self.instances[state.instance].ring()
        self._after_event()

    def _transfer_ended(self, transfer: Transfer, begun_s: float) -> None:
        for flow in transfer.flows:
            ends = flow.source, flow.target
            self._cache_bytes[ends] = self._cache_bytes.get(ends, 0.0) + flow.size_bytes
            self.recorder.transfer(transfer.request_id, transfer.kind, begun_s, self.clock.now,
                                   flow.size_bytes, flow.source, flow.target)
        self._news(self._lanes.arrived(transfer, self.clock.now))
        self.instances[transfer.instance].ring()

    def _news(self, outcome: Outcome) -> None:
        """Carry out and record what a verb of the controller has set off."""
        if outcome is not NOTHING:
            self._carry_out(outcome)
        self._after_event()

    def _carry_out(self, outcome: Outcome) -> None:
        for gap_s in outcome.gaps_s:
            self.recorder.itl(gap_s, gap_s, 1, 1)
        for state in outcome.finished:
            self._ended(state)
        for state in outcome.rejected:
            self._ended(state)
        for transfer in outcome.transfers:
            self.network.start(transfer)
        for index in outcome.touched:
            self.instances[index].ring()

    def _ended(self, state: RequestState) -> None:
        request = state.request
        finished = state.status == Status.FINISHED
        self.recorder.request(
            request_id=request.request_id, arrival_s=request.arrival_s, prompt_tokens=request.prompt_tokens,
            output_tokens=state.output_tokens, status="finished" if finished else "rejected",
            reason=state.reason, instance=state.instance, first_scheduled_s=state.first_scheduled_s,
            first_token_s=state.first_token_s, finish_s=state.finish_s,
            preemptions=state.preemptions, moves=state.moves, moved_bytes=state.moved_bytes,
            remote_share=state.remote_share)
        self.arrivals.ended(state)
        self._ends += 1
        if self._progress is not None and self._ends % PROGRESS_EVERY == 0:
            self._progress(self._ends)

    def _after_event(self) -> None:
        if self.network.under_way:
            changes = self.controller.changes
            if changes != self._changes:
                self._changes = changes
                self.network.update_rates()
        now = self.clock.now
        if now >= self.recorder.next_sample_s:
            self._sample(now)
        if self.given.debug:
            check_controller(self.controller)

    # -- what the parts ask for --------------------------------------------------------------

    def _horizon(self) -> float:
        """No event from outside can reach an instance before this time."""
        if self.network.under_way or self.arrivals.reacts or self._handoffs:
            return self.clock.peek()
        return self.arrivals.next_s

    def _foreground(self) -> dict[Wire, float]:
        if len(self.instances) == 1:
            return self.instances[0].foreground()
        total: dict[Wire, float] = {}
        for instance in self.instances:
            for wire, rate in instance.foreground().items():
                total[wire] = total.get(wire, 0.0) + rate
        return total

    def _sample(self, now: float) -> None:
        used, size = [0] * len(self.given.cluster.devices), self._unit_bytes
        for devices, ledger in self.controller.ledgers():
            for device, units in zip(devices, ledger.used, strict=True):
                used[device] = units * size
        running, waiting = self.controller.in_system()
        self._record_busy()
        self.recorder.sample(now, running, waiting, used, self._heads())

    def _heads(self) -> list[float]:
        """Query heads on every device, averaged over the layers; the nodes of a mesh are not counted."""
        if isinstance(self.controller, MeshController):
            return []
        layers = self.given.model.layers
        return [count / layers for count in self.controller.heads()]

    def _record_peaks(self) -> None:
        """The most cache that each device has held."""
        for devices, ledger in self.controller.ledgers():
            for device, units in zip(devices, ledger.peak, strict=True):
                self.recorder.peak(device, float(units * self._unit_bytes))

    def _record_wires(self) -> None:
        """What every wire has carried."""
        traffic = WireBytes()
        for ends, size_bytes in self._cache_bytes.items():
            traffic.add("cache", self.network.path(*ends)[0], size_bytes)
        for instance in self.instances:
            instance.add_traffic(traffic, self.given.model)
        for wire, name, by_kind in traffic.rows(self.given.cluster):
            self.recorder.wire(name, self.network.bandwidth(wire), by_kind)

    def _record_busy(self) -> None:
        """Busy times up to now."""
        busy_s = self.recorder.busy_s
        for instance in self.instances:
            for device, seconds in instance.busy(self.clock.now):
                if seconds > busy_s[device]:  # rounding must not take time back
                    busy_s[device] = seconds
