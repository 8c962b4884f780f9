"""A small cluster, model and trace to show the executor at work: ``python -m hetis_exec toy``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis_exec.driver import ExecutorInput
from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.cost.host import HostOverhead
from hetis_sim.cost.roofline import RooflineCost
from hetis_sim.policies.base import EngineLimits, PlanningProblem
from hetis_sim.policies.memory import RUNTIME_BYTES
from hetis_sim.policies.registry import make_policy
from hetis_sim.spec.cluster import ClusterSpec, HostSpec, LinkSpec
from hetis_sim.spec.errors import require, require_finite
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec
from hetis_sim.spec.request import Request

MODEL = ModelSpec("toy", layers=4, hidden=64, query_heads=8, kv_heads=4, head_dim=8, ffn_hidden=128,
                  vocab=251, context_limit_tokens=512, weight_bytes=4, kv_bytes=4)
LIMITS = EngineLimits(block_tokens=8, max_batch_requests=32, max_batch_tokens=256, memory_utilization=1.0)
LINK = LinkSpec("toy-link", 10e9, 5e-6)
MIB = 1024**2


@dataclass(frozen=True, slots=True)
class ToyTrace:
    """Poisson arrivals with even lengths.

    Attributes:
        requests: how many.
        rate_per_s: mean rate.
        prompt_tokens, output_tokens: smallest and largest.
        seed: of the trace, the prompts and the weights.
    """

    requests: int = 120
    rate_per_s: float = 150.0
    prompt_tokens: tuple[int, int] = (4, 60)
    output_tokens: tuple[int, int] = (4, 30)
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.requests >= 1, "requests", self.requests, ">= 1")
        require_finite("rate", self.rate_per_s, 0.0, open_low=True)

    def make(self) -> list[Request]:
        """The requests."""
        rng = np.random.default_rng([self.seed, 1])
        times = np.cumsum(rng.exponential(1.0 / self.rate_per_s, self.requests))
        prompts = rng.integers(*self.prompt_tokens, size=self.requests, endpoint=True)
        outputs = rng.integers(*self.output_tokens, size=self.requests, endpoint=True)
        return [Request(n, float(times[n]), int(prompts[n]), int(outputs[n])) for n in range(self.requests)]


def toy_cluster() -> ClusterSpec:
    """A host with two strong devices of little memory, and one with two weak devices.

    They differ for the policy only: all workers run on the cores of this host.
    """
    strong = GpuSpec("toy-strong", RUNTIME_BYTES + 3 * MIB // 2, 100e9, 10e12, 10e12, 5e12)
    weak = GpuSpec("toy-weak", RUNTIME_BYTES + 3 * MIB // 2, 50e9, 2e9, 2e9, 1e9)
    return ClusterSpec("toy", (HostSpec((strong, strong), LINK), HostSpec((weak, weak), LINK)), LINK)


def toy_input(policy_name: str, trace: ToyTrace, timeout_s: float = 30.0) -> ExecutorInput:
    """A run of a policy on the toy cluster.

    Raises:
        HetisError: no such policy, or it finds no plan.
    """
    cluster, cost = toy_cluster(), RooflineCost(host=HostOverhead(1e-4, 1e-5))
    policy = make_policy(policy_name)
    settings = SchedulerSettings(limits=LIMITS, collapse=False, rebalance_interval=8)
    problem = PlanningProblem(cluster, MODEL, cost, LIMITS, sum(trace.prompt_tokens) / 2,
                              sum(trace.output_tokens) / 2, trace.rate_per_s)
    return ExecutorInput(cluster, MODEL, cost, policy, policy.plan(problem), trace.make(), settings,
                         trace.seed, timeout_s, log_decisions=True)
