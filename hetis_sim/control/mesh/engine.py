"""The scheduler of a mesh: requests go round through nodes that batch whatever waits at them.

Story of a request here: it waits until the policy opens a path that has room for it
(:mod:`.routing`); its prompt goes from node to node and gives its first token at the end; then it
goes round the same path once for every further token. Each node takes turns between a batch of whole
prompts and one of everybody who waits for a single token, as the workers of Helix (ASPLOS '25) do, which
force a decode batch after each batch of prompts.

Whoever begins a round that needs another block of cache takes it at all nodes of its path at once.
Where there is no room it waits, and the policy names a victim among those that came no earlier; that
one loses its cache when it is next between two rounds, and starts again later. The oldest request is
never a victim of another one, so every run ends.
"""

from __future__ import annotations

from bisect import insort
from collections import deque

from hetis_sim.control.decisions import DecisionLog
from hetis_sim.control.mesh.books import MeshBooks
from hetis_sim.control.mesh.routing import Routing
from hetis_sim.control.mesh.timing import MeshTimer
from hetis_sim.control.mesh.walk import Message, NodeStep, Path, Walk
from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.control.state import Ending, RequestState, Status, close, rejected
from hetis_sim.control.step import NOTHING, Outcome, StepKind
from hetis_sim.policies.base import Policy
from hetis_sim.policies.plan import SINK, SOURCE
from hetis_sim.policies.view import RequestView
from hetis_sim.spec.model import ModelSpec

TOKEN_ID_BYTES = 4


class NodeQueue:
    """What waits at a node.

    Attributes:
        prompts, tokens: requests there for their prompt, or for one token.
        step: the step under way.
        prompted: the last step was one of prompts, so a batch of single tokens is next.
    """

    __slots__ = ("prompted", "prompts", "step", "tokens")

    def __init__(self) -> None:
        self.prompts: deque[Walk] = deque()
        self.tokens: list[Walk] = []
        self.step: NodeStep | None = None
        self.prompted = False


class MeshEngine:
    """Requests, queues and cache of a mesh.

    Attributes:
        active: requests on their way, by id.
        waiting: requests without a path, in order of arrival.
        stalled: walks that need a block for which there is no room, in order of arrival.
        blocked: the first one waiting found no path; until cache is given back nobody asks again.
        queues: per node.
        changes: counts changes of membership.
    """

    def __init__(self, model: ModelSpec, policy: Policy, timer: MeshTimer, settings: SchedulerSettings,
                 capacity_units: dict[int, int], log: DecisionLog) -> None:
        self.plan = timer.plan
        self.model = model
        self.policy = policy
        self.settings = settings
        self.log = log
        self.books = MeshBooks(self.plan, capacity_units, settings.limits.block_tokens)
        self.longest_context = min(self.books.longest_context(), model.context_limit_tokens)
        self.queues = [NodeQueue() for _ in self.plan.nodes]
        self.routing = Routing(self.plan, policy, self.books, self.queues, settings.limits, log)
        self.active: dict[int, Walk] = {}
        self.waiting: list[RequestState] = []
        self.stalled: list[Walk] = []
        self.blocked = False
        self.changes = 0
        self._activation_bytes = model.hidden * model.activation_bytes
        self._ready: set[int] = set()
        self._news = Outcome()

    # -- the verbs of the seam ---------------------------------------------------------

    def submit(self, state: RequestState, now_s: float) -> None:
        """Queue a request for a path."""
        state.instance = 0
        self._wait(state)

    def next_step(self, now_s: float) -> NodeStep | None:
        """A step for some node that is idle and has work, or None while there is none."""
        self._admit(now_s)
        if not self._ready:
            return None
        node = min(self._ready)
        self._ready.remove(node)
        queue = self.queues[node]
        step = self._prompts(node, queue) if queue.prompts and not (queue.prompted and queue.tokens) \
            else self._tokens(node, queue)
        queue.prompted = step.kind == StepKind.PREFILL
        queue.step = step
        self.routing.queued_tokens[node] -= step.tokens
        return step

    def complete(self, step: NodeStep, now_s: float) -> Outcome:
        """Book the end of a step: its requests go on to their next nodes, or have a token."""
        queue = self.queues[step.node]
        queue.step = None
        self._look_at(step.node)
        outgoing = self.plan.outgoing[step.node]
        if len(outgoing) == 1:
            self._send(step.node, self.plan.edges[outgoing[0]].target, step.walks, step.tokens)
            return self.take_news()
        parts: dict[int, list[Walk]] = {}
        for walk in step.walks:
            parts.setdefault(walk.path.after[step.node], []).append(walk)
        for target, walks in parts.items():
            single = step.kind != StepKind.PREFILL
            self._send(step.node, target, walks, len(walks) if single else sum([w.tokens for w in walks]))
        return self.take_news()

    def arrived(self, message: Message, now_s: float) -> Outcome:
        """Book the arrival of a message: at a node requests queue up, at the sink they have a token."""
        if message.target == SINK:
            self._round_over(message.walks, now_s)
            return self.take_news()
        queue = self.queues[message.target]
        if message.walks[0].state.status == Status.PREFILL:
            queue.prompts += message.walks
        else:
            queue.tokens += message.walks
        self._look_at(message.target)
        return NOTHING

    def finish(self, state: RequestState, reason: Ending, now_s: float) -> None:
        """End a request early: now if it waits, else when its round is over."""
        view = self.routing.view(len(self.active), len(self.waiting))
        self.log.record("finish", view, [state.view(state.generated_base)], reason)
        state.ending = reason
        walk = self.active.get(state.request_id)
        if walk is None:
            self.waiting.remove(state)
            self.blocked = False
        elif walk in self.stalled:
            self._leave(walk)
        else:
            return
        self._close(state, now_s)
        self._news.touched.append(0)
        if self.stalled:
            self._launch(self._retry(now_s))

    def take_news(self) -> Outcome:
        """What has happened since the last call."""
        news = self._news
        if news.empty:
            return NOTHING
        self._news = Outcome()
        return news

    # -- steps -------------------------------------------------------------------------

    def _look_at(self, node: int) -> None:
        queue = self.queues[node]
        if queue.step is None and (queue.tokens or queue.prompts):
            self._ready.add(node)

    def _prompts(self, node: int, queue: NodeQueue) -> NodeStep:
        """Whole prompts from the head of the queue, as many as the budgets allow, but at least one."""
        limits = self.settings.limits
        walks = [queue.prompts.popleft()]
        tokens = walks[0].tokens
        while (queue.prompts and len(walks) < limits.max_batch_requests
               and tokens + queue.prompts[0].tokens <= limits.max_batch_tokens):
            walks.append(queue.prompts.popleft())
            tokens += walks[-1].tokens
        return NodeStep(node, StepKind.PREFILL, walks, tokens)

    def _tokens(self, node: int, queue: NodeQueue) -> NodeStep:
        most = self.settings.limits.max_batch_requests
        walks, queue.tokens = queue.tokens[:most], queue.tokens[most:]
        return NodeStep(node, StepKind.DECODE, walks, len(walks))

    def _send(self, source: int, target: int, walks: list[Walk], tokens: int) -> None:
        single = walks[0].state.status != Status.PREFILL
        if single:
            # Prompts have been counted along their whole path when it was chosen.
            self.routing.sent_tokens[self.books.edge(source, target)] += tokens
        if target == SINK:
            size = TOKEN_ID_BYTES * len(walks)
        else:
            size = tokens * (TOKEN_ID_BYTES if source == SOURCE else self._activation_bytes)
            self.routing.queued_tokens[target] += tokens
        self._news.messages.append(Message(source, target, walks, tokens, float(size)))

    # -- admission -----------------------------------------------------------------------

    def _wait(self, state: RequestState) -> None:
        state.status = Status.WAITING
        insort(self.waiting, state, key=_arrival)

    def _admit(self, now_s: float) -> None:
        """First come, first served: nobody passes the head of the queue, nor those short of a block."""
        while self.waiting and not self.blocked and not self.stalled:
            state = self.waiting[0]
            path = self.routing.choose(state, len(self.active), len(self.waiting))
            if path is None:
                self.blocked = True
                return
            del self.waiting[0]
            self._begin(state, path, now_s)

    def _begin(self, state: RequestState, path: Path, now_s: float) -> None:
        tokens = state.context_tokens
        walk = Walk(state, path, tokens, tokens, self.books.blocks(tokens), tokens)
        self.books.accept(walk)
        self.active[state.request_id] = walk
        self.changes += 1
        state.status = Status.PREFILL
        if state.first_scheduled_s != state.first_scheduled_s:
            state.first_scheduled_s = now_s
        for edge in path.edges:
            self.routing.sent_tokens[edge] += tokens
        self._send(SOURCE, path.nodes[0], [walk], tokens)

    # -- rounds --------------------------------------------------------------------------

    def _round_over(self, walks: list[Walk], now_s: float) -> None:
        """Each walk has a token: it ends, begins its next round, or loses its cache."""
        onwards: list[Walk] = []
        for walk in walks:
            state = walk.state
            state.generated_base += 1
            if state.generated_base > 1:
                self._news.gaps_s.append(now_s - state.last_token_s)
            else:
                state.first_token_s = now_s
            state.last_token_s = now_s
            state.status = Status.DECODE
            if state.ending or state.generated_base >= state.request.output_tokens:
                self._finish(walk, now_s)
            elif walk.doomed:
                self._preempt(walk, now_s)
            elif self._grow(walk):
                onwards.append(walk)
            else:
                insort(self.stalled, walk, key=_arrival_of_walk)
        if self.stalled:
            onwards += self._retry(now_s)
        self._launch(onwards)

    def _launch(self, walks: list[Walk]) -> None:
        groups: dict[int, list[Walk]] = {}
        for walk in walks:
            groups.setdefault(walk.path.nodes[0], []).append(walk)
        for node, group in groups.items():
            self._send(SOURCE, node, group, len(group))

    def _grow(self, walk: Walk) -> bool:
        """Book the cache of the next round's token; False where there is no room."""
        if walk.context % self.books.block_tokens == 0 and not self.books.grow(walk):
            return False
        walk.tokens = 1
        walk.context += 1
        return True

    def _make_room(self, walk: Walk, now_s: float) -> bool:
        """Name a victim for a stalled walk, unless there is one; True if cache was given back at once."""
        device = self.books.full_device(walk)
        if any(other.doomed and _holds(other, device) for other in self.active.values()):
            return False
        rivals = [other for other in self.active.values()
                  if _arrival_of_walk(other) >= _arrival_of_walk(walk) and _holds(other, device)]
        chosen = self.policy.victim(self.plan.devices[device], [self._view(other) for other in rivals])
        victim = next(other for other in rivals if other.state.request_id == chosen.request_id)
        if victim in self.stalled:
            self._preempt(victim, now_s)
            return True
        victim.doomed = True
        return False

    def _view(self, walk: Walk) -> RequestView:
        return walk.state.view(walk.state.generated_base)

    def _retry(self, now_s: float) -> list[Walk]:
        """Walks that were short of a block and have it now, oldest first; victims for those that have not."""
        found: list[Walk] = []
        again = True
        while again:
            again = False
            for walk in list(self.stalled):
                if self._grow(walk):
                    self.stalled.remove(walk)
                    found.append(walk)
                elif self._make_room(walk, now_s):
                    again = True
                    break
        return found

    # -- ends ----------------------------------------------------------------------------

    def _preempt(self, walk: Walk, now_s: float) -> None:
        """Take a walk's cache away; its request starts again with all tokens that it has."""
        state = walk.state
        self._leave(walk)
        state.preemptions += 1
        state.context_tokens = state.request.prompt_tokens + state.generated_base
        if state.preemptions > self.settings.preemptions_max:
            self._news.rejected.append(rejected(state, "preemption_limit", now_s))
        else:
            self._wait(state)

    def _finish(self, walk: Walk, now_s: float) -> None:
        self._leave(walk)
        self._close(walk.state, now_s)

    def _close(self, state: RequestState, now_s: float) -> None:
        (self._news.finished if close(state, now_s) else self._news.rejected).append(state)

    def _leave(self, walk: Walk) -> None:
        if walk in self.stalled:
            self.stalled.remove(walk)
        self.books.release(walk)
        del self.active[walk.state.request_id]
        self.blocked = False
        self.changes += 1


def _arrival(state: RequestState) -> tuple[float, int]:
    return state.request.arrival_s, state.request_id


def _arrival_of_walk(walk: Walk) -> tuple[float, int]:
    return _arrival(walk.state)


def _holds(walk: Walk, device: int) -> bool:
    return any(d == device for d, _ in walk.path.block_units)
