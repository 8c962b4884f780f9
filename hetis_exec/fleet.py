"""All instances of a run: what a verb of the controller has set off is carried out wherever it leads.

Most of it concerns the instance that the verb was about. A handoff leads from one instance to another,
and cache that one gives back may be what another waits for; such instances are asked again afterwards, in
the order in which the controller names them, as the simulator does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from hetis_exec.handoff import send, stream
from hetis_exec.instance import InstanceDriver, Streams
from hetis_exec.messages import Arrived, StageDone
from hetis_exec.records import Measurements, RunRecord
from hetis_sim.control.controller import Controller
from hetis_sim.control.engine import Engine
from hetis_sim.control.state import Ending, RequestState
from hetis_sim.control.step import Outcome, Step, Transfer


class Fleet:
    """The drivers of all instances.

    Args:
        make_driver: makes the driver of one instance.

    Attributes:
        landed: transfers that need not be waited for.
        ended: requests that have ended and not been looked at yet.
    """

    def __init__(self, controller: Controller, make_driver: Callable[[Engine, Fleet], InstanceDriver],
                 measurements: Measurements, record: RunRecord) -> None:
        self._controller = controller
        self._measurements = measurements
        self._record = record
        self.drivers = [make_driver(engine, self) for engine in controller.engines]
        self._driver_of = {device: driver for driver in self.drivers for device in driver.devices}
        self._rung: deque[int] = deque()
        self.landed: deque[Transfer] = deque()
        self.ended: deque[RequestState] = deque()

    @property
    def computing(self) -> bool:
        """Whether a report on a step is due."""
        return any(driver.computing for driver in self.drivers)

    @property
    def busy(self) -> bool:
        """Whether any report of a worker is due."""
        return any(driver.busy for driver in self.drivers)

    def is_last(self, done: StageDone) -> bool:
        """Whether no other report of a worker is due beside this one, of the first rank of a stage."""
        return not done.rank and sum(driver.reports_due for driver in self.drivers) == 1

    # -- what happens ----------------------------------------------------------------------------

    def sampled(self, done: StageDone) -> list[tuple[int, int]]:
        """(request id, token) of the tokens that come with a report."""
        return self._driver_of[done.device].sampled(done)

    def finish(self, request_id: int, reason: Ending, now_s: float) -> None:
        """End a request early."""
        self._record.ends.append((request_id, reason, now_s))
        instance = self._controller.states[request_id].instance
        self.follow(instance, self._controller.finish(request_id, reason, now_s), None, now_s)
        self._settle(now_s)

    def stage_done(self, done: StageDone, now_s: float) -> None:
        """A rank has computed its stage of a step."""
        self._driver_of[done.device].stage_done(done, now_s)
        self._settle(now_s)

    def cache_arrived(self, arrived: Arrived, now_s: float) -> None:
        """A device has all of its share of a shipment."""
        transfer = self._driver_of[arrived.device].cache_arrived(arrived, now_s)
        if transfer is not None:
            self.transfer_arrived(transfer, now_s)

    def transfer_arrived(self, transfer: Transfer, now_s: float) -> None:
        """A transfer of the control plane has ended."""
        self._record.arrivals.append((transfer.request_id, transfer.kind, now_s))
        self.follow(transfer.instance, self._controller.arrived(transfer, now_s), None, now_s)
        self.ring(transfer.instance)
        self._settle(now_s)

    def submitted(self, instance: int, now_s: float) -> None:
        """A request has come to an instance."""
        self.ring(instance)
        self._settle(now_s)

    # -- what follows ----------------------------------------------------------------------------

    def ring(self, instance: int) -> None:
        """Have an instance asked for steps again, after what is under way."""
        self.drivers[instance].declined = False
        if instance not in self._rung:
            self._rung.append(instance)

    def _settle(self, now_s: float) -> None:
        while self._rung:
            self.drivers[self._rung.popleft()].begin_steps(now_s)

    def follow(self, instance: int, outcome: Outcome, step: Step | None, now_s: float) -> None:
        """Have the workers do what a verb about an instance has set off."""
        self._measurements.gaps(outcome)
        self.ended += outcome.finished
        self.ended += outcome.rejected
        transfers = [*outcome.transfers, *(step.transfers if step is not None else ())]
        ends = [index for t in transfers if t.kind == "handoff" for index in (t.instance, t.target)]
        concerned = dict.fromkeys((instance, *outcome.touched, *ends))
        for index in concerned:
            self.drivers[index].mirror.follow()
        streams = self._hand_over(outcome, step)
        for index in concerned:
            own = [t for t in transfers if (t.target if t.kind == "handoff" else t.instance) == index]
            about = step if index == instance else None
            self.landed += self.drivers[index].carry_out(own, about, streams, now_s)
        for index in outcome.touched:
            self.ring(index)

    def _hand_over(self, outcome: Outcome, step: Step | None) -> Streams:
        """Begin handoffs: of whole caches at once, of prompts in the step as they are computed."""
        for transfer in outcome.transfers:
            if transfer.kind == "handoff":
                source, target = self.drivers[transfer.instance], self.drivers[transfer.target]
                send(transfer, source.mirror, target.mirror, target.next_seq)
        streams: Streams = {}
        for transfer in step.transfers if step is not None else ():
            if transfer.kind == "handoff":
                source, target = self.drivers[transfer.instance], self.drivers[transfer.target]
                streams[transfer.request_id] = stream(transfer, source.mirror, target.mirror, target.next_seq)
        return streams
