"""The placement of largest flow, as mixed-integer linear programs.

The source has one variable for the first layer of each node, one for each number of layers that it
could hold, one for the flow of each pair of nodes, and switches that allow a flow where the layers
meet. Both programs here say the same without switches (ours): flow enters and leaves a node at a
layer, and only a node that holds the right layers lets it.

:class:`LinkedProgram` has every node and every link. :class:`PlacementProgram` takes two facts
into account that make it much smaller: nodes of one kind are interchangeable, and where links carry more
than the nodes compute, they need not be looked at. With n the number of nodes of kind c that hold
layers s .. s+k-1, and f the flow that enters them at layer l:

    maximise    sum f(c, s, k, l = 0)
    sum_l f(c, s, k, l) <= rate(c, k) * n(c, s, k)        a node computes no more than its rate
    sum_(s, k) n(c, s, k) <= nodes of kind c
    flow that ends at layer l = flow that enters at layer l, 0 < l < layers

Without partial inference l = s. Flows are counted in shares of the bound that all nodes together set, and
no rate above it is written down: none could be used, and large ones blur what the solver takes for whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetis_sim.policies.helix.flow import Range
from hetis_sim.policies.helix.heuristics import Ranges
from hetis_sim.policies.helix.milp import Budget, Milp, Terms
from hetis_sim.policies.helix.sites import SiteKind, rate_bound

FLOW_LEAST = 1e-9


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """What the solver found.

    Attributes:
        ranges: the placement, None where it found none.
        bound: tokens per second that no placement exceeds.
        stopped: ``optimal`` (within the gap), ``nodes`` or ``time``.
    """

    ranges: Ranges | None
    bound: float
    stopped: str


class _Choice(NamedTuple):
    """A range on nodes of a kind (or on one node): its column, and the flows that enter (layer, column)."""

    kind: int
    first: int
    layers: int
    column: int
    flows: list[tuple[int, int]]


def _all_ranges(most: int, layers: int) -> list[Range]:
    return [(s, k) for k in range(1, min(most, layers) + 1) for s in range(layers - k + 1)]


def _entries(first: int, layers: int, partial: bool) -> range:
    """Layers at which flow may enter a node."""
    return range(first, first + layers) if partial else range(first, first + 1)


class PlacementProgram:
    """The program of kinds of nodes, links left out."""

    @staticmethod
    def columns(kinds: Sequence[SiteKind], layers: int, partial: bool) -> int:
        """Variables that it would have."""
        return sum(1 + len(_entries(s, k, partial)) for kind in kinds
                   for s, k in _all_ranges(kind.layers_most, layers))

    def __init__(self, kinds: Sequence[SiteKind], layers: int, partial: bool) -> None:
        self._kinds = kinds
        self._layers = layers
        self._scale = rate_bound(kinds, layers)
        self._milp = Milp()
        self._choices: list[_Choice] = []
        for c, kind in enumerate(kinds):
            for s, k in _all_ranges(kind.layers_most, layers):
                column = self._milp.add(float(len(kind.groups)), whole=True)
                flows = [(layer, self._milp.add(objective=float(layer == 0)))
                         for layer in _entries(s, k, partial)]
                self._choices.append(_Choice(c, s, k, column, flows))
        self._add_rows()

    def _add_rows(self) -> None:
        per_kind: list[Terms] = [[] for _ in self._kinds]
        balance: list[Terms] = [[] for _ in range(self._layers + 1)]
        for choice in self._choices:
            rate = min(1.0, self._kinds[choice.kind].rates[choice.layers - 1] / self._scale)
            self._milp.at_most([(choice.column, -rate), *((f, 1.0) for _, f in choice.flows)], 0.0)
            per_kind[choice.kind].append((choice.column, 1.0))
            for layer, f in choice.flows:
                balance[layer].append((f, 1.0))
                balance[choice.first + choice.layers].append((f, -1.0))
        for kind, row in zip(self._kinds, per_kind, strict=True):
            self._milp.at_most(row, float(len(kind.groups)))
        for row in balance[1:self._layers]:
            self._milp.equal(row, 0.0)

    def solve(self, budget: Budget, start: Ranges | None = None) -> ProgramResult:
        """Search within a budget, from a placement where one is given.

        Raises:
            HetisError: the solver fails.
        """
        found = self._milp.solve(budget, self._start(start) if start is not None else None)
        ranges = self._ranges(found.values) if found.values is not None else None
        return ProgramResult(ranges, found.bound * self._scale, found.stopped)

    def _start(self, ranges: Ranges) -> dict[int, float]:
        held: dict[tuple[int, int, int], int] = {}
        kind_of = [c for c, kind in enumerate(self._kinds) for _ in kind.groups]
        for c, item in zip(kind_of, ranges, strict=True):
            if item is not None:
                held[c, *item] = held.get((c, *item), 0) + 1
        return {choice.column: float(held.get((choice.kind, choice.first, choice.layers), 0))
                for choice in self._choices}

    def _ranges(self, values: NDArray[np.float64]) -> Ranges:
        """Layers of each node; nodes of one kind take theirs in order."""
        held: list[list[Range]] = [[] for _ in self._kinds]
        for choice in self._choices:
            if sum(values[f] for _, f in choice.flows) > FLOW_LEAST:
                held[choice.kind] += [(choice.first, choice.layers)] * round(values[choice.column])
        found: list[Range | None] = []
        for kind, mine in zip(self._kinds, held, strict=True):
            found += [*sorted(mine), *[None] * (len(kind.groups) - len(mine))]
        return tuple(found)


class LinkedProgram:
    """The program of all nodes and the links between them.

    Args:
        link_rate: tokens per second between two nodes, by their numbers.
    """

    @staticmethod
    def columns(kinds: Sequence[SiteKind], layers: int) -> int:
        """Variables that it would have."""
        count = sum(len(kind.groups) for kind in kinds)
        ranges = sum(len(kind.groups) * len(_all_ranges(kind.layers_most, layers)) for kind in kinds)
        return ranges + count * (2 + (count - 1) * (layers - 1))

    def __init__(self, kinds: Sequence[SiteKind], layers: int, partial: bool,
                 link_rate: Callable[[int, int], float]) -> None:
        self._sites = [kind for kind in kinds for _ in kind.groups]
        self._layers = layers
        self._scale = rate_bound(kinds, layers)
        self._milp = Milp()
        self._choices = [_Choice(i, first, held, self._milp.add(1.0, whole=True), [])
                         for i, kind in enumerate(self._sites)
                         for first, held in _all_ranges(kind.layers_most, layers)]
        count = len(self._sites)
        # What may enter and leave each node at each layer, less what flows there.
        self._entering: list[list[Terms]] = [[[] for _ in range(layers + 1)] for _ in range(count)]
        self._leaving: list[list[Terms]] = [[[] for _ in range(layers + 1)] for _ in range(count)]
        self._balance: list[Terms] = [[] for _ in range(count)]
        self._add_ranges(partial)
        self._add_flows(link_rate)

    def _add_ranges(self, partial: bool) -> None:
        held: list[Terms] = [[] for _ in self._sites]
        for choice in self._choices:
            site = choice.kind
            rate = min(1.0, self._sites[site].rates[choice.layers - 1] / self._scale)
            held[site].append((choice.column, 1.0))
            self._leaving[site][choice.first + choice.layers].append((choice.column, -rate))
            for layer in _entries(choice.first, choice.layers, partial):
                self._entering[site][layer].append((choice.column, -rate))
        for row in held:
            self._milp.at_most(row, 1.0)

    def _add_flows(self, link_rate: Callable[[int, int], float]) -> None:
        for i in range(len(self._sites)):
            self._flow(None, i, 0, 1.0)
            self._flow(i, None, self._layers, 0.0)
            for j in range(len(self._sites)):
                if i != j:
                    flows = [self._flow(i, j, layer, 0.0) for layer in range(1, self._layers)]
                    self._milp.at_most([(f, 1.0) for f in flows], link_rate(i, j) / self._scale)
        for side in (self._entering, self._leaving):
            for rows in side:
                for row in rows:
                    if row:
                        self._milp.at_most(row, 0.0)
        for row in self._balance:
            self._milp.equal(row, 0.0)

    def _flow(self, source: int | None, target: int | None, layer: int, objective: float) -> int:
        column = self._milp.add(objective=objective)
        if source is not None:
            self._leaving[source][layer].append((column, 1.0))
            self._balance[source].append((column, -1.0))
        if target is not None:
            self._entering[target][layer].append((column, 1.0))
            self._balance[target].append((column, 1.0))
        return column

    def solve(self, budget: Budget, start: Ranges | None = None) -> ProgramResult:
        """As :meth:`PlacementProgram.solve`."""
        given = {choice.column: float(start[choice.kind] == (choice.first, choice.layers))
                 for choice in self._choices} if start is not None else None
        found = self._milp.solve(budget, given)
        ranges = self._ranges(found.values) if found.values is not None else None
        return ProgramResult(ranges, found.bound * self._scale, found.stopped)

    def _ranges(self, values: NDArray[np.float64]) -> Ranges:
        held: list[Range | None] = [None] * len(self._sites)
        for choice in self._choices:
            if values[choice.column] > 0.5:
                held[choice.kind] = (choice.first, choice.layers)
        return tuple(held)
