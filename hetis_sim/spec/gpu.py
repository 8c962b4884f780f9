"""Facts of a GPU from its datasheet."""

from __future__ import annotations

from dataclasses import dataclass

from hetis_sim.spec.errors import require_finite
from hetis_sim.spec.lookup import require_int

MIB = 1024**2
GIB = 1024**3
GB = 10**9


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One kind of card, as one device that software sees.

    Attributes:
        name: key of the catalogue, e.g. ``a100-80gb``.
        memory_bytes: device memory that the driver reports, a little less than is marketed.
        memory_bandwidth_bytes_per_s: datasheet peak.
        fp16_flops_per_s: dense peak on fp16 or bf16 inputs with fp32 accumulation, which is
            what serving engines ask for: of the matrix units, or the fp32 rate of the vector
            units where a card has none.
        fp16_vector_flops_per_s: fp16 peak of the vector units, fp16 accumulation.
        fp32_flops_per_s: fp32 peak of the vector units.
        compute_capability: (major, minor) of CUDA, (0, 0) for others.
        peer_bandwidth_bytes_per_s: one-way NVLink-class bandwidth to peers, 0 for none.
        host_bandwidth_bytes_per_s: one-way PCIe bandwidth to the host.
        source: where the numbers come from.
    """

    name: str
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    fp16_flops_per_s: float
    fp16_vector_flops_per_s: float
    fp32_flops_per_s: float
    compute_capability: tuple[int, int] = (0, 0)
    peer_bandwidth_bytes_per_s: float = 0.0
    host_bandwidth_bytes_per_s: float = 15.753846e9
    source: str = ""

    def __post_init__(self) -> None:
        require_int(f"gpu.{self.name}.memory_bytes", self.memory_bytes, 1, 1 << 50)
        for key in ("memory_bandwidth_bytes_per_s", "fp16_flops_per_s", "fp16_vector_flops_per_s",
                    "fp32_flops_per_s", "host_bandwidth_bytes_per_s"):
            require_finite(f"gpu.{self.name}.{key}", getattr(self, key), 0.0, open_low=True)
        require_finite(f"gpu.{self.name}.peer_bandwidth_bytes_per_s", self.peer_bandwidth_bytes_per_s, 0.0)
