"""Helix: layers placed for the largest flow of tokens, and a path for each request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

from hetis_sim.policies.base import PlanningProblem, Policy
from hetis_sim.policies.helix.placing import Placing
from hetis_sim.policies.helix.settings import HelixSettings
from hetis_sim.policies.plan import SINK, Plan
from hetis_sim.policies.view import MeshView, RequestView


class HelixPolicy(Policy):
    """Helix (Mei et al., ASPLOS '25).

    From the source: every node holds a range of layers; the ranges are chosen so that the flow of tokens
    from the source to the sink is the largest, limited by the rate of each node and the bandwidth between
    them, by a mixed-integer linear program that starts from heuristic placements. Each request gets a path
    of its own: at every node the next one is chosen by interleaved weighted round-robin with the flow
    of the edges as weights, by tokens. A node whose cache is expected to fill beyond a mark is left out;
    where no path is open, requests wait. Nodes compute whole prompts and single tokens in turns.

    Ours: the program is smaller and better started (:mod:`.program`, :mod:`.chain`); HiGHS solves it
    where it is small enough, and else the best start is the plan; rates come from this project's cost
    model; a node that holds nothing is open whatever the mark; a request that finds no cache for its next
    token has a victim's cache taken away, which is then computed again (there, it is swapped to host
    memory).
    """

    name: ClassVar[str] = "helix"
    plans_for_rate: ClassVar[bool] = False
    settings_type: ClassVar[type] = HelixSettings

    def __init__(self, settings: HelixSettings | None = None) -> None:
        self.settings = settings or HelixSettings()

    def plan(self, problem: PlanningProblem) -> Plan:
        """The placement of largest flow, or that of a heuristic.

        Raises:
            InfeasibleError: the model does not fit.
        """
        started = time.perf_counter()
        placing = Placing(problem, self.settings)
        found = placing.best()
        mesh = placing.mesh(found)
        search = {"seconds": round(time.perf_counter() - started, 4), **placing.search, "flow": found.flow}
        return Plan((), placing.reasons(mesh), search, mesh)

    def open_nodes(self, request: RequestView, view: MeshView) -> Sequence[bool]:
        """Nodes whose cache stays below the mark if the request passes all their layers.

        Requests are expected to need their prompts and a share of the mean output.
        """
        output = self.settings.output_share * view.plan.mean_output_tokens
        found: list[bool] = []
        for n, node in enumerate(view.plan.nodes):
            held = view.prompt_entries[n] + view.request_layers[n] * output
            needed = (request.context_tokens + output) * node.layers
            most = self.settings.high_water * view.capacity_entries[n]
            found.append(not view.requests[n] or held + needed <= most)
        return found

    def next_edge(self, request: RequestView, view: MeshView, edges: Sequence[int]) -> int:
        """The next edge, by the configured rule.

        ``wrr``: the edge that has been sent the least for its weight once this request is counted.
        ``shortest_queue``: the node at which the fewest tokens wait for its rate. ``random``: any, by a
        hash of the request and the place.
        """
        plan = view.plan
        if self.settings.scheduling == "wrr":
            tokens = request.context_tokens
            return min(edges, key=lambda e: ((view.sent_tokens[e] + tokens) / plan.edges[e].tokens_per_s, e))
        if self.settings.scheduling == "random":
            return edges[_hashed(request.request_id, plan.edges[edges[0]].source) % len(edges)]
        return min(edges, key=lambda e: (_queue_s(view, plan.edges[e].target), e))


def _queue_s(view: MeshView, node: int) -> float:
    """Seconds of work that wait at a node."""
    return 0.0 if node == SINK else view.queued_tokens[node] / view.plan.nodes[node].tokens_per_s


def _hashed(request_id: int, at: int) -> int:
    """A number that looks drawn at random (the mixer of SplitMix64, Steele et al., OOPSLA '14)."""
    mask = (1 << 64) - 1
    z = (request_id * 0x9E3779B97F4A7C15 + (at + 2) * 0xD1B54A32D192ED03) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
