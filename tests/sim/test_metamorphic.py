"""Relations between runs: what may change of a system without changing what users see, and how it may.

Over every registered policy, so that a new one is held to them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from support import ScaledCost

from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.cost import RooflineCost
from hetis_sim.cost.model import CostModel, TransferCost
from hetis_sim.metrics.records import Records
from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.plan import Plan
from hetis_sim.policies.registry import make_policy, policy_names
from hetis_sim.sim.simulation import Simulation, SimulationInput
from hetis_sim.spec.architectures import model
from hetis_sim.spec.cluster import ClusterSpec, HostSpec, LinkSpec
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.gpus import gpu
from hetis_sim.spec.links import link
from hetis_sim.spec.request import Request
from hetis_sim.spec.slo import Slo
from hetis_sim.study.bound import upper_bound

EVENT_BUDGET = 2_000_000
TIMES = ("first_scheduled_s", "first_token_s", "finish_s")
LATENCIES = ("ttft_s", "tpot_s", "e2el_s")
CLOSE = 2e-3
"""The search for the bound ends where it falls by less than 0.05 %."""

TIES = 1e-3
"""How far latencies may differ where ties are broken otherwise."""


def cluster(*hosts: Sequence[str], network: str = "ethernet-100g") -> ClusterSpec:
    """Hosts with the named cards, joined by PCIe inside."""
    boxes = tuple(HostSpec(tuple(gpu(name) for name in host), link("pcie4x16")) for host in hosts)
    return ClusterSpec("tests", boxes, link(network))


MIXED = cluster(("a100-80gb",) * 2, ("t4",) * 2, ("t4",) * 2)


@dataclass(frozen=True)
class System:
    """A cluster and a workload; everything else follows from the policy."""

    where: ClusterSpec = MIXED
    model: str = "opt-30b"
    cost: CostModel = field(default_factory=RooflineCost)
    slow: float = 1.0
    gap_s: float = 0.02
    requests: int = 60
    plan: Plan | None = None

    def arrivals(self) -> list[Request]:
        """Random lengths and gaps; times are multiplied by ``slow``."""
        random, now_s, found = Random(7), 0.0, []
        for number in range(self.requests):
            now_s += random.expovariate(1.0 / self.gap_s)
            found.append(Request(number, self.slow * now_s, random.randint(20, 600), random.randint(2, 120)))
        return found

    def planned(self, policy: str) -> Plan:
        """The policy's plan for mean lengths and rate."""
        slo = Slo(5.0 * self.slow, 0.2 * self.slow)
        rate_per_s = 1.0 / (self.slow * self.gap_s)
        problem = PlanningProblem(self.where, model(self.model), self.cost, SchedulerSettings().limits,
                                  310, 61, rate_per_s, slo)
        return make_policy(policy).plan(problem)

    def run(self, policy: str) -> Records:
        """What a whole run under a policy records."""
        plan = self.plan or self.planned(policy)
        return Simulation(SimulationInput(self.where, model(self.model), self.cost, make_policy(policy), plan,
                                          self.arrivals(), SchedulerSettings(), EVENT_BUDGET)).run().records()


def assert_alike(one: Records, other: Records, columns: Sequence[str] = TIMES, factor: float = 1.0,
                 relative: float = 1e-9) -> None:
    """The same times for every request, the other's ``factor`` times as long."""
    assert (one.requests["status"] == 0).all()
    np.testing.assert_array_equal(one.requests["request_id"], other.requests["request_id"])
    for name in columns:
        np.testing.assert_allclose(other.requests[name], factor * one.requests[name], rtol=relative,
                                   atol=1e-12, equal_nan=True, err_msg=name)


# -- numbers of devices ------------------------------------------------------------------------


def renumbered(plan: Plan, number: dict[int, int]) -> Plan:
    """The plan with other numbers for its devices."""
    return replace(plan, instances=tuple(
        replace(instance, stages=tuple(replace(stage, devices=tuple(number[d] for d in stage.devices))
                                       for stage in instance.stages),
                attention_workers=tuple(number[d] for d in instance.attention_workers))
        for instance in plan.instances))


@pytest.mark.parametrize("policy", policy_names())
def test_equal_devices_are_interchangeable(policy: str) -> None:
    """The plan on the twins of its devices, in the same hosts and with hosts swapped: the same times."""
    system = System()
    plan = system.planned(policy)
    base = replace(system, plan=plan).run(policy)
    for order in ((1, 0, 3, 2, 5, 4), (0, 1, 4, 5, 2, 3)):
        number = dict(enumerate(order))
        assert_alike(base, replace(system, plan=renumbered(plan, number)).run(policy))


@pytest.mark.parametrize("policy", policy_names())
def test_the_order_of_hosts_changes_nothing(policy: str) -> None:
    """Planned and run on the same hosts in another order: the same times for every request."""
    hosts = MIXED.hosts
    other = replace(MIXED, hosts=(hosts[1], hosts[0], hosts[2]))
    assert_alike(System().run(policy), System(where=other).run(policy))


# -- links ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FreeLinks(ScaledCost):
    """A cost model whose links take no time."""

    def transfer(self, link: LinkSpec) -> TransferCost:
        return TransferCost(1e-30, 0.0)

    def all_reduce_s(self, gpu: GpuSpec, link: LinkSpec, size_bytes: int, ranks: int) -> float:
        return 0.0


@pytest.mark.parametrize("policy", policy_names())
def test_links_without_cost_are_co_location(policy: str) -> None:
    """Where no link takes time, cards in hosts of their own do what cards in one host do."""
    free = LinkSpec("pcie-free", 1e30, 0.0)
    cards = [gpu(name) for name in ("a100-80gb", "t4", "l4")]
    one = ClusterSpec("one", (HostSpec(tuple(cards), free),), free)
    each = ClusterSpec("each", tuple(HostSpec((card,), free) for card in cards), free)
    cost = FreeLinks(RooflineCost(), 1.0)
    assert_alike(System(one, cost=cost).run(policy), System(each, cost=cost).run(policy))


# -- one device ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", policy_names())
def test_policies_agree_on_one_device_without_load(policy: str) -> None:
    """A request that is alone on the only card has nothing that could be decided for it."""
    alone = System(cluster(("a100-80gb",)), gap_s=1e4, requests=8)
    assert_alike(alone.run("vllm"), alone.run(policy), LATENCIES)


# -- time ----------------------------------------------------------------------------------------


def shape(plan: Plan) -> list[tuple[object, ...]]:
    """Who does what, without rates."""
    return [(instance.stages, instance.attention_workers, instance.role) for instance in plan.instances]


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("factor", [2.0, pytest.param(0.125, marks=pytest.mark.slow)])
def test_slower_everything_is_the_same_run_in_slow_motion(policy: str, factor: float) -> None:
    """All durations, gaps and promised latencies times k: the same plan, and exactly k times every latency.

    For powers of two, with which times round alike; other factors let rounding decide between workers that
    are done at the same time. A linear program may be decided otherwise even so: of several optima the
    solver takes one by the size of its coefficients, and heads that sit elsewhere grow otherwise.
    """
    system = System()
    slow = replace(system, cost=ScaledCost(system.cost, factor), slow=factor)
    assert shape(slow.planned(policy)) == shape(system.planned(policy))
    solves = getattr(getattr(make_policy(policy), "settings", None), "dispatch", "") == "lp"
    relative = TIES if solves else 0.0
    assert_alike(system.run(policy), slow.run(policy), (*TIMES, *LATENCIES), factor, relative)


# -- the bound -----------------------------------------------------------------------------------

LENGTHS = (np.array([40, 300, 900, 120]), np.array([200, 20, 90, 400]))


RATES = ("memory_bandwidth_bytes_per_s", "fp16_flops_per_s", "fp16_vector_flops_per_s", "fp32_flops_per_s")


def bound(where: ClusterSpec) -> float:
    """The bound in requests per second."""
    found = upper_bound(where, model("llama2-13b"), RooflineCost(), SchedulerSettings(), [LENGTHS])
    return found.requests_per_s


def faster(where: ClusterSpec, name: str) -> ClusterSpec:
    """All cards of a kind with half as much again of every rate."""
    def better(card: GpuSpec) -> GpuSpec:
        if card.name != name:
            return card
        return replace(card, **{key: 1.5 * getattr(card, key) for key in RATES})

    return replace(where, hosts=tuple(replace(host, gpus=tuple(map(better, host.gpus)))
                                      for host in where.hosts))


@pytest.mark.parametrize("name", ["a100-80gb", "t4"])
def test_a_faster_card_never_lowers_the_bound(name: str) -> None:
    """Whichever kind it is; the strong one raises it."""
    base, better = bound(MIXED), bound(faster(MIXED, name))
    assert better >= base * (1 - CLOSE)
    assert better > 1.05 * base or name != "a100-80gb"


def test_a_faster_link_never_lowers_the_bound() -> None:
    """From 1 to 400 Gb/s between hosts, and from PCIe 3 to NVLink inside."""
    rates = [bound(cluster(("a100-80gb",), ("t4",) * 2, network=f"ethernet-{speed}g"))
             for speed in (1, 10, 100, 400)]
    assert all(fast >= slow * (1 - CLOSE) for slow, fast in pairwise(rates))
    inside = [bound(replace(MIXED, hosts=tuple(replace(host, link=link(name)) for host in MIXED.hosts)))
              for name in ("pcie3x16", "pcie5x16", "nvlink4")]
    assert all(fast >= slow * (1 - CLOSE) for slow, fast in pairwise(inside))
