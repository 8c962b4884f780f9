"""Pipelines made of any cards of a cluster, and what each could do at best.

A *bundle* says how many cards of every part of the cluster a pipeline takes; a *part* is the cards of
one kind in one host, which are all alike. A bundle is laid out as stages of tensor-parallel groups,
one group inside one part, high-end cards first; the degrees are tried out, the layers are split by
the estimator. Bundles that differ in the names of equal hosts only are worked out once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.estimate import Estimate, Estimator
from hetis_sim.policies.hetis.layout import gpu_types
from hetis_sim.policies.phases import DecodeEstimator, PrefillEstimator
from hetis_sim.policies.plan import InstancePlan, Role
from hetis_sim.policies.rated import RatedInstance
from hetis_sim.policies.shape import InstanceShape, instance_shape
from hetis_sim.spec.gpu import GpuSpec

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
        strength: see :class:`RatedInstance`.
    """

    role: Role
    split: Split
    estimate: Estimate
    strength: float

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
        self._estimators: Mapping[Role, Estimator] = {
            "both": Estimator(problem), "prefill": PrefillEstimator(problem), "decode": DecodeEstimator(problem)}
        self._known: dict[object, Pipeline | None] = {}
        self._shapes: dict[object, InstanceShape] = {}
        self._forms = [_host_form(problem, part.host) for part in self.parts]
        self._degrees = [d for d in range(1, problem.model.kv_heads + 1)
                         if problem.model.kv_heads % d == 0 and problem.model.query_heads % d == 0]

    def best(self, role: Role, bundle: Bundle) -> Pipeline | None:
        """The pipeline of highest value, None where the model does not fit."""
        key = (role, self._form(bundle))
        if key not in self._known:
            found = [p for split in self._splits(bundle) if (p := self._pipeline(role, split)) is not None]
            self._known[key] = max(found, key=lambda p: p.value, default=None)
        known = self._known[key]
        if known is None:
            return None
        degrees = {self.parts[part].rank: size for part, size in reversed(known.split)}
        return Pipeline(role, self._split(bundle, degrees), known.estimate, known.strength)

    def _form(self, bundle: Bundle) -> object:
        """Equal for bundles that can do the same."""
        if self.problem.cluster.host_links:
            return bundle
        hosts: dict[int, tuple[object, list[tuple[int, int]]]] = {}
        for part, form, count in zip(self.parts, self._forms, bundle, strict=True):
            if count:
                hosts.setdefault(part.host, (form, []))[1].append((part.rank, count))
        return tuple(sorted((str(form), tuple(counts)) for form, counts in hosts.values()))

    def _splits(self, bundle: Bundle) -> Iterator[Split]:
        """One split for every choice of a degree for each kind of card."""
        most: dict[int, int] = {}
        for part, count in zip(self.parts, bundle, strict=True):
            if count:
                most[part.rank] = max(count, most.get(part.rank, 0))
        options = [[d for d in self._degrees if d <= count] for count in most.values()]
        for degrees in product(*options):
            yield self._split(bundle, dict(zip(most, degrees, strict=True)))

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
        layers = self.problem.model.layers
        if len(split) > layers:
            return None
        shape = self._shapes.get(split)
        if shape is None:
            shape = self._shapes[split] = instance_shape(self.problem, self._first_devices(split))
        estimate = self._estimators[role].best(shape)
        if estimate is None or self._longest_context(shape, estimate.layers) < self._longest:
            return None
        tokens = estimate.requests * self._estimators["both"].context
        if role == "prefill":
            tokens = estimate.requests_per_s * self.problem.prompt_tokens
        return Pipeline(role, split, estimate, tokens)

    def _first_devices(self, split: Split) -> Groups:
        taken = [0] * len(self.parts)
        return tuple(_take(self.parts, taken, split))

    def _longest_context(self, shape: InstanceShape, layers: Sequence[int]) -> int:
        """Tokens of the longest request that the empty instance holds."""
        per_token = self.problem.model.kv_bytes_per_token_per_layer_per_group
        return int(min((room - n * weights) / (n * owned * per_token)
                       for stage, n in zip(shape.stages, layers, strict=True)
                       for room, weights, owned in zip(stage.room_bytes, stage.layer_bytes, stage.owned, strict=True)))

    def instances(self, pipelines: Sequence[Pipeline]) -> list[RatedInstance]:
        """The pipelines on actual cards, each card in one of them."""
        taken = [0] * len(self.parts)
        made: list[RatedInstance] = []
        for pipeline in pipelines:
            groups = list(_take(self.parts, taken, pipeline.split))
            plan: InstancePlan = instance_shape(self.problem, groups).with_layers(pipeline.estimate.layers)
            made.append(RatedInstance(plan.stages, (), pipeline.role, pipeline.strength))
        return made

    def describe(self, pipeline: Pipeline) -> str:
        """One line for people: ``a100-80gb TP2 + rtx3090 TP2``."""
        return " + ".join(f"{self.parts[p].gpu.name} TP{size}" for p, size in pipeline.split)


def _take(parts: Sequence[Part], taken: list[int], split: Split) -> Iterator[tuple[int, ...]]:
    """The next cards of each part, group by group."""
    for p, size in split:
        yield parts[p].devices[taken[p]:taken[p] + size]
        taken[p] += size


def longest_context(problem: PlanningProblem) -> int:
    """Context that every instance should be able to hold (ours): four mean requests and a full step, at most
    what the model allows. An operator knows mean lengths; longer requests go where there is more cache.
    """
    mean = problem.prompt_tokens + problem.output_tokens
    wanted = max(problem.limits.max_batch_tokens, int(4 * mean))
    return min(problem.model.context_limit_tokens, wanted)
