"""Whole simulations of tiny systems, and what must hold of their records."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
from hypothesis import strategies as st
from support import TINY, ConstantCost, sized_cluster, tiny_plan, with_host_memory
from support_policies import WanderPolicy

from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.cost.model import CostModel
from hetis_sim.metrics.checks import little_residual, record_violations
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.metrics.records import Records
from hetis_sim.policies.base import EngineLimits, Policy, PreemptionMode
from hetis_sim.policies.plan import Plan, Role
from hetis_sim.sim.simulation import Simulation, SimulationInput
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.request import Request

EVENT_BUDGET = 2_000_000
SLOW_WORKERS = {f"card{n}": 1.0 + 0.35 * n for n in range(16)}


@dataclass(frozen=True)
class Scenario:
    """A tiny system and its workload. Requests arrive by themselves, or with ``users`` in a closed loop.

    ``arrivals_s``, where given, are the times of the requests.
    ``blocks`` is the cache of each instance in blocks of whole contexts, ``worker_blocks`` that
    of an attention worker in blocks of one group; ``ranges`` is the share of placements that may
    split a request's tokens.
    """

    layers: tuple[int, ...] = (6,)
    tp: int = 1
    workers: int = 0
    instances: int = 1
    roles: tuple[Role, ...] = ()
    streams_handoff: bool = False
    ranges: float = 0.0
    mixes_pools: bool = False
    blocks: int = 40
    worker_blocks: int = 60
    block_tokens: int = 4
    chunked: bool = False
    chunk_tokens: int = 24
    preemption: PreemptionMode = "recompute"
    preemptions_max: int = 100
    host_bytes: int = 1 << 30
    interval: int = 5
    moves_max: int = 2
    batch_requests: int = 16
    batch_tokens: int = 64
    requests: int = 24
    rate: float = 12.0
    users: int = 0
    prompt_max: int = 40
    output_max: int = 30
    seed: int = 0
    arrivals_s: tuple[float, ...] = ()
    cost: CostModel = field(default_factory=lambda: ConstantCost(slow=SLOW_WORKERS))
    policy: Policy | None = None

    def settings(self, collapse: bool = True) -> SchedulerSettings:
        """The engine's settings."""
        limits = EngineLimits(self.block_tokens, self.batch_requests, self.batch_tokens, 1.0)
        return SchedulerSettings(limits, self.chunked, self.chunk_tokens, collapse, self.interval,
                                 self.preemptions_max, self.moves_max)

    def plan(self) -> Plan:
        """Who computes what."""
        return tiny_plan(self.layers, self.tp, self.workers, self.instances, self.roles)

    def cluster(self) -> ClusterSpec:
        """Cards with just the cache asked for."""
        cluster = sized_cluster(self.plan(), self.blocks, self.worker_blocks, TINY, self.settings().limits)
        return with_host_memory(cluster, self.host_bytes)

    def given(self, collapse: bool = True, debug: bool = False, log: bool = False) -> SimulationInput:
        """The input of a simulation."""
        workload = Users(self) if self.users else open_requests(self)
        return SimulationInput(self.cluster(), TINY, self.cost, self.decider(), self.plan(), workload,
                               self.settings(collapse), EVENT_BUDGET, log_decisions=log, debug=debug)

    def decider(self) -> Policy:
        """The policy given, or one that decides at random."""
        return self.policy or WanderPolicy(self.seed, preemption=self.preemption,
                                           streams_handoff=self.streams_handoff, ranges=self.ranges,
                                           mixes_pools=self.mixes_pools)

    def simulation(self, collapse: bool = True, debug: bool = False, log: bool = False) -> Simulation:
        """A simulation that has not begun."""
        return Simulation(self.given(collapse, debug, log))

    def run(self, collapse: bool = True, debug: bool = False) -> Recorder:
        """What a whole run records."""
        return self.simulation(collapse, debug).run()


def open_requests(scenario: Scenario) -> list[Request]:
    """Requests with random lengths and exponential gaps."""
    random = Random(scenario.seed)
    requests, now_s = [], 0.0
    for i in range(scenario.requests):
        now_s += random.expovariate(scenario.rate)
        requests.append(Request(i, now_s, random.randint(1, scenario.prompt_max),
                                random.randint(1, scenario.output_max)))
    if scenario.arrivals_s:
        requests = [replace(r, arrival_s=t) for r, t in zip(requests, scenario.arrivals_s, strict=True)]
    return requests


class Users:
    """A closed loop whose users think for a random time."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._random = [Random(repr((scenario.seed, user))) for user in range(scenario.users)]
        self._issued = 0

    def initial(self) -> list[Request]:
        made = (self.next_request(user, 0.0) for user in range(self._scenario.users))
        return [request for request in made if request is not None]

    def next_request(self, user: int, now_s: float) -> Request | None:
        if self._issued == self._scenario.requests:
            return None
        random, scenario = self._random[user], self._scenario
        arrival_s = now_s + random.expovariate(scenario.rate)
        request = Request(self._issued, arrival_s, random.randint(1, scenario.prompt_max),
                          random.randint(1, scenario.output_max), (), user)
        self._issued += 1
        return request


def scenarios(**fixed: object) -> st.SearchStrategy[Scenario]:
    """Any scenario: shapes, batching, tight and ample cache, open and closed loops."""
    drawn = {
        "layers": st.sampled_from([(6,), (6,), (2, 4), (1, 2, 3)]), "tp": st.sampled_from([1, 1, 2]),
        "workers": st.integers(0, 2), "instances": st.sampled_from([1, 1, 2]), "blocks": st.integers(18, 60),
        "roles": st.sampled_from([(), (), (), ("prefill", "decode"), ("decode", "both", "prefill")]),
        "streams_handoff": st.booleans(), "ranges": st.sampled_from([0.0, 0.0, 0.7]),
        "mixes_pools": st.booleans(),
        "worker_blocks": st.integers(10, 120), "block_tokens": st.sampled_from([1, 4, 16]),
        "chunked": st.booleans(), "chunk_tokens": st.integers(1, 48),
        "preemption": st.sampled_from(["recompute", "swap"]), "interval": st.integers(1, 12),
        "host_bytes": st.sampled_from([1 << 30, 1 << 30, 20_000, 0]),
        "moves_max": st.integers(0, 2), "batch_requests": st.integers(1, 12),
        "batch_tokens": st.integers(8, 120), "rate": st.sampled_from([3.0, 12.0, 60.0]),
        "users": st.sampled_from([0, 0, 5]), "seed": st.integers(0, 10**6),
    }
    for key, value in fixed.items():
        drawn[key] = value if isinstance(value, st.SearchStrategy) else st.just(value)
    return st.builds(Scenario, **drawn)


# -- what must hold of every record ------------------------------------------------------------


def assert_sound(records: Records, submitted: int) -> None:
    """Nobody is lost, times are in order, tokens are made once, and areas agree."""
    requests = records.requests
    assert len(requests) == submitted
    assert record_violations(records) == []
    assert little_residual(requests) < 1e-12
    assert_tokens_once(records)


def assert_tokens_once(records: Records) -> None:
    """Over the run, tokens are as many as finished requests asked for, and one has no gap before it.

    A request that is rejected after it has begun has made some tokens too, so with such ones
    the figures are lower bounds.
    """
    requests = records.requests
    finished = requests["status"] == 0
    wanted = int(requests["output_tokens"][finished].sum())
    gaps = records.itl.n
    decoded = int(records.steps["decode_tokens"].sum())
    if (requests["preemptions"][~finished] > 0).any():
        assert gaps >= wanted - finished.sum()
        return
    assert gaps == wanted - finished.sum()
    # Every token but the first comes from a decode iteration, or from a prefill that starts again.
    again = wanted - int(finished.sum()) - decoded
    assert 0 <= again <= int(requests["preemptions"].sum())


def event_hash(records: Records) -> str:
    """SHA-256 over all rows of requests, steps, transfers, samples and gaps."""
    sha = hashlib.sha256()
    for table in (records.requests, records.steps, records.transfers, records.samples):
        for name, values in table.columns.items():
            sha.update(name.encode())
            sha.update(np.ascontiguousarray(values).tobytes())
        sha.update(repr(sorted(table.categories.items())).encode())
    for values in (records.itl.low_s, records.itl.high_s, records.itl.gaps):
        sha.update(np.ascontiguousarray(values).tobytes())
    return sha.hexdigest()


TIMES = ("first_scheduled_s", "first_token_s", "finish_s")


def assert_same_requests(one: Records, other: Records, relative: float = 1e-9) -> None:
    """Both runs did the same to every request, at the same times."""
    for name in ("request_id", "status", "reason", "instance", "preemptions", "moves"):
        np.testing.assert_array_equal(one.requests[name], other.requests[name], name)
    for name in ("arrival_s", *TIMES, "moved_bytes", "remote_share"):
        np.testing.assert_allclose(one.requests[name], other.requests[name], rtol=relative, atol=0.0,
                                   equal_nan=True, err_msg=name)
