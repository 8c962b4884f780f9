"""What bounds each fitted card: datasheet peaks from the catalogue, multiprocessors and caches.

Numbers of multiprocessors and sizes of the last-level cache are those of NVIDIA's architecture
whitepapers and datasheets.
"""

from __future__ import annotations

from dataclasses import dataclass

from analysis.fit.gemm import Card
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.gpus import gpu

MB = 1e6

# multiprocessors, bytes of the last-level cache
CHIPS = {
    "a100-80gb": (108, 40 * MB), "a100-40gb": (108, 40 * MB), "a100-pcie-80gb": (108, 40 * MB),
    "a100-pcie-40gb": (108, 40 * MB), "h100-sxm": (132, 50 * MB), "h100-pcie": (114, 50 * MB),
    "h200": (132, 50 * MB), "l40s": (142, 96 * MB), "rtx6000-ada": (142, 96 * MB), "rtx4090": (128, 72 * MB),
    "rtx-pro-6000": (188, 128 * MB), "l4": (58, 48 * MB), "a40": (84, 6 * MB), "a6000": (84, 6 * MB),
    "a10": (72, 6 * MB), "a10g": (80, 6 * MB), "rtx3090": (82, 6 * MB), "a30": (56, 24 * MB),
    "v100-16gb": (80, 6 * MB), "v100-32gb": (80, 6 * MB), "v100-sxm2-16gb": (80, 6 * MB),
    "v100-sxm2-32gb": (80, 6 * MB), "t4": (40, 4 * MB), "p100-16gb": (56, 4 * MB), "p100-12gb": (56, 3 * MB),
    "p100-sxm2-16gb": (56, 4 * MB),
}

# Cards whose timings show products of small weights served from the cache: rates beyond those of
# device memory. In a model the weights of the other layers push them out, so these rows go.
CACHED_WEIGHT_BYTES = {"l40s": 24 * MB, "rtx-pro-6000": 24 * MB}


@dataclass(frozen=True)
class Ratio:
    """One card relative to another that it is derived from."""

    compute: float
    bandwidth: float
    multiprocessors: float


def spec(name: str) -> GpuSpec:
    """The catalogue's entry."""
    return gpu(name)


def card(name: str) -> Card:
    """Bounds of the search for 16-bit products."""
    facts = spec(name)
    return Card(facts.fp16_flops_per_s, facts.memory_bandwidth_bytes_per_s, CHIPS[name][0])


def fp32_card(name: str) -> Card:
    """Bounds of the search for fp32 products."""
    facts = spec(name)
    return Card(facts.fp32_flops_per_s, facts.memory_bandwidth_bytes_per_s, CHIPS[name][0], 4)


def cache_bytes(name: str) -> float:
    """Size of the last-level cache."""
    return CHIPS[name][1]


def ratio(target: str, source: str) -> Ratio:
    """Datasheet of ``target`` over that of ``source``."""
    to, of = spec(target), spec(source)
    return Ratio(to.fp16_flops_per_s / of.fp16_flops_per_s,
                 to.memory_bandwidth_bytes_per_s / of.memory_bandwidth_bytes_per_s,
                 CHIPS[target][0] / CHIPS[source][0])
