"""vLLM on GPUs of one kind: the baseline of a user who leaves the other GPUs alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hetis_sim.policies.base import PlanningProblem, Policy, PreemptionMode
from hetis_sim.policies.estimate import Estimate, Estimator
from hetis_sim.policies.memory import RUNTIME_BYTES
from hetis_sim.policies.plan import Plan
from hetis_sim.policies.shape import InstanceShape, instance_shape
from hetis_sim.spec.errors import InfeasibleError, require
from hetis_sim.spec.gpu import GB
from hetis_sim.spec.lookup import require_int

Group = tuple[int, ...]


@dataclass(frozen=True)
class VllmSettings:
    """What a user may change.

    Attributes:
        preemption: ``recompute`` or ``swap``.
        tp, pp, dp: degrees of tensor and pipeline parallelism, and replicas at most; 0 for the best.
    """

    preemption: str = "recompute"
    tp: int = 0
    pp: int = 0
    dp: int = 0

    def __post_init__(self) -> None:
        for key in ("tp", "pp", "dp"):
            require_int(f"policy.{key}", getattr(self, key), 0, 1 << 10)
        require(self.preemption in ("recompute", "swap"), "policy.preemption", self.preemption,
                "one of recompute, swap")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layout: equal instances of one kind of GPU."""

    gpu: str
    shapes: tuple[InstanceShape, ...]
    estimate: Estimate

    @property
    def value(self) -> float:
        """Requests per second of all instances, marked down where the SLO is missed."""
        return len(self.shapes) * self.estimate.value

    def describe(self) -> str:
        """One line for people."""
        stages = self.shapes[0].stages
        return (f"{len(self.shapes)} x TP{stages[0].tp} x PP{len(stages)} on {self.gpu}: "
                f"{1.0 / self.value:.4g} s a request")


class VllmPolicy(Policy):
    """Serving as vLLM (Kwon et al., SOSP '23) does it on a homogeneous pool.

    Tensor parallelism inside a host with a degree that divides the heads, pipeline
    parallelism over hosts with even layers, as vLLM splits them, and data parallelism. Of all
    such layouts on every single kind of GPU in the cluster the one with the highest capacity for
    the workload is taken (the choice is ours; a user of vLLM makes it by hand), so that the baseline
    is at its best. All heads stay at the rank that holds their weights; the latest request is preempted.
    """

    name: ClassVar[str] = "vllm"
    plans_for_rate: ClassVar[bool] = False
    settings_type: ClassVar[type] = VllmSettings

    def __init__(self, settings: VllmSettings | None = None) -> None:
        self.settings = settings or VllmSettings()
        self.preemption: PreemptionMode = "swap" if self.settings.preemption == "swap" else "recompute"

    def plan(self, problem: PlanningProblem) -> Plan:
        """The layout of highest capacity on GPUs of one kind.

        Raises:
            InfeasibleError: the model fits on the GPUs of no single kind.
        """
        started = time.perf_counter()
        settings = self.settings
        found = sorted(_candidates(problem, settings), key=lambda c: -c.value)
        if not found and (settings.tp or settings.pp):
            raise InfeasibleError(f"policy.tp={settings.tp} and policy.pp={settings.pp} (0: any) give no "
                                  f"layout of {problem.model.name} on GPUs of one kind in "
                                  f"{problem.cluster.name}; leave them at 0 to see what fits")
        if not found:
            raise InfeasibleError(_does_not_fit(problem))
        best = found[0]
        instances = tuple(shape.with_layers(best.estimate.layers) for shape in best.shapes)
        search = {"seconds": round(time.perf_counter() - started, 4), "candidates": len(found),
                  "best": [candidate.describe() for candidate in found[:3]]}
        return Plan(instances, _reasons(problem, best), search)


def even_layers(layers: int, stages: int) -> tuple[int, ...]:
    """As many layers for each stage; what is left goes to the stages before the last one.

    So vLLM's default partition does it, from the back to the front: the last stage has the LM head.
    """
    counts = [layers // stages] * stages
    for extra in range(layers % stages):
        counts[-2 - extra] += 1
    return tuple(counts)


def _candidates(problem: PlanningProblem, settings: VllmSettings) -> Iterator[Candidate]:
    model, estimator = problem.model, Estimator(problem)
    for name in problem.cluster.gpu_counts:
        hosts = _hosts(problem, name)
        for tp in range(1, max(map(len, hosts)) + 1):
            if model.kv_heads % tp or model.query_heads % tp or settings.tp not in (0, tp):
                continue
            groups = [host[start:start + tp] for host in hosts for start in range(0, len(host) - tp + 1, tp)]
            for depth in range(1, min(len(groups), model.layers) + 1):
                if settings.pp not in (0, depth):
                    continue
                first = instance_shape(problem, groups[:depth])
                estimate = estimator.best(first, even_layers(model.layers, depth))
                if estimate is not None:
                    count = min(len(groups) // depth, settings.dp or len(groups))
                    cuts = [groups[i * depth:(i + 1) * depth] for i in range(count)]
                    yield Candidate(name, tuple(instance_shape(problem, cut) for cut in cuts), estimate)


def _hosts(problem: PlanningProblem, name: str) -> list[Group]:
    by_host: dict[int, list[int]] = {}
    for device in problem.cluster.devices:
        if device.gpu.name == name:
            by_host.setdefault(device.host_id, []).append(device.device_id)
    return [tuple(devices) for devices in by_host.values()]


def _reasons(problem: PlanningProblem, best: Candidate) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for card in problem.cluster.devices:
        reasons[card.device_id] = (
            "not used: left over when instances of equal size were formed" if card.gpu.name == best.gpu else
            f"not used: the {best.gpu}s alone have the highest capacity of any single kind")
    for i, shape in enumerate(best.shapes):
        for s, (stage, layers) in enumerate(zip(shape.stages, best.estimate.layers, strict=True)):
            where = f"instance {i}, stage {s}, {layers} of {problem.model.layers} layers"
            for device in stage.devices:
                reasons[device] = f"primary ({where}): {best.describe()}, the best of any single kind of GPU"
    return reasons


def _does_not_fit(problem: PlanningProblem) -> str:
    share, model = problem.limits.memory_utilization, problem.model
    offers = []
    for name, count in problem.cluster.gpu_counts.items():
        memory = next(d.gpu.memory_bytes for d in problem.cluster.devices if d.gpu.name == name)
        offers.append(f"{count} x {name} offer {count * (memory * share - RUNTIME_BYTES) / GB:.1f} GB")
    return (f"{model.name} does not fit on GPUs of one kind in {problem.cluster.name}: one copy of its "
            f"weights needs {model.weight_bytes_total / GB:.1f} GB besides activations and cache; "
            f"{'; '.join(offers)}; "
            "use more or larger GPUs, or a smaller model")
