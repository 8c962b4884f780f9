"""The catalogues of GPUs and links against physics and against the public table of datasheet values."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.gpu import GIB, GpuSpec
from hetis_sim.spec.gpus import GPUS, gpu
from hetis_sim.spec.links import LINKS, link

# Rows of gpu_catalogue.csv and the entries that carry their figures.
ENTRIES_OF_ROW = {
    "A100-SXM4-80GB": ["a100-80gb"], "A100-PCIe-80GB": ["a100-pcie-80gb"],
    "A100-PCIe-40GB": ["a100-pcie-40gb"],
    "H100-SXM5-80GB": ["h100-sxm"], "H100-PCIe-80GB": ["h100-pcie"], "H200-SXM-141GB": ["h200"],
    "GeForce RTX 3090": ["rtx3090"], "P100-PCIe-16GB": ["p100-16gb"], "P100-PCIe-12GB": ["p100-12gb"],
    "P100-SXM2-16GB": ["p100-sxm2-16gb"], "P4": ["p4"], "V100-PCIe-16/32GB": ["v100-16gb", "v100-32gb"],
    "V100-SXM2-32GB": ["v100-sxm2-32gb"], "T4": ["t4"], "L4": ["l4"], "A10 (A10G: 70 TFLOP/s)": ["a10"],
    "A30": ["a30"], "RTX A6000": ["a6000"], "A40": ["a40"], "L40S": ["l40s"], "GeForce RTX 4090": ["rtx4090"],
    "RTX 6000 Ada": ["rtx6000-ada"], "RTX PRO 6000 Blackwell Server": ["rtx-pro-6000"],
    "MI250 (2 GCDs)": ["mi250"], "MI300X": ["mi300x"],
}
ENTRY_OF_SYSTEM = {
    "a100_pcie": "a100-pcie-80gb", "a100_sxm": "a100-80gb", "a30": "a30", "h100_pcie": "h100-pcie",
    "h100_sxm": "h100-sxm", "h200_sxm": "h200", "l4": "l4", "l40s": "l40s",
    "rtx_pro_6000_server": "rtx-pro-6000",
}
ROW_MEMORY_GB = {"v100-32gb": 32.0}


@pytest.mark.parametrize("card", GPUS.values(), ids=lambda card: card.name)
def test_cards_are_physically_plausible(card: GpuSpec) -> None:
    """Figures lie within what was ever built, and say where they come from."""
    assert GPUS[card.name] is card
    assert 7 * GIB < card.memory_bytes < 200 * GIB
    assert 100e9 < card.memory_bandwidth_bytes_per_s < 10e12
    assert 5e12 < card.fp16_flops_per_s < 2e15
    assert 5e12 < card.fp32_flops_per_s <= card.fp16_flops_per_s
    assert 0 < card.fp16_vector_flops_per_s <= 4 * card.fp32_flops_per_s
    assert 15e9 < card.host_bandwidth_bytes_per_s < 65e9
    assert card.peer_bandwidth_bytes_per_s == 0 or 40e9 < card.peer_bandwidth_bytes_per_s < 1e12
    assert card.source


def test_cards_without_matrix_units_multiply_at_their_fp32_rate() -> None:
    """Products with fp32 accumulation on Pascal run on the vector units."""
    for name in ("p100-12gb", "p100-16gb", "p100-sxm2-16gb", "p4"):
        assert GPUS[name].fp16_flops_per_s == GPUS[name].fp32_flops_per_s
        assert GPUS[name].compute_capability < (7, 0)


def test_every_row_of_the_public_table_is_in_the_catalogue(shared_data: Path) -> None:
    """All cards of the table are here, with equal bandwidth and peaks and no more memory than marketed."""
    with (shared_data / "hardware" / "gpu_catalogue.csv").open(newline="") as stream:
        rows = {row["gpu"]: row for row in csv.DictReader(stream)}
    assert set(rows) == set(ENTRIES_OF_ROW)
    for row_name, row in rows.items():
        for name in ENTRIES_OF_ROW[row_name]:
            _assert_equals_row(gpu(name), row)
    assert gpu("a10g").fp16_flops_per_s == 70e12


def _assert_equals_row(card: GpuSpec, row: dict[str, str]) -> None:
    assert card.memory_bandwidth_bytes_per_s == pytest.approx(float(row["mem_bw_GBps"]) * 1e9), card.name
    marketed_gb = ROW_MEMORY_GB.get(card.name, float(row["mem_GB"]))
    assert 0.92 * marketed_gb <= card.memory_bytes / GIB <= marketed_gb, card.name
    tensor = row["fp16_tensor_dense_TFLOPs"]
    matrix = row["fp32_vector_TFLOPs"] if tensor.startswith("none") or not tensor else tensor
    assert card.fp16_flops_per_s == pytest.approx(float(matrix) * 1e12), card.name
    if row["fp32_vector_TFLOPs"]:
        assert card.fp32_flops_per_s == pytest.approx(float(row["fp32_vector_TFLOPs"]) * 1e12), card.name
    # The table repeats the tensor rate of the T4 in the column of the vector units.
    if row["fp16_vector_TFLOPs"] and card.name != "t4":
        vector = float(row["fp16_vector_TFLOPs"]) * 1e12
        assert card.fp16_vector_flops_per_s == pytest.approx(vector), card.name
    if row["gpu_link_GBps_one_way"]:
        assert card.peer_bandwidth_bytes_per_s == pytest.approx(float(row["gpu_link_GBps_one_way"]) * 1e9)
    assert card.host_bandwidth_bytes_per_s == LINKS[f"pcie{row['pcie'].strip()}"].bandwidth_bytes_per_s


def test_no_measured_rate_exceeds_the_peak_by_more_than_boost_clocks(shared_data: Path) -> None:
    """Rates seen in public measurements confirm the peaks; the 3090 and 4090 boost above their rating."""
    with (shared_data / "hardware" / "gpu_catalogue.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            card = gpu(ENTRIES_OF_ROW[row["gpu"]][0])
            if row["measured_max_GBps"]:
                assert float(row["measured_max_GBps"]) * 1e9 <= card.memory_bandwidth_bytes_per_s
            first = row["measured_max_TFLOPs"].split(" ")[0]
            if first:
                assert float(first) * 1e12 <= 1.06 * card.fp16_flops_per_s, card.name


def test_catalogue_agrees_with_the_vendor_system_files(shared_data: Path) -> None:
    """Bandwidth, matrix peak, memory and compute capability agree with aiconfigurator's system files."""
    for system, name in ENTRY_OF_SYSTEM.items():
        with (shared_data / "hardware" / "aiconfigurator_systems" / f"{system}.yaml").open() as stream:
            facts = yaml.safe_load(stream)["gpu"]
        card = gpu(name)
        assert card.memory_bandwidth_bytes_per_s == facts["mem_bw"]
        assert card.fp16_flops_per_s == pytest.approx(facts["bfloat16_tc_flops"], rel=1e-4)
        assert 0.93 * facts["mem_capacity"] <= card.memory_bytes <= facts["mem_capacity"]
        major, minor = card.compute_capability
        assert major * 10 + minor == facts["sm_version"]


def test_unknown_card_names_the_near_matches() -> None:
    """A slip of the hand is answered with what was probably meant; case and underscores are forgiven."""
    with pytest.raises(SpecError, match=r"gpu='a100-80'.*did you mean .*a100-80gb"):
        gpu("a100-80")
    with pytest.raises(SpecError, match=r"gpu=80"):
        gpu(80)  # type: ignore[arg-type]
    assert gpu("A100_80GB") is GPUS["a100-80gb"]


def test_links_have_their_standard_bandwidth() -> None:
    """One direction: 128b/130b on PCIe, 25 GB/s a link on NVLink 2 to 4, the line rate on networks."""
    assert link("pcie4x16").bandwidth_bytes_per_s == pytest.approx(31.508e9, rel=1e-4)
    assert link("pcie5x16").bandwidth_bytes_per_s == 2 * link("pcie4x16").bandwidth_bytes_per_s
    assert link("nvlink3").bandwidth_bytes_per_s == 12 * 25e9
    assert link("nvlink4").bandwidth_bytes_per_s == 18 * 25e9
    for gbps in (10, 25, 100):
        assert link(f"ethernet-{gbps}g").bandwidth_bytes_per_s == gbps * 1e9 / 8
    assert link("infiniband-ndr").bandwidth_bytes_per_s == 50e9


def test_links_are_plausible_and_sourced() -> None:
    """Latencies lie between a microsecond and a tenth of a millisecond; every entry has a source."""
    for name, spec in LINKS.items():
        assert spec.name == name
        assert spec.source
        assert 0.1e9 <= spec.bandwidth_bytes_per_s <= 1e12
        assert 0.9e-6 < spec.latency_s < 1e-4
    with pytest.raises(SpecError, match=r"cluster\.network='ethernet-100'.*did you mean .*ethernet-100g"):
        link("ethernet-100", "cluster.network")


@pytest.mark.parametrize(("field", "value"), [
    ("memory_bytes", 0), ("memory_bandwidth_bytes_per_s", float("nan")), ("fp16_flops_per_s", 0.0),
    ("peer_bandwidth_bytes_per_s", -1.0), ("host_bandwidth_bytes_per_s", float("inf")),
])
def test_impossible_cards_are_refused(field: str, value: float) -> None:
    """A figure outside its range is named in the error."""
    facts = {"name": "x", "memory_bytes": GIB, "memory_bandwidth_bytes_per_s": 1e12, "fp16_flops_per_s": 1e14,
             "fp16_vector_flops_per_s": 1e13, "fp32_flops_per_s": 1e13, field: value}
    with pytest.raises(SpecError, match=rf"gpu\.x\.{field}"):
        GpuSpec(**facts)
