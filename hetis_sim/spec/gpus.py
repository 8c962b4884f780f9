"""Catalogue of GPUs.

Memory is the total that the driver reports (``nvidia-smi``, ``rocm-smi``; CUDA itself for P100):
below the marketed size where ECC or reserved pages take a share, e.g. 46,068 MiB of an L40S's 48 GB.
Memory bandwidth and arithmetic peaks are those of the datasheets, dense (no sparsity), with fp32
accumulation. GeForce cards run at half rate with fp32 accumulation, which is the rate given here.

P100 and P4 have no matrix units, so products with fp32 accumulation run at the fp32 rate of the
vector units. Public fp16 matrix products in PyTorch on a P100 reach 7.2 to 8.4 TFLOP/s, no more than
fp32 ones (github.com/zzc0721/torch-performance-test-data), although 18.7 are possible with fp16
accumulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hetis_sim.spec.gpu import MIB, GpuSpec
from hetis_sim.spec.links import LINKS
from hetis_sim.spec.lookup import find


def _card(name: str, mib: int, gb_per_s: float, tflops: float, vector16: float, vector32: float,
          capability: tuple[int, int], pcie: str, peer: str = "", source: str = "") -> GpuSpec:
    """One row: MiB, GB/s, three peaks in TFLOP/s, compute capability, PCIe and peer link."""
    return GpuSpec(
        name=name, memory_bytes=mib * MIB, memory_bandwidth_bytes_per_s=gb_per_s * 1e9,
        fp16_flops_per_s=tflops * 1e12, fp16_vector_flops_per_s=vector16 * 1e12,
        fp32_flops_per_s=vector32 * 1e12, compute_capability=capability,
        peer_bandwidth_bytes_per_s=LINKS[peer].bandwidth_bytes_per_s if peer else 0.0,
        host_bandwidth_bytes_per_s=LINKS[pcie].bandwidth_bytes_per_s,
        source=f"{source}; memory as the driver reports it")


_ALL = (
    # Pascal
    _card("p100-12gb", 12193, 549, 9.3, 18.7, 9.3, (6, 0), "pcie3x16",
          source="NVIDIA Tesla P100 PCIe datasheet (12,786,073,600 bytes in CUDA's deviceQuery)"),
    _card("p100-16gb", 16280, 732, 9.3, 18.7, 9.3, (6, 0), "pcie3x16",
          source="NVIDIA Tesla P100 PCIe datasheet"),
    _card("p100-sxm2-16gb", 16280, 732, 10.6, 21.2, 10.6, (6, 0), "pcie3x16", "nvlink1",
          "NVIDIA Tesla P100 datasheet"),
    _card("p4", 7611, 192, 5.5, 0.086, 5.5, (6, 1), "pcie3x16",
          source="NVIDIA Tesla P4 datasheet; fp16 vector rate is 1/64 of fp32 (CUDA programming guide, 6.1)"),
    # Volta and Turing
    _card("v100-16gb", 16384, 900, 112, 28, 14, (7, 0), "pcie3x16", source="NVIDIA V100 PCIe datasheet"),
    _card("v100-32gb", 32768, 900, 112, 28, 14, (7, 0), "pcie3x16", source="NVIDIA V100 PCIe datasheet"),
    _card("v100-sxm2-16gb", 16384, 900, 125, 31.4, 15.7, (7, 0), "pcie3x16", "nvlink2",
          "NVIDIA V100 SXM2 datasheet"),
    _card("v100-sxm2-32gb", 32768, 900, 125, 31.4, 15.7, (7, 0), "pcie3x16", "nvlink2",
          "NVIDIA V100 SXM2 datasheet"),
    _card("t4", 15360, 320, 65, 16.2, 8.1, (7, 5), "pcie3x16",
          source="NVIDIA T4 datasheet; fp16 vector rate is twice fp32 (Turing whitepaper)"),
    # Ampere
    _card("a100-40gb", 40960, 1555, 312, 78, 19.5, (8, 0), "pcie4x16", "nvlink3",
          "NVIDIA A100 datasheet, SXM4 40 GB"),
    _card("a100-80gb", 81920, 2039, 312, 78, 19.5, (8, 0), "pcie4x16", "nvlink3",
          "NVIDIA A100 datasheet, SXM4 80 GB"),
    _card("a100-pcie-40gb", 40960, 1555, 312, 78, 19.5, (8, 0), "pcie4x16", "nvlink-bridge",
          "NVIDIA A100 datasheet, PCIe 40 GB"),
    _card("a100-pcie-80gb", 81920, 1935, 312, 78, 19.5, (8, 0), "pcie4x16", "nvlink-bridge",
          "NVIDIA A100 datasheet, PCIe 80 GB"),
    _card("a30", 24576, 933, 165, 10.3, 10.3, (8, 0), "pcie4x16", "nvlink-bridge-a30",
          "NVIDIA A30 datasheet; fp16 vector rate taken as the fp32 rate"),
    _card("a10", 23028, 600, 125, 31.2, 31.2, (8, 6), "pcie4x16", source="NVIDIA A10 datasheet"),
    _card("a10g", 23028, 600, 70, 35, 35, (8, 6), "pcie4x16", source="NVIDIA A10G datasheet (AWS G5)"),
    _card("a40", 46068, 696, 149.7, 37.4, 37.4, (8, 6), "pcie4x16", "nvlink-bridge-ga102",
          "NVIDIA A40 datasheet; memory with ECC on"),
    _card("a6000", 49140, 768, 154.8, 38.7, 38.7, (8, 6), "pcie4x16", "nvlink-bridge-ga102",
          "NVIDIA RTX A6000 datasheet; memory with ECC off, its default"),
    _card("rtx3090", 24576, 936, 71.2, 35.6, 35.6, (8, 6), "pcie4x16", "nvlink-bridge-ga102",
          "NVIDIA GA102 whitepaper"),
    # Ada
    _card("l4", 23034, 300, 121, 30.3, 30.3, (8, 9), "pcie4x16", source="NVIDIA L4 datasheet"),
    _card("l40s", 46068, 864, 362.05, 91.6, 91.6, (8, 9), "pcie4x16", source="NVIDIA L40S datasheet"),
    _card("rtx4090", 24564, 1008, 165.2, 82.6, 82.6, (8, 9), "pcie4x16", source="NVIDIA Ada whitepaper"),
    _card("rtx6000-ada", 49140, 960, 364.2, 91.1, 91.1, (8, 9), "pcie4x16",
          source="NVIDIA RTX 6000 Ada datasheet; memory with ECC off"),
    # Hopper and Blackwell
    _card("h20", 97871, 4000, 148, 44, 44, (9, 0), "pcie5x16", "nvlink4",
          "published figures of the H20, no datasheet seen; fp16 vector rate taken as the fp32 rate"),
    _card("h100-pcie", 81559, 2000, 756.5, 102, 51, (9, 0), "pcie5x16", "nvlink-bridge",
          "NVIDIA H100 datasheet, PCIe 80 GB"),
    _card("h100-sxm", 81559, 3350, 989, 134, 67, (9, 0), "pcie5x16", "nvlink4",
          "NVIDIA H100 datasheet, SXM5 80 GB"),
    _card("h200", 143771, 4800, 989, 134, 67, (9, 0), "pcie5x16", "nvlink4",
          "NVIDIA H200 datasheet, SXM 141 GB"),
    _card("rtx-pro-6000", 97887, 1792, 467.8, 116.9, 116.9, (12, 0), "pcie5x16",
          source="NVIDIA RTX PRO 6000 Blackwell Server Edition, peaks at the 2430 MHz that servers report "
                 "(aiconfigurator 0.12); vector rate 188 x 128 x 2 x 2.43 GHz"),
    # AMD
    _card("mi250", 131040, 3277, 362.1, 45.3, 45.3, (0, 0), "pcie4x16", "xgmi-mi250",
          "AMD Instinct MI250 datasheet: the package of two dies as one device (software sees mi250-gcd); "
          "fp16 vector rate taken as the fp32 rate"),
    _card("mi250-gcd", 65520, 1638.4, 181.05, 22.65, 22.65, (0, 0), "pcie4x16", "xgmi-mi250",
          "AMD Instinct MI250 datasheet: one of the two dies, half of the package"),
    _card("mi300x", 196592, 5300, 1307.4, 163.4, 163.4, (0, 0), "pcie5x16", "xgmi-mi300x",
          "AMD Instinct MI300X datasheet; fp16 vector rate taken as the fp32 rate"),
)

GPUS: Mapping[str, GpuSpec] = MappingProxyType({spec.name: spec for spec in _ALL})
"""All cards of the catalogue by name."""


def gpu(name: str, key: str = "gpu") -> GpuSpec:
    """The card ``name`` of the catalogue.

    Raises:
        SpecError: no such card; the text names ``key`` and the near matches.
    """
    return find(key, name, GPUS)
