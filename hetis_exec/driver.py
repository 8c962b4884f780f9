"""The second driver of the control plane: time is measured.

Admit what has arrived, ask for a step, have it executed, report its completion, carry out
transfers: the simulator does the same with computed durations. Each event is reported with a
time of its own, later than the one before, and after each the instance that it concerns is
asked for its next step; so the times of a run alone determine the order of its decisions,
and a replay can repeat them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hetis_exec.backend import Backend
from hetis_exec.crew import Crew, ThreadCrew, WorkerSpec, worker_specs
from hetis_exec.errors import ExecutorError, WorkerError
from hetis_exec.fleet import Fleet
from hetis_exec.instance import InstanceDriver
from hetis_exec.mesh.fleet import Hop, MeshFleet
from hetis_exec.messages import Arrived, Beat, Failed, Report, StageDone, Tokens
from hetis_exec.places import AnyEngine
from hetis_exec.records import Measurements, RunRecord, no_record
from hetis_exec.sources import POLL_S, Arrival, Ended, Source, Trace
from hetis_exec.texts import Listener, Prompt, Text, Texts
from hetis_exec.throttle import Throttle
from hetis_exec.totals import Totals
from hetis_exec.toy_backend import ToyBackend
from hetis_sim.control.controller import Controller
from hetis_sim.control.decisions import DecisionLog
from hetis_sim.control.engine import Engine
from hetis_sim.control.invariants import check_controller
from hetis_sim.control.mesh.controller import MeshController
from hetis_sim.control.mesh.timing import MeshTimer
from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.control.state import RequestState, Status
from hetis_sim.control.step import Transfer
from hetis_sim.control.timing import InstanceTimer
from hetis_sim.cost.model import CostModel
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.policies.base import Policy
from hetis_sim.policies.memory import unit_bytes
from hetis_sim.policies.plan import Plan
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.errors import require, require_finite
from hetis_sim.spec.model import ModelSpec
from hetis_sim.spec.request import Request

Event = Arrival | Ended | Transfer | Hop | StageDone | Arrived
"""What the driver deals with one after the other."""


@dataclass(frozen=True)
class ExecutorInput:
    """What is to be run.

    Attributes:
        requests: in order of arrival; they are submitted when due.
        cost: what policies believe about durations; nothing here waits for it.
        seed: of prompts that are made up, and of the toy's weights.
        timeout_s: a worker that shows no sign of life for so long is lost.
        debug: check the invariants of the control plane after every event.
        backend: what workers compute with; the toy by default.
        here: devices whose workers live on this host; None for all.
        prompts: of requests; those that are not named are random tokens.
        endless: nothing is kept of requests and steps that are over, but for totals.
        throttles, cores: of workers, by device; see :mod:`hetis_exec.throttle`.
    """

    cluster: ClusterSpec
    model: ModelSpec
    cost: CostModel
    policy: Policy
    plan: Plan
    requests: Sequence[Request]
    settings: SchedulerSettings
    seed: int = 0
    timeout_s: float = 30.0
    log_decisions: bool = False
    debug: bool = False
    backend: Backend | None = None
    here: Container[int] | None = None
    prompts: Mapping[int, Prompt] = field(default_factory=dict)
    endless: bool = False
    throttles: Mapping[int, Throttle] = field(default_factory=dict)
    cores: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_finite("executor.timeout_s", self.timeout_s, 0.0, open_low=True)
        times = [request.arrival_s for request in self.requests]
        require(times == sorted(times), "requests", "arrival times that go back", "sorted by arrival_s")
        ids = [request.request_id for request in self.requests]
        require(len(set(ids)) == len(ids), "requests", "the same request_id twice", "each request_id once")
        mixed = all(instance.role == "both" for instance in self.plan.instances)
        require(mixed or not self.policy.splits_tokens, "policy", self.policy.name,
                "one that splits cache by head alone: divided tokens are not handed from pool to pool here")

    @property
    def step_settings(self) -> SchedulerSettings:
        """The scheduler's settings with one iteration a step: what lies ahead is not known here."""
        return replace(self.settings, collapse=False)

    def controller(self) -> Controller | MeshController:
        """A fresh control plane."""
        if self.plan.mesh is not None:
            return MeshController(self.cluster, self.model, self.policy, self.plan,
                                  MeshTimer(self.cluster, self.model, self.cost, self.plan.mesh),
                                  self.step_settings, DecisionLog(self.log_decisions))
        timers = [InstanceTimer(self.cluster, self.model, self.cost, plan) for plan in self.plan.instances]
        return Controller(self.cluster, self.model, self.policy, self.plan, timers, self.step_settings,
                          DecisionLog(self.log_decisions))

    def prompt(self, request: Request) -> Tokens:
        """The token ids of a request's prompt."""
        if request.request_id in self.prompts:
            return np.array(self.prompts[request.request_id].tokens, dtype=np.int64)
        stream = np.random.default_rng([self.seed, request.request_id])
        return stream.integers(self.model.vocab, size=request.prompt_tokens)

    def text(self, request: Request) -> Text:
        """The same as the beginning of a text."""
        known = self.prompts.get(request.request_id)
        return Text.of(known or Prompt(self.prompt(request).tolist()))


@dataclass(frozen=True)
class ExecutionResult:
    """What a run gives back.

    Attributes:
        recorder: measured times, in the simulator's schema.
        tokens: what each finished request has generated.
        record: what a replay needs.
        submitted: requests that had come in.
    """

    recorder: Recorder
    tokens: dict[int, list[int]]
    record: RunRecord
    submitted: int


@dataclass(slots=True)
class RunClock:
    """Seconds since the run began; no two readings are equal."""

    start_s: float = field(default_factory=time.perf_counter)
    last_s: float = 0.0

    def seconds(self) -> float:
        """Time passed."""
        return time.perf_counter() - self.start_s

    def tick(self) -> float:
        """The time of an event."""
        self.last_s = max(self.seconds(), math.nextafter(self.last_s, math.inf))
        return self.last_s


def engines_of(controller: Controller | MeshController) -> Sequence[AnyEngine]:
    """Whatever holds cache of its own."""
    return [controller.engine] if isinstance(controller, MeshController) else controller.engines


class Executor:
    """Runs requests on workers.

    Args:
        given: what is to be run.
        make_crew: how workers come to life; threads of this process by default.
        progress: called with the number of requests that have ended.
        listener: told of every token.
        source: where requests come from; by default they are those of the input.
        rest: called between steps, when no report is due, with the time of the run, which stands still
            meanwhile: what it does takes no time of the run.

    Raises:
        HetisError: the combination cannot run.
    """

    def __init__(self, given: ExecutorInput, make_crew: Callable[[Sequence[WorkerSpec]], Crew] = ThreadCrew,
                 progress: Callable[[int], None] | None = None, listener: Listener | None = None,
                 source: Source | None = None, rest: Callable[[float], None] | None = None) -> None:
        self.given = given
        self._progress = progress
        self._rest = rest
        self._listener = listener
        self._source = source or Trace(given.requests)
        self.controller = given.controller()
        engines = engines_of(self.controller)
        self._backend = given.backend or ToyBackend(given.model, given.seed)
        self._backend.check(engines, given.here)
        self.record = no_record() if given.endless else RunRecord(decisions=self.controller.log.lines)
        self.crew = make_crew([spec for engine in engines
                               for spec in worker_specs(engine, self._backend, 2 * given.timeout_s,
                                                        given.throttles, given.cores)])
        self._texts: Texts = {r.request_id: given.text(r) for r in given.requests}
        make = Totals if given.endless else Measurements
        self.measurements: Measurements = make([device.label for device in given.cluster.devices], engines,
                                               unit_bytes(given.model, given.settings.limits))
        self._fleet = self._make_fleet(self.controller)
        self._arrived = 0
        self._ended = 0
        self._clock = RunClock()
        self._heard_s = dict.fromkeys([d for engine in engines for d in engine.plan.devices], -math.inf)
        self._progress_s = 0.0
        self._looked_s = 0.0

    def _make_fleet(self, controller: Controller | MeshController) -> Fleet | MeshFleet:
        if isinstance(controller, MeshController):
            return MeshFleet(controller, self.crew.endpoint, self._texts, self.measurements, self.record)
        hosts = [device.host_id for device in self.given.cluster.devices]

        def make_driver(engine: Engine, fleet: Fleet) -> InstanceDriver:
            return InstanceDriver(controller, engine, fleet, hosts, self.crew.endpoint, self._texts,
                                  self.measurements, self.record)

        return Fleet(controller, make_driver, self.measurements, self.record)

    def run(self) -> ExecutionResult:
        """Serve all requests.

        Raises:
            WorkerError: a worker has raised, died or hung.
            ExecutorError: the run cannot go on. Whatever had finished is in the error's ``result``.
        """
        try:
            try:
                self.crew.start()
                self._await_workers()
                if self._listener is not None:
                    self._listener.began()
                while (event := self._next_event()) is not None:
                    self._let_rest(event)
                    self._deal_with(event)
                self._look_after_workers()
            finally:
                self.crew.stop(at_once=not self._done)
            self._hear_last_words()
        except ExecutorError as error:
            error.result = self.result()
            raise
        return self.result()

    def result(self) -> ExecutionResult:
        """What there is so far."""
        self.measurements.peaks()
        states = self.controller.states
        finished = {request_id: self._texts[request_id].generated
                    for request_id, state in states.items() if state.status == Status.FINISHED}
        return ExecutionResult(self.measurements.recorder, finished, self.record, len(states))

    # -- events ------------------------------------------------------------------------------------

    def _let_rest(self, event: Event) -> None:
        """Stop the clock for what is to be done between steps, if one has ended and none is under way."""
        if self._rest is not None and isinstance(event, StageDone) and self._fleet.is_last(event):
            now_s, begun_s = self._clock.seconds(), time.perf_counter()
            self._rest(now_s)
            self._clock.start_s += time.perf_counter() - begun_s

    def _deal_with(self, event: Event) -> None:
        """Report one event, and have done what follows from it."""
        if isinstance(event, StageDone):
            self._take_tokens(event)
        now_s = self._clock.tick()
        match event:
            case Arrival():
                self._admit(event, now_s)
            case Ended():
                self._end_early(event, now_s)
            case StageDone():
                self._fleet.stage_done(event, now_s)
            case Arrived():
                self._fleet.cache_arrived(event, now_s)
            case Transfer() | Hop():
                self._land(event, now_s)
        while self._fleet.ended:
            self._end(self._fleet.ended.popleft())
        self.measurements.sample(now_s, self._source.due(now_s))
        if self.given.debug:
            check_controller(self.controller)

    def _land(self, event: Transfer | Hop, now_s: float) -> None:
        """What need not be waited for is there: cache in instances, messages in a mesh."""
        fleet = self._fleet
        if isinstance(fleet, MeshFleet):
            assert isinstance(event, Hop)
            fleet.hop_arrived(event, now_s)
        else:
            assert isinstance(event, Transfer)
            fleet.transfer_arrived(event, now_s)

    def _take_tokens(self, done: StageDone) -> None:
        """Add tokens to their texts; those that are complete end with the step, which is reported next."""
        for request_id, token in self._fleet.sampled(done):
            self._texts[request_id].tokens.append(token)
            if self._listener is not None and self._listener.token(request_id, token):
                self._fleet.finish(request_id, "stop", self._clock.tick())

    def _end_early(self, event: Ended, now_s: float) -> None:
        """A request may have ended before its client has gone."""
        state = self.controller.states.get(event.request_id)
        if state is not None and state.status < Status.FINISHED:
            self._fleet.finish(event.request_id, event.reason, now_s)

    def _admit(self, arrival: Arrival, now_s: float) -> None:
        request = arrival.request
        self._arrived += 1
        if arrival.prompt is not None:
            self._texts[request.request_id] = Text.of(arrival.prompt)
        self.record.requests.append((request, now_s))
        state = self.controller.submit(request, now_s)
        if state.status == Status.REJECTED:
            self._end(state)
        else:
            self._fleet.submitted(state.instance, now_s)

    def _end(self, state: RequestState) -> None:
        made = len(self._texts[state.request_id].generated)
        if state.status == Status.FINISHED and made != state.output_tokens:
            raise ExecutorError(f"request {state.request_id} has ended with {made} tokens, booked are "
                                f"{state.output_tokens}")
        self.measurements.ended(state)
        self._ended += 1
        if self._listener is not None:
            self._listener.ended(state)
        if self._progress is not None:
            self._progress(self._ended)
        if self.given.endless:
            self.controller.forget(state.request_id)
            del self._texts[state.request_id]

    @property
    def _done(self) -> bool:
        return self._source.over and self._ended == self._arrived and not self._fleet.computing

    def _next_event(self) -> Event | None:
        """The next thing that happens: what needs no waiting, an arrival that is due, a report.

        None once all is done.

        Raises:
            WorkerError: a worker has failed, died or hung meanwhile.
            ExecutorError: nothing can happen any more.
        """
        self._progress_s = time.monotonic()
        while not self._done:
            if self._fleet.landed:
                return self._fleet.landed.popleft()
            due_s = self._source.next_s() - self._clock.seconds()
            if due_s <= 0:
                return self._source.take(self._clock.start_s)
            report = self._listen(min(self._source.poll_s, due_s))
            if report is not None:
                return report
            self._check_progress(due_s)
        return None

    # -- workers -------------------------------------------------------------------------------------

    def _listen(self, timeout_s: float) -> StageDone | Arrived | None:
        """A report that is an event, if one comes in time.

        Raises:
            WorkerError: a worker has failed, died or hung.
        """
        if time.monotonic() - self._looked_s > POLL_S:
            self._looked_s = time.monotonic()
            self._look_after_workers()
        message = self.crew.endpoint.receive(timeout_s)
        if message is None:
            return None
        if not isinstance(message, Report):
            raise ExecutorError(f"the driver does not know what to do with {message}")
        self._heard_s[message.device] = time.monotonic()
        if isinstance(message, Failed):
            raise WorkerError(message.device, message.reason)
        return None if isinstance(message, Beat) else message

    def _look_after_workers(self) -> None:
        for device, how in self.crew.dead():
            # What it has said before it ended says more.
            self._hear_last_words()
            raise WorkerError(device, how)
        since_s = time.monotonic() - self.given.timeout_s
        for device, heard_s in self._heard_s.items():
            if heard_s < since_s:
                raise WorkerError(device, f"no sign of life for {self.given.timeout_s:g} s")

    def _check_progress(self, due_s: float) -> None:
        busy = self._fleet.busy
        if not busy and due_s == math.inf and self._arrived > self._ended:
            raise ExecutorError(f"the run has come to a halt with {self.controller.counts()}")
        if busy and time.monotonic() - self._progress_s > 2 * self.given.timeout_s:
            raise ExecutorError(f"no step or transfer has ended for {2 * self.given.timeout_s:g} s")

    def _await_workers(self) -> None:
        """Begin when every worker has shown that it is there.

        Raises:
            WorkerError: one does not.
        """
        begun_s = time.monotonic()
        while -math.inf in self._heard_s.values():
            message = self.crew.endpoint.receive(POLL_S)
            if isinstance(message, Failed):
                raise WorkerError(message.device, message.reason)
            if isinstance(message, Beat):
                self._heard_s[message.device] = time.monotonic()
            for device, how in self.crew.dead():
                raise WorkerError(device, how)
            if time.monotonic() - begun_s > max(self._backend.start_s, self.given.timeout_s):
                silent = [device for device, heard_s in self._heard_s.items() if heard_s == -math.inf]
                raise WorkerError(silent[0], "it has not started")
        self._heard_s = dict.fromkeys(self._heard_s, time.monotonic())
        self._clock = RunClock()

    def _hear_last_words(self) -> None:
        """Raise what a worker may have had to say before it ended."""
        while (message := self.crew.endpoint.receive(0.0)) is not None:
            if isinstance(message, Failed):
                raise WorkerError(message.device, message.reason)
