"""DistServe: prefill and decoding apart, each with the parallelism that suits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hetis_sim.policies.admission import dispatch_at_home
from hetis_sim.policies.base import PlanningProblem, Policy
from hetis_sim.policies.evolve import Effort
from hetis_sim.policies.plan import Placement, Plan
from hetis_sim.policies.pools import PoolRules, plan_pools
from hetis_sim.policies.rated import shortest_queue
from hetis_sim.policies.settings import SearchSettings
from hetis_sim.policies.view import InstanceLoad, InstanceView, RequestView


@dataclass(frozen=True)
class DistServeSettings(SearchSettings):
    """What a user may change."""


class DistServePolicy(Policy):
    """DistServe (Zhong et al., OSDI '24).

    From the source: instances for prefill and for decoding with tensor and pipeline parallelism of
    their own, chosen for goodput, the highest rate at which the limits on TTFT and TPOT hold; prompts
    go to the prefill instance with the shortest queue, then to the least loaded decode instance, which
    pulls the cache when it has room; until then it stays where it was computed.

    Ours: goodput comes from the estimates of :mod:`.phases` (there from a simulation). The source repeats
    the instance of highest goodput per GPU for each phase, and on narrow networks keeps stages with the same
    layers in one node; as cards are unequal, here the whole division of the cluster is searched
    (:mod:`.pools`), with what the network carries between the pools. Queues are divided by the strength
    of the instance; a cache that finds no room in the least loaded decode instance may go to another.
    """

    name: ClassVar[str] = "distserve"
    settings_type: ClassVar[type] = DistServeSettings
    streams_handoff = False

    def __init__(self, settings: DistServeSettings | None = None) -> None:
        self.settings = settings or DistServeSettings()
        self.preemption = self.settings.preemption_mode

    def plan(self, problem: PlanningProblem) -> Plan:
        """The division into prefill and decode instances of highest goodput.

        Raises:
            InfeasibleError: the model fits nowhere.
        """
        effort = Effort(evaluations=self.settings.evaluations, seed=self.settings.seed)
        return plan_pools(problem, PoolRules(phases=True), effort, self.name)

    def route(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        """The prefill instance with the shortest queue for its strength."""
        able = [i for i, load in enumerate(instances) if load.plan.role != "decode"]
        return shortest_queue(instances, request.context_tokens, able or None)

    def handoff(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        """The least loaded decode instance for its strength."""
        return shortest_queue(instances, request.context_tokens)

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
        """All heads at home, as long as the reserve stays free; where requests only prefill, it is 0."""
        reserve = 0.0 if view.plan.role == "prefill" else self.settings.reserve_fraction
        return dispatch_at_home(requests, view, reserve)
