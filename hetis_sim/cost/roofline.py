"""Durations from the datasheet: the larger of FLOPs and bytes at a stated share of the peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetis_sim.cost import work
from hetis_sim.cost.floor import decode_floor_s_per_byte, matrix_flops_per_s
from hetis_sim.cost.host import HostOverhead
from hetis_sim.cost.memo import MemoisedCost
from hetis_sim.cost.model import AttentionCost, ProvenanceRow, TransferCost
from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.errors import require_finite
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class RooflineSettings:
    """Shares of the datasheet peaks that the roofline assumes are reached.

    Assumptions of ours, rounded from the medians over the fitted cards and links of docs/cost.md.

    Attributes:
        gemm_compute: share of the matrix peak in large products.
        memory: share of the memory bandwidth in streaming kernels and thin products.
        attention_compute: share of the matrix peak in prefill attention.
        decode_memory: share of the memory bandwidth in decode attention.
        link: share of a link's bandwidth in large messages.
        kernel_s: time that a kernel adds whatever its size, with launches in a CUDA graph.
        message_s: software time of a message or of one step of a collective.
    """

    gemm_compute: float = 0.8
    memory: float = 0.8
    attention_compute: float = 0.55
    decode_memory: float = 0.8
    link: float = 0.78
    kernel_s: float = 2e-6
    message_s: float = 5e-6

    def __post_init__(self) -> None:
        for key in ("gemm_compute", "memory", "attention_compute", "decode_memory", "link"):
            require_finite(f"cost.roofline.{key}", getattr(self, key), 0.0, 1.0, open_low=True)
        for key in ("kernel_s", "message_s"):
            require_finite(f"cost.roofline.{key}", getattr(self, key), 0.0)


class RooflineCost(MemoisedCost):
    """Durations from datasheets alone; the fallback where nothing is measured."""

    def __init__(self, settings: RooflineSettings | None = None, host: HostOverhead | None = None) -> None:
        super().__init__()
        self.settings = settings or RooflineSettings()
        self.host = host or HostOverhead()

    def gemm_s(self, gpu: GpuSpec, gemm: work.Gemm, model: ModelSpec) -> float:
        """Seconds of ``gemm.count`` products, launched as one kernel."""
        moved = gemm.weights * model.weight_bytes + gemm.activations * model.activation_bytes
        compute = gemm.flops / (matrix_flops_per_s(gpu, model) * self.settings.gemm_compute)
        return max(compute, self.stream_s(gpu, moved)) + self.settings.kernel_s

    def stream_s(self, gpu: GpuSpec, size_bytes: float) -> float:
        """Seconds to move ``size_bytes`` through device memory."""
        return size_bytes / (gpu.memory_bandwidth_bytes_per_s * self.settings.memory)

    def elementwise_s(self, gpu: GpuSpec, size_bytes: float) -> float:
        """Seconds of one elementwise kernel that moves ``size_bytes``."""
        return self.stream_s(gpu, size_bytes) + self.settings.kernel_s

    def host_overhead_s(self, sequences: int, prompts: int = 0) -> float:
        return self.host.waited_s(sequences, prompts)

    def host_beside_s(self, sequences: int, layers: int, leads: bool, prompts: int = 0,
                      eager: bool = False) -> float:
        return self.host.beside_s(sequences, layers, leads, prompts, eager)

    def provenance(self, gpus: Sequence[GpuSpec], model: ModelSpec,
                   links: Sequence[LinkSpec]) -> list[ProvenanceRow]:
        rows = [self.gpu_row(module, gpu) for gpu in gpus
                for module in ("gemm", "elementwise", "prefill_attention", "decode_attention", "all_reduce")]
        rows += [ProvenanceRow("transfer", link.name, "roofline", "", "link specification") for link in links]
        return [*rows, self.host.provenance()]

    def gpu_row(self, module: str, gpu: GpuSpec) -> ProvenanceRow:
        """The row that says that ``module`` on ``gpu`` comes from the datasheet."""
        return ProvenanceRow(module, gpu.name, "roofline", "", gpu.source or "datasheet",
                             note="datasheet peak times an assumed share")

    def _dense_layer_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        kernels = work.layer_elementwise(model, tokens, tp)
        return sum(self.gemm_s(gpu, gemm, model) for gemm in work.layer_gemms(model, tokens, tp)) \
            + sum(self.elementwise_s(gpu, moved) for _, moved in kernels)

    def _head_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        kernels = work.head_elementwise(model, tokens, tp)
        return self.gemm_s(gpu, work.head_gemm(model, tokens, tp), model) \
            + sum(self.elementwise_s(gpu, moved) for _, moved in kernels)

    def _prefill_attention_layer_s(self, gpu: GpuSpec, model: ModelSpec, query_heads: int,
                                   new_tokens: int, context_tokens: int) -> float:
        flops = work.prefill_attention_flops(model, query_heads, new_tokens, context_tokens)
        moved = work.prefill_attention_bytes(model, query_heads, new_tokens, context_tokens)
        moved += 2 * query_heads * model.head_dim * model.activation_bytes * new_tokens
        compute = flops / (gpu.fp16_flops_per_s * self.settings.attention_compute)
        return max(compute, self.stream_s(gpu, moved)) + self.settings.kernel_s

    def _decode_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        per_byte = decode_floor_s_per_byte(gpu, model) / self.settings.decode_memory
        query_and_output_bytes = 2 * model.head_dim * model.activation_bytes
        return AttentionCost(self.stream_s(gpu, query_and_output_bytes), per_byte, 2 * self.settings.kernel_s)

    def _transfer_cost(self, link: LinkSpec) -> TransferCost:
        return TransferCost(1.0 / (link.bandwidth_bytes_per_s * self.settings.link),
                            link.latency_s + self.settings.message_s)

    def _all_reduce_s(self, gpu: GpuSpec, link: LinkSpec, size_bytes: int, ranks: int) -> float:
        """Ring: 2*(p-1) steps of size/p each (Patarasuk and Yuan, 2009)."""
        steps = 2 * (ranks - 1)
        step = self._transfer_cost(link)
        return steps * (step.gamma_s_per_byte * size_bytes / ranks + step.beta_s)
