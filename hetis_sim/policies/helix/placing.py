"""From candidate nodes to a mesh: placements are made, their flow is worked out, the best is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.helix.chain import chain
from hetis_sim.policies.helix.flow import EdgeFlows, Placed, connections, largest_flow
from hetis_sim.policies.helix.heuristics import HEURISTICS, Ranges
from hetis_sim.policies.helix.milp import Budget
from hetis_sim.policies.helix.program import LinkedProgram, PlacementProgram
from hetis_sim.policies.helix.settings import HelixSettings
from hetis_sim.policies.helix.sites import SiteKind, rate_bound, site_kinds
from hetis_sim.policies.plan import SINK, SOURCE, MeshEdge, MeshNode, MeshPlan, even_groups
from hetis_sim.spec.errors import InfeasibleError, require

FLOW_SHARE_LEAST = 0.05
"""An edge with less flow than this share of the fullest one of its node is not used.

The source leaves out what has less than 5 % of the node's total flow, which with twenty equal
edges would leave none.
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement and its flow in tokens per second; ``flows`` has places in ``nodes`` as ends."""

    name: str
    nodes: tuple[Placed, ...]
    flow: float
    flows: EdgeFlows


class Placing:
    """All placements that are looked at for a problem.

    Attributes:
        search: figures of the search, for the plan.
    """

    def __init__(self, problem: PlanningProblem, settings: HelixSettings) -> None:
        self.problem = problem
        self._settings = settings
        self._layers = problem.model.layers
        share = 1.0 if settings.placement == "given" else settings.weights_share
        self._kinds = site_kinds(problem, settings.high_water, share, settings.tp_max)
        self._site_kinds = [kind for kind in self._kinds for _ in kind.groups]
        self._groups = [group for kind in self._kinds for group in kind.groups]
        self._activation_bytes = problem.model.hidden * problem.model.activation_bytes
        self.search: dict[str, Any] = {}

    def best(self) -> Candidate:
        """The placement that the settings ask for.

        Raises:
            InfeasibleError: the heuristic asked for finds none.
        """
        chosen = self._settings.placement
        if chosen == "given":
            return self._given()
        if chosen != "milp":
            found = list(self._placed(chosen, HEURISTICS[chosen]))
            if not found:
                raise InfeasibleError(f"policy.placement={chosen!r} finds no placement of "
                                      f"{self.problem.model.name} on {self.problem.cluster.name}; use milp")
            return max(found, key=lambda candidate: candidate.flow)
        starts = [candidate for name, make in (*HEURISTICS.items(), ("chain", chain))
                  for candidate in self._placed(name, make)]
        if not starts:
            raise InfeasibleError(f"no placement of {self.problem.model.name} on {self.problem.cluster.name} "
                                  "passes every layer")
        return self._solve(starts)

    def _given(self) -> Candidate:
        """The ranges of the settings, device by device.

        Raises:
            SpecError, InfeasibleError: they do not fit the cluster, or pass not all layers.
        """
        ranges, devices = self._settings.ranges, len(self.problem.cluster.devices)
        require(len(ranges) == devices, "policy.ranges", len(ranges), f"one range for each of {devices} "
                                                                      "devices")
        found: list[tuple[int, int] | None] = []
        for group, kind in zip(self._groups, self._site_kinds, strict=True):
            held = ranges[group[0]]
            require(not held or held[1] <= kind.layers_most, "policy.ranges", list(held),
                    f"at most {kind.layers_most} layers on device {group[0]}")
            found.append((held[0], held[1]) if held else None)
        candidate = self._evaluate("given", tuple(found))
        if candidate.flow <= 0.0:
            raise InfeasibleError(f"the given ranges pass not all {self._layers} layers one after the other")
        return candidate

    def _placed(self, name: str,
                make: Callable[[Sequence[SiteKind], int], Iterator[Ranges]]) -> Iterator[Candidate]:
        for ranges in make(self._kinds, self._layers):
            found = self._evaluate(name, ranges)
            if found.flow > 0.0:
                self.search[name] = max(found.flow, self.search.get(name, 0.0))
                yield found

    def _solve(self, starts: Sequence[Candidate]) -> Candidate:
        """What the solver makes of the best start, if there is something to gain."""
        settings = self._settings
        best = max(starts, key=lambda candidate: candidate.flow)
        bound = rate_bound(self._kinds, self._layers)
        self.search["solver"] = "not needed"
        if best.flow < (1.0 - settings.milp_gap) * bound:
            program, columns = self._program(bound)
            self.search |= {"solver": "program too large", "variables": columns}
            if columns > settings.milp_columns:
                self.search |= {"placement": best.name, "bound": bound}
                return best
            budget = Budget(settings.milp_nodes, settings.milp_gap, settings.milp_time_s)
            result = program().solve(budget, self._ranges(best))
            bound = min(bound, result.bound)
            self.search["solver"] = result.stopped
            if result.ranges is not None:
                best = max(best, self._evaluate("milp", result.ranges), key=lambda candidate: candidate.flow)
        self.search |= {"placement": best.name, "bound": bound}
        return best

    def _program(self, bound: float) -> tuple[Callable[[], PlacementProgram | LinkedProgram], int]:
        """How to make the program, and its variables.

        It is the small one, or the one with links where some link carries less than a flow could be.
        """
        kinds, layers, partial = self._kinds, self._layers, self._settings.partial_inference
        sites = range(len(self._groups))
        slowest = min((self._site_link_rate(i, j) for i in sites for j in sites if i != j), default=bound)
        if slowest >= bound:
            return (lambda: PlacementProgram(kinds, layers, partial),
                    PlacementProgram.columns(kinds, layers, partial))
        return (lambda: LinkedProgram(kinds, layers, partial, self._site_link_rate),
                LinkedProgram.columns(kinds, layers))

    def _ranges(self, candidate: Candidate) -> Ranges:
        held = {node.site: (node.first, node.layers) for node in candidate.nodes}
        return tuple(held.get(site) for site in range(len(self._groups)))

    def _evaluate(self, name: str, ranges: Ranges) -> Candidate:
        nodes = tuple(Placed(site, item[0], item[1], self._site_kinds[site].rates[item[1] - 1])
                      for site, item in enumerate(ranges) if item is not None)
        partial = self._settings.partial_inference or name == "petals"
        pairs = connections(nodes, self._layers, partial)
        if name == "separate":
            pairs = [pair for pair in pairs if self._together(nodes, pair)]
        rate = self._site_link_rate
        flow, flows = largest_flow(nodes, pairs, lambda i, j: rate(nodes[i].site, nodes[j].site))
        return Candidate(name, nodes, flow, flows)

    def _together(self, nodes: Sequence[Placed], pair: tuple[int, int]) -> bool:
        """Whether a pair of nodes belongs to the same pipeline of nodes of one kind.

        Their ranges come pipeline by pipeline, so those of one pipeline are neighbours.
        """
        i, j = pair
        if i == SOURCE or j == SINK:
            return True
        return j == i + 1 and self._site_kinds[nodes[i].site] is self._site_kinds[nodes[j].site]

    def _site_link_rate(self, source: int, target: int) -> float:
        """Tokens per second that the link between two candidate nodes carries."""
        problem = self.problem
        link = problem.cluster.link(self._groups[source][-1], self._groups[target][0])
        return 1.0 / (problem.cost.transfer(link).gamma_s_per_byte * self._activation_bytes)

    def mesh(self, found: Candidate) -> MeshPlan:
        """The plan of a placement: nodes that have flow, in the order of their layers."""
        fullest: dict[int, float] = {}
        for (i, _), flow in found.flows.items():
            fullest[i] = max(flow, fullest.get(i, 0.0))
        kept = {pair: flow for pair, flow in found.flows.items()
                if flow >= FLOW_SHARE_LEAST * fullest[pair[0]]}
        used = _on_the_way(kept)
        order = sorted(used, key=lambda n: (found.nodes[n].first, found.nodes[n].end, n))
        number = {SOURCE: SOURCE, SINK: SINK} | {n: place for place, n in enumerate(order)}
        nodes: list[MeshNode] = []
        for n in order:
            node, devices = found.nodes[n], self._groups[found.nodes[n].site]
            owned = even_groups(self.problem.model.kv_heads, len(devices))
            nodes.append(MeshNode(devices, node.layers, owned, node.first, node.tokens_per_s))
        edges = [MeshEdge(number[i], number[j], flow) for (i, j), flow in kept.items()
                 if i in number and j in number]
        edges.sort(key=lambda edge: (edge.source, edge.target))
        return MeshPlan(tuple(nodes), tuple(edges), self.problem.output_tokens)

    def reasons(self, mesh: MeshPlan) -> dict[int, str]:
        """A sentence for every device."""
        devices = self.problem.cluster.devices
        known = {device for group in self._groups for device in group}
        reasons = {card.device_id: "not used: adds nothing to the flow" if card.device_id in known else
                   "not used: no layer fits beside cache" for card in devices}
        for node in mesh.nodes:
            alone = "" if node.tp == 1 else f", one of {node.tp} tensor-parallel ranks"
            for device in node.devices:
                reasons[device] = f"{node.layers} of {mesh.layers} layers{alone}"
        return reasons


def _on_the_way(flows: EdgeFlows) -> set[int]:
    """Nodes that lie between source and sink when only these edges are used."""
    ahead, back = {SOURCE}, {SINK}
    while True:
        more = {j for i, j in flows if i in ahead} | ahead
        fewer = {i for i, j in flows if j in back} | back
        if more == ahead and fewer == back:
            return (ahead & back) - {SOURCE, SINK}
        ahead, back = more, fewer
