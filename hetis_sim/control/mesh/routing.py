"""How a request gets its path: the policy opens nodes and chooses edge by edge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hetis_sim.control.decisions import DecisionLog
from hetis_sim.control.mesh.books import MeshBooks
from hetis_sim.control.mesh.walk import Path
from hetis_sim.control.placement import PlacementError
from hetis_sim.control.state import RequestState
from hetis_sim.policies.base import EngineLimits, Policy
from hetis_sim.policies.plan import SINK, SOURCE, MeshPlan
from hetis_sim.policies.view import MeshView

if TYPE_CHECKING:
    from hetis_sim.control.mesh.engine import NodeQueue


class Routing:
    """Asks the policy for paths, on a snapshot in which the counters of the mesh stand.

    Attributes:
        sent_tokens: per edge, tokens sent over it; prompts count as soon as their path is chosen.
        queued_tokens: per node, tokens that wait there or are on their way to it.
    """

    def __init__(self, plan: MeshPlan, policy: Policy, books: MeshBooks, queues: Sequence[NodeQueue],
                 limits: EngineLimits, log: DecisionLog) -> None:
        self._plan = plan
        self._policy = policy
        self._books = books
        self._queues = queues
        self._log = log
        self.sent_tokens = [0] * len(plan.edges)
        self.queued_tokens = [0] * len(plan.nodes)
        # One full batch for each node that a path may have: as many as lanes of an even pipeline hold.
        self._requests_most = limits.max_batch_requests * longest_path(plan)

    def view(self, running: int, waiting: int) -> MeshView:
        """A picture of the mesh for its policy."""
        books = self._books
        return MeshView(self._plan, books.capacity_entries, books.free_entries(), list(books.requests),
                        list(books.request_layers), list(books.prompt_entries), list(self.queued_tokens),
                        list(self.sent_tokens), running, waiting, books.block_tokens)

    def choose(self, state: RequestState, running: int, waiting: int) -> Path | None:
        """A path for a request, None while the policy opens none that has room.

        Raises:
            PlacementError: the policy chooses an edge that it was not offered, or opens no path
                on an empty mesh.
        """
        view = self.view(running, waiting)
        request = state.view(state.generated_base)
        opened = self._policy.open_nodes(request, view)
        room = self._room(state, view)
        ways = self._leading_on([a and b for a, b in zip(opened, room, strict=True)])
        if not ways[SOURCE]:
            if not running:
                raise PlacementError(f"policy {self._policy.name!r} opens no path for request "
                                     f"{state.request_id} ({state.context_tokens} tokens) on the empty mesh")
            self._log.record("path", view, [request], None)
            return None
        edges: list[int] = []
        at = SOURCE
        while at != SINK:
            edge = self._policy.next_edge(request, view, ways[at])
            if edge not in ways[at]:
                raise PlacementError(f"policy {self._policy.name!r} sends request {state.request_id} along "
                                     f"edge {edge!r}, must be one of {ways[at]}")
            edges.append(edge)
            at = self._plan.edges[edge].target
        self._log.record("path", view, [request], edges)
        return self._books.path(tuple(edges))

    def _room(self, state: RequestState, view: MeshView) -> list[bool]:
        """Nodes with room for the prompt and a token now, for all tokens once empty, and in their batches.

        Engines are told the longest output of a request (``max_tokens``), so this may use it.
        """
        block = self._books.block_tokens
        now = self._books.blocks(state.context_tokens + 1) * block
        most = self._books.blocks(state.request.total_tokens) * block
        return [now * node.layers <= free and most * node.layers <= capacity and held < self._requests_most
                for node, free, capacity, held in zip(self._plan.nodes, view.free_entries,
                                                      view.capacity_entries, view.requests, strict=True)]

    def _leading_on(self, opened: Sequence[bool]) -> dict[int, list[int]]:
        """Edges from the source and each node to open nodes from which the sink can be reached."""
        ways: dict[int, list[int]] = {SINK: []}
        for at in (*reversed(self._plan.order), SOURCE):
            ways[at] = []
            if at != SOURCE and not opened[at]:
                continue
            for e in self._plan.outgoing[at]:
                target = self._plan.edges[e].target
                if target == SINK or ways[target]:
                    ways[at].append(e)
        return ways


def longest_path(plan: MeshPlan) -> int:
    """Nodes on the longest path."""
    depth = dict.fromkeys((SOURCE, *range(len(plan.nodes))), 0)
    for at in (SOURCE, *plan.order):
        for e in plan.outgoing[at]:
            target = plan.edges[e].target
            if target != SINK:
                depth[target] = max(depth[target], depth[at] + 1)
    return max(depth.values())
