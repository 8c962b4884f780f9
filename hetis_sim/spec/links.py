"""Catalogue of links: peak of one direction and latency without software.

Bandwidths are those of the standard or datasheet. PCIe counts its 128b/130b line code (PCI
Express Base Specification 3.0 to 5.0); NVLink is the sum over a card's links (20 GB/s a link and
direction for NVLink 1, 25 GB/s for NVLink 2 to 4, 50 GB/s for NVLink 5; NVIDIA architecture
whitepapers); networks are their line rate.

Latencies are ours, rounded from public measurements of the smallest messages less about 5 us
for launching a send in software, which the cost model counts itself: NCCL send/receive of an empty
message takes 6 us over NVLink 4 (H100, H200), 10.7 us over PCIe 3 (V100) and 26 to 30 us over 10 Gb/s
Ethernet between two V100 hosts (tables of github.com/microsoft/apex_plus). The figures for faster
Ethernet and InfiniBand lie between these and the adapters' own 1 us.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.lookup import find

_PCIE = "PCI Express Base Specification, 16 lanes, 128b/130b coding"
_NVLINK = "NVIDIA architecture whitepaper, sum over the card's links"
_BRIDGE = "NVLink bridge between two cards, card datasheet"
_LINE = "line rate"


def _gb(name: str, gb_per_s: float, latency_us: float, source: str) -> LinkSpec:
    return LinkSpec(name, gb_per_s * 1e9, latency_us / 1e6, source)


def _pcie(name: str, gigatransfers_per_s: int) -> LinkSpec:
    return _gb(name, gigatransfers_per_s * 16 / 8 * 128 / 130, 5.0, _PCIE)


_ALL = (
    _pcie("pcie3x16", 8),
    _pcie("pcie4x16", 16),
    _pcie("pcie5x16", 32),
    _gb("nvlink1", 80.0, 1.0, f"{_NVLINK} (P100: 4 links)"),
    _gb("nvlink2", 150.0, 1.0, f"{_NVLINK} (V100: 6 links)"),
    _gb("nvlink3", 300.0, 1.0, f"{_NVLINK} (A100: 12 links)"),
    _gb("nvlink4", 450.0, 1.0, f"{_NVLINK} (H100, H200, H20: 18 links)"),
    _gb("nvlink5", 900.0, 1.0, f"{_NVLINK} (B200: 18 links)"),
    _gb("nvlink-bridge-ga102", 56.25, 1.0, f"{_BRIDGE} (RTX 3090, A6000, A40)"),
    _gb("nvlink-bridge-a30", 100.0, 1.0, f"{_BRIDGE} (A30)"),
    _gb("nvlink-bridge", 300.0, 1.0, f"{_BRIDGE} (A100 PCIe, H100 PCIe)"),
    _gb("xgmi-mi250", 50.0, 2.0, "AMD ROCm documentation of the MI250: one link between packages"),
    _gb("xgmi-mi300x", 448.0, 2.0, "AMD MI300X datasheet: 7 links of 64 GB/s, one to each peer of eight"),
    _gb("ethernet-1g", 0.125, 50.0, _LINE),
    _gb("ethernet-10g", 1.25, 25.0, _LINE),
    _gb("ethernet-25g", 3.125, 15.0, _LINE),
    _gb("ethernet-50g", 6.25, 12.0, _LINE),
    _gb("ethernet-100g", 12.5, 10.0, _LINE),
    _gb("ethernet-200g", 25.0, 10.0, _LINE),
    _gb("ethernet-400g", 50.0, 10.0, _LINE),
    _gb("infiniband-edr", 12.5, 5.0, f"{_LINE}, 100 Gb/s"),
    _gb("infiniband-hdr", 25.0, 5.0, f"{_LINE}, 200 Gb/s"),
    _gb("infiniband-ndr", 50.0, 5.0, f"{_LINE}, 400 Gb/s"),
)

LINKS: Mapping[str, LinkSpec] = MappingProxyType({spec.name: spec for spec in _ALL})
"""All links of the catalogue by name."""


def link(name: str, key: str = "link") -> LinkSpec:
    """The link ``name`` of the catalogue.

    Raises:
        SpecError: no such link; the text names ``key`` and the near matches.
    """
    return find(key, name, LINKS)
