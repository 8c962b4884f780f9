"""One instance under the real clock: its engine's steps become work for its workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from hetis_exec.errors import ExecutorError
from hetis_exec.holdings import Shipment
from hetis_exec.messages import Arrived, Control, Onward, Row, StageDone, Task
from hetis_exec.mirror import Mirror
from hetis_exec.records import Measurements, RunRecord, StepRecord
from hetis_exec.texts import Texts
from hetis_exec.transport import Endpoint
from hetis_sim.control.controller import Controller
from hetis_sim.control.engine import Engine
from hetis_sim.control.state import RequestState
from hetis_sim.control.step import Outcome, Step, Transfer

Streams = dict[int, dict[int, tuple[Onward, ...]]]
"""By request and stage, what goes to another instance while a prompt is computed."""

NOWHERE: dict[int, tuple[Onward, ...]] = {}


@dataclass(slots=True, eq=False)
class StepRun:
    """A step under way.

    Attributes:
        sampled: requests that get a token, in the order of the batch.
        fresh: of the decoding ones, those that had their last token outside this lane.
        stages: reports of the stages so far.
    """

    step: Step
    record: StepRecord
    sampled: list[int]
    fresh: list[RequestState]
    stages: list[StageDone] = field(default_factory=list)


class Fleet(Protocol):
    """What a driver needs of all of them: see :class:`hetis_exec.fleet.Fleet`."""

    def follow(self, instance: int, outcome: Outcome, step: Step | None, now_s: float) -> None:
        """Have the workers do what a verb about an instance has set off."""


class InstanceDriver:
    """Asks the engine for steps, sends them to the workers and reports what they report.

    Attributes:
        mirror: what the workers hold.
        declined: the engine has had no step to give, and nothing has changed since.
        devices: its workers.
    """

    def __init__(self, controller: Controller, engine: Engine, fleet: Fleet, hosts: Sequence[int],
                 endpoint: Endpoint, texts: Texts, measurements: Measurements, record: RunRecord) -> None:
        self._controller = controller
        self._engine = engine
        self._fleet = fleet
        self._endpoint = endpoint
        self._texts = texts
        self._measurements = measurements
        self._record = record
        self.mirror = Mirror(engine, hosts)
        self.devices = engine.plan.devices
        self._seq = 0
        self._runs: dict[int, StepRun] = {}
        self._first_stage: int | None = None
        self.declined = False
        self._shipments: dict[int, Shipment] = {}

    @property
    def computing(self) -> bool:
        """Whether a report on a step is due."""
        return bool(self._runs)

    @property
    def busy(self) -> bool:
        """Whether any report of a worker is due."""
        return bool(self._runs or self._shipments)

    @property
    def reports_due(self) -> int:
        """Stages of steps under way that have not been reported by their first ranks, and shipments."""
        stages = len(self._engine.plan.stages)
        return sum(stages - len(run.stages) for run in self._runs.values()) + len(self._shipments)

    @property
    def next_seq(self) -> int:
        """The number of the next message to the workers."""
        return self._seq + 1

    # -- what happens ----------------------------------------------------------------------------

    def stage_done(self, done: StageDone, now_s: float) -> None:
        """A rank has computed its stage: the first one takes the next step, the last one ends this one.

        Reports of different workers may overtake each other.
        """
        self._measurements.busy(done)
        if done.rank:
            return
        run = self._runs[done.seq]
        run.stages.append(done)
        if self._first_stage == done.seq and (done.stage == 0 or done.tokens is not None):
            self._first_stage = None
            run.record.free_s = now_s
        if done.tokens is not None:
            self.declined = False
            self._complete(run, now_s)
        over = len(run.stages) == len(self._engine.plan.stages)
        if over:
            del self._runs[done.seq]
        self.begin_steps(now_s)
        if over:
            # Workers compute meanwhile.
            self._measurements.step(run.step, run.record.begun_s, run.record.ended_s, run.stages)

    def cache_arrived(self, arrived: Arrived, now_s: float) -> Transfer | None:
        """A device has all of its share of a shipment; returns the transfer that has ended with it."""
        shipment = self._shipments[arrived.tag]
        del shipment.pieces[arrived.device]
        if shipment.pieces:
            return None
        del self._shipments[arrived.tag]
        assert shipment.transfer is not None
        self._measurements.shipment(shipment, now_s)
        return shipment.transfer

    def sampled(self, done: StageDone) -> list[tuple[int, int]]:
        """(request id, token) of the tokens that come with the end of a step."""
        if done.tokens is None:
            return []
        return list(zip(self._runs[done.seq].sampled, done.tokens.tolist(), strict=True))

    def _complete(self, run: StepRun, now_s: float) -> None:
        step = run.step
        run.record.ended_s = now_s
        if step.decoding:
            self._measurements.tokens(self._engine.index, step.lane, run.fresh, step.decoding, now_s)
        self._follow(self._controller.complete(step, now_s), None, now_s)

    # -- steps -------------------------------------------------------------------------------------

    def begin_steps(self, now_s: float) -> None:
        """While the first stage is free and a lane may have work, ask for its step."""
        while self._first_stage is None and not self.declined and self._may_have_work():
            step = self._controller.next_step(self._engine.index, now_s)
            self.declined = step is None
            self._follow(self._controller.news(self._engine.index), step, now_s)

    def _may_have_work(self) -> bool:
        admits = self._engine.admits
        return any(lane.step is None and (admits or lane.has_work) for lane in self._engine.lanes)

    def _follow(self, outcome: Outcome, step: Step | None, now_s: float) -> None:
        self._fleet.follow(self._engine.index, outcome, step, now_s)

    def carry_out(self, transfers: Sequence[Transfer], step: Step | None, streams: Streams,
                  now_s: float) -> list[Transfer]:
        """Tell the workers what follows from a verb: which cache they hold and send, and what they compute.

        Returns:
            Transfers that need not be waited for.
        """
        rows = self._rows(step) if step is not None else []
        ops, shipments = self.mirror.take()
        landed = self._bind(transfers, shipments, now_s)
        if ops or step is not None:
            self._seq += 1
            tasks = self._tasks(rows, streams) if step is not None else {}
            for d, device in enumerate(self.devices):
                self._endpoint.send(device, Control(self._seq, ops.get(device, ()),
                                                    self._engine.books.ledger.used[d], tasks.get(device)))
        if step is not None:
            self._enter(step, [row for row, _ in rows], now_s)
        return landed

    def _enter(self, step: Step, rows: list[Row], now_s: float) -> None:
        lane = self._engine.lanes[step.lane]
        fresh: list[RequestState] = []
        if step.decoding:
            fresh, lane.fresh = lane.fresh, fresh
        record = StepRecord.of(step, now_s)
        self._record.steps.append(record)
        self._runs[self._seq] = StepRun(step, record, [row.request_id for row in rows if row.samples], fresh)
        self._first_stage = self._seq

    def _rows(self, step: Step) -> list[tuple[Row, list[int]]]:
        """The batch, without the holders that each stage fills in, and its new token ids."""
        rows: list[tuple[Row, list[int]]] = []
        lane = self._engine.lanes[step.lane]
        for state in lane.members.values() if step.decoding else ():
            position = lane.cached_tokens(state) - 1
            rows.append(self._row(state, position, 1, samples=True, prefill=False))
        for state, new_tokens, context, last in step.chunks:
            push_tag = self.mirror.push(state) if last else -1
            rows.append(self._row(state, context, new_tokens, samples=last, prefill=True, push_tag=push_tag))
        return rows

    def _row(self, state: RequestState, position: int, new_tokens: int, *, samples: bool, prefill: bool,
             push_tag: int = -1) -> tuple[Row, list[int]]:
        text = self._texts[state.request_id]
        if samples and len(text.tokens) != position + new_tokens:
            raise ExecutorError(f"request {state.request_id} has {len(text.tokens)} tokens, its cache is to "
                                f"have {position + new_tokens}")
        row = Row(state.request_id, position, new_tokens, samples, prefill, (), push_tag,
                  sample=text.sample if samples else None)
        return row, text.tokens[position:position + new_tokens]

    def _tasks(self, rows: list[tuple[Row, list[int]]], streams: Streams) -> dict[int, Task]:
        tasks: dict[int, Task] = {}
        for stage, part in enumerate(self._engine.plan.stages):
            held = tuple(self._at_stage(row, stage, streams) for row, _ in rows)
            tokens = np.array([token for _, new in rows for token in new]) if stage == 0 else None
            for device in part.devices:
                tasks[device] = Task(held, tokens)
        return tasks

    def _at_stage(self, row: Row, stage: int, streams: Streams) -> Row:
        """The same, with what one stage is to know."""
        request_id, position, new_tokens, samples, prefill, _, push_tag, sample, _, _ = row
        onward = streams.get(request_id, NOWHERE).get(stage, ()) if streams else ()
        return Row(request_id, position, new_tokens, samples, prefill,
                   self.mirror.devices(request_id, stage), push_tag, sample, onward,
                   self.mirror.spans(request_id, stage))

    # -- transfers -----------------------------------------------------------------------------------

    def _bind(self, transfers: Sequence[Transfer], shipments: list[Shipment], now_s: float) -> list[Transfer]:
        """Join what the control plane calls a transfer with what the devices carry out.

        Returns:
            Transfers with which there is nothing to carry.
        """
        landed: list[Transfer] = []
        for transfer in transfers:
            shipment = next((s for s in shipments if _fits(s, transfer)), None)
            if shipment is not None:
                shipments.remove(shipment)
                shipment.transfer, shipment.begun_s = transfer, now_s
                self._shipments[shipment.tag] = shipment
            elif transfer.kind == "move":
                # Given up again in the same breath.
                landed.append(transfer)
            else:
                raise ExecutorError(f"nothing is to be carried for {transfer}")
        if shipments:
            raise ExecutorError(f"the control plane knows nothing of {shipments}")
        return landed


def _fits(shipment: Shipment, transfer: Transfer) -> bool:
    if shipment.transfer is not None:
        return shipment.transfer is transfer
    return shipment.kind == transfer.kind and shipment.request_id == transfer.request_id
