"""The best chain of stages: a start for the solver that is seldom beaten (ours).

In a chain all nodes of a stage hold the same layers, so its flow is the lowest rate of a stage. Whether
a given flow can be reached is decided exactly: layer by layer, which numbers of nodes of every kind can
have carried the flow so far. The highest such flow is found by bisection. Even chains (SWARM) and
equal pipelines side by side are among these placements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from hetis_sim.policies.helix.flow import Range
from hetis_sim.policies.helix.heuristics import Ranges
from hetis_sim.policies.helix.sites import SiteKind, rate_bound

STATES_MOST = 20_000
"""Combinations of numbers of nodes; where there would be more, nodes are counted in bundles."""

BISECTIONS = 14

Counts = tuple[int, ...]
Reached = list[NDArray[np.bool_]]


def chain(kinds: Sequence[SiteKind], layers: int) -> Iterator[Ranges]:
    """The placement of highest flow among chains; none where no chain holds the model."""
    bundle = 1
    while np.prod([len(kind.groups) // bundle + 1 for kind in kinds]) > STATES_MOST:
        bundle += 1
    search = _ChainSearch(kinds, layers, bundle)
    best = search.highest()
    if best is not None:
        yield best


class _ChainSearch:
    def __init__(self, kinds: Sequence[SiteKind], layers: int, bundle: int) -> None:
        self._kinds = kinds
        self._layers = layers
        self._bundle = bundle
        self._most = tuple(len(kind.groups) // bundle for kind in kinds)
        self._deepest = min(layers, max(kind.layers_most for kind in kinds))

    def highest(self) -> Ranges | None:
        """Bisection between nothing and what all nodes together could compute."""
        low = 0.0
        best = self._stages(low)
        if best is None:
            return None
        low = self._flow(best)
        high = rate_bound(self._kinds, self._layers)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            found = self._stages(middle)
            if found is None:
                high = middle
            else:
                best, low = found, max(middle, self._flow(found))
        return self._ranges(best)

    def _flow(self, stages: Sequence[tuple[int, Counts]]) -> float:
        return min(self._rate(counts, k) for k, counts in stages)

    def _rate(self, counts: Counts, k: int) -> float:
        return sum(n * rate for n, rate in zip(counts, self._rates(k), strict=True) if n)

    def _rates(self, k: int) -> list[float]:
        """Of a bundle of each kind with k layers; 0 where its nodes hold fewer."""
        return [self._bundle * kind.rates[k - 1] if k <= kind.layers_most else 0.0 for kind in self._kinds]

    def _stages(self, flow: float) -> list[tuple[int, Counts]] | None:
        """Stages as (layers, nodes of each kind) that carry a flow; None where there are none."""
        options = {k: list(self._least(k, flow)) for k in range(1, self._deepest + 1)}
        shape = [n + 1 for n in self._most]
        reached: Reached = [np.zeros(shape, dtype=bool) for _ in range(self._layers + 1)]
        reached[0][(0,) * len(self._most)] = True
        for layer in range(self._layers):
            here = reached[layer]
            if not here.any():
                continue
            for k in range(1, min(self._deepest, self._layers - layer) + 1):
                for counts in options[k]:
                    _step(here, reached[layer + k], counts)
        ends = np.argwhere(reached[self._layers])
        return self._trace(reached, options, tuple(ends[0].tolist())) if len(ends) else None

    def _least(self, k: int, flow: float) -> Iterator[Counts]:
        """Numbers of nodes with k layers that carry a flow, none of them with one to spare."""
        rates = self._rates(k)
        able = [n if rate else 0 for n, rate in zip(self._most, rates, strict=True)]
        for counts in product(*(range(n + 1) for n in able)):
            if any(counts):
                least = min(rate for n, rate in zip(counts, rates, strict=True) if n)
                rate = self._rate(counts, k)
                if rate >= flow > rate - least or (flow <= 0.0 and sum(counts) == 1):
                    yield counts

    def _trace(self, reached: Reached, options: dict[int, list[Counts]],
               end: Counts) -> list[tuple[int, Counts]]:
        """One way back from the end, deepest stages first."""
        stages: list[tuple[int, Counts]] = []
        layer, used = self._layers, end
        while layer:
            k, counts = next((k, counts) for k in range(min(self._deepest, layer), 0, -1)
                             for counts in options[k] if _before(reached[layer - k], used, counts))
            stages.append((k, counts))
            layer, used = layer - k, tuple(a - b for a, b in zip(used, counts, strict=True))
        return stages[::-1]

    def _ranges(self, stages: Sequence[tuple[int, Counts]]) -> Ranges:
        held: list[list[Range]] = [[] for _ in self._kinds]
        first = 0
        for k, counts in stages:
            for mine, n in zip(held, counts, strict=True):
                mine += [(first, k)] * (n * self._bundle)
            first += k
        found: list[Range | None] = []
        for kind, mine in zip(self._kinds, held, strict=True):
            found += [*mine, *[None] * (len(kind.groups) - len(mine))]
        return tuple(found)


def _step(here: NDArray[np.bool_], there: NDArray[np.bool_], counts: Counts) -> None:
    """Whatever is reached here is reached there with so many nodes more."""
    source = tuple(slice(0, size - n) for size, n in zip(here.shape, counts, strict=True))
    target = tuple(slice(n, None) for n in counts)
    there[target] |= here[source]


def _before(reached: NDArray[np.bool_], used: Counts, counts: Counts) -> bool:
    left = tuple(a - b for a, b in zip(used, counts, strict=True))
    return min(left) >= 0 and bool(reached[left])
