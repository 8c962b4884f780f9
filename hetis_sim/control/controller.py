"""The control plane: everything that decides, above the clock.

A driver (the simulator or an executor) hands in requests, asks for steps, and reports what
has ended. Times are arguments; nothing here waits, computes tensors or reads a clock.
"""

from __future__ import annotations

from collections.abc import Sequence

from hetis_sim.control.decisions import DecisionLog
from hetis_sim.control.engine import Engine
from hetis_sim.control.handoff import Handoffs
from hetis_sim.control.ledger import KvLedger
from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.control.state import Ending, RequestState, Status, known_request, rejected, stations
from hetis_sim.control.step import NOTHING, Outcome, Step, Transfer
from hetis_sim.control.swap import HostMemory
from hetis_sim.control.timing import InstanceTimer
from hetis_sim.policies.base import Policy
from hetis_sim.policies.memory import cache_units
from hetis_sim.policies.plan import Plan
from hetis_sim.policies.verify import check_plan
from hetis_sim.policies.view import InstanceView, RequestView
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.errors import InfeasibleError
from hetis_sim.spec.model import ModelSpec
from hetis_sim.spec.request import Request


class Controller:
    """Routes requests to instances and passes the verbs of the seam on to their engines.

    Raises:
        SpecError: the plan does not fit the model or the cluster.
        InfeasibleError: an instance of the plan has no room for any cache.
    """

    def __init__(self, cluster: ClusterSpec, model: ModelSpec, policy: Policy, plan: Plan,
                 timers: Sequence[InstanceTimer], settings: SchedulerSettings,
                 log: DecisionLog | None = None) -> None:
        check_plan(plan, model, cluster)
        self.model = model
        self.policy = policy
        self.plan = plan
        self.log = log or DecisionLog()
        self.states: dict[int, RequestState] = {}
        host_memory = HostMemory(cluster)
        self.engines = [
            Engine(index, model, policy, timer, settings,
                   cache_units(cluster, model, settings.limits, timer.plan), host_memory, self.log)
            for index, timer in enumerate(timers)]
        self._devices = len(cluster.devices)
        self._head_layers = [[(position.device, position.layers * model.heads_per_group)
                              for position in timer.plan.positions] for timer in timers]
        self.context_limits = [_longest_context(engine) for engine in self.engines]
        self._handoffs = Handoffs(self.engines, policy)
        self._handoffs.learn_limits(self.context_limits)
        if not any(self.context_limits):
            raise InfeasibleError(f"no instance of the plan has cache for a single token of {model.name}; "
                                  "use more or larger GPUs, or a smaller model")

    def submit(self, request: Request, now_s: float) -> RequestState:
        """Take a request in. It is queued, or rejected at once with a reason.

        Reasons: ``context_limit`` (longer than the model allows) and ``cache_capacity``
        (longer than an empty instance can hold).
        """
        state = RequestState(request, context_tokens=request.prompt_tokens)
        self.states[request.request_id] = state
        needed = request.prompt_tokens + request.output_tokens
        if needed > self.model.context_limit_tokens:
            return rejected(state, "context_limit", now_s)
        able = self._able(needed)
        if not able:
            return rejected(state, "cache_capacity", now_s)
        self._route(state, able).submit(state, now_s)
        return state

    def forget(self, request_id: int) -> None:
        """Drop the state of a request that has ended; a driver that serves without end asks for this."""
        if self.states[request_id].status >= Status.FINISHED:
            del self.states[request_id]

    @property
    def longest_context(self) -> int:
        """Tokens that prompt and output of a request may have together, for it to be taken in."""
        elsewhere, mixes = self._handoffs.longest_context, self.policy.mixes_pools
        found = 0
        for engine, most in zip(self.engines, self.context_limits, strict=True):
            if mixes or engine.plan.role == "both":
                found = max(found, most)
            elif engine.plan.role == "prefill":
                found = max(found, min(most, elsewhere))
        return min(found, self.model.context_limit_tokens)

    def _able(self, tokens: int) -> list[Engine]:
        """Instances that can prefill a request which reaches so many tokens, and carry it to its end."""
        elsewhere, mixes = self._handoffs.longest_context, self.policy.mixes_pools
        return [engine for engine, most in zip(self.engines, self.context_limits, strict=True)
                if tokens <= most and (mixes or engine.plan.role == "both"
                                       or (engine.plan.role == "prefill" and tokens <= elsewhere))]

    def _route(self, state: RequestState, able: list[Engine]) -> Engine:
        if len(able) == 1:
            return able[0]
        for engine in able:
            engine.sync()
        loads = [engine.load() for engine in able]
        request = state.view(state.generated_base)
        choice = self.policy.route(request, loads)
        self.log.record("route", loads[choice], [request], choice)
        return able[choice]

    def next_step(self, instance: int, now_s: float) -> Step | None:
        """The next step for an instance whose first stage is free."""
        step = self.engines[instance].next_step(now_s)
        if step is not None and self._handoffs.any and self.engines[instance].plan.role == "prefill":
            begun = (self._handoffs.stream(chunk.state) for chunk in step.chunks if chunk.last)
            step.transfers += [transfer for transfer in begun if transfer is not None]
        return step

    def complete(self, step: Step, now_s: float) -> Outcome:
        """Report that the issued iterations of a step have been executed."""
        return self._carry_on(self.engines[step.instance].complete(step, now_s))

    def arrived(self, transfer: Transfer, now_s: float) -> Outcome:
        """Report that all flows of a transfer have ended."""
        if transfer.kind != "handoff":
            return self._carry_on(self.engines[transfer.instance].arrived(transfer, now_s))
        for index in (transfer.instance, transfer.target):
            self.engines[index].sync()
        state = self.states.get(transfer.request_id)
        outcome = Outcome(touched=[transfer.target])
        if state is not None and state.landing is not None and self._handoffs.arrived(state):
            self._handoffs.land(state)
        return self._carry_on(outcome)

    def finish(self, request_id: int, reason: Ending, now_s: float) -> Outcome:
        """End a request before it has all the tokens it was submitted for.

        It ends at once, or, while a step computes it, when that step is reported complete; the token of
        that step counts. With reason ``stop`` it counts as finished, given that it has a token; with
        ``aborted`` as rejected. One that has ended already stays as it is.

        Raises:
            SpecError: no such request or reason.
        """
        state = known_request(self.states, request_id, reason)
        if state.status >= Status.FINISHED:
            return NOTHING
        engine = self.engines[state.instance]
        engine.finish(state, reason, now_s, self._handoffs.forget(state))
        return self._carry_on(engine.take_news())

    def news(self, instance: int) -> Outcome:
        """What :meth:`next_step` or :meth:`submit` has set off."""
        return self._carry_on(self.engines[instance].take_news())

    def _carry_on(self, outcome: Outcome) -> Outcome:
        """See to the requests that go on in another instance."""
        if not self._handoffs.any:
            return outcome
        more = Outcome(outcome.finished, outcome.rejected, outcome.gaps_s, list(outcome.transfers),
                       touched=list(outcome.touched))
        for state in (*outcome.finished, *outcome.rejected):
            if state.landing is not None:
                more.touched.append(state.landing.instance)
                self._handoffs.cancel(state)
        for state in outcome.prefilled:
            for ready in self._handoffs.prefilled(state):
                more.touched += [ready.instance, ready.landing.instance] if ready.landing else []
                self._handoffs.land(ready)
        for state in outcome.evicted:
            engine = self._route(state, self._able(state.request.total_tokens))
            engine.take_back(state)
            more.touched.append(engine.index)
        more.transfers += self._handoffs.retry(more.touched)
        return more

    def ledgers(self) -> Sequence[tuple[tuple[int, ...], KvLedger]]:
        """Devices of every instance and their cache, up to date."""
        for engine in self.engines:
            engine.sync()
        return [(engine.plan.devices, engine.books.ledger) for engine in self.engines]

    def heads(self) -> list[int]:
        """Query heads times layers in the cache of every device; one that is split by tokens counts twice."""
        heads = [0] * self._devices
        for engine, positions in zip(self.engines, self._head_layers, strict=True):
            for (device, head_layers), groups in zip(positions, engine.loads.held(), strict=True):
                if groups:
                    heads[device] += groups * head_layers
        return heads

    @property
    def changes(self) -> int:
        """Counts changes of membership."""
        return sum(engine.changes for engine in self.engines)

    def in_system(self) -> tuple[int, int]:
        """Requests running and waiting."""
        return (sum(len(engine.active) for engine in self.engines),
                sum(len(engine.waiting) for engine in self.engines))

    def counts(self) -> dict[str, int]:
        """Requests by station: the terms of the conservation law (invariant 1)."""
        return stations(self.states.values(), *self.in_system())


def _longest_context(engine: Engine) -> int:
    """Tokens that a request may reach on the empty instance, by bisection over its policy."""
    view: InstanceView = engine.view()

    def fits(tokens: int) -> bool:
        placed = engine.policy.dispatch([RequestView(0, 0.0, tokens, tokens)], view)
        return bool(placed) and engine.books.fits(placed[0], tokens, staged=False)

    low, high = 0, engine.model.context_limit_tokens + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
