"""Settings of the continuous-batching scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from hetis_sim.policies.base import EngineLimits
from hetis_sim.spec.errors import require


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """How an instance forms its batches.

    Attributes:
        limits: bounds of a batch and of memory, shared with the policies.
        chunked_prefill: mix pieces of prompts into decode steps instead of giving whole
            prompts priority.
        chunk_tokens: tokens of a mixed step, decode tokens included.
        collapse: let a decode step stand for as many iterations as nothing can change in.
        rebalance_interval: iterations of a micro-batch between two questions to the policy.
        preemptions_max: a request that loses its cache more often is rejected.
        moves_max: moves of heads under way at once in one instance.
    """

    limits: EngineLimits = field(default_factory=EngineLimits)
    chunked_prefill: bool = False
    chunk_tokens: int = 512
    collapse: bool = True
    rebalance_interval: int = 32
    preemptions_max: int = 100
    moves_max: int = 1

    def __post_init__(self) -> None:
        for key in ("chunk_tokens", "rebalance_interval", "preemptions_max"):
            require(getattr(self, key) >= 1, f"scheduler.{key}", getattr(self, key), ">= 1")
        require(self.moves_max >= 0, "scheduler.moves_max", self.moves_max, ">= 0")
        limits = self.limits
        for key in ("block_tokens", "max_batch_requests", "max_batch_tokens"):
            require(getattr(limits, key) >= 1, f"scheduler.{key}", getattr(limits, key), ">= 1")
        require(0 < limits.memory_utilization <= 1, "scheduler.memory_utilization",
                limits.memory_utilization, "in (0, 1]")
