"""From plain mappings (YAML, Hydra, Python) to cluster and model specs.

The dataclasses here are schemas of the configuration groups ``cluster`` and ``model``; they hold
what a user writes, unchecked. The two functions check it and build the specs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from hetis_sim.spec.architectures import MODELS
from hetis_sim.spec.cluster import ClusterSpec, HostSpec, LinkSpec
from hetis_sim.spec.errors import SpecError, require, require_finite
from hetis_sim.spec.gpu import GIB, GpuSpec
from hetis_sim.spec.gpus import GPUS
from hetis_sim.spec.huggingface import load_huggingface
from hetis_sim.spec.links import LINKS, link
from hetis_sim.spec.lookup import find, require_int, require_known_keys, require_mapping
from hetis_sim.spec.model import ModelSpec

T = TypeVar("T")

GPU_LIMIT = 4096
"""Largest cluster, in GPUs."""


@dataclass
class HostConfig:
    """One kind of host.

    Attributes:
        gpus: ``{name: count}``, a list of names, or one name.
        link: joins the GPUs: a name of the catalogue, ``{bandwidth_gbps, latency_us}``, or null
            for the PCIe of the slowest card.
        count: number of such hosts.
        memory_gib: host memory that may hold swapped-out cache.
    """

    gpus: Any = None
    link: Any = None
    count: int = 1
    memory_gib: float = 256.0


@dataclass
class HostLinkConfig:
    """The link of two hosts, numbered from 0 with counts expanded, where the network does not apply."""

    hosts: list[int] = field(default_factory=list)
    link: Any = None


@dataclass
class GpuTypeConfig:
    """A card of a user's own; figures as in :class:`GpuSpec`, in TFLOP/s and in GB/s one way.

    The first three must be given. A vector rate that is left out is taken as the fp16 rate.
    """

    memory_gib: float | None = None
    memory_bandwidth_gb_per_s: float | None = None
    fp16_tflops: float | None = None
    fp16_vector_tflops: float | None = None
    fp32_tflops: float | None = None
    compute_capability: list[int] = field(default_factory=lambda: [0, 0])
    peer_gb_per_s: float = 0.0
    host_gb_per_s: float = 15.753846
    source: str = "the user's cluster file"


@dataclass
class ClusterConfig:
    """A cluster as a user writes it.

    Attributes:
        name: shown in output.
        network: between hosts: a name of the catalogue or ``{bandwidth_gbps, latency_us}``.
        hosts: what stands in the cluster.
        links: exceptions to ``network``.
        gpu_types: cards that the catalogue lacks, by name; see :class:`GpuTypeConfig`.
    """

    name: str = "custom"
    network: Any = "ethernet-100g"
    hosts: list[HostConfig] = field(default_factory=list)
    links: list[HostLinkConfig] = field(default_factory=list)
    gpu_types: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelConfig:
    """A model as a user names it.

    Attributes:
        name: of the catalogue; any label where ``config`` is given.
        config: path of a Hugging Face ``config.json`` or model folder, which then decides.
        weight_bytes, kv_bytes: as in :class:`ModelSpec`.
        context_limit_tokens: replaces the published limit; null keeps it. The simulator
            counts tokens only: whether a model is any use beyond its limit is not its concern.
    """

    name: str | None = "llama2-70b"
    config: str | None = None
    weight_bytes: int = 2
    kv_bytes: int = 2
    context_limit_tokens: int | None = None


def cluster_from_mapping(cluster: Any) -> ClusterSpec:
    """The cluster that a mapping (or :class:`ClusterConfig`) describes.

    Raises:
        SpecError: unknown keys or names, counts or figures out of range, no hosts, more than
            ``GPU_LIMIT`` GPUs, or a link faster than its cards.
    """
    given = _read("cluster", cluster, ClusterConfig)
    own = {name: _gpu_type(name, value)
           for name, value in require_mapping("cluster.gpu_types", given.gpu_types).items()}
    hosts = _hosts(given, {**GPUS, **own})
    links = tuple(_host_link(f"cluster.links[{index}]", entry)
                  for index, entry in enumerate(_sequence("cluster.links", given.links)))
    network = _link("cluster.network", given.network)
    return ClusterSpec(_text("cluster.name", given.name), hosts, network, links)


def model_from_mapping(model: Any) -> ModelSpec:
    """The model that a mapping (or :class:`ModelConfig`) names.

    Raises:
        SpecError: an unknown key or name, a value out of range, or a ``config.json`` that
            cannot be read or is not supported.
    """
    given = _read("model", model, ModelConfig)
    if given.config is not None:
        named = isinstance(given.name, str) and given.name not in MODELS
        return load_huggingface(_text("model.config", given.config), given.name if named else None,
                                context_limit_tokens=given.context_limit_tokens,
                                weight_bytes=given.weight_bytes, kv_bytes=given.kv_bytes)
    spec = replace(find("model.name", given.name, MODELS),
                   weight_bytes=given.weight_bytes, kv_bytes=given.kv_bytes)
    limit = given.context_limit_tokens
    return spec if limit is None else spec.with_context_limit(limit)


def _read(key: str, value: Any, schema: type[T]) -> T:
    """A ``schema`` filled from a mapping that has no keys but its fields; the values are unchecked."""
    if isinstance(value, schema):
        return value
    mapping = require_mapping(key, value)
    require_known_keys(key, mapping, list(inspect.signature(schema).parameters))
    return schema(**mapping)


def _sequence(key: str, value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise SpecError(key, value, "a list")
    return value


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise SpecError(key, value, "a text that is not empty")
    return value


def _hosts(given: ClusterConfig, cards: Mapping[str, GpuSpec]) -> tuple[HostSpec, ...]:
    """All hosts, equal ones repeated."""
    hosts: list[HostSpec] = []
    total = 0
    for index, entry in enumerate(_sequence("cluster.hosts", given.hosts)):
        key = f"cluster.hosts[{index}]"
        values = _read(key, entry, HostConfig)
        host = _host(key, values, cards)
        count = require_int(f"{key}.count", values.count, 1, GPU_LIMIT)
        total += count * len(host.gpus)
        require(total <= GPU_LIMIT, "cluster.hosts", f"{total} GPUs", f"at most {GPU_LIMIT} GPUs")
        hosts += [host] * count
    require(bool(hosts), "cluster.hosts", given.hosts, "a list of at least one host")
    return tuple(hosts)


def _host(key: str, values: HostConfig, cards: Mapping[str, GpuSpec]) -> HostSpec:
    gpus = _gpus(f"{key}.gpus", values.gpus, cards)
    host_link = _slowest_pcie(gpus) if values.link is None else _link(f"{key}.link", values.link)
    if len(gpus) > 1:
        _require_not_faster_than_cards(f"{key}.link", host_link, gpus)
    require_finite(f"{key}.memory_gib", values.memory_gib, 0.0, 1 << 20)
    return HostSpec(gpus, host_link, int(values.memory_gib * GIB))


def _gpus(key: str, value: Any, cards: Mapping[str, GpuSpec]) -> tuple[GpuSpec, ...]:
    """The cards of one host, in the order written."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping):
        counted = [(find(key, name, cards), require_int(f"{key}.{name}", count, 1, GPU_LIMIT))
                   for name, count in value.items()]
        gpus = tuple(card for card, count in counted for _ in range(count))
    else:
        gpus = tuple(find(key, name, cards) for name in _sequence(key, value))
    require(bool(gpus), key, value, "at least one GPU, as {name: count} or a list of names")
    return gpus


def _slowest_pcie(gpus: Sequence[GpuSpec]) -> LinkSpec:
    """The PCIe path between cards, as fast as the slowest of them."""
    bandwidth = min(card.host_bandwidth_bytes_per_s for card in gpus)
    known = [spec for name, spec in LINKS.items()
             if name.startswith("pcie") and spec.bandwidth_bytes_per_s == bandwidth]
    if known:
        return known[0]
    return LinkSpec("pcie-custom", bandwidth, LINKS["pcie3x16"].latency_s, "the cards' own ports")


def _require_not_faster_than_cards(key: str, host_link: LinkSpec, gpus: Sequence[GpuSpec]) -> None:
    for card in gpus:
        fastest = max(card.peer_bandwidth_bytes_per_s, card.host_bandwidth_bytes_per_s)
        # 2 % of slack lets figures pass that were rounded up, such as 32 GB/s for PCIe 4.
        require(host_link.bandwidth_bytes_per_s <= 1.02 * fastest, key, host_link.name,
                f"no faster than {card.name}'s own ports, {fastest / 1e9:.4g} GB/s one way")


def _link(key: str, value: Any) -> LinkSpec:
    """A link of the catalogue by name, or one of the user's own."""
    if isinstance(value, str):
        return link(value, key)
    values = require_mapping(key, value)
    require_known_keys(key, values, ("name", "bandwidth_gbps", "latency_us"))
    gbps = _figure(f"{key}.bandwidth_gbps", values.get("bandwidth_gbps"))
    latency_us = _figure(f"{key}.latency_us", values.get("latency_us"), 0.0, 1e7)
    name = _text(f"{key}.name", values.get("name", f"link-{gbps:g}gbps-{latency_us:g}us"))
    # Measured profiles are kept by name and would silently replace the figures given here.
    require(name not in LINKS, f"{key}.name", name, "a name that the catalogue does not use")
    return LinkSpec(name, gbps * 1e9 / 8, latency_us / 1e6, "the user's cluster file")


def _host_link(key: str, entry: Any) -> tuple[int, int, LinkSpec]:
    values = _read(key, entry, HostLinkConfig)
    pair = _sequence(f"{key}.hosts", values.hosts)
    require(len(pair) == 2, f"{key}.hosts", values.hosts, "the numbers of two hosts")
    a, b = (require_int(f"{key}.hosts", host, 0, GPU_LIMIT) for host in pair)
    return a, b, _link(f"{key}.link", values.link)


def _gpu_type(name: str, value: Any) -> GpuSpec:
    key = f"cluster.gpu_types.{name}"
    require(name not in GPUS, key, name, "a name that the catalogue does not use")
    card = _read(key, value, GpuTypeConfig)
    peak = _figure(f"{key}.fp16_tflops", card.fp16_tflops)
    vector16 = peak if card.fp16_vector_tflops is None else card.fp16_vector_tflops
    vector32 = peak if card.fp32_tflops is None else card.fp32_tflops
    capability = _sequence(f"{key}.compute_capability", card.compute_capability)
    require(len(capability) == 2, f"{key}.compute_capability", capability, "[major, minor]")
    major, minor = (require_int(f"{key}.compute_capability", part, 0, 99) for part in capability)
    bandwidth = _figure(f"{key}.memory_bandwidth_gb_per_s", card.memory_bandwidth_gb_per_s)
    return GpuSpec(
        name=name, memory_bytes=int(_figure(f"{key}.memory_gib", card.memory_gib) * GIB),
        memory_bandwidth_bytes_per_s=bandwidth * 1e9, fp16_flops_per_s=peak * 1e12,
        fp16_vector_flops_per_s=_figure(f"{key}.fp16_vector_tflops", vector16) * 1e12,
        fp32_flops_per_s=_figure(f"{key}.fp32_tflops", vector32) * 1e12,
        compute_capability=(major, minor),
        peer_bandwidth_bytes_per_s=_figure(f"{key}.peer_gb_per_s", card.peer_gb_per_s, 0.0) * 1e9,
        host_bandwidth_bytes_per_s=_figure(f"{key}.host_gb_per_s", card.host_gb_per_s) * 1e9,
        source=_text(f"{key}.source", card.source))


def _figure(key: str, value: Any, low: float = 1e-3, high: float = 1e6) -> float:
    require_finite(key, value, low, high)
    return float(value)
