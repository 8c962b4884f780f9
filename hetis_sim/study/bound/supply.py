"""What the devices of a cluster can do at best, by kind of GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.cost.floor import prefill_attention_floor_s
from hetis_sim.cost.model import AttentionCost, CostModel
from hetis_sim.policies.base import EngineLimits
from hetis_sim.policies.memory import RUNTIME_BYTES, activation_bytes, attention_worker_reserve_bytes
from hetis_sim.spec.cluster import ClusterSpec, LinkSpec
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec
from hetis_sim.study.bound.demand import Demand
from hetis_sim.study.bound.durations import TpGroup, best_per_token, intervals, tp_groups

MERGED = 0.02
"""Batches whose times are within this share of one another are taken as one."""


@dataclass(frozen=True, slots=True)
class Kind:
    """All devices of one kind of GPU.

    Attributes:
        gpu, count: which, and how many.
        memory_bytes: of all of them, for weights and cache.
        hosts: numbers of the hosts that have some.
        attention: coefficients of decode attention.
        head_s: LM head of one token at the best batch, in device seconds.
        prefill_s: dense work of one prompt token in all layers, in device seconds; None where
            prompts share steps with decoding.
        prompt_s: prefill attention in all layers, for each bin of prompts.
        wire_bytes_per_s: of the network interfaces of those hosts together, one way.
    """

    gpu: GpuSpec
    count: int
    memory_bytes: float
    hosts: frozenset[int]
    attention: AttentionCost
    head_s: float
    prefill_s: float | None
    prompt_s: tuple[float, ...]
    wire_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of the iterations of a batch: ``1/tp`` of the dense work of all layers.

    Attributes:
        kind: index of the kind of GPU.
        share: at most this many tokens' worth of dense work, batch over ranks.
        decode_share: of those, at most so many decoded ones.
        busy_s: that the rank computes and communicates.
        held_s: that the iteration takes, at least; its requests hold their cache so long.
        host_s: the host's part, per rank.
        launches: of decode attention, per rank: one a layer for each batch that decodes.
    """

    kind: int
    share: float
    decode_share: float
    busy_s: float
    held_s: float
    host_s: float
    launches: float


@dataclass(frozen=True, slots=True)
class Supply:
    """Best cases of a cluster.

    Attributes:
        kinds: of GPUs.
        batches: ways to run decode iterations.
        iteration_s: the shortest iteration of any batch.
        prompt_host_s: host time of a prompt's prefill.
        mixed: batches may hold prompt tokens as well.
    """

    kinds: tuple[Kind, ...]
    batches: tuple[Batch, ...]
    iteration_s: float
    prompt_host_s: float
    mixed: bool


class SupplyMaker:
    """Asks the cost model for everything that :class:`Supply` holds."""

    def __init__(self, cluster: ClusterSpec, model: ModelSpec, cost: CostModel, settings: SchedulerSettings,
                 demand: Demand) -> None:
        self.cluster = cluster
        self.model = model
        self.cost = cost
        self.settings = settings
        self.demand = demand
        self.sequences = settings.limits.max_batch_requests
        self.mixed = settings.chunked_prefill
        self.tps = tp_groups(min(model.kv_heads, len(cluster.devices)))
        self.gpus = list({device.gpu: None for device in cluster.devices})
        self.launch_s = min(cost.decode_attention(gpu, model).least().c_s for gpu in self.gpus)

    def make(self) -> Supply:
        """Kinds and batches."""
        batches = tuple(batch for k in range(len(self.gpus)) for batch in undominated(self._batches(k)))
        per_prompt = 0.0
        if not self.mixed:
            # Every prompt gets its first token in the iteration that it is computed in.
            per_prompt = best_per_token(lambda n: self.cost.host_overhead_s(n, n), self.sequences)
        return Supply(tuple(map(self._kind, self.gpus)), batches, min(batch.held_s for batch in batches),
                      per_prompt, self.mixed)

    def _kind(self, gpu: GpuSpec) -> Kind:
        devices = [device for device in self.cluster.devices if device.gpu == gpu]
        hosts = frozenset(device.host_id for device in devices)
        room = len(devices) * usable_bytes(gpu, self.model, self.settings.limits)
        attention = self.cost.decode_attention(gpu, self.model).least()
        return Kind(gpu, len(devices), room, hosts, attention, self._head_s(gpu),
                    None if self.mixed else self._prefill_s(gpu),
                    tuple(self._prompt_s(gpu, shortest) for _, shortest in self.demand.prompts),
                    sum(map(self._wire_bytes_per_s, hosts)))

    # -- dense work ------------------------------------------------------------------------

    def _layers_s(self, gpu: GpuSpec, tp: TpGroup, tokens: int) -> float:
        """Dense work and all-reduces of all layers on one rank, at the best degree of a group."""
        model = self.model
        dense = min(self.cost.dense_layer_s(gpu, model, tokens, degree) for degree in set(tp))
        return model.layers * (dense + 2 * self._all_reduce_s(gpu, tp, tokens))

    def _all_reduce_s(self, gpu: GpuSpec, tp: TpGroup, tokens: int) -> float:
        size = tokens * self.model.hidden * self.model.activation_bytes
        return min(self.cost.all_reduce_s(gpu, link, size, degree)
                   for degree in set(tp) for link in self._rings(gpu, tp[0]))

    def _rings(self, gpu: GpuSpec, ranks: int) -> list[LinkSpec]:
        """Links that may be the slowest one between so many ranks, one of them of this kind."""
        cluster = self.cluster
        inside = [host for host in cluster.hosts if gpu in host.gpus]
        across = self._links_between()
        if ranks <= max(len(host.gpus) for host in inside) or not across:
            return list({host.link: None for host in inside} | dict.fromkeys(across))
        fastest = max(link.bandwidth_bytes_per_s for link in across)
        slower = [host.link for host in cluster.hosts if host.link.bandwidth_bytes_per_s <= fastest]
        return list(dict.fromkeys([*across, *slower]))

    def _links_between(self) -> list[LinkSpec]:
        """Links between different hosts."""
        if len(self.cluster.hosts) < 2:
            return []
        return [self.cluster.network, *(link for _, _, link in self.cluster.host_links)]

    def _batches(self, kind: int) -> list[Batch]:
        """All ways for one rank of a kind to take part in decode iterations."""
        gpu, layers = self.gpus[kind], self.model.layers
        most = max(self.settings.chunk_tokens, self.sequences) if self.mixed else self.sequences
        found: list[Batch] = []
        for tp in self.tps:
            for low, high, busy in intervals(partial(self._layers_s, gpu, tp), most):
                # In a mixed batch it is open how many tokens are those of sequences.
                sequences = 1 if self.mixed else low
                host = self.cost.host_overhead_s(sequences)
                held = busy + host + layers * self.launch_s + self._least_head_s(sequences)
                decoded = min(high, self.sequences)
                found.append(Batch(kind, high / tp[0], decoded / tp[0], busy, held, host / tp[1],
                                   layers / tp[1]))
        return found

    def _prefill_s(self, gpu: GpuSpec) -> float:
        most = max(self.settings.limits.max_batch_tokens, self.demand.longest_tokens)
        return min(tp[0] * best_per_token(partial(self._layers_s, gpu, tp), most) for tp in self.tps)

    # -- the head, and attention -------------------------------------------------------------

    def _head_s(self, gpu: GpuSpec) -> float:
        return min(tp[0] * best_per_token(partial(self._head_rank_s, gpu, tp), self.sequences)
                   for tp in self.tps)

    def _head_rank_s(self, gpu: GpuSpec, tp: TpGroup, sequences: int) -> float:
        return min(self.cost.head_s(gpu, self.model, sequences, degree) for degree in set(tp))

    def _least_head_s(self, sequences: int) -> float:
        """The head's part of an iteration, wherever it is computed."""
        return min(self._head_rank_s(gpu, tp, sequences) for gpu in self.gpus for tp in self.tps)

    def _prompt_s(self, gpu: GpuSpec, tokens: int) -> float:
        """Prefill attention of a prompt in all layers, in device seconds."""
        model, groups = self.model, self.model.kv_heads
        if self.mixed:
            # Pieces of any size: what counts for all of them is the arithmetic.
            return model.layers * prefill_attention_floor_s(gpu, model, model.query_heads, tokens, 0)
        return model.layers * min(
            self.cost.prefill_attention_layer_s(gpu, model, n * model.heads_per_group, tokens, 0) * groups / n
            for n in range(1, groups + 1))

    # -- links -------------------------------------------------------------------------------

    def _wire_bytes_per_s(self, host: int) -> float:
        """One way through all network interfaces of a host."""
        links = [self.cluster.network]
        links += [link for a, b, link in self.cluster.host_links if host in (a, b)]
        return sum(1.0 / self._least_s_per_byte(link) for link in links)

    def _least_s_per_byte(self, link: LinkSpec) -> float:
        """Of a message of any kind: those with heads may take less than others."""
        kinds = {device.gpu.name: device.gpu for device in self.cluster.devices}.values()
        return min(self.cost.transfer(link).gamma_s_per_byte,
                   *(self.cost.head_transfer(link, rank, worker).gamma_s_per_byte
                     for rank in kinds for worker in kinds))


def usable_bytes(gpu: GpuSpec, model: ModelSpec, limits: EngineLimits) -> float:
    """Memory of one device that weights and cache may take, in the role that leaves the most.

    All of it where the configuration says what the cache holds.
    """
    if limits.cache_tokens:
        return float(gpu.memory_bytes)
    narrowest = activation_bytes(model, limits, model.kv_heads, False)
    reserve = min(narrowest, attention_worker_reserve_bytes(model, limits))
    return max(0.0, gpu.memory_bytes * limits.memory_utilization - RUNTIME_BYTES - reserve)


def undominated(batches: Sequence[Batch]) -> list[Batch]:
    """Those that no other one of the same kind beats in every respect, per token of dense work.

    Batches within 2 % of one another in the time of the rank and of the iteration become one, with
    the best of each.
    """
    table = np.array([[b.busy_s / b.share, b.held_s, b.host_s / b.share, b.launches / b.share,
                       -b.decode_share / b.share] for b in batches])
    number = np.arange(len(table))
    kept = [n for n, row in enumerate(table) if not
            ((table <= row).all(axis=1) & ((table < row).any(axis=1) | (number < n))).any()]
    found: list[Batch] = []
    while kept:
        near = [n for n in kept if (np.abs(np.log(table[n, :2] / table[kept[0], :2])) <= MERGED).all()]
        busy, held, host, launches, decoded = table[near].min(axis=0).tolist()
        found.append(Batch(batches[kept[0]].kind, 1.0, -decoded, busy, held, host, launches))
        kept = [n for n in kept if n not in near]
    return found


def supply_of(cluster: ClusterSpec, model: ModelSpec, cost: CostModel, settings: SchedulerSettings,
              demand: Demand) -> Supply:
    """The best cases of a cluster for a model, a cost model and a workload."""
    return SupplyMaker(cluster, model, cost, settings, demand).make()
