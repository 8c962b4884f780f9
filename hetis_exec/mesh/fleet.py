"""The driver of a mesh: each idle node is given what waits there, and what it has done goes on.

Activations go from node to node without the driver, which hears when they are there; token ids come
from it and go to it with the steps themselves. So messages from the source and to the sink need not be
waited for, yet each is an event of its own, as in the simulator.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hetis_exec.errors import ExecutorError
from hetis_exec.mesh.mirror import MeshMirror
from hetis_exec.messages import Arrived, Control, Leg, Row, StageDone, Task, Tokens
from hetis_exec.records import Measurements, RunRecord, StepRecord
from hetis_exec.texts import Texts
from hetis_exec.transport import Endpoint
from hetis_sim.control.mesh.controller import MeshController
from hetis_sim.control.mesh.walk import Message, NodeStep, Walk
from hetis_sim.control.state import Ending, RequestState
from hetis_sim.control.step import Outcome, StepKind
from hetis_sim.policies.plan import SINK, SOURCE

HOP = "hop"
"""What the arrival of a message is called in records."""


@dataclass(slots=True, eq=False)
class NodeRun:
    """A step from its begin until its last message has arrived.

    Attributes:
        seq: number of the driver's message.
        walks: in the order of the batch.
        tags: of the activations that go on, by the node that they go to.
        track: steps of one track of a node do not overlap in the table of steps.
        messages: that have not arrived yet.
    """

    step: NodeStep
    seq: int
    walks: list[Walk]
    tags: dict[int, int]
    record: StepRecord
    track: int
    done: StageDone | None = None
    messages: int = 0


@dataclass(slots=True, eq=False)
class Hop:
    """A message on its way; ``missing`` devices of its target have not got it yet."""

    message: Message
    run: NodeRun | None
    missing: set[int] = field(default_factory=set)


class MeshFleet:
    """See :class:`hetis_exec.fleet.Fleet`, whose place it takes.

    Attributes:
        landed: messages that need not be waited for.
        ended: requests that have ended and not been looked at yet.
    """

    def __init__(self, controller: MeshController, endpoint: Endpoint, texts: Texts,
                 measurements: Measurements, record: RunRecord) -> None:
        self._controller = controller
        self._plan = controller.engine.plan
        self._ledger = controller.engine.books.ledger
        self._local = {device: d for d, device in enumerate(self._plan.devices)}
        self._endpoint = endpoint
        self._texts = texts
        self._measurements = measurements
        self._record = record
        self._mirror = MeshMirror(controller.engine)
        self._seq = self._tags = 0
        self._runs: dict[int, NodeRun] = {}
        self._hops: dict[int, Hop] = {}
        self._early: dict[int, set[int]] = {}
        self._tracks: list[list[int]] = [[] for _ in self._plan.nodes]
        self._tracks_used = [0] * len(self._plan.nodes)
        self.landed: deque[Hop] = deque()
        self.ended: deque[RequestState] = deque()

    @property
    def computing(self) -> bool:
        """Whether a report on a step is due."""
        return bool(self._runs)

    @property
    def busy(self) -> bool:
        """Whether any report of a worker is due."""
        return bool(self._runs or self._hops)

    def is_last(self, done: StageDone) -> bool:
        """Never: nodes of a mesh compute one beside the other."""
        return False

    # -- what happens ----------------------------------------------------------------------------

    def sampled(self, done: StageDone) -> list[tuple[int, int]]:
        """(request id, token) of the tokens that come with a report."""
        if done.tokens is None:
            return []
        walks = self._runs[done.seq].walks
        return [(walk.state.request_id, token)
                for walk, token in zip(walks, done.tokens.tolist(), strict=True)]

    def finish(self, request_id: int, reason: Ending, now_s: float) -> None:
        """End a request early."""
        self._record.ends.append((request_id, reason, now_s))
        self._follow(self._controller.finish(request_id, reason, now_s), None)
        self._begin_steps(now_s)

    def stage_done(self, done: StageDone, now_s: float) -> None:
        """A rank has computed its part of a step: the first one ends it."""
        self._measurements.busy(done)
        if done.rank:
            return
        run = self._runs.pop(done.seq)
        run.record.free_s = run.record.ended_s = now_s
        run.done = done
        self._follow(self._controller.complete(run.step, now_s), run)
        self._begin_steps(now_s)

    def cache_arrived(self, arrived: Arrived, now_s: float) -> None:
        """A device has got activations; the driver may not have heard yet that they were sent."""
        hop = self._hops.get(arrived.tag)
        if hop is None:
            self._early.setdefault(arrived.tag, set()).add(arrived.device)
            return
        hop.missing.discard(arrived.device)
        if not hop.missing:
            del self._hops[arrived.tag]
            self.hop_arrived(hop, now_s)

    def hop_arrived(self, hop: Hop, now_s: float) -> None:
        """A message is there."""
        message, run = hop.message, hop.run
        self._record.arrivals.append((message.walks[0].state.request_id, HOP, now_s))
        if run is not None:
            run.messages -= 1
            if not run.messages:
                self._keep(run, now_s)
        self._follow(self._controller.arrived(message, now_s), None)
        self._begin_steps(now_s)

    def submitted(self, instance: int, now_s: float) -> None:
        """A request has come."""
        self._begin_steps(now_s)

    # -- what follows ----------------------------------------------------------------------------

    def _begin_steps(self, now_s: float) -> None:
        while (step := self._controller.next_step(0, now_s)) is not None:
            self._begin(step, now_s)
        self._follow(self._controller.news(0), None)

    def _follow(self, outcome: Outcome, run: NodeRun | None) -> None:
        """Have the workers do what a verb has set off."""
        self._measurements.gaps(outcome)
        self.ended += outcome.finished
        self.ended += outcome.rejected
        self._tell({})
        if run is not None:
            run.messages = len(outcome.messages)
        for message in outcome.messages:
            self._carry(message, run)

    def _carry(self, message: Message, run: NodeRun | None) -> None:
        hop = Hop(message, run)
        if message.source != SOURCE and message.target != SINK:
            assert run is not None
            tag = run.tags[message.target]
            hop.missing = set(self._plan.nodes[message.target].devices) - self._early.pop(tag, set())
            if hop.missing:
                self._hops[tag] = hop
                return
        self.landed.append(hop)

    def _tell(self, tasks: dict[int, Task]) -> None:
        """Tell devices which cache they hold, and what they are to compute."""
        self._mirror.follow()
        ops = self._mirror.take()
        if ops or tasks:
            self._seq += 1
        for device in sorted({*ops, *tasks}):
            self._endpoint.send(device, Control(self._seq, ops.get(device, ()),
                                                self._ledger.used[self._local[device]], tasks.get(device)))

    # -- steps -------------------------------------------------------------------------------------

    def _begin(self, step: NodeStep, now_s: float) -> None:
        node = self._plan.nodes[step.node]
        walks = sorted(step.walks, key=lambda walk: walk.path.first_layers[step.node])
        targets = dict.fromkeys(walk.path.after[step.node] for walk in walks)
        tags = {target: self._next_tag() for target in targets if target != SINK}
        legs = tuple([self._leg(step.node, walk, tags) for walk in walks])
        rows, tokens = self._rows(step, walks, legs)
        self._tell({device: Task(rows, tokens, legs) for device in node.devices})
        record = node_record(step, now_s)
        self._record.steps.append(record)
        self._runs[self._seq] = NodeRun(step, self._seq, walks, tags, record, self._track(step.node))

    def _next_tag(self) -> int:
        self._tags += 1
        return self._tags

    def _leg(self, n: int, walk: Walk, tags: dict[int, int]) -> Leg:
        path, target = walk.path, walk.path.after[n]
        devices = self._plan.nodes[target].devices if target != SINK else ()
        return Leg(path.first_layers[n] - self._plan.nodes[n].first_layer, n == path.nodes[0], devices,
                   tags.get(target, -1))

    def _rows(self, step: NodeStep, walks: Sequence[Walk],
              legs: Sequence[Leg]) -> tuple[tuple[Row, ...], Tokens | None]:
        """The batch, and the token ids of those that begin here."""
        node = self._plan.nodes[step.node]
        # Each group stays at the rank that owns it.
        holders = tuple([device for device, owned in zip(node.devices, node.owned_groups, strict=True)
                         for _ in range(owned)])
        prefill = step.kind == StepKind.PREFILL
        rows: list[Row] = []
        tokens: list[int] = []
        for walk, leg in zip(walks, legs, strict=True):
            text, position = self._texts[walk.state.request_id], walk.context - walk.tokens
            if len(text.tokens) != walk.context:
                raise ExecutorError(f"request {walk.state.request_id} has {len(text.tokens)} tokens, its "
                                    f"cache is to have {walk.context}")
            ends = not leg.targets
            rows.append(Row(walk.state.request_id, position, walk.tokens, ends, prefill, holders, -1,
                            sample=text.sample if ends else None))
            if leg.starts:
                tokens += text.tokens[position:]
        return tuple(rows), np.array(tokens, dtype=np.int64) if tokens else None

    def _track(self, n: int) -> int:
        if self._tracks[n]:
            return heapq.heappop(self._tracks[n])
        self._tracks_used[n] += 1
        return self._tracks_used[n] - 1

    def _keep(self, run: NodeRun, now_s: float) -> None:
        """Keep a step whose last message has arrived; its tokens count where they are made."""
        assert run.done is not None
        heapq.heappush(self._tracks[run.step.node], run.track)
        made = run.step.tokens if run.done.tokens is not None else 0
        self._measurements.node_step(run.step, run.track, made, run.record, now_s, run.done)


def node_record(step: NodeStep, now_s: float) -> StepRecord:
    """The record of a node's step that begins."""
    prefill = step.kind == StepKind.PREFILL
    held = [[walk.state.request_id, walk.context - walk.tokens, walk.tokens] for walk in step.walks]
    return StepRecord(step.node, 0, int(step.kind), 0 if prefill else len(held), held, now_s)
