"""vLLM over all GPUs: one even pipeline through every kind of card."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from hetis_sim.policies.admission import dispatch_at_home
from hetis_sim.policies.base import PlanningProblem, Policy
from hetis_sim.policies.bundles import FREE_SHARE, longest_context
from hetis_sim.policies.estimate import Estimate, Estimator
from hetis_sim.policies.layout import Draft, deal, gpu_types
from hetis_sim.policies.phases import ranks
from hetis_sim.policies.plan import Placement, Plan
from hetis_sim.policies.pools import does_not_fit
from hetis_sim.policies.rated import RatedInstance, shortest_queue
from hetis_sim.policies.settings import AdmissionSettings
from hetis_sim.policies.shape import InstanceShape, instance_shape
from hetis_sim.policies.view import InstanceLoad, InstanceView, RequestView
from hetis_sim.policies.vllm import even_layers
from hetis_sim.spec.errors import InfeasibleError

BATCH_SHRINK = 0.9
SHRINK_MOST = 0.3


@dataclass(frozen=True)
class VllmAllSettings(AdmissionSettings):
    """What a user may change."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Pipelines over all cards, and their estimates."""

    shapes: tuple[InstanceShape, ...]
    estimates: tuple[Estimate, ...]
    tp: tuple[tuple[str, int], ...]

    @property
    def value(self) -> float:
        """Requests per second of all pipelines, marked down where the SLO is missed."""
        return sum(estimate.value for estimate in self.estimates)

    def describe(self) -> str:
        """One line for people."""
        degrees = ", ".join(f"{name} TP{degree}" for name, degree in self.tp)
        return f"{len(self.shapes)} x PP{len(self.shapes[0].stages)} ({degrees}): {self.value:.4g} requests/s"


class VllmAllPolicy(Policy):
    """Serving as vLLM (Kwon et al., SOSP '23) does it when it is given all GPUs as if they were equal.

    From the source: tensor parallelism inside a host with degrees that divide the heads, pipeline
    parallelism over the rest with as many layers for every stage, data parallelism; all heads stay at
    the rank that holds their weights; the latest request is preempted.

    Ours: every pipeline goes through all kinds of card; a stage whose cards cannot hold its even
    share and its cache gets fewer layers, which a user of vLLM sets by hand; degrees, number of pipelines,
    how much cache that is, and the batch are searched for the highest capacity; requests go where fewest
    tokens are outstanding.
    """

    name: ClassVar[str] = "vllm_all"
    plans_for_rate: ClassVar[bool] = False
    settings_type: ClassVar[type] = VllmAllSettings

    def __init__(self, settings: VllmAllSettings | None = None) -> None:
        self.settings = settings or VllmAllSettings()
        self.preemption = self.settings.preemption_mode

    def plan(self, problem: PlanningProblem) -> Plan:
        """The even pipelines of highest capacity.

        Raises:
            InfeasibleError: the model fits nowhere.
        """
        started = time.perf_counter()
        found: list[Layout] = []
        for longest in (longest_context(problem), 1):
            found = found or sorted(_layouts(problem, longest), key=lambda layout: -layout.value)
        if not found:
            raise InfeasibleError(does_not_fit(problem))
        best = found[0]
        context = Estimator(problem).context
        instances = tuple(
            RatedInstance(shape.with_layers(estimate.layers).stages, strength=estimate.requests * context)
            for shape, estimate in zip(best.shapes, best.estimates, strict=True))
        reasons = {
            device: f"primary (instance {i}, stage {s}, {stage.layers} of {instance.layers} layers): "
                    f"every card has its share of a pipeline over all; {best.describe()}"
            for i, instance in enumerate(instances) for s, stage in enumerate(instance.stages)
            for device in stage.devices}
        search = {"seconds": round(time.perf_counter() - started, 4), "candidates": len(found),
                  "requests_per_s": best.value, "best": [layout.describe() for layout in found[:3]]}
        return Plan(instances, dict(sorted(reasons.items())), search)

    def route(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        """The pipeline with the fewest outstanding tokens for its cache."""
        return shortest_queue(instances, request.context_tokens)

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> list[Placement]:
        """All heads at home, as long as the reserve stays free."""
        return dispatch_at_home(requests, view, self.settings.reserve_fraction)


def _layouts(problem: PlanningProblem, longest: int) -> Iterator[Layout]:
    """All that fit, one for every number of pipelines and choice of degrees."""
    types, model = gpu_types(problem), problem.model
    estimator = Estimator(problem, FREE_SHARE)
    known: dict[object, Estimate | None] = {}
    options = [[d for d in range(1, len(kind.hosts[0]) + 1) if _divides(problem, d)] for kind in types]
    for degrees in product(*options):
        tp = {kind.name: degree for kind, degree in zip(types, degrees, strict=True)}
        groups = [kind.groups(tp[kind.name]) for kind in types]
        if any(not _divides(problem, len(group)) for made in groups for group in made):
            continue
        for count in range(1, min(map(len, groups)) + 1):
            drafts = deal(problem, types, tp, count, ())
            if drafts is None or any(len(draft.groups) > model.layers for draft in drafts):
                continue
            shapes = tuple(instance_shape(problem, draft.groups) for draft in drafts)
            estimates: list[Estimate] = []
            for draft, shape in zip(drafts, shapes, strict=True):
                key = _form(problem, draft)
                if key not in known:
                    known[key] = even_estimate(estimator, shape, longest)
                estimate = known[key]
                if estimate is None:
                    break
                estimates.append(estimate)
            if len(estimates) == count:
                yield Layout(shapes, tuple(estimates), tuple(tp.items()))


def _divides(problem: PlanningProblem, degree: int) -> bool:
    return problem.model.kv_heads % degree == 0 and problem.model.query_heads % degree == 0


def _form(problem: PlanningProblem, draft: Draft) -> tuple[object, ...]:
    """Equal for instances that differ in the numbers of their devices only."""
    devices = problem.cluster.devices
    if problem.cluster.host_links:
        return tuple(draft.groups)
    return tuple((devices[a[0]].gpu.name, len(a), problem.cluster.hosts[devices[a[0]].host_id].link.name,
                  b is not None and devices[a[0]].host_id == devices[b[0]].host_id)
                 for a, b in zip(draft.groups, [*draft.groups[1:], None], strict=True))


def even_estimate(estimator: Estimator, shape: InstanceShape, longest_tokens: int) -> Estimate | None:
    """The best estimate with layers as even as the memory for some batch allows; None if nothing fits.

    The larger the batch, the more its cache pushes layers out of small cards. For every split that comes of
    it, the largest batch is tried, and smaller ones until the SLO is held and the estimate gets no better.
    """
    problem, stages = estimator.problem, len(shape.stages)
    longest_bytes = longest_tokens * problem.model.kv_bytes_per_token_per_layer_per_group
    largest: dict[tuple[int, ...], int] = {}
    for batch in range(1, estimator.largest_batch(shape) + 1):
        largest[_layers_that_fit(shape, max(batch * estimator.group_bytes, longest_bytes))] = batch
    splits = {even_within(most, problem.model.layers): batch for most, batch in largest.items()}
    best: Estimate | None = None
    for layers, batch in splits.items():
        if layers is None:
            continue
        last, shrink = -1.0, BATCH_SHRINK
        while batch:
            lane = max(1, batch // stages)
            found = estimator.at(shape, lane, min(batch, lane * stages), layers)
            if found is not None:
                if best is None or found.value > best.value:
                    best = found
                if found.penalty <= 1.0 and found.value <= last:
                    break
                last, shrink = found.value, max(SHRINK_MOST, min(BATCH_SHRINK, 1.0 / found.penalty))
            batch = int(batch * shrink)
    return best


def _layers_that_fit(shape: InstanceShape, group_bytes: float) -> tuple[int, ...]:
    """Layers that each stage holds with so much cache for each of their KV groups."""
    return tuple(int(min(room / (weights + group_bytes * owned) for room, weights, owned in ranks(stage)))
                 for stage in shape.stages)


def even_within(most: Sequence[int], layers: int) -> tuple[int, ...] | None:
    """Layers as vLLM splits them, at most ``most`` for each stage; None where a stage gets none.

    What a stage cannot hold goes, layer by layer, to the stage that has the fewest and room for more.
    """
    if sum(most) < layers or min(most) < 1 or len(most) > layers:
        return None
    counts = [min(n, limit) for n, limit in zip(even_layers(layers, len(most)), most, strict=True)]
    for _ in range(layers - sum(counts)):
        s = min((s for s, limit in enumerate(most) if counts[s] < limit), key=lambda s: (counts[s], s))
        counts[s] += 1
    return tuple(counts)


