"""Evolutionary search over divisions of a cluster into pipelines.

A division is a set of (use, bundle). Parents
are picked from a small population of the best divisions by tournament and changed by what HexGen
(Jiang et al., ICML '24) calls merge, split and swap, by moving cards between pipelines, and by giving a
pipeline another use, such as idleness (the last two are ours). The best division is
then improved by single moves until none helps. The random stream has a fixed seed, and cards are
named in an order that equal hosts do not decide, so the outcome is a function of the problem.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from hetis_sim.policies.bundles import Bundle, Part
from hetis_sim.policies.plan import Role

Use = Role | Literal["idle"]
Division = tuple[tuple[Use, Bundle], ...]
Score = Callable[[Division], float]
"""Value of a division, the higher the better; negative where it is not allowed."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to search.

    Attributes:
        population: divisions kept.
        evaluations: divisions looked at by evolution, at most.
        islands: populations that evolve apart; all but the first start from a third of the regular divisions.
        seed: of the random stream.
    """

    population: int = 24
    evaluations: int = 2000
    islands: int = 5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """The best division, its score, and how many were looked at."""

    division: Division
    score: float
    candidates: int


class Evolution:
    """One search.

    Args:
        parts: the cluster's cards.
        uses: of bundles; besides, they may stand idle.
        score: what to maximise.
        effort: how long to search.
    """

    def __init__(self, parts: Sequence[Part], uses: Sequence[Use], score: Score, effort: Effort) -> None:
        self._parts = parts
        self._uses: tuple[Use, ...] = (*uses, "idle")
        self._score = score
        self._effort = effort
        self._rng = random.Random(effort.seed)
        self._known: dict[Division, float] = {}

    def run(self, seeds: Sequence[Division]) -> Found:
        """Search from these divisions."""
        seeds = [normal(seed) for seed in seeds]
        best: Division | None = None
        for island in range(self._effort.islands):
            chosen = seeds if island == 0 else self._rng.sample(seeds, -(-len(seeds) // 3))
            found = self._climb(self._evolve(chosen))
            if best is None or self._known[found] > self._known[best]:
                best = found
        assert best is not None
        return Found(best, self._known[best], len(self._known))

    def _evolve(self, seeds: Sequence[Division]) -> Division:
        """The best division of one island."""
        population = self._ranked(seeds)[:self._effort.population]
        for _ in range(self._effort.evaluations // self._effort.islands):
            child = self._mutant(self._parent(population))
            if child not in population:
                population = self._ranked([*population, child])[:self._effort.population]
        return population[0]

    def _value(self, division: Division) -> float:
        if division not in self._known:
            self._known[division] = self._score(division)
        return self._known[division]

    def _ranked(self, divisions: Iterator[Division] | Sequence[Division]) -> list[Division]:
        return sorted(dict.fromkeys(divisions), key=lambda d: (-self._value(d), d))

    def _parent(self, population: Sequence[Division]) -> Division:
        """The better of two at random; the population is in order."""
        rng = self._rng
        return population[min(rng.randrange(len(population)), rng.randrange(len(population)))]

    def _mutant(self, division: Division) -> Division:
        for _ in range(self._rng.choice((1, 1, 1, 2, 2, 3))):
            change = self._rng.choice((self._move, self._move, self._swap, self._merge, self._split,
                                       self._recast))
            division = normal(change(division))
        return division

    def _move(self, division: Division) -> Division:
        """Some cards of one part go to another pipeline, or form a new one."""
        source = self._rng.randrange(len(division))
        bundle = division[source][1]
        part = self._rng.choice([p for p, n in enumerate(bundle) if n])
        count = self._rng.choice((1, bundle[part], self._rng.randint(1, bundle[part])))
        target = self._rng.randrange(len(division) + 1)
        return moved(division, source, part, count, target, self._rng.choice(self._uses))

    def _swap(self, division: Division) -> Division:
        """Two pipelines exchange cards."""
        if len(division) < 2:
            return division
        a, b = self._rng.sample(range(len(division)), 2)
        out = self._rng.choice([p for p, n in enumerate(division[a][1]) if n])
        back = self._rng.choice([p for p, n in enumerate(division[b][1]) if n])
        give = self._rng.randint(1, division[a][1][out])
        take = self._rng.randint(1, division[b][1][back])
        rows = [list(bundle) for _, bundle in division]
        for p, n in ((out, give), (back, -take)):
            rows[a][p] -= n
            rows[b][p] += n
        return tuple((role, tuple(row)) for (role, _), row in zip(division, rows, strict=True))

    def _merge(self, division: Division) -> Division:
        if len(division) < 2:
            return division
        a, b = self._rng.sample(range(len(division)), 2)
        both = tuple(m + n for m, n in zip(division[a][1], division[b][1], strict=True))
        rest = [pair for i, pair in enumerate(division) if i not in (a, b)]
        return (*rest, (division[a][0], both))

    def _split(self, division: Division) -> Division:
        """One pipeline becomes two: every part whole on one side, or every part halved."""
        source = self._rng.randrange(len(division))
        role, bundle = division[source]
        if self._rng.random() < 0.5:
            half = tuple(n * self._rng.randrange(2) for n in bundle)
        else:
            half = tuple(n // 2 + (n % 2) * self._rng.randrange(2) for n in bundle)
        rest = tuple(n - m for n, m in zip(bundle, half, strict=True))
        others = [pair for i, pair in enumerate(division) if i != source]
        return (*others, (role, half), (self._rng.choice(self._uses), rest))

    def _recast(self, division: Division) -> Division:
        source = self._rng.randrange(len(division))
        changed = list(division)
        changed[source] = (self._rng.choice(self._uses), division[source][1])
        return tuple(changed)

    def _climb(self, division: Division) -> Division:
        """Single moves of one card or a whole part, until none is better."""
        budget = len(self._known) + self._effort.evaluations
        while len(self._known) < budget:
            others = islice(map(normal, self._neighbours(division)), budget - len(self._known))
            better = self._ranked([division, *others])[0]
            if better == division:
                break
            division = better
        return division

    def _neighbours(self, division: Division) -> Iterator[Division]:
        for source, (role, bundle) in enumerate(division):
            for other in self._uses:
                if other != role:
                    yield (*division[:source], (other, bundle), *division[source + 1:])
            for part, n in enumerate(bundle):
                for count in {1, n} if n else ():
                    for target in range(len(division)):
                        if target != source:
                            yield moved(division, source, part, count, target, role)
                    for fresh in self._uses:
                        yield moved(division, source, part, count, len(division), fresh)


def moved(division: Division, source: int, part: int, count: int, target: int, fresh: Use) -> Division:
    """``count`` cards of a part moved to another pipeline, or past the end to a new one used as ``fresh``."""
    roles = [role for role, _ in division] + [fresh]
    rows = [list(bundle) for _, bundle in division] + [[0] * len(division[0][1])]
    rows[source][part] -= count
    rows[target][part] += count
    return tuple((role, tuple(row)) for role, row in zip(roles, rows, strict=True))


def normal(division: Division) -> Division:
    """Without empty pipelines, in one order."""
    return tuple(sorted(pair for pair in division if any(pair[1])))


def starting_divisions(parts: Sequence[Part]) -> list[Division]:
    """Regular divisions to start from.

    All cards in one pipeline; chunks of one, two, four ... cards of a part, each a pipeline of its own, or
    dealt in turn over some number of pipelines, so that each has its share of every kind.
    """
    sizes = [len(part.devices) for part in parts]
    total = sum(sizes)
    found: dict[Division, None] = {(("both", tuple(sizes)),): None}
    for size in sorted({1, *(2 ** n for n in range(1, max(sizes).bit_length())), max(sizes)}):
        chunks = [(p, min(size, n - start)) for p, n in enumerate(sizes) for start in range(0, n, size)]
        for count in sorted({*range(1, min(len(chunks), 8) + 1), len(chunks)}):
            rows = [[0] * len(parts) for _ in range(min(count, total))]
            for turn, (p, n) in enumerate(chunks):
                rows[turn % len(rows)][p] += n
            found[normal(tuple(("both", tuple(row)) for row in rows))] = None
    return list(found)
