"""Settings of the continuous-batching scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from hetis_sim.policies.base import EngineLimits
from hetis_sim.spec.errors import require, require_finite


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
        joint_attention: requests that decode in a mixed step share one attention kernel with its prompts,
            which takes longer than one of their own; see :meth:`CostModel.mixed_attention`.
        async_scheduling: a step is put together while the one before it runs (vLLM's asynchronous
            scheduling). So who arrives while the instance is busy is first seen one step later.
        prompt_patience: iterations that decoding requests have for themselves before a single prompt may
            hold them up, where whole prompts go first; 0 for none. After n of them since the last
            prompts, those that wait are prefilled once they are at least
            ``running * (patience - n) / patience``, as in IBM's fork of TGI (``max_waiting_tokens``).
        prompt_pause_share: with patience, decoding requests have so much of the time that prompts took for
            themselves afterwards, however many wait; 0.5 in that fork since January 2024, 0 before.
        mesh_message_s: in a mesh, host time in which a node hands over the results of one request; 0 for all
            of a batch at once.
        mesh_poll_s: in a mesh, time between two looks of an idle node for arrivals; 0 for at once.
    """

    limits: EngineLimits = field(default_factory=EngineLimits)
    chunked_prefill: bool = False
    chunk_tokens: int = 512
    collapse: bool = True
    rebalance_interval: int = 32
    preemptions_max: int = 100
    moves_max: int = 1
    joint_attention: bool = False
    async_scheduling: bool = False
    prompt_patience: int = 0
    mesh_message_s: float = 0.0
    mesh_poll_s: float = 0.0
    prompt_pause_share: float = 0.5

    def __post_init__(self) -> None:
        for key in ("chunk_tokens", "rebalance_interval", "preemptions_max"):
            require(getattr(self, key) >= 1, f"scheduler.{key}", getattr(self, key), ">= 1")
        require(self.moves_max >= 0, "scheduler.moves_max", self.moves_max, ">= 0")
        for key in ("mesh_message_s", "mesh_poll_s"):
            require_finite(f"scheduler.{key}", getattr(self, key), 0.0, 1.0)
        require_finite("scheduler.prompt_pause_share", self.prompt_pause_share, 0.0, 100.0)
        require(self.prompt_patience >= 0, "scheduler.prompt_patience", self.prompt_patience, ">= 0")
        require(not (self.prompt_patience and self.chunked_prefill), "scheduler.prompt_patience",
                self.prompt_patience, "0 with scheduler.chunked_prefill=true, where prompts hold nobody up")
        require(not self.joint_attention or self.chunked_prefill, "scheduler.joint_attention",
                self.joint_attention, "false unless scheduler.chunked_prefill=true mixes the two")
        limits = self.limits
        for key in ("block_tokens", "max_batch_requests", "max_batch_tokens"):
            require(getattr(limits, key) >= 1, f"scheduler.{key}", getattr(limits, key), ">= 1")
        require(limits.cache_tokens >= 0, "scheduler.cache_tokens", limits.cache_tokens, ">= 0")
        require(0 < limits.memory_utilization <= 1, "scheduler.memory_utilization",
                limits.memory_utilization, "in (0, 1]")
