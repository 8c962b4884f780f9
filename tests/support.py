"""Small models, clusters and cost models whose every figure a test can set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hetis_sim.cost.grid import Grid
from hetis_sim.cost.model import AttentionCost, CostModel, ProvenanceRow, TransferCost
from hetis_sim.policies.base import EngineLimits
from hetis_sim.policies.memory import cache_bytes, unit_bytes
from hetis_sim.policies.plan import InstancePlan, Plan, Role, StagePlan, even_groups
from hetis_sim.spec.cluster import ClusterSpec, HostSpec, LinkSpec
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec

TINY = ModelSpec("tiny", layers=6, hidden=16, query_heads=8, kv_heads=4, head_dim=4, ffn_hidden=32, vocab=64,
                 context_limit_tokens=4096)

ATTENTION = AttentionCost(1e-6, 3e-9, 1e-4)
WIRE = TransferCost(2e-7, 3e-4)
PEER = LinkSpec("pcie-of-tests", 8e6, 1e-5)
NETWORK = LinkSpec("network-of-tests", 4e6, 1e-4)


@dataclass(frozen=True)
class ConstantCost(CostModel):
    """Durations that are given, not derived: constants and straight lines, the same for every shard.

    Attributes:
        dense_s, dense_s_per_token: dense work of one layer.
        last_s: embedding and LM head.
        prefill_s_per_token: prefill attention of one layer.
        attention: coefficients of decode attention of one layer.
        slow: factors on ``attention`` by name of the GPU.
        wire: coefficients of a message on any link, whatever its bandwidth.
        reduce_s: one all-reduce.
        host_s: one iteration.
    """

    dense_s: float = 1e-3
    dense_s_per_token: float = 1e-5
    last_s: float = 5e-4
    prefill_s_per_token: float = 2e-5
    attention: AttentionCost = ATTENTION
    slow: Mapping[str, float] = field(default_factory=dict)
    wire: TransferCost = WIRE
    reduce_s: float = 2e-4
    host_s: float = 1.5e-3

    def dense_layer_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        return self.dense_s + self.dense_s_per_token * tokens

    def head_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        return self.last_s

    def prefill_attention_layer_s(self, gpu: GpuSpec, model: ModelSpec, query_heads: int,
                                  new_tokens: int, context_tokens: int) -> float:
        return self.prefill_s_per_token * new_tokens

    def decode_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        return scaled_attention(self.attention, self.slow.get(gpu.name, 1.0))

    def transfer(self, link: LinkSpec) -> TransferCost:
        return self.wire

    def all_reduce_s(self, gpu: GpuSpec, link: LinkSpec, size_bytes: int, ranks: int) -> float:
        return self.reduce_s if ranks > 1 else 0.0

    def host_overhead_s(self, sequences: int, prompts: int = 0) -> float:
        return self.host_s

    def provenance(self, gpus: Sequence[GpuSpec], model: ModelSpec,
                   links: Sequence[LinkSpec]) -> list[ProvenanceRow]:
        return []


@dataclass(frozen=True)
class ScaledCost(CostModel):
    """Another cost model with every duration multiplied."""

    inner: CostModel
    factor: float

    def dense_layer_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        return self.factor * self.inner.dense_layer_s(gpu, model, tokens, tp)

    def head_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        return self.factor * self.inner.head_s(gpu, model, tokens, tp)

    def prefill_attention_layer_s(self, gpu: GpuSpec, model: ModelSpec, query_heads: int,
                                  new_tokens: int, context_tokens: int) -> float:
        return self.factor * self.inner.prefill_attention_layer_s(gpu, model, query_heads, new_tokens,
                                                                  context_tokens)

    def decode_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        return scaled_attention(self.inner.decode_attention(gpu, model), self.factor)

    def transfer(self, link: LinkSpec) -> TransferCost:
        cost = self.inner.transfer(link)
        return TransferCost(self.factor * cost.gamma_s_per_byte, self.factor * cost.beta_s)

    def all_reduce_s(self, gpu: GpuSpec, link: LinkSpec, size_bytes: int, ranks: int) -> float:
        return self.factor * self.inner.all_reduce_s(gpu, link, size_bytes, ranks)

    def host_overhead_s(self, sequences: int, prompts: int = 0) -> float:
        return self.factor * self.inner.host_overhead_s(sequences, prompts)

    def provenance(self, gpus: Sequence[GpuSpec], model: ModelSpec,
                   links: Sequence[LinkSpec]) -> list[ProvenanceRow]:
        return self.inner.provenance(gpus, model, links)


BENT = replace(ATTENTION, correction=Grid(((0.0, 4.0, 8.0), (0.0, 8.0, 16.0)),
                                          (0.4, 0.2, 0.1, 0.0, -0.1, -0.3, -0.2, -0.4, -0.6)))
"""Decode attention that is no line."""


def scaled_attention(cost: AttentionCost, factor: float) -> AttentionCost:
    """The same line, steeper and higher."""
    return cost.scaled(factor)


def gpu(name: str, memory_bytes: int) -> GpuSpec:
    """A card of no particular speed; :class:`ConstantCost` does not ask."""
    return GpuSpec(name, memory_bytes, 1e12, 1e14, 1e14, 1e13, host_bandwidth_bytes_per_s=2e6)


def instance_plan(first_device: int, first_worker: int, layers: Sequence[int], tp: int = 1, workers: int = 0,
                  role: Role = "both", kv_heads: int = TINY.kv_heads) -> InstancePlan:
    """Stages of the given depths on consecutive devices, and consecutive attention workers."""
    stages = []
    for depth in layers:
        devices = tuple(range(first_device, first_device + tp))
        stages.append(StagePlan(devices, depth, even_groups(kv_heads, tp)))
        first_device += tp
    return InstancePlan(tuple(stages), tuple(range(first_worker, first_worker + workers)), role)


def tiny_plan(layers: Sequence[int] = (6,), tp: int = 1, workers: int = 0, instances: int = 1,
              roles: Sequence[Role] = (), kv_heads: int = TINY.kv_heads) -> Plan:
    """Equal instances: first the primaries of all of them, then all attention workers.

    ``roles``, where given, has one for each instance; those that only prefill have no workers.
    """
    roles = roles or ("both",) * instances
    primaries = len(layers) * tp
    made: list[InstancePlan] = []
    next_worker = len(roles) * primaries
    for n, role in enumerate(roles):
        count = 0 if role == "prefill" else workers
        made.append(instance_plan(n * primaries, next_worker, layers, tp, count, role, kv_heads))
        next_worker += count
    return Plan(tuple(made))


def sized_cluster(plan: Plan, blocks: int, worker_blocks: int = 0, model: ModelSpec = TINY,
                  limits: EngineLimits | None = None) -> ClusterSpec:
    """A cluster on which each instance of ``plan`` caches a known number of blocks.

    Each rank has room for ``blocks`` blocks of the groups that it owns, each attention worker
    for ``worker_blocks`` blocks of one group in all layers. Primaries share a host, attention
    workers another.
    """
    limits = limits or EngineLimits(memory_utilization=1.0)
    instances = plan.instances
    rough = GpuSpec("rough", 1 << 45, 1e12, 1e14, 1e14, 1e13)
    total = sum(len(instance.devices) for instance in instances)
    empty = ClusterSpec("rough", (HostSpec((rough,) * total, PEER),), NETWORK)
    memory = [0] * total
    for instance in instances:
        left = cache_bytes(empty, model, limits, instance)
        for device, units in _units(instance, blocks, worker_blocks).items():
            memory[device] = rough.memory_bytes - left[device] + units * unit_bytes(model, limits)
    cards = tuple(gpu(f"card{device}", size) for device, size in enumerate(memory))
    primaries = total - sum(len(instance.attention_workers) for instance in instances)
    hosts = [HostSpec(cards[:primaries], PEER), HostSpec(cards[primaries:], PEER)] if primaries < total \
        else [HostSpec(cards, PEER)]
    return ClusterSpec("tests", tuple(hosts), NETWORK)


def _units(instance: InstancePlan, blocks: int, worker_blocks: int) -> dict[int, int]:
    units = dict.fromkeys(instance.attention_workers, worker_blocks * instance.layers)
    for stage in instance.stages:
        units |= {device: blocks * owned * stage.layers
                  for device, owned in zip(stage.devices, stage.owned_groups, strict=True)}
    return units


def with_host_memory(cluster: ClusterSpec, memory_bytes: int) -> ClusterSpec:
    """The same cluster with other host memory."""
    return replace(cluster, hosts=tuple(replace(host, memory_bytes=memory_bytes) for host in cluster.hosts))
