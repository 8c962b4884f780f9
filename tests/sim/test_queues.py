"""Invariant 12: a system cut down to a queue waits as queueing theory says.

One device, batches of one and a single output token: a request is served for the time of its
prefill, which the cost model makes proportional to its prompt, to a part in ten thousand. So any
law of service can be given through the lengths of prompts, and the waiting time is that from
arrival to the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from support import TINY, ConstantCost, sized_cluster, tiny_plan
from support_policies import LocalPolicy

from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.cost.model import AttentionCost, TransferCost
from hetis_sim.policies.base import EngineLimits
from hetis_sim.policies.view import InstanceLoad, RequestView
from hetis_sim.sim.simulation import Simulation, SimulationInput
from hetis_sim.spec.request import Request

Floats = NDArray[np.float64]

MEAN_TOKENS = 10_000
TOKEN_S = 1.0 / MEAN_TOKENS
MODEL = replace(TINY, layers=1, hidden=1, query_heads=1, kv_heads=1, head_dim=1, context_limit_tokens=1 << 20)
COST = ConstantCost(dense_s=0.0, dense_s_per_token=0.0, last_s=0.0, prefill_s_per_token=TOKEN_S,
                    attention=AttentionCost(0.0, 0.0, 0.0), wire=TransferCost(1e-9, 0.0), host_s=0.0)
REQUESTS = 12_000
BATCHES = 30
SERVERS = 3


class LeastWorkLeft(LocalPolicy):
    """Joins the instance that will be free first, which a policy may know: prompts are no secret.

    For requests served whole and in order this is the same queue, request by request, as one
    line before all servers.
    """

    def __init__(self, servers: int) -> None:
        super().__init__()
        self.free_s = [0.0] * servers

    def route(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        server = min(range(len(instances)), key=self.free_s.__getitem__)
        begin_s = max(self.free_s[server], request.arrival_s)
        self.free_s[server] = begin_s + request.prompt_tokens * TOKEN_S
        return server


def waits(arrival_s: Floats, tokens: NDArray[np.int64], servers: int) -> Floats:
    """Waiting times in a simulation."""
    plan = tiny_plan((1,), instances=servers, kv_heads=1)
    limits = EngineLimits(16, 1, 1, 1.0)
    cluster = sized_cluster(plan, 1 << 17, model=MODEL, limits=limits)
    requests = [Request(i, float(now_s), int(n), 1)
                for i, (now_s, n) in enumerate(zip(arrival_s, tokens, strict=True))]
    given = SimulationInput(cluster, MODEL, COST, LeastWorkLeft(servers), plan, requests,
                            SchedulerSettings(limits), 10**7)
    rows = Simulation(given).run().records().requests
    assert (rows["status"] == 0).all()
    return rows["first_scheduled_s"] - rows["arrival_s"]


def served_in_order(arrival_s: Floats, service_s: Floats, servers: int) -> Floats:
    """Waiting times by recursion (Lindley 1952; Kiefer and Wolfowitz 1955 for several servers)."""
    free_s = [0.0] * servers
    found = np.empty(len(arrival_s))
    for i, (now_s, needed_s) in enumerate(zip(arrival_s.tolist(), service_s.tolist(), strict=True)):
        server = min(range(servers), key=free_s.__getitem__)
        begin_s = max(free_s[server], now_s)
        found[i] = begin_s - now_s
        free_s[server] = begin_s + needed_s
    return found


def erlang_c(servers: int, load: float) -> float:
    """Probability of waiting in M/M/c with ``load`` = rate x mean service (Erlang 1917)."""
    idle = [load**k / math.factorial(k) for k in range(servers)]
    busy = load**servers / math.factorial(servers) / (1 - load / servers)
    return busy / (sum(idle) + busy)


def exponential(rng: np.random.Generator, n: int) -> Floats:
    """Coefficient of variation 1."""
    return rng.exponential(1.0, n)


def deterministic(rng: np.random.Generator, n: int) -> Floats:
    """Coefficient of variation 0."""
    return np.ones(n)


def gamma(rng: np.random.Generator, n: int) -> Floats:
    """Squared coefficient of variation 2, so a second moment of 3."""
    return rng.gamma(0.5, 2.0, n)


def pollaczek_khinchine(rate: float, second_moment: float) -> float:
    """Mean waiting time of M/G/1 with mean service 1."""
    return rate * second_moment / (2 * (1 - rate))


CASES: dict[str, tuple[Callable[[np.random.Generator, int], Floats], int, float, float, float]] = {
    # law of service, servers, rate, mean waiting time, probability of waiting
    "M/M/1": (exponential, 1, 0.6, 0.6 / (1 - 0.6), 0.6),
    "M/D/1": (deterministic, 1, 0.6, pollaczek_khinchine(0.6, 1.0), 0.6),
    "M/G/1, gamma service": (gamma, 1, 0.5, pollaczek_khinchine(0.5, 3.0), 0.5),
    "M/M/3": (exponential, SERVERS, 2.1, erlang_c(SERVERS, 2.1) / (SERVERS - 2.1), erlang_c(SERVERS, 2.1)),
}


def batch_z(values: Floats, expected: float) -> tuple[float, str]:
    """How many standard errors the mean is from what is expected, by batch means; and a sentence."""
    means = values[: len(values) // BATCHES * BATCHES].reshape(BATCHES, -1).mean(axis=1)
    error = means.std(ddof=1) / math.sqrt(BATCHES)
    z = (means.mean() - expected) / error
    low, high = means.mean() - 1.96 * error, means.mean() + 1.96 * error
    found = f"{means.mean():.4f} found, 95 % interval [{low:.4f}, {high:.4f}], z = {z:+.2f}"
    return z, f"{expected:.4f} expected, {found}"


@pytest.mark.parametrize("name", CASES)
def test_waiting_times_are_those_of_theory(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each wait equals the recursion's, and mean wait and share of waiting are those of the formula."""
    law, servers, rate, mean_s, share = CASES[name]
    rng = np.random.default_rng(12)
    arrival_s = np.cumsum(rng.exponential(1 / rate, REQUESTS))
    tokens = np.maximum(1, np.rint(law(rng, REQUESTS) * MEAN_TOKENS)).astype(np.int64)
    found = waits(arrival_s, tokens, servers)
    recursion = served_in_order(arrival_s, tokens * TOKEN_S, servers)
    np.testing.assert_allclose(found, recursion, rtol=0.0, atol=1e-7)
    settled = found[REQUESTS // 20:]
    mean_z, mean_text = batch_z(settled, mean_s)
    share_z, share_text = batch_z((settled > 1e-7).astype(float), share)
    with capsys.disabled():
        print(f"\n{name}: mean wait {mean_text}; share that waits {share_text}")
    assert abs(mean_z) <= 4
    assert abs(share_z) <= 4
