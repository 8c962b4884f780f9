"""Conformance checks for policies whose plans have a mesh."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

from hetis_sim.policies.base import PlanningProblem, Policy
from hetis_sim.policies.memory import mesh_cache_bytes, mesh_cache_units
from hetis_sim.policies.plan import SINK, SOURCE, MeshPlan
from hetis_sim.policies.view import MeshView, RequestView

Require = Callable[[bool, str, str], None]


def check_mesh_plan(mesh: MeshPlan, problem: PlanningProblem, require: Require) -> None:
    """Check that a mesh can be carried out: layers, weights, and a way from every node to the end."""
    cluster, model = problem.cluster, problem.model
    require(set(mesh.devices) <= set(range(len(cluster.devices))), "devices exist", str(mesh.devices))
    require(mesh.layers == model.layers, "layers sum to the model's", f"{mesh.layers} for {model.layers}")
    for number, node in enumerate(mesh.nodes):
        require(sum(node.owned_groups) == model.kv_heads, "owned groups sum to the KV heads",
                f"node {number}: {node.owned_groups} for {model.kv_heads}")
        hosts = {cluster.devices[device].host_id for device in node.devices}
        require(len(hosts) == 1, "a node is in one host", f"node {number}: {node.devices}")
        require(bool(mesh.outgoing[number]), "every node leads on", f"node {number}")
        require(any(edge.target == number for edge in mesh.edges), "every node is led to", f"node {number}")
    require(bool(mesh.outgoing[SOURCE]), "requests can enter", "no edge from the source")
    for device, left in mesh_cache_bytes(cluster, model, problem.limits, mesh).items():
        require(left >= 0, "weights fit", f"device {device} lacks {-left} bytes")


def mesh_signature(mesh: MeshPlan, problem: PlanningProblem) -> list[tuple[object, ...]]:
    """What of a mesh may not depend on the order of hosts."""
    devices = problem.cluster.devices
    return sorted((node.first_layer, node.layers, node.tp, devices[node.devices[0]].gpu.name)
                  for node in mesh.nodes)


class MeshBench:
    """A mesh in random states."""

    def __init__(self, policy: Policy, problem: PlanningProblem, mesh: MeshPlan, seed: int,
                 require: Require) -> None:
        self._policy = policy
        self._problem = problem
        self._mesh = mesh
        self._rng = random.Random(f"{seed}/mesh")
        self._require = require
        units = mesh_cache_units(problem.cluster, problem.model, problem.limits, mesh)
        block = problem.limits.block_tokens
        ranks = [zip(node.devices, node.owned_groups, strict=True) for node in mesh.nodes]
        self._capacity = [min(units[d] // owned for d, owned in pairs) * block for pairs in ranks]
        self.asked = self.opened = 0

    def check_empty(self) -> None:
        """A short request finds a path on the empty mesh."""
        zeros = [0] * len(self._mesh.nodes)
        view = self._view(zeros, zeros, zeros, zeros, [0] * len(self._mesh.edges))
        path = self._walk(RequestView(0, 0.0, 1, 1), view)
        self._require(path is not None, "a short request has a path on the empty mesh", str(self._mesh))

    def check_state(self) -> None:
        """A random load, and the decisions on it."""
        rng, count = self._rng, len(self._mesh.nodes)
        requests = [rng.choice((0, rng.randint(1, 200))) for _ in range(count)]
        layers = [n * rng.randint(1, node.layers) for n, node in zip(requests, self._mesh.nodes, strict=True)]
        prompts = [n * rng.randint(1, 3000) for n in layers]
        sent = [rng.randint(0, 10**7) for _ in self._mesh.edges]
        queued = [rng.randint(0, 5000) for _ in range(count)]
        tokens = max(1, int(rng.expovariate(1.0 / rng.choice((50, 500, 3000)))))
        self._walk(RequestView(1, 1.0, tokens, tokens), self._view(requests, layers, prompts, queued, sent))

    def _view(self, requests: list[int], layers: list[int], prompts: list[int], queued: list[int],
              sent: list[int]) -> MeshView:
        free = [max(0, most - used) for most, used in zip(self._capacity, prompts, strict=True)]
        return MeshView(self._mesh, self._capacity, free, requests, layers, prompts, queued, sent,
                        max(requests), 0, self._problem.limits.block_tokens)

    def _walk(self, request: RequestView, view: MeshView) -> list[int] | None:
        """The edges that the policy chooses; None where it opens no path."""
        policy, require = self._policy, self._require
        before = copy.deepcopy((request, view))
        opened = list(policy.open_nodes(request, view))
        require(list(policy.open_nodes(request, view)) == opened, "open_nodes is pure", str(view))
        require(len(opened) == len(self._mesh.nodes), "open_nodes answers for every node", str(opened))
        ways = self._ways(opened)
        self.asked += 1
        edges: list[int] = []
        at = SOURCE
        while at != SINK and ways[at]:
            edge = policy.next_edge(request, view, ways[at])
            require(policy.next_edge(request, view, ways[at]) == edge, "next_edge is pure", str(view))
            require(edge in ways[at], "next_edge takes one of the edges offered", f"{edge} of {ways[at]}")
            edges.append(edge)
            at = self._mesh.edges[edge].target
        require((request, view) == before, "decisions leave their arguments alone", str(view))
        self.opened += at == SINK
        return edges if at == SINK else None

    def _ways(self, opened: list[bool]) -> dict[int, list[int]]:
        """Edges from each node to open ones that lead to the end."""
        ways: dict[int, list[int]] = {}
        for at in (*reversed(self._mesh.order), SOURCE):
            targets = [(e, self._mesh.edges[e].target) for e in self._mesh.outgoing[at]]
            ways[at] = [e for e, target in targets if target == SINK or (opened[target] and ways[target])]
        return ways
