"""Instances that know what their plan counts on, and queues measured against it.

Systems that join the shortest queue by tokens were made for equal machines. Where a plan mixes
strong and weak instances, the same number of tokens is a long queue at one and a short one at
another, so queues are divided by the instance's strength (ours; with equal machines nothing changes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hetis_sim.policies.plan import InstancePlan
from hetis_sim.policies.view import InstanceLoad
from hetis_sim.spec.errors import require_finite


@dataclass(frozen=True)
class RatedInstance(InstancePlan):
    """An instance and its planned strength.

    Attributes:
        strength: prompt tokens a second where the instance only prefills, otherwise the tokens
            that it holds in cache when it is as full as the plan means it to be.
        prompt_rate: prompt tokens a second if it only prefilled.
    """

    strength: float = 1.0
    prompt_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_finite("instance.strength", self.strength, 0.0, open_low=True)
        require_finite("instance.prompt_rate", self.prompt_rate, 0.0, open_low=True)


def strength(load: InstanceLoad) -> float:
    """Planned strength of an instance, 1 where its plan does not say."""
    return load.plan.strength if isinstance(load.plan, RatedInstance) else 1.0


def prompt_rate(load: InstanceLoad) -> float:
    """Prompt tokens a second of an instance that only prefills, 1 where its plan does not say."""
    return load.plan.prompt_rate if isinstance(load.plan, RatedInstance) else 1.0


def outstanding_tokens(load: InstanceLoad) -> int:
    """Tokens in cache and prompt tokens that wait."""
    return load.context_tokens + load.waiting_tokens


def shortest_queue(loads: Sequence[InstanceLoad], tokens: int, among: Iterable[int] | None = None,
                   queue: Callable[[InstanceLoad], int] = outstanding_tokens) -> int:
    """Index of the instance whose queue, with ``tokens`` more, is shortest for its strength.

    Args:
        loads: the instances.
        tokens: of the request that arrives; of idle instances the strongest is taken.
        among: indices to choose from, all by default.
        queue: tokens ahead of the request.
    """
    chosen = range(len(loads)) if among is None else among
    return min(chosen, key=lambda i: ((queue(loads[i]) + tokens) / strength(loads[i]), i))
