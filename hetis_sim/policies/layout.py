"""Forms tensor-parallel groups and instances out of a cluster's devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.gpu import GpuSpec

Group = tuple[int, ...]
"""Devices of one tensor-parallel group: one kind of GPU in one host."""


@dataclass(frozen=True, slots=True)
class GpuType:
    """All cards of one kind.

    Attributes:
        gpu: the kind.
        hosts: devices by host, hosts with more of them first.
        request_s: dense time of one layer for a mean request on one card; orders the types.
    """

    gpu: GpuSpec
    hosts: tuple[Group, ...]
    request_s: float

    @property
    def name(self) -> str:
        """Name of the kind."""
        return self.gpu.name

    @property
    def devices(self) -> Group:
        """All its cards."""
        return tuple(device for host in self.hosts for device in host)

    def tp_options(self, kv_heads: int) -> tuple[int, ...]:
        """Tensor-parallel degrees worth trying: divisors of a host's cards, and powers of two."""
        largest = len(self.hosts[0])
        sizes = {len(host) for host in self.hosts}
        return tuple(k for k in range(1, min(largest, kv_heads) + 1)
                     if k & (k - 1) == 0 or any(size % k == 0 for size in sizes))

    def groups(self, tp: int) -> list[Group]:
        """Its cards in groups of ``tp``; what is left of a host forms a smaller group. Largest first."""
        made = [host[start:start + tp] for host in self.hosts for start in range(0, len(host), tp)]
        return sorted(made, key=len, reverse=True)


def gpu_types(problem: PlanningProblem) -> tuple[GpuType, ...]:
    """The kinds of GPU of a cluster, high-end first.

    High-end is what computes the dense part of a mean request fastest: its prompt, and its
    output at a batch of 64 (ours; papers speak of low-end GPUs without a measure).
    """
    found = []
    for name in problem.cluster.gpu_counts:
        hosts = _hosts(problem.cluster, name)
        gpu = problem.cluster.devices[hosts[0][0]].gpu
        batch = min(64, problem.limits.max_batch_requests)
        prompt = max(1, min(round(problem.prompt_tokens), problem.limits.max_batch_tokens))
        seconds = problem.cost.dense_layer_s(gpu, problem.model, prompt, 1) * problem.prompt_tokens / prompt
        seconds += problem.output_tokens / batch * problem.cost.dense_layer_s(gpu, problem.model, batch, 1)
        found.append(GpuType(gpu, hosts, seconds))
    return tuple(sorted(found, key=lambda t: (t.request_s, t.name)))


def _hosts(cluster: ClusterSpec, name: str) -> tuple[Group, ...]:
    by_host: dict[int, list[int]] = {}
    for device in cluster.devices:
        if device.gpu.name == name:
            by_host.setdefault(device.host_id, []).append(device.device_id)
    ordered = sorted(by_host.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(tuple(devices) for _, devices in ordered)


@dataclass(slots=True)
class Draft:
    """An instance in the making: its groups in pipeline order, its attention workers, its strength."""

    groups: list[Group]
    workers: list[int]
    power: float = 0.0
    memory_bytes: float = 0.0


def deal(problem: PlanningProblem, types: Sequence[GpuType], tp: Mapping[str, int], count: int,
         workers: Sequence[GpuType]) -> list[Draft] | None:
    """Spread the groups of every type evenly over ``count`` instances, then the attention workers.

    Groups that do not divide evenly go to the instances that are weakest so far. An attention
    worker goes to the instance with the least memory for its speed. Stages come high-end first.

    Returns:
        None when an instance would have no group.
    """
    drafts = [Draft([], []) for _ in range(count)]
    for kind in types:
        groups = kind.groups(tp[kind.name])
        each, extra = divmod(len(groups), count)
        weakest = sorted(range(count), key=lambda i: (drafts[i].power, i))[:extra]
        start = 0
        for i, draft in enumerate(drafts):
            taken = each + (i in weakest)
            for group in groups[start:start + taken]:
                draft.groups.append(group)
                draft.power += len(group) / kind.request_s
                draft.memory_bytes += len(group) * kind.gpu.memory_bytes
            start += taken
    if any(not draft.groups for draft in drafts):
        return None
    _deal_workers(problem, drafts, workers)
    return drafts


def _deal_workers(problem: PlanningProblem, drafts: list[Draft], workers: Sequence[GpuType]) -> None:
    weights = problem.model.weight_bytes_total
    for kind in workers:
        for device in kind.devices:
            neediest = min(range(len(drafts)),
                           key=lambda i: ((drafts[i].memory_bytes - weights) / drafts[i].power, i))
            drafts[neediest].workers.append(device)
            drafts[neediest].memory_bytes += kind.gpu.memory_bytes
