"""Splitwise: prompts on one pool of machines, decoding on another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from hetis_sim.policies.admission import dispatch_at_home
from hetis_sim.policies.base import PlanningProblem, Policy
from hetis_sim.policies.evolve import Effort
from hetis_sim.policies.plan import Placement, Plan
from hetis_sim.policies.pools import PoolRules, plan_pools
from hetis_sim.policies.rated import prompt_rate, shortest_queue
from hetis_sim.policies.settings import SearchSettings
from hetis_sim.policies.view import InstanceLoad, InstanceView, RequestView
from hetis_sim.spec.errors import require, require_finite
from hetis_sim.spec.lookup import require_int


@dataclass(frozen=True)
class SplitwiseSettings(SearchSettings):
    """What a user may change.

    Attributes:
        high_end_bias: what a division of the cluster must serve more, as a share, to be taken although
            a decode instance has a card of a higher-end kind than some prefill instance (ours).
        share_kinds: whether prefill and decode pool may have cards of one kind. Without, they do where
            nothing else serves the model, which is how Hetis' evaluation describes its Splitwise (ours).
        mixing: whether instances of either pool do the other's work when it has too much.
        queue_tokens: prompt tokens at an instance from which its queue counts as long (the value of
            the source's simulator).
    """

    high_end_bias: float = 0.25
    share_kinds: bool = True
    mixing: bool = True
    queue_tokens: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        require_finite("policy.high_end_bias", self.high_end_bias, 0.0)
        require(isinstance(self.share_kinds, bool), "policy.share_kinds", self.share_kinds, "true or false")
        require(isinstance(self.mixing, bool), "policy.mixing", self.mixing, "true or false")
        require_int("policy.queue_tokens", self.queue_tokens, 0, 1 << 30)


class SplitwisePolicy(Policy):
    """Splitwise (Patel et al., ISCA '24), by its section on the cluster-level scheduler and its simulator.

    From the source: pools of machines for the prompt and for the decode phase; requests join the
    shortest queue, by tokens, in both. Machines mix phases while they must: where the best queue of
    prompts is long, a machine of the decode pool takes the prompt in, one that mixes already before others;
    where no machine of the decode pool has memory, one of the prompt pool decodes; each is back in its
    pool when it has done with that. The cache is sent layer by layer while the prompt is
    computed. Prompts go to high-end GPUs, decoding to low-end ones (its heterogeneous designs, and
    Hetis' evaluation).

    Ours: machines are pipelines of tensor-parallel groups, which the source does not need, having
    equal machines that each hold the model; who is in which pool is searched for the rate of the whole
    (:mod:`.pools`), phases apart. Queues are divided by the strength of the instance, and a decode
    instance takes in a prompt only where it comes sooner to it. Where a request decodes is settled when its
    cache can be sent (there on arrival, by its output tokens, which nobody knows); one that stays
    out of the decode pool decodes where its prompt was computed; a prompt taken in decodes where it is.
    """

    name: ClassVar[str] = "splitwise"
    settings_type: ClassVar[type] = SplitwiseSettings
    streams_handoff = True

    def __init__(self, settings: SplitwiseSettings | None = None) -> None:
        self.settings = settings or SplitwiseSettings()
        self.mixes_pools = self.settings.mixing
        self.preemption = self.settings.preemption_mode

    def plan(self, problem: PlanningProblem) -> Plan:
        """The division into pools of highest rate.

        Raises:
            InfeasibleError: the model fits nowhere.
        """
        given = self.settings
        rules = PoolRules(True, given.high_end_bias, given.share_kinds)
        effort = Effort(evaluations=given.evaluations, seed=given.seed)
        return plan_pools(problem, rules, effort, self.name)

    def route(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        """The shortest queue of prompts; where it is long, that of an instance that mixes phases or may."""
        def seconds(i: int) -> float:
            return (prompt_tokens(instances[i]) + request.context_tokens) / prompt_rate(instances[i])

        def shortest(chosen: Iterable[int]) -> int | None:
            return min(chosen, key=lambda i: (seconds(i), i), default=None)

        everywhere = range(len(instances))
        own = shortest(i for i in everywhere if instances[i].plan.role != "decode")
        mixed = shortest(i for i in everywhere if instances[i].guests)
        limit = math.inf if own is None else seconds(own)
        for i in (own, mixed, shortest(everywhere)):
            if i is not None and seconds(i) <= limit and not self._is_long(instances[i], request):
                return i
        return min(everywhere, key=lambda i: (seconds(i), i))

    def _is_long(self, load: InstanceLoad, request: RequestView) -> bool:
        waiting = load.waiting_tokens
        return waiting > 0 and waiting + request.context_tokens > self.settings.queue_tokens

    def handoff(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        """The decode instance with the fewest tokens for its strength."""
        return shortest_queue(instances, request.context_tokens)

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
        """All heads at home, as long as the reserve stays free."""
        return dispatch_at_home(requests, view, self.settings.reserve_fraction)


def prompt_tokens(load: InstanceLoad) -> int:
    """Tokens of prompts ahead: those that wait; in the prompt pool also those computed or to be sent."""
    return load.waiting_tokens + (0 if load.plan.role == "decode" else load.context_tokens)
