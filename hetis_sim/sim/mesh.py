"""A mesh in simulated time: nodes that compute, and messages between them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hetis_sim.control.mesh.controller import MeshController
from hetis_sim.control.mesh.timing import MeshTimer, NodeParts
from hetis_sim.control.mesh.walk import Message, NodeStep
from hetis_sim.control.step import Outcome, StepKind
from hetis_sim.cost.model import CostModel
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.policies.plan import SINK, SOURCE
from hetis_sim.sim.clock import Clock
from hetis_sim.sim.messages import MessageLinks
from hetis_sim.sim.network import Network, Wire
from hetis_sim.sim.traffic import WireBytes, add_ring, collective_bytes
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.model import ModelSpec


@dataclass(slots=True, eq=False)
class NodeRun:
    """A step from its begin until its last message has arrived.

    ``track`` is the place of its row: rows of one track do not overlap, while a node computes the next
    batch as its messages are still on their way.
    """

    step: NodeStep
    parts: NodeParts
    begun_s: float
    ended_s: float
    track: int
    messages: int = 0
    hop_s: float = 0.0


class Mesh:
    """Asks for the steps of all nodes, waits out their durations and delivers what they send.

    Requests are handed out by a coordinator. Where the cluster has several hosts it is another host of
    the same network: token ids to it and from it take the time of a message, but no wire of a
    node (they are a few bytes). In a cluster of one host they take no time (ours).

    Where the settings say so, requests of a batch leave one by one (``mesh_message_s``), and an idle node
    looks for arrivals at intervals (``mesh_poll_s``). Then it begins with whoever is there by then, so that
    requests which went through one node together may part at the next.

    Args:
        news: called with what each verb of the controller has set off.
    """

    def __init__(self, clock: Clock, controller: MeshController, timer: MeshTimer, recorder: Recorder,
                 news: Callable[[Outcome], None], cluster: ClusterSpec, cost: CostModel,
                 network: Network) -> None:
        self._clock = clock
        self._controller = controller
        self._timer = timer
        self._recorder = recorder
        self._news = news
        self._links = MessageLinks(clock, network)
        self._coordinator = cost.transfer(cluster.network) if len(cluster.hosts) > 1 else None
        count = len(timer.plan.nodes)
        self._last = {n for n, node in enumerate(timer.plan.nodes) if node.end_layer == timer.plan.layers}
        self._free_s = [0.0] * count
        self._told_s = [0.0] * count
        self._token_layers = [0] * count
        self._sent = WireBytes()
        self._network = network
        self._tracks: list[list[int]] = [[] for _ in range(count)]
        self._tracks_used = [0] * count
        self._alarm_s = math.inf
        settings = controller.engine.settings
        self._message_s, self._poll_s = settings.mesh_message_s, settings.mesh_poll_s
        self._unseen: list[list[Message]] = [[] for _ in range(count)]

    def ring(self) -> None:
        """Something has changed: look again, after everything else that happens now."""
        now = self._clock.now
        if now != self._alarm_s:
            self._alarm_s = now
            self._clock.call(now, self._work)

    def _work(self) -> None:
        self._alarm_s = math.inf
        now = self._clock.now
        while (step := self._controller.next_step(0, now)) is not None:
            self._begin(step, now)
        self.carry_out(self._controller.news(0))

    def _begin(self, step: NodeStep, now: float) -> None:
        n = step.node
        parts = self._timer.nodes[n].parts(step)
        end = self.ends_s(step, parts, now)
        if self._tracks[n]:
            track = heapq.heappop(self._tracks[n])
        else:
            track, self._tracks_used[n] = self._tracks_used[n], self._tracks_used[n] + 1
        self._told_s[n] += end - now
        self._token_layers[n] += self._timer.nodes[n].token_layers(step)
        self._free_s[n] = end
        run = NodeRun(step, parts, now, end, track)
        if end < math.inf:
            self._clock.call(end, lambda: self._ended(run), priority=1)

    def ends_s(self, step: NodeStep, parts: NodeParts, now_s: float) -> float:
        """When a step that begins now will be over; a replay overrides this, and :meth:`send`."""
        return now_s + sum(parts)

    def _ended(self, run: NodeRun) -> None:
        self.carry_out(self._controller.complete(run.step, self._clock.now), run)
        self.ring()

    def carry_out(self, outcome: Outcome, run: NodeRun | None = None) -> None:
        """Send the messages of an outcome, those of a step where it has one, and pass on the rest."""
        messages = outcome.messages if not self._message_s else _one_by_one(outcome.messages)
        if run is not None:
            run.messages = len(messages)
        for place, message in enumerate(messages):
            self._send_after(place * self._message_s, message, run)
        self._news(outcome)

    def _send_after(self, delay_s: float, message: Message, run: NodeRun | None) -> None:
        if not delay_s:
            self.send(message, run)
            return
        self._clock.call(self._clock.now + delay_s, lambda: self.send(message, run), priority=1)

    def send(self, message: Message, run: NodeRun | None) -> None:
        """Carry a message to where it is to go."""
        if message.source == SOURCE or message.target == SINK:
            hop_s = self._coordinator.seconds(message.size_bytes) if self._coordinator is not None else 0.0
            self._clock.call(self._clock.now + hop_s, lambda: self._arrived(message, run, hop_s), priority=1)
            return
        nodes = self._timer.plan.nodes
        source, target = nodes[message.source].devices[-1], nodes[message.target].devices[0]
        self._sent.add("activations", self._network.path(source, target)[0], message.size_bytes)
        self._links.send(source, target, message.size_bytes, lambda hop_s: self._arrived(message, run, hop_s))

    def _arrived(self, message: Message, run: NodeRun | None, hop_s: float) -> None:
        if run is not None:
            run.messages -= 1
            run.hop_s = hop_s
            if not run.messages:
                self._record(run)
        now, target = self._clock.now, message.target
        if self._poll_s and target != SINK and self._free_s[target] <= now:
            self._see_later(message, now)
            return
        self._take_in(message)

    def _see_later(self, message: Message, now: float) -> None:
        """Keep a message until an idle node looks the next time."""
        unseen, idle_s = self._unseen[message.target], self._free_s[message.target]
        unseen.append(message)
        if len(unseen) == 1:
            looks = math.ceil((now - idle_s) / self._poll_s)
            self._clock.call(idle_s + looks * self._poll_s, lambda: self._look(unseen), priority=1)

    def _look(self, unseen: list[Message]) -> None:
        messages = unseen.copy()
        unseen.clear()
        for message in messages:
            self._take_in(message)

    def _take_in(self, message: Message) -> None:
        self.carry_out(self._controller.arrived(message, self._clock.now))
        self.ring()

    def _record(self, run: NodeRun) -> None:
        """Keep the step; its tokens count where they are made, at the last node of a path."""
        step, parts, now = run.step, run.parts, self._clock.now
        heapq.heappush(self._tracks[step.node], run.track)
        prefill = step.kind == StepKind.PREFILL
        made = step.tokens if step.node in self._last else 0
        # What is left is time spent waiting for a wire; rounding must not make it negative.
        waiting = max(0.0, now - run.ended_s - run.hop_s)
        self._recorder.step(step.node, run.track, int(step.kind), run.begun_s, now, 1,
                            0 if prefill else len(step.walks), made if prefill else 0,
                            0 if prefill else made, *parts, 0.0, now - run.ended_s - waiting, waiting)

    def busy(self, now_s: float) -> Iterator[tuple[int, float]]:
        """Devices and the seconds that they have computed up to now."""
        for node, told_s, free_s in zip(self._timer.plan.nodes, self._told_s, self._free_s, strict=True):
            for device in node.devices:
                yield device, told_s - max(0.0, free_s - now_s)

    def add_traffic(self, traffic: WireBytes, model: ModelSpec) -> None:
        """Add the bytes that messages and collectives have put on wires."""
        traffic.add_all(self._sent)
        for node, token_layers in zip(self._timer.plan.nodes, self._token_layers, strict=True):
            add_ring(traffic, self._network, node.devices,
                     collective_bytes(model, 1, token_layers, node.tp))

    def foreground(self) -> dict[Wire, float]:
        """Decode puts no head traffic on wires here."""
        return {}


def _one_by_one(messages: Sequence[Message]) -> list[Message]:
    """The same with a message for every request."""
    found: list[Message] = []
    for message in messages:
        if len(message.walks) == 1:
            found.append(message)
            continue
        per_token = message.size_bytes / message.tokens
        single = message.tokens == len(message.walks)
        for walk in message.walks:
            tokens = 1 if single else walk.tokens
            found.append(Message(message.source, message.target, [walk], tokens, per_token * tokens))
    return found
