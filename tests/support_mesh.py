"""Small meshes, whole runs of them, and policies that choose paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from hypothesis import strategies as st
from support import NETWORK, PEER, TINY, ConstantCost, gpu
from support_policies import LocalPolicy

from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.cost.model import CostModel
from hetis_sim.policies.base import EngineLimits, Policy
from hetis_sim.policies.memory import mesh_cache_bytes, unit_bytes
from hetis_sim.policies.plan import SINK, SOURCE, MeshEdge, MeshNode, MeshPlan, Plan, even_groups
from hetis_sim.policies.view import MeshView, RequestView
from hetis_sim.sim.simulation import Simulation, SimulationInput
from hetis_sim.spec.cluster import ClusterSpec, HostSpec
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.request import Request

EVENT_BUDGET = 2_000_000

Ranges = tuple[tuple[int, int], ...]
"""First layer and number of layers of each node."""

ONE: Ranges = ((0, 6),)
PIPELINE: Ranges = ((0, 2), (2, 4))
DIAMOND: Ranges = ((0, 2), (2, 2), (2, 2), (4, 2))
OVERLAP: Ranges = ((0, 3), (1, 4), (2, 4), (3, 3), (4, 2))


class MeshPolicy(LocalPolicy):
    """Opens all nodes and takes edges by the default rule, or at random."""

    name = "mesh-of-tests"

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self._seed = seed

    def next_edge(self, request: RequestView, view: MeshView, edges: Sequence[int]) -> int:
        if self._seed is None:
            return super().next_edge(request, view, edges)
        random = Random(repr((self._seed, request.request_id, request.preemptions, tuple(edges))))
        return random.choice(list(edges))


def mesh_plan(ranges: Ranges, tp: int = 1, kv_heads: int = TINY.kv_heads, output: float = 10.0) -> MeshPlan:
    """Nodes on consecutive devices, and an edge wherever a request can go on, partial inference included."""
    nodes = tuple(MeshNode(tuple(range(n * tp, n * tp + tp)), layers, even_groups(kv_heads, tp), first,
                           float(10 + n)) for n, (first, layers) in enumerate(ranges))
    last = max(node.end_layer for node in nodes)
    edges = [MeshEdge(SOURCE, n, float(n + 1)) for n, node in enumerate(nodes) if node.first_layer == 0]
    edges += [MeshEdge(i, j, float(j + 1)) for i, before in enumerate(nodes) for j, node in enumerate(nodes)
              if node.first_layer <= before.end_layer < node.end_layer]
    edges += [MeshEdge(n, SINK, float(n + 1)) for n, node in enumerate(nodes) if node.end_layer == last]
    return MeshPlan(nodes, tuple(edges), output)


def mesh_cluster(mesh: MeshPlan, blocks: int, limits: EngineLimits, hosts: bool = True) -> ClusterSpec:
    """A cluster on which every node caches ``blocks`` blocks of contexts in all its layers.

    Each node is a host of its own, or all of them are in one.
    """
    rough = GpuSpec("rough", 1 << 45, 1e12, 1e14, 1e14, 1e13)
    empty = ClusterSpec("rough", (HostSpec((rough,) * len(mesh.devices), PEER),), NETWORK)
    left = mesh_cache_bytes(empty, TINY, limits, mesh)
    cards: dict[int, GpuSpec] = {}
    for node in mesh.nodes:
        for device, owned in zip(node.devices, node.owned_groups, strict=True):
            units = blocks * owned * node.layers
            cards[device] = gpu(f"card{device}", rough.memory_bytes - left[device]
                                + units * unit_bytes(TINY, limits))
    if not hosts:
        return ClusterSpec("tests", (HostSpec(tuple(cards.values()), PEER),), NETWORK)
    return ClusterSpec("tests", tuple(HostSpec(tuple(cards[d] for d in node.devices), PEER)
                                      for node in mesh.nodes), NETWORK)


@dataclass(frozen=True)
class MeshScenario:
    """A tiny mesh and its workload; ``blocks`` is the cache of each node in blocks of whole contexts."""

    ranges: Ranges = DIAMOND
    tp: int = 1
    hosts: bool = True
    blocks: int = 40
    block_tokens: int = 4
    batch_requests: int = 16
    batch_tokens: int = 64
    preemptions_max: int = 100
    requests: int = 24
    rate: float = 12.0
    prompt_max: int = 40
    output_max: int = 30
    seed: int = 0
    cost: CostModel = field(default_factory=ConstantCost)
    policy: Policy = field(default_factory=MeshPolicy)

    def settings(self) -> SchedulerSettings:
        """The engine's settings."""
        limits = EngineLimits(self.block_tokens, self.batch_requests, self.batch_tokens, 1.0)
        return SchedulerSettings(limits, preemptions_max=self.preemptions_max)

    def workload(self) -> list[Request]:
        """Requests with random lengths and exponential gaps."""
        random, now_s = Random(self.seed), 0.0
        made = []
        for n in range(self.requests):
            now_s += random.expovariate(self.rate)
            made.append(Request(n, now_s, random.randint(1, self.prompt_max),
                                random.randint(1, self.output_max)))
        return made

    def simulation(self, debug: bool = False, log: bool = False) -> Simulation:
        """A simulation that has not begun."""
        mesh, settings = mesh_plan(self.ranges, self.tp), self.settings()
        cluster = mesh_cluster(mesh, self.blocks, settings.limits, self.hosts)
        return Simulation(SimulationInput(cluster, TINY, self.cost, self.policy, Plan((), mesh=mesh),
                                          self.workload(), settings, EVENT_BUDGET, log_decisions=log,
                                          debug=debug))


def mesh_scenarios() -> st.SearchStrategy[MeshScenario]:
    """Any mesh: shapes, tight and ample cache, several kinds of load."""
    return st.builds(
        MeshScenario, ranges=st.sampled_from([ONE, PIPELINE, DIAMOND, OVERLAP]),
        tp=st.sampled_from([1, 1, 2]), hosts=st.booleans(), blocks=st.integers(18, 60),
        block_tokens=st.sampled_from([1, 4, 16]),
        batch_requests=st.integers(1, 12), batch_tokens=st.integers(8, 120),
        rate=st.sampled_from([3.0, 12.0, 60.0]), seed=st.integers(0, 10**6),
        policy=st.sampled_from([MeshPolicy(), MeshPolicy(1), MeshPolicy(2)]))
