"""Clusters: what configurations give, and what they may not."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from hetis_sim.spec.architectures import MODELS
from hetis_sim.spec.cluster import ClusterSpec, HostSpec, LinkSpec
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.gpu import GIB
from hetis_sim.spec.gpus import GPUS, gpu
from hetis_sim.spec.links import LINKS, link
from hetis_sim.spec.parse import (
    GPU_LIMIT,
    ClusterConfig,
    HostConfig,
    ModelConfig,
    cluster_from_mapping,
    model_from_mapping,
)

NAN = float("nan")


def load(root: Path, name: str) -> ClusterSpec:
    """A cluster of the configuration group, through the schema that Hydra applies."""
    given_values = OmegaConf.load(root / "conf" / "cluster" / f"{name}.yaml")
    return cluster_from_mapping(OmegaConf.merge(OmegaConf.structured(ClusterConfig), given_values))


def one_host(**host: Any) -> ClusterSpec:
    """A cluster of a single kind of host."""
    return cluster_from_mapping({"hosts": [host]})


def test_paper_is_the_testbed_of_the_paper(project_root: Path) -> None:
    """1 host of 4 A100, 2 hosts of 2 RTX 3090, 1 host of 4 P100, PCIe inside, 100 Gb/s between."""
    paper = load(project_root, "paper")
    assert paper.gpu_counts == {"a100-80gb": 4, "rtx3090": 4, "p100-12gb": 4}
    assert [len(host.gpus) for host in paper.hosts] == [4, 2, 2, 4]
    assert [host.link.name for host in paper.hosts] == ["pcie4x16", "pcie4x16", "pcie4x16", "pcie3x16"]
    assert paper.network.bandwidth_bytes_per_s == 100e9 / 8
    assert paper.link(0, 3).name == "pcie4x16"
    assert paper.link(4, 6).name == "ethernet-100g"


def test_helix24_has_one_card_a_machine_as_the_measured_cluster(project_root: Path) -> None:
    """Any two of the 24 cards talk over 10 Gb/s."""
    helix = load(project_root, "helix24")
    assert helix.gpu_counts == {"a100-40gb": 4, "l4": 8, "t4": 12}
    assert len(helix.hosts) == 24
    assert {helix.link(0, other).name for other in range(1, 24)} == {"ethernet-10g"}


def test_every_shipped_configuration_builds(project_root: Path) -> None:
    """Each file of the groups cluster and model gives the spec of its own name."""
    clusters = sorted(path.stem for path in (project_root / "conf" / "cluster").glob("*.yaml"))
    assert {"paper", "helix24", "a100x4", "a100x8", "h200", "a100-t4", "single-a100"} <= set(clusters)
    for name in clusters:
        assert load(project_root, name).name == name
    models = {path.stem: path for path in (project_root / "conf" / "model").glob("*.yaml")}
    assert set(models) == set(MODELS)
    for name, path in models.items():
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(path))
        assert model_from_mapping(merged) == MODELS[name]


def test_devices_are_numbered_in_host_order() -> None:
    """Ids count from 0 over hosts and, within one, in the order written."""
    cluster = cluster_from_mapping({"hosts": [{"gpus": ["l4", "t4"]}, {"gpus": {"a30": 2}, "count": 2}]})
    assert [device.device_id for device in cluster.devices] == list(range(6))
    assert [device.gpu.name for device in cluster.devices] == ["l4", "t4", "a30", "a30", "a30", "a30"]
    assert [device.host_id for device in cluster.devices] == [0, 0, 1, 1, 2, 2]
    assert cluster.devices[4].label == "4:a30@host2"


def test_a_host_without_a_link_uses_the_pcie_of_its_slowest_card() -> None:
    """Mixed generations talk at the older one's rate."""
    assert one_host(gpus={"l4": 1, "t4": 1}).hosts[0].link is LINKS["pcie3x16"]
    assert one_host(gpus={"h100-sxm": 8}).hosts[0].link is LINKS["pcie5x16"]


def test_slowest_link_bounds_a_collective() -> None:
    """Within a host the host's link, across hosts the network, for one device none."""
    cluster = cluster_from_mapping({
        "network": "ethernet-10g", "hosts": [{"gpus": {"a100-80gb": 2}, "link": "nvlink3", "count": 2}]})
    assert cluster.slowest_link([0, 1]) is LINKS["nvlink3"]
    assert cluster.slowest_link([0, 1, 2]) is LINKS["ethernet-10g"]
    assert cluster.slowest_link([3]) is None
    slow, late = LinkSpec("a", 1e9, 1e-6), LinkSpec("b", 1e9, 1e-5)
    hosts = tuple(HostSpec((gpu("t4"),), link("pcie3x16")) for _ in range(3))
    tie = ClusterSpec("tie", hosts, slow, ((0, 2, late),))
    assert tie.slowest_link([0, 1, 2]) is late


def test_pairs_of_hosts_may_have_a_link_of_their_own() -> None:
    """An exception holds in both directions and for that pair only."""
    cluster = cluster_from_mapping({
        "hosts": [{"gpus": "t4", "count": 3}],
        "links": [{"hosts": [2, 0], "link": {"name": "wan", "bandwidth_gbps": 1, "latency_us": 20_000}}]})
    wan = LinkSpec("wan", 0.125e9, 0.02, "the user's cluster file")
    assert cluster.link(0, 2) == cluster.link(2, 0) == wan
    assert cluster.link(0, 1) is cluster.network


def test_a_user_may_bring_a_card_and_a_network() -> None:
    """Figures of the file arrive in SI units; rates that are left out follow the fp16 rate."""
    cluster = cluster_from_mapping({
        "name": "mine", "network": {"bandwidth_gbps": 40, "latency_us": 7.5},
        "gpu_types": {"npu": {"memory_gib": 32, "memory_bandwidth_gb_per_s": 400, "fp16_tflops": 280,
                              "fp32_tflops": 70, "host_gb_per_s": 12}},
        "hosts": [{"gpus": {"npu": 2, "t4": 1}, "memory_gib": 0.5}]})
    card = cluster.devices[0].gpu
    assert (card.memory_bytes, card.memory_bandwidth_bytes_per_s) == (32 * GIB, 400e9)
    assert card.fp16_flops_per_s == card.fp16_vector_flops_per_s == 280e12
    assert card.fp32_flops_per_s == 70e12
    assert cluster.hosts[0].link.bandwidth_bytes_per_s == 12e9
    assert cluster.hosts[0].memory_bytes == GIB // 2
    assert (cluster.network.bandwidth_bytes_per_s, cluster.network.latency_s) == (5e9, 7.5e-6)


def test_dataclasses_and_mappings_give_the_same_cluster() -> None:
    """The Python interface equals the configuration file."""
    config = ClusterConfig(name="x", network="ethernet-25g", hosts=[HostConfig(gpus={"l4": 2}, count=3)])
    mapping = {"name": "x", "network": "ethernet-25g", "hosts": [{"gpus": {"l4": 2}, "count": 3}]}
    assert cluster_from_mapping(config) == cluster_from_mapping(mapping)
    assert cluster_from_mapping(OmegaConf.create(mapping)) == cluster_from_mapping(mapping)


def test_the_schema_refuses_unknown_keys_of_hosts() -> None:
    """Hydra stops a misspelt key before the program sees it."""
    with pytest.raises(ConfigKeyError, match="gpuz"):
        OmegaConf.merge(OmegaConf.structured(ClusterConfig), {"hosts": [{"gpuz": {"t4": 1}}]})


T4 = {"hosts": [{"gpus": "t4"}]}


@pytest.mark.parametrize(("bad", "message"), [
    ({}, r"cluster\.hosts=\[\].*at least one host"),
    ({"hosts": []}, r"cluster\.hosts=\[\].*at least one host"),
    ({"hosts": "t4"}, r"cluster\.hosts='t4'.*a list"),
    ({"hosts": [3]}, r"cluster\.hosts\[0\]=3.*a mapping"),
    (5, r"cluster=5.*a mapping"),
    (T4 | {"netwrk": "x"}, r"cluster\.netwrk='x'.*did you mean network"),
    ({"hosts": [{"gpus": "t4", "lnk": 1}]}, r"cluster\.hosts\[0\]\.lnk=1.*did you mean link"),
    (T4 | {"name": " "}, r"cluster\.name=' '"),
    (T4 | {"network": "ethernet100"}, r"cluster\.network='ethernet100'.*did you mean .*ethernet-100g"),
    (T4 | {"network": {"bandwidth_gbps": NAN, "latency_us": 1}}, r"cluster\.network\.bandwidth_gbps=nan"),
    (T4 | {"network": {"bandwidth_gbps": 0, "latency_us": 1}}, r"cluster\.network\.bandwidth_gbps=0"),
    (T4 | {"network": {"bandwidth_gbps": 10}}, r"cluster\.network\.latency_us=None"),
    (T4 | {"network": {"bandwidth_gbps": 10, "latency_us": -1}}, r"cluster\.network\.latency_us=-1"),
    (T4 | {"network": {"name": "pcie4x16", "bandwidth_gbps": 10, "latency_us": 1}}, r"name='pcie4x16'"),
    ({"hosts": [{"gpus": {}}]}, r"hosts\[0\]\.gpus=\{\}.*at least one GPU"),
    ({"hosts": [{}]}, r"hosts\[0\]\.gpus=None.*at least one GPU"),
    ({"hosts": [{"gpus": {"a100-80": 1}}]}, r"hosts\[0\]\.gpus='a100-80'.*did you mean .*a100-80gb"),
    ({"hosts": [{"gpus": {"t4": 0}}]}, r"hosts\[0\]\.gpus\.t4=0"),
    ({"hosts": [{"gpus": {"t4": True}}]}, r"hosts\[0\]\.gpus\.t4=True"),
    ({"hosts": [{"gpus": {"t4": 1.5}}]}, r"hosts\[0\]\.gpus\.t4=1\.5"),
    ({"hosts": [{"gpus": "t4", "count": 0}]}, r"hosts\[0\]\.count=0"),
    ({"hosts": [{"gpus": "t4", "count": 10**9}]}, r"hosts\[0\]\.count=1000000000"),
    ({"hosts": [{"gpus": {"t4": 64}, "count": 65}]}, r"4160 GPUs.*at most 4096"),
    ({"hosts": [{"gpus": "t4", "memory_gib": NAN}]}, r"hosts\[0\]\.memory_gib=nan"),
    ({"hosts": [{"gpus": "t4", "memory_gib": -1}]}, r"hosts\[0\]\.memory_gib=-1"),
    ({"hosts": [{"gpus": {"t4": 2}, "link": "nvlink3"}]}, r"hosts\[0\]\.link='nvlink3'.*t4's own ports"),
    (T4 | {"links": [{"hosts": [0, 1], "link": "ethernet-1g"}]}, r"links\.hosts=\[0, 1\]"),
    (T4 | {"links": [{"hosts": [0], "link": "ethernet-1g"}]}, r"links\[0\]\.hosts=\[0\].*two hosts"),
    ({"hosts": [{"gpus": "t4", "count": 2}],
      "links": [{"hosts": pair, "link": "ethernet-1g"} for pair in ([0, 1], [1, 0])]}, "named once"),
    (T4 | {"gpu_types": {"t4": {}}}, r"gpu_types\.t4.*catalogue"),
    (T4 | {"gpu_types": {"x": {"fp16_tflops": 1, "memory_gib": 1}}}, r"memory_bandwidth_gb_per_s=None"),
    (T4 | {"gpu_types": {"x": {"fp16_tflop": 1}}}, r"gpu_types\.x\.fp16_tflop=1.*did you mean fp16_tflops"),
])
def test_bad_clusters_are_refused_by_key_and_value(bad: Any, message: str) -> None:
    """The error names the key, the value and what is allowed."""
    with pytest.raises(SpecError, match=message):
        cluster_from_mapping(bad)


def test_the_largest_cluster_is_allowed() -> None:
    """The cap itself still builds."""
    assert len(one_host(gpus={"t4": 8}, count=GPU_LIMIT // 8).devices) == GPU_LIMIT


@given(counts=st.lists(st.tuples(st.sampled_from(sorted(GPUS)), st.integers(1, 4), st.integers(1, 3)),
                       min_size=1, max_size=5))
def test_clusters_hold_what_was_written(counts: list[tuple[str, int, int]]) -> None:
    """Devices are conserved, and the link of two devices does not depend on the direction."""
    cluster = cluster_from_mapping(
        {"hosts": [{"gpus": {name: cards}, "count": hosts} for name, cards, hosts in counts]})
    assert len(cluster.devices) == sum(cards * hosts for _, cards, hosts in counts)
    assert sum(cluster.gpu_counts.values()) == len(cluster.devices)
    for a, b in pairwise(range(len(cluster.devices))):
        assert cluster.link(a, b) is cluster.link(b, a)
