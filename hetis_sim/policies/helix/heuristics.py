"""Placements without a solver: those that the source compares with, and where its solver starts.

Each takes the kinds of candidate nodes and gives the layers of every node, None for nodes that it
does not use. Nodes are numbered kind by kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from hetis_sim.policies.helix.flow import Range
from hetis_sim.policies.helix.sites import SiteKind

Ranges = tuple[Range | None, ...]


def even_split(layers: int, parts: int) -> list[Range]:
    """Consecutive ranges of as equal length as can be, longer ones first."""
    base, extra = divmod(layers, parts)
    found: list[Range] = []
    first = 0
    for n in range(parts):
        found.append((first, base + (n < extra)))
        first += found[-1][1]
    return found


def _sites(kinds: Sequence[SiteKind]) -> list[SiteKind]:
    return [kind for kind in kinds for _ in kind.groups]


def swarm(kinds: Sequence[SiteKind], layers: int) -> Iterator[Ranges]:
    """SWARM (Ryabinin et al., ICML '23) as the source has it: even stages, all of about equal rate.

    There are as few stages as the smallest node allows. Nodes join the stage with the lowest rate, best
    nodes first. Where the smallest nodes would make for more stages than there are nodes, they are
    left out (ours): one placement for each size of node that may be the smallest.
    """
    sites = _sites(kinds)
    for smallest in sorted({kind.layers_most for kind in kinds}):
        used = [n for n, kind in enumerate(sites) if kind.layers_most >= smallest]
        stages = even_split(layers, -(-layers // smallest))
        if len(used) < len(stages):
            continue
        rates = [0.0] * len(stages)
        found: list[Range | None] = [None] * len(sites)
        for n in sorted(used, key=lambda n: (-sites[n].rates[stages[0][1] - 1], n)):
            s = rates.index(min(rates))
            found[n] = stages[s]
            rates[s] += sites[n].rates[stages[s][1] - 1]
        yield tuple(found)


def petals(kinds: Sequence[SiteKind], layers: int) -> Iterator[Ranges]:
    """Petals (Borzunov et al., NeurIPS '23) as the source has it: each node holds all it can.

    One after the other, nodes take the range whose layers have the lowest rates so far. They come in
    order of their rate, best first (there, in random order).
    """
    sites = _sites(kinds)
    rates = [0.0] * layers
    found: list[Range | None] = [None] * len(sites)
    for n in sorted(range(len(sites)), key=lambda n: (-sites[n].rates[-1], n)):
        width = min(layers, sites[n].layers_most)
        first = min(range(layers - width + 1), key=lambda s: (sorted(rates[s:s + width]), s))
        found[n] = (first, width)
        for layer in range(first, first + width):
            rates[layer] += sites[n].rates[width - 1]
    yield tuple(found)


def separate(kinds: Sequence[SiteKind], layers: int) -> Iterator[Ranges]:
    """Pipelines of one kind of node each, as many as the kind has nodes for, with even stages."""
    found: list[Range | None] = []
    for kind in kinds:
        depth = -(-layers // kind.layers_most)
        pipelines = len(kind.groups) // depth
        if pipelines:
            # Nodes that are left over make the pipelines deeper.
            stages = even_split(layers, min(layers, len(kind.groups) // pipelines))
            mine: list[Range | None] = [*(stages * pipelines)]
        else:
            mine = []
        found += mine + [None] * (len(kind.groups) - len(mine))
    if any(found):
        yield tuple(found)


HEURISTICS: Mapping[str, Callable[[Sequence[SiteKind], int], Iterator[Ranges]]] = {
    "swarm": swarm, "petals": petals, "separate": separate}
