"""Pipelines made of any cards of a cluster, and what each could do at best.

A *bundle* says how many cards of every part of the cluster a pipeline takes; a *part* is the cards of
one kind in one host, which are all alike. A bundle is laid out as stages of tensor-parallel groups,
one group inside one part, high-end cards first; the degrees are tried out, the layers are split by
the estimator. Bundles that differ in the names of equal hosts only are worked out once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.estimate import Estimate, Estimator
from hetis_sim.policies.layout import gpu_types
from hetis_sim.policies.phases import DecodeEstimator, PrefillEstimator, ranks
from hetis_sim.policies.plan import InstancePlan, Role
from hetis_sim.policies.rated import RatedInstance
from hetis_sim.policies.shape import InstanceShape, instance_shape
from hetis_sim.spec.gpu import GpuSpec

FREE_SHARE = 0.1
"""Share of the cache that is planned to stay free, as contexts differ in length and grow (ours)."""

CHOICES_MOST = 27
TABLES_KEPT = 4
STAGES_MOST = 24
"""Stages of a pipeline, at most; deeper ones spend their time on hops (ours)."""

Bundle = tuple[int, ...]
Groups = tuple[tuple[int, ...], ...]
Split = tuple[tuple[int, int], ...]
"""Groups as (part, cards), in pipeline order."""


@dataclass(frozen=True, slots=True)
class Part:
    """The cards of one kind in one host. ``rank`` counts the kinds, high-end first."""

    gpu: GpuSpec
    rank: int
    host: int
    devices: tuple[int, ...]


def cluster_parts(problem: PlanningProblem) -> tuple[Part, ...]:
    """All parts, high-end kinds first, in an order that the numbers of equal hosts do not decide."""
    cluster = problem.cluster
    ranks = {kind.name: rank for rank, kind in enumerate(gpu_types(problem))}
    found: dict[tuple[int, int], list[int]] = {}
    for device in cluster.devices:
        found.setdefault((ranks[device.gpu.name], device.host_id), []).append(device.device_id)
    parts = [Part(cluster.devices[ids[0]].gpu, rank, host, tuple(ids)) for (rank, host), ids in found.items()]
    return tuple(sorted(parts, key=lambda part: (part.rank, -len(part.devices),
                                                 _host_form(problem, part.host), part.host)))


def _host_form(problem: PlanningProblem, host: int) -> tuple[str, tuple[str, ...]]:
    spec = problem.cluster.hosts[host]
    return spec.link.name, tuple(sorted(gpu.name for gpu in spec.gpus))


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A bundle at its best in one role.

    Attributes:
        role: what it serves.
        split: its groups.
        estimate: its figures.
        strength, prompt_rate: see :class:`RatedInstance`.
        lone_ttft_s, lone_tpot_s: latencies of a request that is alone; 0 for a phase not served.
    """

    role: Role
    split: Split
    estimate: Estimate
    strength: float
    prompt_rate: float
    lone_ttft_s: float
    lone_tpot_s: float

    @property
    def value(self) -> float:
        """Requests per second, marked down where the SLO is missed."""
        return self.estimate.value


class PipelineTable:
    """The best pipeline of every bundle and role; remembers what it has worked out.

    Args:
        problem: cluster, model, costs and workload.
        longest_tokens: context that an instance must be able to hold to count at all.
    """

    def __init__(self, problem: PlanningProblem, longest_tokens: int) -> None:
        self.problem = problem
        self.parts = cluster_parts(problem)
        self._longest = longest_tokens
        self._prefill = PrefillEstimator(problem)
        self._estimators: Mapping[Role, Estimator] = {
            "both": Estimator(problem, FREE_SHARE), "prefill": self._prefill,
            "decode": DecodeEstimator(problem, FREE_SHARE)}
        self._known: dict[object, Pipeline | None] = {}
        self._shapes: dict[object, InstanceShape] = {}
        self._forms = [_host_form(problem, part.host) for part in self.parts]
        self._degrees = [d for d in range(1, problem.model.kv_heads + 1)
                         if problem.model.kv_heads % d == 0 and problem.model.query_heads % d == 0]

    def best(self, role: Role, bundle: Bundle) -> Pipeline | None:
        """The pipeline of highest value, None where the model does not fit."""
        key = (role, self._form(bundle))
        if key not in self._known:
            self._known[key] = self._search(role, bundle)
        known = self._known[key]
        if known is None:
            return None
        degrees = {self.parts[part].rank: size for part, size in reversed(known.split)}
        return replace(known, split=self._split(bundle, degrees))

    def _form(self, bundle: Bundle) -> object:
        """Equal for bundles that can do the same."""
        if self.problem.cluster.host_links:
            return bundle
        hosts: dict[int, tuple[object, list[tuple[int, int]]]] = {}
        for part, form, count in zip(self.parts, self._forms, bundle, strict=True):
            if count:
                hosts.setdefault(part.host, (form, []))[1].append((part.rank, count))
        return tuple(sorted((str(form), tuple(counts)) for form, counts in hosts.values()))

    def _search(self, role: Role, bundle: Bundle) -> Pipeline | None:
        """The best choice of a tensor-parallel degree for each kind of card.

        All choices are tried, or where there are very many, one kind after the other.
        """
        most: dict[int, int] = {}
        for part, count in zip(self.parts, bundle, strict=True):
            if count:
                most[part.rank] = max(count, most.get(part.rank, 0))
        options = [[d for d in self._degrees if d <= count] for count in most.values()]
        if math.prod(map(len, options)) <= CHOICES_MOST:
            return self._best_of(role, bundle, most, product(*options))
        chosen = [option[-1] for option in options]
        best: Pipeline | None = None
        for kind, option in enumerate(options):
            rows = [(*chosen[:kind], degree, *chosen[kind + 1:]) for degree in option]
            best = self._best_of(role, bundle, most, rows)
            if best is not None:
                sizes = {self.parts[part].rank: size for part, size in reversed(best.split)}
                chosen = [sizes[rank] for rank in most]
        return best

    def _best_of(self, role: Role, bundle: Bundle, kinds: Iterable[int],
                 rows: Iterable[Sequence[int]]) -> Pipeline | None:
        splits = (self._split(bundle, dict(zip(kinds, degrees, strict=True))) for degrees in rows)
        found = [p for split in splits if (p := self._pipeline(role, split)) is not None]
        return max(found, key=lambda p: p.value, default=None)

    def _split(self, bundle: Bundle, degrees: Mapping[int, int]) -> Split:
        """Groups of at most the degree of their kind; what is left of a part forms smaller ones."""
        groups: list[tuple[int, int, int, int]] = []
        for p, (part, count) in enumerate(zip(self.parts, bundle, strict=True)):
            left = count
            while left:
                size = max(d for d in self._degrees if d <= min(left, degrees[part.rank]))
                groups.append((part.rank, -size, -count, p))
                left -= size
        return tuple((p, -size) for _, size, _, p in sorted(groups))

    def _pipeline(self, role: Role, split: Split) -> Pipeline | None:
        if len(split) > min(STAGES_MOST, self.problem.model.layers):
            return None
        shape = self._shapes.get(split)
        if shape is None:
            shape = self._shapes[split] = instance_shape(self.problem, self._first_devices(split))
        estimate = self._estimators[role].best(shape)
        if estimate is None or self._longest_context(shape, estimate.layers) < self._longest:
            return None
        tokens = estimate.requests * self._estimators["both"].context
        ttft_s = tpot_s = 0.0
        if role == "prefill":
            tokens = estimate.requests_per_s * self.problem.prompt_tokens
        else:
            alone = self._estimators[role].at(shape, 1, 1, estimate.layers)
            tpot_s = alone.tpot_s if alone is not None else estimate.tpot_s
        if role != "decode":
            ttft_s = self._prefill.path_s(shape, estimate.layers)
        rate = self._prefill.tokens_per_s(shape, estimate.layers)
        return Pipeline(role, split, estimate, tokens, rate, ttft_s, tpot_s)

    def _first_devices(self, split: Split) -> Groups:
        taken = [0] * len(self.parts)
        return tuple(_take(self.parts, taken, split))

    def _longest_context(self, shape: InstanceShape, layers: Sequence[int]) -> int:
        """Tokens of the longest request that the empty instance holds."""
        per_token = self.problem.model.kv_bytes_per_token_per_layer_per_group
        return int(min((room - n * weights) / (n * owned * per_token)
                       for stage, n in zip(shape.stages, layers, strict=True)
                       for room, weights, owned in ranks(stage)))

    def instances(self, pipelines: Sequence[Pipeline]) -> list[RatedInstance]:
        """The pipelines on actual cards, each card in one of them."""
        taken = [0] * len(self.parts)
        made: list[RatedInstance] = []
        for pipeline in pipelines:
            groups = list(_take(self.parts, taken, pipeline.split))
            plan: InstancePlan = instance_shape(self.problem, groups).with_layers(pipeline.estimate.layers)
            made.append(RatedInstance(plan.stages, (), pipeline.role, pipeline.strength,
                                      pipeline.prompt_rate))
        return made

    def describe(self, pipeline: Pipeline) -> str:
        """One line for people: ``a100-80gb TP2 + rtx3090 TP2``."""
        return " + ".join(f"{self.parts[p].gpu.name} TP{size}" for p, size in pipeline.split)


@lru_cache(maxsize=TABLES_KEPT)
def _table(problem: PlanningProblem, longest_tokens: int) -> PipelineTable:
    return PipelineTable(problem, longest_tokens)


def pipeline_table(problem: PlanningProblem, longest_tokens: int) -> PipelineTable:
    """The table for a problem at any rate: what a pipeline can do does not depend on the load.

    Problems with one and the same cost model share it, so that a plan for another rate costs little.
    """
    return _table(replace(problem, rate_per_s=None), longest_tokens)


def _take(parts: Sequence[Part], taken: list[int], split: Split) -> Iterator[tuple[int, ...]]:
    """The next cards of each part, group by group."""
    for p, size in split:
        yield parts[p].devices[taken[p]:taken[p] + size]
        taken[p] += size


def longest_context(problem: PlanningProblem) -> int:
    """Context that every instance should be able to hold (ours).

    Four mean requests, for an operator knows mean lengths only, or a full step of prompts if that is
    more; at most what the model allows.
    """
    mean = problem.prompt_tokens + problem.output_tokens
    wanted = max(problem.limits.max_batch_tokens, int(4 * mean))
    return min(problem.model.context_limit_tokens, wanted)
