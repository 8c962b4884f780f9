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
from bisect import bisect_right
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hetis_exec.backend import Backend
from hetis_exec.crew import Crew, ThreadCrew, WorkerSpec, worker_specs
from hetis_exec.errors import ExecutorError, WorkerError
from hetis_exec.fleet import Fleet
from hetis_exec.instance import InstanceDriver, Texts
from hetis_exec.messages import Arrived, Beat, Failed, Report, StageDone, Tokens
from hetis_exec.records import Measurements, RunRecord
from hetis_exec.toy_backend import ToyBackend
from hetis_sim.control.controller import Controller
from hetis_sim.control.decisions import DecisionLog
from hetis_sim.control.engine import Engine
from hetis_sim.control.invariants import check_controller
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

POLL_S = 0.1
"""How often the workers are looked after while nothing happens."""

@dataclass(frozen=True)
class ExecutorInput:
    """What is to be run.

    Attributes:
        requests: in order of arrival; they are submitted when due.
        cost: what policies believe about durations; nothing here waits for it.
        seed: of the prompts, and of the toy's weights.
        timeout_s: a worker that shows no sign of life for so long is lost.
        debug: check the invariants of the control plane after every event.
        backend: what workers compute with; the toy by default.
        here: devices whose workers live on this host; None for all.
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

    def __post_init__(self) -> None:
        require_finite("executor.timeout_s", self.timeout_s, 0.0, open_low=True)
        times = [request.arrival_s for request in self.requests]
        require(times == sorted(times), "requests", "arrival times that go back", "sorted by arrival_s")
        ids = [request.request_id for request in self.requests]
        require(len(set(ids)) == len(ids), "requests", "the same request_id twice", "each request_id once")
        require(self.plan.mesh is None, "plan.mesh", "a mesh of nodes",
                "none: workers here form pipelines, plans with instances only")
        require(not self.policy.splits_tokens, "policy", self.policy.name,
                "one that splits cache by head alone: workers here attend to whole contexts")

    @property
    def step_settings(self) -> SchedulerSettings:
        """The scheduler's settings with one iteration a step: what lies ahead is not known here."""
        return replace(self.settings, collapse=False)

    def controller(self) -> Controller:
        """A fresh control plane."""
        timers = [InstanceTimer(self.cluster, self.model, self.cost, plan) for plan in self.plan.instances]
        return Controller(self.cluster, self.model, self.policy, self.plan, timers, self.step_settings,
                          DecisionLog(self.log_decisions))

    def prompt(self, request: Request) -> Tokens:
        """The token ids of a request's prompt."""
        stream = np.random.default_rng([self.seed, request.request_id])
        return stream.integers(self.model.vocab, size=request.prompt_tokens)


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


class Executor:
    """Runs requests on workers.

    Args:
        given: what is to be run.
        make_crew: how workers come to life; threads of this process by default.
        progress: called with the number of requests that have ended.

    Raises:
        HetisError: the combination cannot run.
    """

    def __init__(self, given: ExecutorInput, make_crew: Callable[[Sequence[WorkerSpec]], Crew] = ThreadCrew,
                 progress: Callable[[int], None] | None = None) -> None:
        self.given = given
        self._progress = progress
        self.controller = given.controller()
        engines = self.controller.engines
        self._backend = given.backend or ToyBackend(given.model, given.seed)
        self._backend.check(engines, given.here)
        self.record = RunRecord(decisions=self.controller.log.lines)
        self.crew = make_crew([spec for engine in engines
                               for spec in worker_specs(engine, self._backend, 2 * given.timeout_s)])
        self._texts: Texts = {r.request_id: given.prompt(r).tolist() for r in given.requests}
        self._measurements = Measurements([device.label for device in given.cluster.devices], engines,
                                          unit_bytes(given.model, given.settings.limits))
        self._fleet = Fleet(self.controller, self._make_driver, self._measurements, self.record)
        self._arrived = 0
        self._ended: set[int] = set()
        self._clock = RunClock()
        self._heard_s = dict.fromkeys([d for engine in engines for d in engine.plan.devices], -math.inf)
        self._progress_s = 0.0
        self._looked_s = 0.0

    def _make_driver(self, engine: Engine, fleet: Fleet) -> InstanceDriver:
        hosts = [device.host_id for device in self.given.cluster.devices]
        return InstanceDriver(self.controller, engine, fleet, hosts, self.crew.endpoint, self._texts,
                              self._measurements, self.record)

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
                while not self._done:
                    self._deal_with(self._next_event())
            finally:
                self.crew.stop(at_once=not self._done)
            self._hear_last_words()
        except ExecutorError as error:
            error.result = self.result()
            raise
        return self.result()

    def result(self) -> ExecutionResult:
        """What there is so far."""
        self._measurements.peaks()
        states = self.controller.states
        finished = {request_id: self._texts[request_id][state.request.prompt_tokens:]
                    for request_id, state in states.items() if state.status == Status.FINISHED}
        return ExecutionResult(self._measurements.recorder, finished, self.record, len(states))

    # -- events ------------------------------------------------------------------------------------

    def _deal_with(self, event: Request | Transfer | StageDone | Arrived) -> None:
        """Report one event, and have done what follows from it."""
        now_s = self._clock.tick()
        match event:
            case Request():
                self._admit(event, now_s)
            case StageDone():
                self._fleet.stage_done(event, now_s)
            case Arrived():
                self._fleet.cache_arrived(event, now_s)
            case Transfer():
                self._fleet.transfer_arrived(event, now_s)
        while self._fleet.ended:
            self._end(self._fleet.ended.popleft())
        due = bisect_right(self.given.requests, now_s, lo=self._arrived, key=lambda r: r.arrival_s)
        self._measurements.sample(now_s, due - self._arrived)
        if self.given.debug:
            check_controller(self.controller)

    def _admit(self, request: Request, now_s: float) -> None:
        self._arrived += 1
        self.record.requests.append((request, now_s))
        state = self.controller.submit(request, now_s)
        if state.status == Status.REJECTED:
            self._end(state)
        else:
            self._fleet.submitted(state.instance, now_s)

    def _end(self, state: RequestState) -> None:
        made = len(self._texts[state.request_id]) - state.request.prompt_tokens
        if state.status == Status.FINISHED and made != state.request.output_tokens:
            raise ExecutorError(f"request {state.request_id} has ended with {made} tokens, asked were "
                                f"{state.request.output_tokens}")
        self._measurements.ended(state)
        self._ended.add(state.request_id)
        if self._progress is not None:
            self._progress(len(self._ended))

    @property
    def _done(self) -> bool:
        return len(self._ended) == len(self.given.requests) and not self._fleet.computing

    def _next_event(self) -> Request | Transfer | StageDone | Arrived:
        """The next thing that happens: what needs no waiting, an arrival that is due, a report.

        Raises:
            WorkerError: a worker has failed, died or hung meanwhile.
            ExecutorError: nothing can happen any more.
        """
        self._progress_s = time.monotonic()
        while True:
            if self._fleet.landed:
                return self._fleet.landed.popleft()
            due_s = self._next_arrival_s() - self._clock.seconds()
            if due_s <= 0:
                return self.given.requests[self._arrived]
            report = self._listen(min(POLL_S, due_s))
            if report is not None:
                return report
            self._check_progress(due_s)

    def _next_arrival_s(self) -> float:
        if self._arrived == len(self.given.requests):
            return math.inf
        return self.given.requests[self._arrived].arrival_s

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
        if not busy and due_s == math.inf:
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
