"""Measured times in the simulator's schema, and the record that a replay needs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hetis_exec.holdings import Shipment
from hetis_exec.messages import StageDone
from hetis_exec.places import AnyEngine, units_of
from hetis_sim.control.engine import Engine
from hetis_sim.control.mesh.walk import NodeStep
from hetis_sim.control.state import Ending, RequestState, Status
from hetis_sim.control.step import Outcome, Step, StepKind
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.spec.request import Request


@dataclass(slots=True)
class StepRecord:
    """One step as it went: what it held, and when it began, left the first stage and ended."""

    instance: int
    lane: int
    kind: int
    decoding: int
    chunks: list[list[int]]
    begun_s: float
    free_s: float = math.nan
    ended_s: float = math.nan

    @classmethod
    def of(cls, step: Step, now_s: float) -> StepRecord:
        """The record of a step that begins."""
        chunks = [[c.state.request_id, c.context_tokens, c.new_tokens] for c in step.chunks]
        return cls(step.instance, step.lane, int(step.kind), step.decoding, chunks, now_s)

    def holds_the_same(self, other: StepRecord) -> bool:
        """Whether two records are of the same work."""
        return (self.instance, self.lane, self.kind, self.decoding, self.chunks) == (
            other.instance, other.lane, other.kind, other.decoding, other.chunks)


@dataclass(slots=True)
class RunRecord:
    """Everything from outside that the control plane was told in a run, and what it decided.

    Attributes:
        requests: with the times at which they were submitted.
        steps: in the order in which they began.
        arrivals: (request id, kind, time) of every transfer that ended, in that order.
        decisions: the decision log.
        ends: (request id, reason, time) of every request that was told to end early, in that order.
    """

    requests: list[tuple[Request, float]] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    arrivals: list[tuple[int, str, float]] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    ends: list[tuple[int, Ending, float]] = field(default_factory=list)

    def write(self, path: str | Path) -> None:
        """Keep it as JSON; numbers come back to the last bit."""
        plain = {"requests": [[asdict(request), now_s] for request, now_s in self.requests],
                 "steps": [asdict(step) for step in self.steps], "arrivals": self.arrivals,
                 "ends": self.ends, "decisions": self.decisions}
        Path(path).write_text(json.dumps(plain), encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """The inverse of :meth:`write`."""
        plain: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        requests = [(Request(**{**fields, "prefix_hashes": tuple(fields["prefix_hashes"])}), now_s)
                    for fields, now_s in plain["requests"]]
        arrivals = [(request_id, kind, now_s) for request_id, kind, now_s in plain["arrivals"]]
        ends = [(request_id, reason, now_s) for request_id, reason, now_s in plain["ends"]]
        return cls(requests, [StepRecord(**step) for step in plain["steps"]], arrivals, plain["decisions"],
                   ends)


class _Nothing(list[Any]):
    """A list that stays empty."""

    def append(self, item: Any) -> None:
        """Forget an item."""


def no_record() -> RunRecord:
    """The record of a run without end: it keeps nothing."""
    return RunRecord(_Nothing(), _Nothing(), _Nothing(), _Nothing(), _Nothing())


class Measurements:
    """Fills a :class:`Recorder` with what was measured."""

    def __init__(self, labels: Sequence[str], engines: Sequence[AnyEngine], unit_bytes: int) -> None:
        self._engines = engines
        self._unit_bytes = unit_bytes
        capacity = dict.fromkeys(range(len(labels)), 0)
        for engine in engines:
            capacity.update(units_of(engine))
        self.recorder = Recorder(devices=labels,
                                 capacity_bytes=[float(units * unit_bytes) for units in capacity.values()])
        self._last_token_s = {(e.index, lane.index): 0.0 for e in engines if isinstance(e, Engine)
                              for lane in e.lanes}

    def tokens(self, instance: int, lane: int, fresh: Sequence[RequestState], decoding: int,
               now_s: float) -> None:
        """Keep the gaps that end with an iteration of a lane; ``fresh`` had their last token elsewhere."""
        gap_s = now_s - self._last_token_s[instance, lane]
        if decoding > len(fresh):
            self.recorder.itl(gap_s, gap_s, 1, decoding - len(fresh))
        for state in fresh:
            own_gap_s = now_s - state.last_token_s
            self.recorder.itl(own_gap_s, own_gap_s, 1, 1)
        self._last_token_s[instance, lane] = now_s

    def step(self, step: Step, begun_s: float, ended_s: float, stages: Sequence[StageDone]) -> None:
        """Keep a step: where its time went along the stages; what nothing else accounts for is host time."""
        dense = collective = attention = heads = hop = waiting = 0.0
        for done in stages:
            times = done.times
            dense += times.dense_s
            collective += times.collective_s
            attention += times.attention_s
            heads += times.head_transfer_s
            if done.stage:
                waiting += max(0.0, times.free_s - times.sent_s)
                hop += times.begun_s - max(times.sent_s, times.free_s)
        total = ended_s - begun_s
        parts = dense + collective + attention + heads + hop + waiting
        self.recorder.step(step.instance, step.lane, int(step.kind), begun_s, ended_s, 1, step.decoding,
                           step.prefill_tokens, step.decoding, total - parts, dense, collective, attention,
                           heads, hop, waiting)

    def node_step(self, step: NodeStep, track: int, made: int, record: StepRecord, now_s: float,
                  done: StageDone) -> None:
        """Keep a step of a mesh's node, whose last message has arrived; it has made so many tokens."""
        times, prefill = done.times, step.kind == StepKind.PREFILL
        parts = (times.dense_s, times.collective_s, times.attention_s)
        self.recorder.step(step.node, track, int(step.kind), record.begun_s, now_s, 1,
                           0 if prefill else len(step.walks), made if prefill else 0, 0 if prefill else made,
                           record.ended_s - record.begun_s - sum(parts), *parts, 0.0, now_s - record.ended_s,
                           0.0)

    def busy(self, done: StageDone) -> None:
        """Keep the time that devices computed for one stage of a step."""
        self.recorder.busy(done.device, done.times.dense_s + done.times.attention_s)
        for device, seconds in done.worker_busy_s:
            self.recorder.busy(device, seconds)

    def gaps(self, outcome: Outcome) -> None:
        """Keep the gaps of requests that had lost their cache."""
        for gap_s in outcome.gaps_s:
            self.recorder.itl(gap_s, gap_s, 1, 1)

    def shipment(self, shipment: Shipment, now_s: float) -> None:
        """Keep cache that has arrived."""
        for source, target, size_bytes in shipment.flows:
            self.recorder.transfer(shipment.request_id, shipment.kind, shipment.begun_s, now_s, size_bytes,
                                   source, target)

    def ended(self, state: RequestState) -> None:
        """Keep a request that is over."""
        request = state.request
        finished = state.status == Status.FINISHED
        self.recorder.request(
            request_id=request.request_id, arrival_s=request.arrival_s, prompt_tokens=request.prompt_tokens,
            output_tokens=state.output_tokens, status="finished" if finished else "rejected",
            reason=state.reason, instance=state.instance, first_scheduled_s=state.first_scheduled_s,
            first_token_s=state.first_token_s, finish_s=state.finish_s,
            preemptions=state.preemptions, moves=state.moves, moved_bytes=state.moved_bytes,
            remote_share=state.remote_share)

    def sample(self, now_s: float, outside: int) -> None:
        """Look at the system, if it is time to; ``outside`` requests have come and wait to be taken in."""
        recorder = self.recorder
        if now_s < recorder.next_sample_s:
            return
        used = [0.0] * len(recorder.devices)
        for engine in self._engines:
            for d, device in enumerate(engine.plan.devices):
                used[device] = float(engine.books.ledger.used[d] * self._unit_bytes)
        self.peaks()
        running = sum(len(engine.active) for engine in self._engines)
        recorder.sample(now_s, running, outside + sum(len(engine.waiting) for engine in self._engines), used)

    def peaks(self) -> None:
        """Keep the most cache that each device has held."""
        for engine in self._engines:
            for device, units in zip(engine.plan.devices, engine.books.ledger.peak, strict=True):
                self.recorder.peak(device, float(units * self._unit_bytes))
