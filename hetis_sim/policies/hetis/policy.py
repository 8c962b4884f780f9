"""The Hetis policy: parallelizer, dispatcher and redispatcher behind the policy interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from hetis_sim.policies.base import PlanningProblem, Policy, PreemptionMode
from hetis_sim.policies.hetis.attention import ContextTable
from hetis_sim.policies.hetis.dispatcher import Dispatcher
from hetis_sim.policies.hetis.parallelizer import Parallelizer
from hetis_sim.policies.hetis.redispatcher import Redispatcher
from hetis_sim.policies.hetis.settings import HetisSettings
from hetis_sim.policies.hetis.unitwise import UnitDispatcher, UnitRedispatcher
from hetis_sim.policies.plan import Plan
from hetis_sim.policies.ranges import AnyPlacement
from hetis_sim.policies.view import InstanceView, Move, RequestView


class HetisPolicy(Policy):
    """Hetis (SC '25): dense work on primary workers, decode attention by KV group over all workers.

    The paper gives the division into Parallelizer, Dispatcher and Redispatcher, the exclusion
    rule, the linear program, both triggers of redispatch and theta. What it leaves open is
    marked as ours where it is decided. With another ``granularity`` the same plan and objective divide whole
    requests, or tokens, in place of heads.
    """

    name: ClassVar[str] = "hetis"
    plans_for_rate: ClassVar[bool] = False
    settings_type: ClassVar[type] = HetisSettings

    def __init__(self, settings: HetisSettings | None = None) -> None:
        self.settings: HetisSettings = settings or self.settings_type()
        self.preemption: PreemptionMode = "swap" if self.settings.preemption == "swap" else "recompute"
        self.splits_tokens = self.settings.granularity == "sequence"
        contexts = ContextTable(ranges=self.splits_tokens)
        self._parallelizer = Parallelizer(self.settings)
        self._dispatcher: Dispatcher | UnitDispatcher
        if self.settings.granularity == "head":
            self._dispatcher = Dispatcher(self.settings, contexts)
            self._redispatcher = Redispatcher(self.settings, contexts)
        else:
            self._dispatcher = UnitDispatcher(self.settings, contexts)
            self._redispatcher = UnitRedispatcher(self.settings, contexts)

    def plan(self, problem: PlanningProblem) -> Plan:
        """Search the primary layout; see :class:`Parallelizer`."""
        return self._parallelizer.plan(problem)

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> Sequence[AnyPlacement]:
        """Place the longest prefix that fits; see :class:`Dispatcher`."""
        return self._dispatcher.dispatch(requests, view)

    def rebalance(self, view: InstanceView, running: Sequence[RequestView]) -> Move | None:
        """A move for speed; see :class:`Redispatcher`."""
        return self._redispatcher.rebalance(view, running)

    def relieve(self, view: InstanceView, device: int, running: Sequence[RequestView]) -> Move | None:
        """A move for memory; see :class:`Redispatcher`."""
        return self._redispatcher.relieve(view, device, running)

    def victim(self, device: int, candidates: Sequence[RequestView]) -> RequestView:
        """The latest arrival; with ``eviction: benefit`` among those that lost their cache least often."""
        if self.settings.eviction == "lifo":
            return super().victim(device, candidates)
        return max(candidates, key=lambda r: (-r.preemptions, r.arrival_s, r.request_id))
