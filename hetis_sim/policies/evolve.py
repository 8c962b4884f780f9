"""Evolutionary search over divisions of a cluster into pipelines.

A division is a set of (role, bundle); cards in bundles that cannot hold the model stand idle. Parents
are picked from a small population of the best divisions by tournament and changed by what HexGen
(Jiang et al., ICML '24) calls merge, split and swap, by moving cards between pipelines, and by giving a
pipeline another role where there are several (the last two are ours). The best division is
then improved by single moves until none helps. The random stream has a fixed seed, and cards are
named in an order that equal hosts do not decide, so the outcome is a function of the problem.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hetis_sim.policies.bundles import Bundle, Part
from hetis_sim.policies.plan import Role

Division = tuple[tuple[Role, Bundle], ...]
Score = Callable[[Division], float]
"""Value of a division, the higher the better; negative where it is not allowed."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to search.

    Attributes:
        population: divisions kept.
        evaluations: divisions looked at, at most.
        patience: evaluations without a better division after which the search ends.
        seed: of the random stream.
    """

    population: int = 24
    evaluations: int = 1500
    patience: int = 500
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
        roles: that a pipeline may have.
        score: what to maximise.
        effort: how long to search.
    """

    def __init__(self, parts: Sequence[Part], roles: Sequence[Role], score: Score, effort: Effort) -> None:
        self._parts = parts
        self._roles = tuple(roles)
        self._score = score
        self._effort = effort
        self._rng = random.Random(effort.seed)
        self._known: dict[Division, float] = {}

    def run(self, seeds: Sequence[Division]) -> Found:
        """Search from these divisions."""
        population = self._ranked(normal(seed) for seed in seeds)
        population = population[:self._effort.population]
        quiet = 0
        while len(self._known) < self._effort.evaluations and quiet < self._effort.patience:
            child = normal(self._mutant(self._parent(population)))
            quiet += 1
            if child in self._known:
                continue
            before = self._known[population[0]]
            population = self._ranked([*population, child])[:self._effort.population]
            if self._known[population[0]] > before:
                quiet = 0
        best = self._climb(population[0])
        return Found(best, self._known[best], len(self._known))

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
            change = self._rng.choice((self._move, self._move, self._swap, self._merge, self._split, self._recast))
            division = change(division)
        return division

    def _move(self, division: Division) -> Division:
        """Some cards of one part go to another pipeline, or form a new one."""
        source = self._rng.randrange(len(division))
        bundle = division[source][1]
        part = self._rng.choice([p for p, n in enumerate(bundle) if n])
        count = self._rng.choice((1, bundle[part], self._rng.randint(1, bundle[part])))
        target = self._rng.randrange(len(division) + 1)
        return moved(division, source, part, count, target, self._rng.choice(self._roles))

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
        return (*others, (role, half), (self._rng.choice(self._roles), rest))

    def _recast(self, division: Division) -> Division:
        source = self._rng.randrange(len(division))
        changed = list(division)
        changed[source] = (self._rng.choice(self._roles), division[source][1])
        return tuple(changed)

    def _climb(self, division: Division) -> Division:
        """Single moves of one card or a whole part, until none is better."""
        budget = 2 * self._effort.evaluations
        while len(self._known) < budget:
            better = self._ranked([division, *(normal(d) for d in self._neighbours(division))])[0]
            if better == division:
                break
            division = better
        return division

    def _neighbours(self, division: Division) -> Iterator[Division]:
        for source, (role, bundle) in enumerate(division):
            for other in self._roles:
                if other != role:
                    yield (*division[:source], (other, bundle), *division[source + 1:])
            for part, n in enumerate(bundle):
                for count in {1, n} if n else ():
                    for target in range(len(division)):
                        if target != source:
                            yield moved(division, source, part, count, target, role)
                    for fresh in self._roles:
                        yield moved(division, source, part, count, len(division), fresh)


def moved(division: Division, source: int, part: int, count: int, target: int, fresh: Role) -> Division:
    """``count`` cards of a part from one pipeline to another; to a new one with the role ``fresh`` past the end."""
    width = len(division[0][1])
    rows = [[role, list(bundle)] for role, bundle in division] + [[fresh, [0] * width]]
    rows[source][1][part] -= count  # type: ignore[index]
    rows[target][1][part] += count  # type: ignore[index]
    return tuple((role, tuple(row)) for role, row in rows)  # type: ignore[misc, arg-type]


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
