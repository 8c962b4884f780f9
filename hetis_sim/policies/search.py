"""Searches the layout for a given set of primary types: instances, stages, tensor parallelism."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from hetis_sim.policies.estimate import Estimate, Estimator
from hetis_sim.policies.layout import Draft, GpuType, deal
from hetis_sim.policies.relax import Relaxation
from hetis_sim.policies.shape import instance_shape

EXACT_CANDIDATES = 96
BEST_OF_EACH_COUNT = 2
SAME_COST = 0.05
"""Costs that differ by less are the same: the estimate is off by as much (ours)."""

INSTANCE_COUNTS = 32

ShapeKey = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A complete layout and its cost.

    Attributes:
        drafts, estimates: of every instance.
        tp: tensor-parallel degree of each primary type.
        cost_s: seconds per request of the whole cluster.
    """

    drafts: tuple[Draft, ...]
    estimates: tuple[Estimate, ...]
    tp: tuple[tuple[str, int], ...]
    cost_s: float

    def describe(self) -> str:
        """One line for people."""
        degrees = ", ".join(f"{name} TP{degree}" for name, degree in self.tp)
        depths = sorted({len(draft.groups) for draft in self.drafts})
        stages = "1 stage" if depths == [1] else f"{'/'.join(map(str, depths))} stages"
        instances = "1 instance" if len(self.drafts) == 1 else f"{len(self.drafts)} instances"
        return f"{instances} of {stages} ({degrees}): {self.cost_s:.4g} s a request"


@dataclass(slots=True)
class Found:
    """The outcome of a search: the best layouts, cheapest first, and how many were looked at.

    ``choice`` is one of those that cost practically the same as the cheapest: the one that serves a
    request alone in the shortest time. Both are None where nothing fits.
    """

    layouts: list[Layout]
    candidates: int
    choice: Layout | None

    @property
    def cost_s(self) -> float | None:
        """The lowest cost, None where nothing fits."""
        return self.layouts[0].cost_s if self.layouts else None


class LayoutSearch:
    """Tries instance counts and tensor-parallel degrees; everything else follows from them.

    All candidates get a cost in a relaxed form first (equal instances of fractional groups, layers
    divisible). The best :data:`EXACT_CANDIDATES` of these, and the best :data:`BEST_OF_EACH_COUNT` of
    every instance count, are worked out in whole devices and whole layers. Clusters with fewer
    candidates are searched exhaustively.
    """

    def __init__(self, estimator: Estimator) -> None:
        self.problem = problem = estimator.problem
        self.estimator = estimator
        self._estimates: dict[ShapeKey, Estimate | None] = {}
        self._alone: dict[ShapeKey, float] = {}
        self._relaxation = Relaxation(problem, estimator)

    def run(self, primaries: Sequence[GpuType], workers: Sequence[GpuType], keep: int = 3) -> Found:
        """The best layouts with ``primaries`` doing dense work and ``workers`` attention only."""
        kv_heads = self.problem.model.kv_heads
        options = [kind.tp_options(kv_heads) for kind in primaries]
        counts = self._instance_counts(primaries)
        candidates = len(counts)
        for option in options:
            candidates *= len(option)
        order: Iterable[tuple[int, tuple[int, ...]]]
        if candidates <= EXACT_CANDIDATES:
            order = product(counts, product(*options))
        else:
            order = _shortlist(self._relaxation.ranked(primaries, workers, options, counts))
        layouts = [layout for count, degrees in order
                   if (layout := self._layout(primaries, workers, count, degrees)) is not None]
        layouts.sort(key=lambda layout: layout.cost_s)
        near = [layout for layout in layouts if layout.cost_s <= (1.0 + SAME_COST) * layouts[0].cost_s]
        choice = min(near, key=self._alone_s, default=None) if len(near) > 1 else next(iter(near), None)
        return Found(layouts[:keep], candidates, choice)

    def _instance_counts(self, primaries: Sequence[GpuType]) -> list[int]:
        """Numbers of instances whose weights the primaries could hold; not all of very many."""
        share = self.problem.limits.memory_utilization
        memory = sum(len(kind.devices) * kind.gpu.memory_bytes * share for kind in primaries)
        most = min(sum(len(kind.devices) for kind in primaries),
                   int(memory / self.problem.model.weight_bytes_total))
        if most <= INSTANCE_COUNTS:
            return list(range(1, most + 1))
        sizes, stride = [len(kind.devices) for kind in primaries], -(-most // INSTANCE_COUNTS)
        return [n for n in range(1, most + 1)
                if n <= INSTANCE_COUNTS // 2 or n % stride == 0 or any(size % n == 0 for size in sizes)]

    def _layout(self, primaries: Sequence[GpuType], workers: Sequence[GpuType], count: int,
                degrees: Sequence[int]) -> Layout | None:
        tp = {kind.name: degree for kind, degree in zip(primaries, degrees, strict=True)}
        drafts = deal(self.problem, primaries, tp, count, workers)
        if drafts is None:
            return None
        estimates: list[Estimate] = []
        for draft in drafts:
            key = self._key(draft)
            if key not in self._estimates:
                shape = instance_shape(self.problem, draft.groups, draft.workers)
                self._estimates[key] = self.estimator.best(shape)
            estimate = self._estimates[key]
            if estimate is None:
                return None
            estimates.append(estimate)
        value = sum(estimate.value for estimate in estimates)
        return Layout(tuple(drafts), tuple(estimates), tuple(tp.items()), 1.0 / value)

    def _alone_s(self, layout: Layout) -> float:
        """Time of a mean request on the idle cluster, averaged over the instances by throughput."""
        total = 0.0
        for draft, estimate in zip(layout.drafts, layout.estimates, strict=True):
            key = self._key(draft)
            if key not in self._alone:
                shape = instance_shape(self.problem, draft.groups, draft.workers)
                alone = self.estimator.at(shape, 1, 1, estimate.layers)
                self._alone[key] = math.inf if alone is None else (
                    alone.prefill_s + self.estimator.output * alone.tpot_s)
            total += estimate.value * layout.cost_s * self._alone[key]
        return total

    def _key(self, draft: Draft) -> ShapeKey:
        """Equal for instances that differ in the numbers of their devices only."""
        cluster = self.problem.cluster
        heads = [group[0] for group in draft.groups]
        stages = tuple((cluster.devices[group[0]].gpu.name, len(group),
                        cluster.link(group[0], group[1]).name if len(group) > 1 else "")
                       for group in draft.groups)
        hops = tuple(cluster.link(a[-1], b[0]).name for a, b in pairwise(draft.groups))
        workers = Counter((cluster.devices[d].gpu.name, tuple(
            (cluster.link(head, d).name, cluster.devices[head].host_id == cluster.devices[d].host_id)
            for head in heads)) for d in draft.workers)
        return (stages, hops, tuple(sorted(workers.items())))


def _shortlist(ranked: Sequence[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """The first of all candidates, and the first few of every instance count."""
    taken: Counter[int] = Counter()
    chosen: list[tuple[int, tuple[int, ...]]] = []
    for place, (count, degrees) in enumerate(ranked):
        taken[count] += 1
        if place < EXACT_CANDIDATES or taken[count] <= BEST_OF_EACH_COUNT:
            chosen.append((count, degrees))
    return chosen
