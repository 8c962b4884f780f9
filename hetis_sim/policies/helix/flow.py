"""The largest flow of tokens through placed nodes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hetis_sim.policies.plan import SINK, SOURCE

Range = tuple[int, int]
"""First layer of a node, and how many it holds."""

EdgeFlows = dict[tuple[int, int], float]

ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Placed:
    """A node with layers; ``site`` is its number among the candidates."""

    site: int
    first: int
    layers: int
    tokens_per_s: float

    @property
    def end(self) -> int:
        """One past its last layer."""
        return self.first + self.layers


def connections(nodes: Sequence[Placed], layers: int, partial: bool) -> list[tuple[int, int]]:
    """Pairs of places in ``nodes`` (or ``SOURCE``, ``SINK``) that a request can go between.

    A node continues where another one ends; with ``partial`` inference also where that end lies
    inside its layers.
    """
    found: list[tuple[int, int]] = []
    for j, node in enumerate(nodes):
        if node.first == 0:
            found.append((SOURCE, j))
        found += [(i, j) for i, before in enumerate(nodes)
                  if node.first == before.end or (partial and node.first < before.end < node.end)]
        if node.end == layers:
            found.append((j, SINK))
    return found


def largest_flow(nodes: Sequence[Placed], pairs: Sequence[tuple[int, int]],
                 capacity: Callable[[int, int], float]) -> tuple[float, EdgeFlows]:
    """Dinic's algorithm, shortest ways first.

    Args:
        nodes: each passes no more than its rate.
        pairs: where flow can go.
        capacity: tokens per second of a pair of nodes; pairs with an end have no limit.

    Returns:
        Tokens per second, and those of every pair that has any.
    """
    graph = _Graph(2 * len(nodes) + 2)
    source, sink = 2 * len(nodes), 2 * len(nodes) + 1
    total = sum(node.tokens_per_s for node in nodes)
    for n, node in enumerate(nodes):
        graph.add(2 * n, 2 * n + 1, node.tokens_per_s)
    arcs: list[int] = []
    for i, j in pairs:
        limit = total if i == SOURCE or j == SINK else min(total, capacity(i, j))
        arcs.append(graph.add(source if i == SOURCE else 2 * i + 1, sink if j == SINK else 2 * j, limit))
    value = graph.run(source, sink, ROUNDING * max(total, 1.0))
    flows = {pair: graph.flow(arc) for pair, arc in zip(pairs, arcs, strict=True)}
    return value, {pair: flow for pair, flow in flows.items() if flow > ROUNDING * total}


class _Graph:
    """Residual capacities; the arc back of arc ``a`` is ``a ^ 1``."""

    def __init__(self, vertices: int) -> None:
        self._out: list[list[int]] = [[] for _ in range(vertices)]
        self._head: list[int] = []
        self._left: list[float] = []

    def add(self, tail: int, head: int, capacity: float) -> int:
        arc = len(self._head)
        self._head += [head, tail]
        self._left += [capacity, 0.0]
        self._out[tail].append(arc)
        self._out[head].append(arc + 1)
        return arc

    def flow(self, arc: int) -> float:
        return self._left[arc ^ 1]

    def run(self, source: int, sink: int, least: float) -> float:
        total = 0.0
        while (level := self._levels(source, least))[sink] >= 0:
            tried = [0] * len(self._out)
            while (pushed := self._augment(source, sink, level, tried, least)) > 0.0:
                total += pushed
        return total

    def _levels(self, source: int, least: float) -> list[int]:
        level = [-1] * len(self._out)
        level[source] = 0
        queue = deque([source])
        while queue:
            at = queue.popleft()
            for arc in self._out[at]:
                if self._left[arc] > least and level[self._head[arc]] < 0:
                    level[self._head[arc]] = level[at] + 1
                    queue.append(self._head[arc])
        return level

    def _augment(self, source: int, sink: int, level: list[int], tried: list[int], least: float) -> float:
        """Push along one way of shortest length; 0 where there is none left."""
        way: list[int] = []
        at = source
        while at != sink:
            arcs = self._out[at]
            while tried[at] < len(arcs):
                arc = arcs[tried[at]]
                if self._left[arc] > least and level[self._head[arc]] == level[at] + 1:
                    break
                tried[at] += 1
            else:
                if not way:
                    return 0.0
                at = self._head[way.pop() ^ 1]
                tried[at] += 1
                continue
            way.append(arcs[tried[at]])
            at = self._head[way[-1]]
        pushed = min(self._left[arc] for arc in way)
        for arc in way:
            self._left[arc] -= pushed
            self._left[arc ^ 1] += pushed
        return pushed
