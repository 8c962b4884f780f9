"""The control plane of a plan with a mesh; the verbs are those of :class:`Controller`."""

from __future__ import annotations

from collections.abc import Sequence

from hetis_sim.control.decisions import DecisionLog
from hetis_sim.control.ledger import KvLedger
from hetis_sim.control.mesh.engine import MeshEngine
from hetis_sim.control.mesh.timing import MeshTimer
from hetis_sim.control.mesh.walk import Message, NodeStep
from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.control.state import Ending, RequestState, Status, known_request, rejected, stations
from hetis_sim.control.step import NOTHING, Outcome
from hetis_sim.policies.base import Policy
from hetis_sim.policies.memory import mesh_cache_units
from hetis_sim.policies.plan import Plan
from hetis_sim.policies.verify import check_plan
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.errors import InfeasibleError, require
from hetis_sim.spec.model import ModelSpec
from hetis_sim.spec.request import Request


class MeshController:
    """Takes requests in and passes the verbs of the seam on to the engine of the mesh.

    Raises:
        SpecError: the plan does not fit the model or the cluster, or prompts are to be cut in pieces.
        InfeasibleError: no path of the plan has room for any cache.
    """

    def __init__(self, cluster: ClusterSpec, model: ModelSpec, policy: Policy, plan: Plan, timer: MeshTimer,
                 settings: SchedulerSettings, log: DecisionLog | None = None) -> None:
        check_plan(plan, model, cluster)
        require(not settings.chunked_prefill, "scheduler.chunked_prefill", True,
                f"false with policy {policy.name!r}: the nodes of a mesh compute whole prompts")
        self.model = model
        self.policy = policy
        self.plan = plan
        self.log = log or DecisionLog()
        self.timer = timer
        self.states: dict[int, RequestState] = {}
        units = mesh_cache_units(cluster, model, settings.limits, timer.plan)
        self.engine = MeshEngine(model, policy, timer, settings, units, self.log)
        self.context_limits = [self.engine.longest_context]
        if not self.engine.longest_context:
            raise InfeasibleError(f"no path of the plan has cache for a single token of {model.name}; "
                                  "use more or larger GPUs, or a smaller model")

    def submit(self, request: Request, now_s: float) -> RequestState:
        """Take a request in. It is queued, or rejected at once with a reason, as in :class:`Controller`."""
        state = RequestState(request, context_tokens=request.prompt_tokens)
        self.states[request.request_id] = state
        if request.total_tokens > self.model.context_limit_tokens:
            return rejected(state, "context_limit", now_s)
        if request.total_tokens > self.engine.longest_context:
            return rejected(state, "cache_capacity", now_s)
        self.engine.submit(state, now_s)
        return state

    def forget(self, request_id: int) -> None:
        """Drop the state of a request that has ended, as in :class:`Controller`."""
        if self.states[request_id].status >= Status.FINISHED:
            del self.states[request_id]

    @property
    def longest_context(self) -> int:
        """Tokens that prompt and output of a request may have together, for it to be taken in."""
        return self.engine.longest_context

    def next_step(self, instance: int, now_s: float) -> NodeStep | None:
        """A step for some idle node; ``instance`` is 0."""
        return self.engine.next_step(now_s)

    def complete(self, step: NodeStep, now_s: float) -> Outcome:
        """Report that a step has been executed."""
        return self.engine.complete(step, now_s)

    def arrived(self, message: Message, now_s: float) -> Outcome:
        """Report that a message is there."""
        return self.engine.arrived(message, now_s)

    def finish(self, request_id: int, reason: Ending, now_s: float) -> Outcome:
        """End a request early, as in :class:`Controller`: one that is on its way ends with its round.

        Raises:
            SpecError: no such request or reason.
        """
        state = known_request(self.states, request_id, reason)
        if state.status >= Status.FINISHED:
            return NOTHING
        self.engine.finish(state, reason, now_s)
        return self.engine.take_news()

    def news(self, instance: int) -> Outcome:
        """What :meth:`next_step` or :meth:`submit` has set off."""
        return self.engine.take_news()

    def ledgers(self) -> Sequence[tuple[tuple[int, ...], KvLedger]]:
        """Devices and their cache."""
        return [(self.engine.plan.devices, self.engine.books.ledger)]

    @property
    def changes(self) -> int:
        """Counts changes of membership."""
        return self.engine.changes

    def in_system(self) -> tuple[int, int]:
        """Requests running and waiting."""
        return len(self.engine.active), len(self.engine.waiting)

    def counts(self) -> dict[str, int]:
        """Requests by station: the terms of the conservation law (invariant 1)."""
        return stations(self.states.values(), *self.in_system())
