"""The scheduler of one instance: continuous batching over its micro-batches.

Story of a request here: it waits; a prefill step computes its prompt while heads meant for
attention workers stream to them (:mod:`.admission`); once its cache is in place it joins the lane;
every iteration gives it a token; after its last token it leaves. Whatever cannot be carried on
with the cache at hand is relieved, preempted or made to wait (:mod:`.pressure`).

Drivers call the public verbs: :meth:`submit`, :meth:`next_step`, :meth:`complete`, :meth:`arrived` and
:meth:`finish`. No clock is read here: times are handed in.
"""

from __future__ import annotations

from collections import deque
from operator import sub

from hetis_sim.control.admission import Admission
from hetis_sim.control.books import CacheBooks
from hetis_sim.control.decisions import DecisionLog
from hetis_sim.control.ending import Endings
from hetis_sim.control.lane import Lane
from hetis_sim.control.loads import Loads
from hetis_sim.control.pressure import Pressure
from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.control.state import Ending, HeldCache, RequestState, Status
from hetis_sim.control.step import NOTHING, Chunk, Outcome, Step, StepKind, Transfer
from hetis_sim.control.swap import HostMemory
from hetis_sim.control.timing import InstanceTimer
from hetis_sim.policies.base import Policy
from hetis_sim.policies.view import InstanceLoad, InstanceView, RequestView
from hetis_sim.spec.model import ModelSpec


def _turn(lane: Lane) -> tuple[float, int]:
    return lane.ready_at_s, lane.index


class Engine:
    """Requests, lanes and cache of one instance.

    Attributes:
        active: requests that hold cache here or in host memory, by id.
        blocked: the head of the queue found no room; until cache is given back nobody asks again.
        cycle_units: units per local device that all decoding requests open in block_tokens iterations.
        landings: cache held for requests that are still prefilled elsewhere, by id.
        guests: ids of requests for which the instance does what its role does not say.
        changes: counts changes of membership.
        steps_made: counts steps.
    """

    def __init__(self, index: int, model: ModelSpec, policy: Policy, timer: InstanceTimer,
                 settings: SchedulerSettings, capacity_units: dict[int, int],
                 host_memory: HostMemory, log: DecisionLog) -> None:
        self.index = index
        self.plan = timer.plan
        self.model = model
        self.policy = policy
        self.timer = timer
        self.settings = settings
        self.log = log
        self.capacity_units = capacity_units
        self.loads = Loads(len(self.plan.stages), len(self.plan.positions))
        self.books = CacheBooks(self.plan, model.kv_heads, capacity_units, settings.limits.block_tokens,
                                self.loads)
        self.cycle_units = [0] * len(self.plan.devices)
        self.lanes = [Lane(n, self.loads, settings.limits.block_tokens, self.cycle_units)
                      for n in range(len(self.plan.stages))]
        self.waiting: deque[RequestState] = deque()
        self.waiting_tokens = 0
        self.active: dict[int, RequestState] = {}
        self.blocked = False
        self.news = Outcome()
        self.landings: dict[int, HeldCache] = {}
        self.guests: set[int] = set()
        self.changes = 0
        self.steps_made = 0
        self.admission = Admission(self)
        self.pressure = Pressure(self, host_memory)
        self._endings = Endings(self)
        self.bytes_per_group_token = model.kv_bytes_per_token_per_layer_per_group

    # -- the verbs of the seam ---------------------------------------------------------

    def submit(self, state: RequestState, now_s: float) -> None:
        """Queue a request for prefill."""
        self.sync()
        state.instance = self.index
        state.context_tokens = state.request.prompt_tokens
        if self.settings.async_scheduling and any(lane.step is not None for lane in self.lanes):
            state.unseen_before = self.steps_made + 1
        self.waiting.append(state)
        self.waiting_tokens += state.context_tokens

    def next_step(self, now_s: float) -> Step | None:
        """The next step to enter the pipeline, or None while there is nothing to do.

        Lanes that are between steps take turns in the order in which they became ready; the
        lane whose turn it is prefills whole prompts before it decodes.
        """
        self.sync()
        step, changes = None, -1
        # What one lane gives up may be what another lane, asked before it, was short of.
        while step is None and changes != self.changes:
            changes = self.changes
            step = self._first_step(now_s)
        if len(self.lanes) > 1:
            self.cap_open_steps()
        self.steps_made += step is not None
        return step

    def sees(self, state: RequestState, lane: Lane) -> bool:
        """Whether a waiting request was there when the step that a lane begins was put together.

        An empty step takes no time, so that nobody waits for one.
        """
        return state.unseen_before <= self.steps_made or not lane.has_work

    def _first_step(self, now_s: float) -> Step | None:
        ready = [lane for lane in self.lanes if lane.step is None]
        if len(ready) > 1:
            ready.sort(key=_turn)
        for lane in ready:
            self._reach_boundary(lane)
            step = self._step(lane, now_s)
            if step is not None:
                return step
        return None

    def cap_open_steps(self) -> None:
        """Have the steps under way end before they need cache that has been given to somebody since."""
        safe = self._safe_iterations()
        for lane in self.lanes:
            if lane.step is not None:
                lane.step.limit = min(lane.step.limit, lane.step.issued + safe)

    def _step(self, lane: Lane, now_s: float) -> Step | None:
        if self.pressure.swapped and self.admits:
            self.pressure.swap_in(lane)
        if self.settings.chunked_prefill:
            return self._mixed_step(lane, now_s)
        chunks = self.admission.whole_prompts(lane, now_s) if self.admits and self._heeds(lane, now_s) else []
        if not chunks:
            return self._decode_step(lane, now_s)
        lane.prompted_at, lane.prompts_begun_s = lane.issued, now_s
        return self._step_with(chunks, lane, 0)

    def _heeds(self, lane: Lane, now_s: float) -> bool:
        """Whether prompts that wait may hold up a lane's decoding by now."""
        patience, running = self.settings.prompt_patience, len(lane.members)
        if not patience or running <= 1:
            return True
        if now_s < lane.patient_until_s:
            return False
        since = 1 + lane.issued - lane.prompted_at
        return len(self.waiting) >= max(1, running * (patience - since) // patience)

    @property
    def admits(self) -> bool:
        """Whether somebody waits who may find room.

        While this holds, a driver offers every lane's next turn to :meth:`next_step`, even if
        the lane's step could go on.
        """
        return not self.blocked and bool(self.waiting or self.pressure.swapped)

    def complete(self, step: Step, now_s: float) -> Outcome:
        """Book the end of a step; all its issued iterations have been executed."""
        self.sync()
        lane = self.lanes[step.lane]
        lane.step = None
        lane.ready_at_s = now_s
        if self.settings.prompt_patience and step.kind == StepKind.PREFILL:
            pause_s = self.settings.prompt_pause_share * (now_s - lane.prompts_begun_s)
            lane.patient_until_s = now_s + pause_s
        if step.decoding:
            for state in lane.pop_finished():
                self.books.end(state)
                self._finish(state, now_s)
            self._endings.step_over(step, now_s)
        for chunk in step.chunks:
            self._complete_chunk(chunk, lane, now_s)
        return self.take_news()

    def arrived(self, transfer: Transfer, now_s: float) -> Outcome:
        """Book the end of a transfer."""
        self.sync()
        state = self.active.get(transfer.request_id)
        if transfer.kind == "move":
            self.pressure.moves -= 1
        if state is not None:
            if transfer.kind == "move":
                self._move_arrived(state, transfer)
            elif transfer.kind == "swap_out":
                self.pressure.swapped_out(state)
            else:
                if transfer.kind == "swap_in":
                    self.pressure.swapped_in(state)
                state.in_flight_transfers -= 1
                self._join_when_ready(state)
        return self.take_news()

    def finish(self, state: RequestState, reason: Ending, now_s: float, queued: bool) -> None:
        """End a request early: now, or with the iteration under way.

        ``queued``: it has been prefilled here and waits for its way to another instance.
        """
        self.sync()
        self._endings.end(state, reason, now_s, queued)

    # -- state that policies and drivers may look at -------------------------------------

    def sync(self) -> None:
        """Account for iterations that the driver has begun since the last call."""
        for lane in self.lanes:
            step = lane.step
            if step is not None and step.accounted < step.issued:
                if step.decoding:
                    lane.advance(step.issued - step.accounted, self.books.ledger)
                step.accounted = step.issued

    def view(self) -> InstanceView:
        """A picture of the instance for its policy."""
        groups, tokens = self.loads.total()
        ledger = self.books.ledger
        free = dict(zip(self.plan.devices, map(sub, ledger.capacity, ledger.used), strict=True))
        return InstanceView(self.index, self.plan, self.timer.believed_costs, groups, tokens,
                            len(self.lanes), free, self.capacity_units, self.settings.limits.block_tokens,
                            len(self.active), len(self.waiting), self.waiting_tokens, self.context_tokens())

    def load(self) -> InstanceLoad:
        """How much the instance has to do."""
        self.guests.intersection_update(self.active)
        return InstanceLoad(self.index, self.plan, self.capacity_units, len(self.active), len(self.waiting),
                            self.waiting_tokens, self.context_tokens(), len(self.guests))

    def context_tokens(self) -> int:
        """Tokens in cache, summed over the requests that hold any."""
        lanes = sum(lane.offset_sum + lane.issued * len(lane.members) for lane in self.lanes)
        return lanes + self.books.extra_context

    def request_view(self, state: RequestState) -> RequestView:
        """A request as its policy may see it."""
        if state.status != Status.DECODE:
            return state.view(state.generated_base)
        lane = self.lanes[state.lane]
        generated = state.generated_base + lane.issued - state.joined_at
        return state.view(generated, movable=state.move is None)

    @staticmethod
    def interrupt(lane: Lane) -> None:
        """Have a lane's open step end at its next iteration boundary: something is to be done there."""
        if lane.step is not None:
            lane.step.limit = lane.step.issued

    def membership_changed(self) -> None:
        """Cache was given back or a batch has changed: ask again whatever was refused."""
        self.blocked = False
        self.changes += 1
        self.pressure.refusals.clear()

    def take_news(self) -> Outcome:
        """What has happened since the last call: ends, gaps, transfers to carry out."""
        news = self.news
        if news.empty:
            return NOTHING
        self.news = Outcome()
        return news

    # -- from prefill to decode ---------------------------------------------------------

    def _complete_chunk(self, chunk: Chunk, lane: Lane, now_s: float) -> None:
        state = chunk.state
        state.prefilled_tokens += chunk.new_tokens
        if chunk.last:
            self._count_token(state, now_s)
        if state.ending or state.generated_base >= state.request.output_tokens:
            lane.prefilling -= 1
            lane.forget(state)
            self.books.release(state)
            self._endings.over(state, now_s)
            return
        if not chunk.last:
            return
        if self.plan.role == "prefill":
            lane.prefilling -= 1
            self.blocked = False  # a place in the batch is free, though no cache
            self.news.prefilled.append(state)
            return
        self._join_when_ready(state)

    def _count_token(self, state: RequestState, now_s: float) -> None:
        """A prompt's last piece has given a token."""
        state.generated_base += 1
        if state.generated_base > 1:
            self.news.gaps_s.append(now_s - state.last_token_s)
        state.last_token_s = now_s
        if state.first_token_s != state.first_token_s:
            state.first_token_s = now_s
        state.status = Status.TRANSFER

    def release(self, state: RequestState) -> None:
        """Let go of a request that goes on elsewhere."""
        self.books.release(state)
        del self.active[state.request_id]
        self.membership_changed()

    def land(self, state: RequestState, held: HeldCache) -> None:
        """Take over a request that was prefilled elsewhere; its cache is here."""
        lane = min(self.lanes, key=lambda lane: (lane.load, lane.index))
        state.shape, state.held_blocks, state.cached_tokens = held.shape, held.blocks, held.tokens
        state.remote_share = self.books.shapes.remote_share(held.shape, held.tokens)
        state.instance, state.lane = self.index, lane.index
        self.active[state.request_id] = state
        lane.prefilling += 1
        self._join_when_ready(state)

    def keep(self, state: RequestState) -> None:
        """Have a prefilled request decode here, though the instance otherwise only prefills."""
        self.guests.add(state.request_id)
        self.lanes[state.lane].prefilling += 1
        self._join_when_ready(state)

    def take_back(self, state: RequestState) -> None:
        """Queue a request, which has lost its cache in another instance, before all others."""
        self.sync()
        state.instance = self.index
        self.waiting.appendleft(state)
        self.waiting_tokens += state.context_tokens
        self.blocked = False  # that was for whoever stood first before

    def _join_when_ready(self, state: RequestState) -> None:
        if state.status != Status.TRANSFER or state.in_flight_transfers:
            return
        lane = self.lanes[state.lane]
        lane.joins.append(state)
        self.interrupt(lane)

    def _reach_boundary(self, lane: Lane) -> None:
        """Between two iterations: requests join, moved heads switch over."""
        if not lane.joins and not lane.switches:
            return
        for state in lane.joins:
            lane.prefilling -= 1
            state.status = Status.DECODE
            self.books.join(state, lane)
        for state in lane.switches:
            if state.move is not None and self.books.finish_move(state, lane):
                state.moves += 1
        lane.joins, lane.switches = [], []
        self.membership_changed()

    # -- decode ------------------------------------------------------------------------

    def _decode_step(self, lane: Lane, now_s: float) -> Step | None:
        if not self._begin_iteration(lane, now_s):
            return None
        return self._long_decode(lane)

    def _begin_iteration(self, lane: Lane, now_s: float) -> int:
        """Book one iteration of the lane's decodes; returns how many requests take part."""
        if not lane.members or not self.pressure.make_room(lane, now_s):
            return 0
        self._rebalance(lane)
        lane.advance(1, self.books.ledger)
        return len(lane.members)

    def _long_decode(self, lane: Lane) -> Step:
        """A decode step whose first iteration is booked already."""
        step = Step(self.index, lane.index, StepKind.DECODE, decoding=len(lane.members), issued=1,
                    accounted=1)
        if self.settings.collapse:
            step.limit = 1 + self._iterations_left(lane)
        lane.step = step
        return step

    def _iterations_left(self, lane: Lane) -> int:
        """Further iterations in which nothing the controller knows of can change a decision."""
        if self.admits:
            return 0
        left = min(lane.next_finish(), self._safe_iterations())
        return min(left, lane.rebalance_at - lane.issued) if self._rebalances else left

    def _safe_iterations(self) -> int:
        """Iterations that every lane can take with the cache that is free now.

        ``c`` times block_tokens iterations open ``c`` blocks for every group there is.
        """
        ledger = self.books.ledger
        free = map(sub, ledger.capacity, ledger.used)
        cycles = min([units // growth for units, growth in zip(free, self.cycle_units, strict=True)
                      if growth], default=1 << 30)
        return cycles * self.settings.limits.block_tokens

    @property
    def _rebalances(self) -> bool:
        return bool(self.plan.attention_workers) and self.settings.moves_max > 0

    def _rebalance(self, lane: Lane) -> None:
        if not self._rebalances or lane.issued < lane.rebalance_at:
            return
        lane.rebalance_at = lane.issued + self.settings.rebalance_interval
        self.pressure.look_ahead()

    # -- chunked prefill -----------------------------------------------------------------

    def _mixed_step(self, lane: Lane, now_s: float) -> Step | None:
        """One iteration of the lane's decodes with as many prompt tokens as the budget leaves."""
        decoding = self._begin_iteration(lane, now_s)
        chunks = self.admission.pieces(lane, self.settings.chunk_tokens - decoding, now_s)
        if not chunks:
            return self._long_decode(lane) if decoding else None
        return self._step_with(chunks, lane, decoding)

    def _step_with(self, chunks: list[Chunk], lane: Lane, decoding: int) -> Step:
        """A step of one iteration that computes prompts, and whatever decodes already."""
        kind = StepKind.MIXED if decoding else StepKind.PREFILL
        step = Step(self.index, lane.index, kind, tuple(chunks), decoding=decoding, issued=1, accounted=1)
        step.transfers = [t for c in chunks if c.last and (t := self.admission.push(c.state))]
        lane.step = step
        return step

    # -- ends ----------------------------------------------------------------------------

    def _move_arrived(self, state: RequestState, transfer: Transfer) -> None:
        if state.move is None or state.move.transfer is not transfer:
            return
        state.moved_bytes += transfer.size_bytes
        lane = self.lanes[state.lane]
        lane.switches.append(state)
        self.interrupt(lane)

    def drop(self, state: RequestState, reason: str, now_s: float) -> None:
        """Give up a request that holds no cache; it is counted with its reason."""
        state.status, state.reason, state.finish_s = Status.REJECTED, reason, now_s
        self.news.rejected.append(state)

    def _finish(self, state: RequestState, now_s: float) -> None:
        state.last_token_s = now_s
        self._endings.over(state, now_s)
