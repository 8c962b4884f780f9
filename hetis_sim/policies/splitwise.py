"""Splitwise: prompts on one pool of machines, decoding on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hetis_sim.policies.admission import dispatch_at_home
from hetis_sim.policies.base import PlanningProblem, Policy, PreemptionMode
from hetis_sim.policies.evolve import Effort
from hetis_sim.policies.plan import Placement, Plan
from hetis_sim.policies.pools import PoolRules, plan_pools
from hetis_sim.policies.rated import shortest_queue
from hetis_sim.policies.view import InstanceLoad, InstanceView, RequestView
from hetis_sim.spec.errors import require, require_finite
from hetis_sim.spec.lookup import require_int


@dataclass(frozen=True)
class SplitwiseSettings:
    """What a user may change.

    Attributes:
        high_end_bias: what a division of the cluster must serve more, as a share, to be taken although
            a decode instance has a card of a higher-end kind than some prefill instance (ours).
        mixed_instances: instances in the mixed pool, at most; 0 for none. The search makes one only
            where it serves more than it would in the other pools (ours).
        queue_tokens: prompt tokens waiting at the best prefill instance from which the mixed pool
            is used too; a batch of prompts gains little beyond 2048 tokens (section III of the paper).
        reserve_fraction: share of each device's cache that admission leaves free for growth (ours, as
            for Hetis; vLLM leaves 0.01).
        preemption: ``recompute`` or ``swap``.
        evaluations: divisions of the cluster that the search looks at, at most.
        seed: of the search.
    """

    high_end_bias: float = 0.25
    mixed_instances: int = 1
    queue_tokens: int = 2048
    reserve_fraction: float = 0.05
    preemption: str = "recompute"
    evaluations: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        require_finite("policy.reserve_fraction", self.reserve_fraction, 0.0, 0.9)
        require_finite("policy.high_end_bias", self.high_end_bias, 0.0)
        require_int("policy.mixed_instances", self.mixed_instances, 0, 1 << 20)
        require_int("policy.queue_tokens", self.queue_tokens, 0, 1 << 30)
        require(self.preemption in ("recompute", "swap"), "policy.preemption", self.preemption,
                "one of recompute, swap")
        require_int("policy.evaluations", self.evaluations, 1, 1 << 30)
        require_int("policy.seed", self.seed, 0, 1 << 63)


class SplitwisePolicy(Policy):
    """Splitwise (Patel et al., ISCA '24).

    From the source: pools of machines for the prompt and for the decode phase, and a mixed one;
    requests join the shortest queue, by tokens, in the prompt and in the decode pool; where the
    prompt queues are long, the mixed pool is used; the cache is sent layer by layer while the prompt is
    computed; prompts go to high-end GPUs, decoding to low-end ones (its heterogeneous designs, and
    Hetis' evaluation).

    Ours: machines are pipelines of tensor-parallel groups, which the source does not need, having
    equal machines that each hold the model; who is in which pool is searched for the rate of the whole
    (:mod:`.pools`); queues are divided by the strength of the instance; the mixed pool is fixed by
    the plan and keeps the requests that it takes in (there, machines change pools while they serve).
    """

    name: ClassVar[str] = "splitwise"
    settings_type: ClassVar[type] = SplitwiseSettings
    streams_handoff = True

    def __init__(self, settings: SplitwiseSettings | None = None) -> None:
        self.settings = settings or SplitwiseSettings()
        self.preemption: PreemptionMode = "swap" if self.settings.preemption == "swap" else "recompute"

    def plan(self, problem: PlanningProblem) -> Plan:
        """The division into pools of highest rate.

        Raises:
            InfeasibleError: the model fits nowhere.
        """
        given = self.settings
        rules = PoolRules(phases=True, mixed_most=given.mixed_instances, high_end_bias=given.high_end_bias)
        effort = Effort(evaluations=given.evaluations, seed=given.seed)
        return plan_pools(problem, rules, effort, self.name)

    def route(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        """The shortest queue of prompts; the mixed pool's where the prefill pool's are long."""
        best: list[int] = []
        for role, queue in (("prefill", prompt_tokens), ("both", mixed_tokens)):
            pool = [i for i, load in enumerate(instances) if load.plan.role == role]
            if pool:
                best.append(shortest_queue(instances, request.context_tokens, pool, queue))
        for i in best:
            waiting = instances[i].waiting_tokens
            if not waiting or waiting + request.context_tokens <= self.settings.queue_tokens:
                return i
        return min(best or range(len(instances)), key=lambda i: (instances[i].waiting_tokens, i))

    def handoff(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        """The decode instance with the fewest tokens for its strength."""
        return shortest_queue(instances, request.context_tokens)

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
        """All heads at home, as long as the reserve stays free."""
        return dispatch_at_home(requests, view, self.settings.reserve_fraction)


def prompt_tokens(load: InstanceLoad) -> int:
    """Tokens of prompts that wait, are computed, or wait for their caches to be sent."""
    return load.waiting_tokens + load.context_tokens


def mixed_tokens(load: InstanceLoad) -> int:
    """Tokens that the next iterations must compute: waiting prompts, and one for every running request."""
    return load.waiting_tokens + load.running
