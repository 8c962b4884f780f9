"""The cache of a mesh: who holds what on which node, on top of the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hetis_sim.control.ledger import KvLedger, LedgerError
from hetis_sim.control.mesh.walk import Path, Walk
from hetis_sim.policies.plan import SINK, SOURCE, MeshPlan


class MeshBooks:
    """Takes and gives the ledger's units for whole paths, and keeps the sums that policies look at.

    A block of a request takes, on each rank of a node of its path, one unit for each KV group that the
    rank owns and each layer that the request passes there.
    """

    def __init__(self, plan: MeshPlan, capacity_units: dict[int, int], block_tokens: int) -> None:
        self.plan = plan
        self.block_tokens = block_tokens
        self.ledger = KvLedger([capacity_units[device] for device in plan.devices])
        count = len(plan.nodes)
        self.requests = [0] * count
        self.request_layers = [0] * count
        self.prompt_entries = [0] * count
        self._edge_of = {(edge.source, edge.target): n for n, edge in enumerate(plan.edges)}
        self._ranks: list[list[tuple[int, int]]] = []
        local = 0
        for node in plan.nodes:
            self._ranks.append(list(enumerate(node.owned_groups, local)))
            local += node.tp
        self._known: dict[tuple[int, ...], Path] = {}
        self.capacity_entries = self._entries(self.ledger.capacity)

    def _entries(self, units: Sequence[int]) -> list[int]:
        return [min([units[d] // owned for d, owned in ranks]) * self.block_tokens for ranks in self._ranks]

    def free_entries(self) -> list[int]:
        """Per node, entries (a token in a layer) that fit into the free cache of its fullest rank."""
        ledger = self.ledger
        return self._entries([most - used for most, used in zip(ledger.capacity, ledger.used, strict=True)])

    def blocks(self, tokens: int) -> int:
        """Blocks that ``tokens`` take."""
        return -(-tokens // self.block_tokens)

    def path(self, edges: tuple[int, ...]) -> Path:
        """The path along these edges of the plan."""
        found = self._known.get(edges)
        if found is None:
            found = self._known[edges] = self._make(edges)
        return found

    def _make(self, edges: tuple[int, ...]) -> Path:
        nodes = tuple(self.plan.edges[e].target for e in edges[:-1])
        firsts = [-1] * len(self.plan.nodes)
        layers: list[int] = []
        units: list[tuple[int, int]] = []
        passed = 0
        for n in nodes:
            node = self.plan.nodes[n]
            firsts[n] = passed
            layers.append(node.end_layer - passed)
            units += [(d, owned * layers[-1]) for d, owned in self._ranks[n]]
            passed = node.end_layer
        after = dict(zip(nodes, (*nodes[1:], SINK), strict=True))
        return Path(nodes, tuple(firsts), tuple(layers), after, edges, tuple(units))

    def edge(self, source: int, target: int) -> int:
        """The number of an edge."""
        return self._edge_of[source, target]

    def accept(self, walk: Walk) -> None:
        """Hold the blocks that a walk begins with.

        Raises:
            LedgerError: there is no room.
        """
        self.ledger.take(walk.path.block_units, walk.blocks)
        self._count(walk, 1)

    def release(self, walk: Walk) -> None:
        """Give back all that a walk holds."""
        self.ledger.give(walk.path.block_units, walk.blocks)
        self._count(walk, -1)

    def _count(self, walk: Walk, sign: int) -> None:
        for n, layers in zip(walk.path.nodes, walk.path.layers, strict=True):
            self.requests[n] += sign
            self.request_layers[n] += sign * layers
            self.prompt_entries[n] += sign * layers * walk.prompt_tokens

    def grow(self, walk: Walk) -> bool:
        """Hold one block more at every node of the path; False if some rank has no room."""
        if not self.ledger.fits(walk.path.block_units):
            return False
        self.ledger.take(walk.path.block_units)
        walk.blocks += 1
        return True

    def full_device(self, walk: Walk) -> int:
        """The first local device of the path without room for another block."""
        return next(d for d, units in walk.path.block_units if units > self.ledger.free(d))

    def longest_context(self) -> int:
        """Tokens that a request may reach on the empty mesh, on the path that holds the longest."""
        blocks = [entries // (node.layers * self.block_tokens)
                  for entries, node in zip(self.capacity_entries, self.plan.nodes, strict=True)]
        widest = dict.fromkeys((SOURCE, SINK, *range(len(blocks))), 0)
        widest[SOURCE] = 1 << 40
        for at in (SOURCE, *self.plan.order):
            for e in self.plan.outgoing[at]:
                target = self.plan.edges[e].target
                room = min(widest[at], blocks[target]) if target != SINK else widest[at]
                widest[target] = max(widest[target], room)
        return widest[SINK] * self.block_tokens

    def check(self, walks: Iterable[Walk]) -> None:
        """Recount everything held and compare with the ledger and the sums (invariant 3).

        Raises:
            LedgerError: the books do not balance.
        """
        want = [0] * len(self.ledger.used)
        requests = [0] * len(self.plan.nodes)
        for walk in walks:
            if walk.blocks != self.blocks(walk.context):
                raise LedgerError(f"request {walk.state.request_id} holds {walk.blocks} blocks for "
                                  f"{walk.context} tokens")
            for d, units in walk.path.block_units:
                want[d] += units * walk.blocks
            for n in walk.path.nodes:
                requests[n] += 1
        if want != self.ledger.used or requests != self.requests:
            raise LedgerError(f"the ledger says {self.ledger.used} units are used, the requests hold {want}; "
                              f"{self.requests} requests by node are {requests}")
