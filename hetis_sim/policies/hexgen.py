"""HexGen: pipelines of unequal stages over all GPUs."""

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
from hetis_sim.spec.lookup import require_int


@dataclass(frozen=True)
class HexGenSettings(SearchSettings):
    """What a user may change.

    Attributes:
        population: divisions of the cluster that the search keeps.
        islands: populations that evolve apart.
    """

    population: int = 24
    islands: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("population", "islands"):
            require_int(f"policy.{key}", getattr(self, key), 1, 1 << 30)


class HexGenPolicy(Policy):
    """HexGen (Jiang et al., ICML '24).

    From the source: the cluster is divided into pipelines that serve in parallel; stages of one
    pipeline may differ in their tensor-parallel degree and in their layers; the division is found by
    evolution with merges, splits and swaps, and within a pipeline the best degrees are looked for; all
    heads stay at the rank that holds their weights.

    Ours: the value of a division is the rate at which it holds the SLO by the estimates that Hetis is
    planned with (there, attainment of the SLO in a simulation); degrees are enumerated (in the paper, found
    by dynamic programming); layers are split by the time that stages take for them, under memory;
    tensor-parallel groups stay within one kind of GPU in one host; cards that bring nothing may stand
    idle; requests go to the pipeline with the fewest outstanding tokens for its strength.
    """

    name: ClassVar[str] = "hexgen"
    settings_type: ClassVar[type] = HexGenSettings

    def __init__(self, settings: HexGenSettings | None = None) -> None:
        self.settings = settings or HexGenSettings()
        self.preemption = self.settings.preemption_mode

    def plan(self, problem: PlanningProblem) -> Plan:
        """The division into pipelines of highest rate.

        Raises:
            InfeasibleError: the model fits nowhere.
        """
        given = self.settings
        effort = Effort(given.population, given.evaluations, given.islands, given.seed)
        return plan_pools(problem, PoolRules(phases=False), effort, self.name)

    def route(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        """The pipeline with the fewest outstanding tokens for its strength."""
        return shortest_queue(instances, request.context_tokens)

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
        """All heads at home, as long as the reserve stays free."""
        return dispatch_at_home(requests, view, self.settings.reserve_fraction)
