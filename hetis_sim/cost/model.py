"""The interface of the cost room: how long each part of an iteration takes.

Every duration is in seconds on an idle device or link. One method per named part of an
iteration, so that a record can keep the parts apart: dense modules, prefill attention,
decode attention (tau), head transfer (rho), tensor-parallel collectives, host overhead.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hetis_sim.cost.graphs import NO_GRAPHS, GraphSteps
from hetis_sim.cost.grid import Grid
from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec

TILE_ROWS, TILE_ROWS_PAGED = 128, 64
"""Query rows of a tile of FlashAttention: of version 3, and of version 2 over a paged cache."""

PACKING_CAPABILITIES = (9,)
"""Major compute capabilities on which the heads of a KV group share a tile."""

TILE_REQUESTS, TILE_CONTEXTS = 32, (512, 2048)
"""Requests and contexts between which the cost of a tile is taken: enough to fill any card."""


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """Decode attention of one layer on one device: tau = a*h + b*g + c (Hetis, SC '25).

    Attributes:
        a_s_per_head: cost of one query head; h sums the query heads of all requests in the batch.
        b_s_per_byte: cost of one byte of KV cache; g sums the bytes of this one layer that are read.
        c_s: fixed cost of the kernel, paid only when there is work.
        lone: the same of a batch of one request, where that differs: contexts of several requests have
            to be brought together, a single one has not.
        correction: log of what the line leaves over, over (log2 query heads, log2 bytes per query head).

    Policies go by the line alone.
    """

    a_s_per_head: float
    b_s_per_byte: float
    c_s: float
    lone: AttentionCost | None = None
    correction: Grid | None = None

    def scaled(self, factor: float) -> AttentionCost:
        """A device that takes so many times as long."""
        lone = None if self.lone is None else self.lone.scaled(factor)
        return replace(self, a_s_per_head=factor * self.a_s_per_head, b_s_per_byte=factor * self.b_s_per_byte,
                       c_s=factor * self.c_s, lone=lone)

    def least(self) -> AttentionCost:
        """A line that no batch is faster than."""
        low = 1.0 if self.correction is None else math.exp(min(self.correction.values))
        lone = self if self.lone is None else self.lone
        return AttentionCost(min(low * self.a_s_per_head, lone.a_s_per_head),
                             min(low * self.b_s_per_byte, lone.b_s_per_byte), min(low * self.c_s, lone.c_s))

    def over_line(self, query_heads: float, kv_bytes: float) -> float:
        """What ``query_heads`` > 0 heads over ``kv_bytes`` > 0 take, over what the line says."""
        if self.correction is None:
            return 1.0
        return math.exp(self.correction.at_point(math.log2(query_heads), math.log2(kv_bytes / query_heads)))

    def seconds(self, query_heads: float, kv_bytes: float) -> float:
        """Duration for ``query_heads`` heads over ``kv_bytes`` of cache; 0 without heads."""
        if query_heads <= 0:
            return 0.0
        line_s = self.a_s_per_head * query_heads + self.b_s_per_byte * kv_bytes + self.c_s
        return line_s if self.correction is None else line_s * self.over_line(query_heads, kv_bytes)


@dataclass(frozen=True, slots=True)
class TransferCost:
    """Time of a message on a link: rho = gamma*d + beta (Hetis, SC '25).

    Attributes:
        gamma_s_per_byte: inverse of the bandwidth that is reached.
        beta_s: time of an empty message, software included.
    """

    gamma_s_per_byte: float
    beta_s: float

    def seconds(self, size_bytes: float) -> float:
        """Duration of a message of ``size_bytes``; 0 for nothing to send."""
        if size_bytes <= 0:
            return 0.0
        return self.gamma_s_per_byte * size_bytes + self.beta_s


NO_PACKING = TransferCost(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class ProvenanceRow:
    """Where the durations of one module on one device or link come from.

    Attributes:
        module: ``gemm``, ``elementwise``, ``prefill_attention``, ``decode_attention``,
            ``all_reduce``, ``transfer`` or ``host_overhead``.
        subject: the GPU or link.
        kind: ``measured`` (fitted to timings of this device), ``derived`` (from timings of a
            relative or of another precision, reasoning in the profile), ``roofline``
            (datasheet and stated assumptions) or ``setting`` (given by the user).
        profile: name of the profile, empty for none.
        source: the data or datasheet.
        median_error: median absolute relative error on rows that the fit did not see; None without.
        p95_error: 95th percentile of the same.
        note: the reasoning behind a derived or assumed value.
    """

    module: str
    subject: str
    kind: str
    profile: str
    source: str
    median_error: float | None = None
    p95_error: float | None = None
    note: str = ""


class CostModel(ABC):
    """Durations of the parts of an iteration, in seconds.

    Implementations are deterministic, never return less than the physical floor (FLOPs over
    the peak, weight, KV or message bytes over the bandwidth) and answer repeated questions
    from memory.
    """

    @abstractmethod
    def dense_layer_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        """Dense work of one layer for a batch of ``tokens`` on one of ``tp`` equal shards.

        QKV and output projections, MLP (of a mixture: the expected number of distinct experts
        that ``tokens`` touch), norms, rotary embedding, residuals and the KV write. No collectives.
        """

    @abstractmethod
    def head_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        """Embedding, final norm, LM head and sampling for ``tokens`` sequences on one of ``tp`` shards."""

    @abstractmethod
    def prefill_attention_layer_s(self, gpu: GpuSpec, model: ModelSpec, query_heads: int,
                                  new_tokens: int, context_tokens: int) -> float:
        """Causal attention of one layer and one request for ``query_heads`` heads.

        ``new_tokens`` queries see ``context_tokens`` cached tokens and the new ones before them.
        """

    @abstractmethod
    def decode_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        """Coefficients of decode attention of one layer on one device."""

    def remote_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        """The same on an attention worker, which has waited for what it is to compute.

        That of a rank unless measured apart: a processor that has waited finds its caches cold.
        """
        return self.decode_attention(gpu, model)

    @abstractmethod
    def transfer(self, link: LinkSpec) -> TransferCost:
        """Coefficients of a point-to-point message on a link."""

    def head_transfer(self, link: LinkSpec, rank: GpuSpec, worker: GpuSpec) -> TransferCost:
        """Coefficients of a message between a rank and an attention worker; by default those of any."""
        return self.transfer(link)

    def hop(self, link: LinkSpec) -> TransferCost:
        """Coefficients of activations on their way to the next stage: those of any message by default."""
        return self.transfer(link)

    @abstractmethod
    def all_reduce_s(self, gpu: GpuSpec, link: LinkSpec, size_bytes: int, ranks: int) -> float:
        """All-reduce of ``size_bytes`` per rank over ``ranks`` cards joined by ``link``; 0 for one rank."""

    @abstractmethod
    def host_overhead_s(self, sequences: int, prompts: int = 0) -> float:
        """Host time of one engine iteration that the devices wait for (scheduling, input, output).

        Args:
            sequences: that get a token in it.
            prompts: or pieces of such, in it.
        """

    def head_packing(self, gpu: GpuSpec) -> TransferCost:
        """Processor time of a rank on ``gpu`` to address one attention worker in one layer.

        Over the bytes that go out and come back: picking the rows and handing them over, and putting the
        answers in their places. It lies on the rank's own path, whether or not it waits for the worker.
        Nothing by default: kernels do it on the way.
        """
        return NO_PACKING

    def cache_packing(self, gpu: GpuSpec) -> TransferCost:
        """Processor time of a rank on ``gpu`` to send one layer of a prompt's cache to one other device.

        Over the bytes that go. It lies on the rank's own path. That of heads unless it was measured.
        """
        return self.head_packing(gpu)

    def host_copy(self, gpu: GpuSpec) -> TransferCost:
        """A copy of cache between a device and the memory of its host, either way.

        That of the card's datasheet unless it was measured.
        """
        return TransferCost(1.0 / gpu.host_bandwidth_bytes_per_s, 0.0)

    def ranges(self, gpu: GpuSpec, module: str) -> Mapping[str, tuple[float, float]]:
        """What the durations of a module were fitted on: ends by quantity; empty where nothing was fitted."""
        return {}

    def host_beside_s(self, sequences: int, layers: int, leads: bool, prompts: int = 0,
                      eager: bool = False) -> float:
        """Host time that runs beside the devices; an iteration of a stage takes the longer of the two.

        ``layers`` are those of the stage, and ``leads`` says whether the host schedules the iteration there.
        ``eager`` are iterations that no graph of kernels can stand for: those that are spread over several
        devices, and those with prompts that :meth:`graph_steps` does not let in.
        """
        return 0.0

    def graph_steps(self) -> GraphSteps:
        """Steps that graphs of kernels stand for where one device has all, and how they are rounded up."""
        return NO_GRAPHS

    def mixed_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        """Decode attention where one kernel computes it together with pieces of prompts.

        Such a kernel gives every query head of a decoding request a tile of rows, one of which it needs.
        vLLM calls FlashAttention so for batches of both kinds. FlashAttention 2 has 64 rows a tile over a
        paged cache. FlashAttention 3, which is used on Hopper, has 128 and packs the heads of a KV group into
        one tile. A tile is charged as half of 128 rows of a prompt (ours).
        """
        alone = self.decode_attention(gpu, model)
        heads = TILE_REQUESTS * model.query_heads
        short, long = TILE_CONTEXTS
        rise = (self.prefill_attention_layer_s(gpu, model, heads, TILE_ROWS, long)
                - self.prefill_attention_layer_s(gpu, model, heads, TILE_ROWS, short))
        group_s = rise / ((long - short) * TILE_REQUESTS * model.kv_heads)
        packed = gpu.compute_capability[0] in PACKING_CAPABILITIES
        group_s *= 1.0 / model.heads_per_group if packed else TILE_ROWS_PAGED / TILE_ROWS
        per_byte = group_s / model.kv_bytes_per_token_per_layer_per_group
        return AttentionCost(alone.a_s_per_head, max(alone.b_s_per_byte, per_byte), alone.c_s)

    @abstractmethod
    def provenance(self, gpus: Sequence[GpuSpec], model: ModelSpec,
                   links: Sequence[LinkSpec]) -> list[ProvenanceRow]:
        """Where each module's durations come from, for the run's output."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was asked outside the range that a profile was fitted on, each once, in order."""
        return ()
