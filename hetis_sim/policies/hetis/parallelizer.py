"""Chooses primary and attention workers, and the layout of the primaries.

Given the paper's exclusion rule, everything follows from one cost: seconds per request of the
whole cluster in steady state, one over the sum of the throughputs that :mod:`hetis_sim.policies.estimate`
finds for the instances. That the cost rewards throughput, not the latency of a lone batch, is ours; it
agrees with the paper's RTX 3090s being primary for Llama-70B, which lengthen the way of every
batch and pay only because stages work at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.estimate import Estimator
from hetis_sim.policies.hetis.settings import HetisSettings
from hetis_sim.policies.layout import GpuType, gpu_types
from hetis_sim.policies.memory import RUNTIME_BYTES
from hetis_sim.policies.plan import Plan
from hetis_sim.policies.search import Found, Layout, LayoutSearch
from hetis_sim.policies.shape import instance_shape
from hetis_sim.spec.errors import InfeasibleError
from hetis_sim.spec.gpu import GB


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the exclusion rule found about one type: primary or not, and why, for people."""

    primary: bool
    sentence: str


class Parallelizer:
    """The search for the primary layout, made once before the first request."""

    def __init__(self, settings: HetisSettings) -> None:
        self.settings = settings

    def plan(self, problem: PlanningProblem) -> Plan:
        """The plan of least cost under the exclusion rule; of plans that cost the same, the quickest.

        Starting with all types as primaries, types are looked at from the lowest-end one up: type
        t is left out of dense work when C(without t) <= (1 + delta) * C(with t), and computes
        attention from then on. That is repeated until no type is left out any more; the highest-end
        type always stays (both ours).

        Raises:
            InfeasibleError: the model fits in no layout; the text holds the memory needed and there.
        """
        started = time.perf_counter()
        run = _Run(problem, self.settings)
        types = gpu_types(problem)
        primaries = list(types)
        found = run.search(primaries)
        if found.choice is None:
            raise InfeasibleError(_does_not_fit(problem))
        verdicts: dict[str, Verdict] = {}
        undecided = True
        while undecided:
            undecided = False
            for kind in reversed(types[1:]):
                if kind not in primaries:
                    continue
                without = [t for t in primaries if t is not kind]
                fewer = run.search(without)
                verdicts[kind.name] = self._verdict(kind, found, fewer)
                if not verdicts[kind.name].primary:
                    primaries, found, undecided = without, fewer, True
        verdicts[types[0].name] = Verdict(True, "the highest-end type always computes the dense modules")
        assert found.choice is not None
        figures = run.figures(primaries, time.perf_counter() - started)
        instances = tuple(
            instance_shape(problem, draft.groups, draft.workers).with_layers(estimate.layers)
            for draft, estimate in zip(found.choice.drafts, found.choice.estimates, strict=True))
        return Plan(instances, _reasons(problem, found.choice, verdicts), figures)

    def _verdict(self, kind: GpuType, found: Found, fewer: Found) -> Verdict:
        """The exclusion rule for one type."""
        assert found.cost_s is not None
        names, delta = f"the {kind.name}s", self.settings.delta
        if fewer.cost_s is None:
            return Verdict(True, f"the model does not fit without {names}")
        cost, less = found.cost_s, fewer.cost_s
        gain = less / cost - 1.0
        figures = f"{cost:.4g} s a request with them, {less:.4g} s without"
        if less <= (1.0 + delta) * cost:
            if gain > 0:
                change = f"improve the cost by {gain:.1%}, not more than delta = {delta:.0%}"
            else:
                change = f"not improve the cost but raise it by {cost / less - 1.0:.1%}"
            return Verdict(False, f"taking {names} into dense work would {change} ({figures})")
        return Verdict(True, f"{names} improve the cost by {gain:.1%}, more than delta = {delta:.0%} "
                             f"({figures})")


class _Run:
    """One run of the search over sets of types; remembers what each set costs."""

    def __init__(self, problem: PlanningProblem, settings: HetisSettings) -> None:
        self._types = gpu_types(problem)
        self._search = LayoutSearch(Estimator(problem, settings.reserve_fraction,
                                              ideal_pipeline=settings.ideal_pipeline))
        self._found: dict[tuple[str, ...], Found] = {}

    def search(self, primaries: Sequence[GpuType]) -> Found:
        """The best layouts with these types as primaries and all others as attention workers."""
        key = tuple(kind.name for kind in primaries)
        if key not in self._found:
            workers = [kind for kind in self._types if kind not in primaries]
            self._found[key] = self._search.run(primaries, workers)
        return self._found[key]

    def figures(self, primaries: Sequence[GpuType], seconds: float) -> dict[str, Any]:
        """For ``Plan.search``: time taken, number of candidates, costs of sets and of the best layouts."""
        found = self._found[tuple(kind.name for kind in primaries)]
        assert found.choice is not None
        return {
            "seconds": round(seconds, 4),
            "candidates": sum(tried.candidates for tried in self._found.values()),
            "sets": {" + ".join(key): tried.cost_s for key, tried in self._found.items()},
            "best": [layout.describe() for layout in found.layouts],
            "chosen": found.choice.describe(),
            "requests_per_s": sum(estimate.requests_per_s for estimate in found.choice.estimates),
            "tpot_s": max(estimate.tpot_s for estimate in found.choice.estimates),
        }


def _reasons(problem: PlanningProblem, layout: Layout, verdicts: dict[str, Verdict]) -> dict[int, str]:
    """One sentence for every device."""
    reasons: dict[int, str] = {}
    devices = problem.cluster.devices
    for i, (draft, estimate) in enumerate(zip(layout.drafts, layout.estimates, strict=True)):
        for s, (group, layers) in enumerate(zip(draft.groups, estimate.layers, strict=True)):
            where = f"instance {i}, stage {s}, {layers} of {problem.model.layers} layers"
            if len(group) > 1:
                where += f", tensor parallel over {len(group)}"
            for device in group:
                reasons[device] = f"primary ({where}): {verdicts[devices[device].gpu.name].sentence}"
        for device in draft.workers:
            kind = devices[device].gpu.name
            reasons[device] = f"attention worker (instance {i}): {verdicts[kind].sentence}"
    return dict(sorted(reasons.items()))


def _does_not_fit(problem: PlanningProblem) -> str:
    """How much memory the model needs, and how much there is."""
    cluster, model, share = problem.cluster, problem.model, problem.limits.memory_utilization
    usable = sum(max(0.0, device.gpu.memory_bytes * share - RUNTIME_BYTES) for device in cluster.devices)
    largest = max(device.gpu.memory_bytes for device in cluster.devices) * share - RUNTIME_BYTES
    return (f"{model.name} does not fit on {cluster.name}: one copy of its weights needs "
            f"{model.weight_bytes_total / GB:.1f} GB besides activations and cache, "
            f"{len(cluster.devices)} GPUs offer {usable / GB:.1f} GB "
            f"(scheduler.memory_utilization={share:g}, less the runtime); a layer takes "
            f"{model.layer_bytes / GB:.2f} GB, the largest GPU offers {largest / GB:.2f} GB; "
            "use more or larger GPUs, or a smaller model")
