"""Profile files: what was fitted for one device or for links, with range, error and origin.

A profile is one JSON object:

    schema      1
    name        of the profile
    device      the device it was made for (its name in the catalogue or the cluster), "links" or "host"
    modules     by name, see below; a module that is absent falls back to the roofline
    calibration of a profile that was measured on one machine: see :class:`Calibration`
    sha256      with it: hash of everything else

and each module

    model         form of the coefficients: tile_wave | curves | flash_blocks | linear | links |
                  token_tables | per_iteration | per_message
    status        measured | derived
    coefficients  of that form
    range         {quantity: [least, largest]} that was fitted on
    held_out      {n, median, p95, ...} relative error on rows that the fit did not see, or null
    sources       [{file, source_repo, commit, sha256, licence}, ...] or [{text: ...}]
    note          the reasoning behind a derived value

Modules: gemm (tile_wave), elementwise (curves), prefill_attention (flash_blocks), decode_attention and
remote_attention (linear; the latter of a device that has waited for its heads), all_reduce, transfer and
hop (links; the last of activations between stages, where they differ from other messages), dense_layer and
head (token_tables: one model shape measured whole; they go before gemm and elementwise where they match),
host_overhead (per_iteration: what an iteration takes besides, of the device "host"), head_packing
(per_message: processor time of a rank for one attention worker in one layer), cache_packing (per_message:
that for a layer of a prompt's cache that goes elsewhere), host_copy (per_message: cache between the device
and the memory of its host).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hetis_sim.cost.attention import DecodeClass, PrefillClass
from hetis_sim.cost.calibration import FINGERPRINT, KEY, Calibration, check_fingerprint
from hetis_sim.cost.curve import Curve
from hetis_sim.cost.gemm import TileWaveGemm
from hetis_sim.cost.host import HostOverhead
from hetis_sim.cost.links import LinkTable
from hetis_sim.cost.model import TransferCost
from hetis_sim.cost.parse import positive, positive_list
from hetis_sim.cost.tables import TokenTables
from hetis_sim.spec.errors import SpecError, require
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec

SCHEMA = 1
LINKS_DEVICE = "links"
HOST_DEVICE = "host"
NO_CARD = (LINKS_DEVICE, HOST_DEVICE)
STATUSES = ("measured", "derived")
PACKING = ("head_packing", "cache_packing", "host_copy")
"""Modules that are a fixed time and one for each byte."""

MODELS = {"gemm": "tile_wave", "elementwise": "curves", "prefill_attention": "flash_blocks",
          "decode_attention": "linear", "all_reduce": "links", "transfer": "links", "hop": "links",
          "remote_attention": "linear", "dense_layer": "token_tables", "head": "token_tables",
          "host_overhead": "per_iteration", **dict.fromkeys(PACKING, "per_message")}


@dataclass(frozen=True)
class ModuleInfo:
    """What a profile says about one module besides its coefficients."""

    status: str
    ranges: Mapping[str, tuple[float, float]]
    median_error: float | None
    p95_error: float | None
    source: str
    note: str


@dataclass(frozen=True)
class Profile:
    """One parsed profile; a module that the file does not have is None."""

    name: str
    device: str
    infos: Mapping[str, ModuleInfo]
    gemm: TileWaveGemm | None = None
    elementwise: Mapping[str, Curve] = field(default_factory=dict)
    prefill_attention: tuple[PrefillClass, ...] = ()
    decode_attention: tuple[DecodeClass, ...] = ()
    remote_attention: tuple[DecodeClass, ...] = ()
    all_reduce: LinkTable | None = None
    transfer: LinkTable | None = None
    hop: LinkTable | None = None
    dense_layer: TokenTables | None = None
    head: TokenTables | None = None
    host_overhead: HostOverhead | None = None
    head_packing: TransferCost | None = None
    cache_packing: TransferCost | None = None
    host_copy: TransferCost | None = None
    calibration: Calibration | None = None

    def check_device(self, gpu: GpuSpec) -> None:
        """Raise :class:`SpecError` when this profile was made for another card than ``gpu``."""
        if self.device != gpu.name:
            raise SpecError("profile.device", self.device,
                            f"{gpu.name!r}: profile {self.name!r} was made for {self.device!r} "
                            f"and cannot be used on {gpu.name!r}")

    def check_model(self, model: ModelSpec) -> None:
        """Raise :class:`SpecError` when a calibrated profile was measured for other models than ``model``."""
        if self.calibration is None or self.device in NO_CARD:
            return
        self.calibration.check_model(model, self.name)
        for module, tables in (("dense_layer", self.dense_layer), ("head", self.head)):
            if tables is not None and not tables.degrees(model):
                raise SpecError("model", model.name, f"one of the shapes that profile {self.name!r} of "
                                f"{self.device!r} holds for {module} ({', '.join(self.calibration.models)}); "
                                "calibrate with this model")


def read_profile(path: str | Path) -> Profile:
    """Read and check a profile file.

    Raises:
        SpecError: no such file, not JSON, another schema, an unknown module, or a coefficient
            that is nan, infinite, negative or missing; the text names it.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError("profile", str(path), "a readable file") from error
    except ValueError as error:
        raise SpecError("profile", str(path), f"a JSON file ({error})") from error
    return parse_profile(raw, str(path))


def parse_profile(raw: Any, key: str = "profile") -> Profile:
    """Check a profile's content; errors as :func:`read_profile`."""
    require(isinstance(raw, dict), key, type(raw).__name__, "a JSON object")
    require(raw.get("schema") == SCHEMA, f"{key}: schema", raw.get("schema"), f"{SCHEMA}")
    for name in ("name", "device"):
        require(isinstance(raw.get(name), str) and raw[name] != "", f"{key}: {name}", raw.get(name), "a name")
    modules = raw.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise SpecError(f"{key}: modules", modules, "an object with at least one module")
    infos, parts = {}, {}
    for module, body in modules.items():
        place = f"{key}: modules.{module}"
        require(module in MODELS, place, module, f"one of {', '.join(MODELS)}")
        require(isinstance(body, dict), place, type(body).__name__, "an object")
        require(body.get("model") == MODELS[module], f"{place}.model", body.get("model"), MODELS[module])
        infos[module] = _info(body, place)
        coefficients = body.get("coefficients")
        require(isinstance(coefficients, dict), f"{place}.coefficients", type(coefficients).__name__,
                "an object")
        parts[module] = _coefficients(module, coefficients, f"{place}.coefficients")
    calibration = None
    if KEY in raw or FINGERPRINT in raw:
        check_fingerprint(raw, key)
        calibration = Calibration.parse(raw.get(KEY), f"{key}: {KEY}")
    return Profile(raw["name"], raw["device"], infos, calibration=calibration, **parts)


def _coefficients(module: str, raw: dict[str, Any], key: str) -> Any:
    """The coefficients of one module in their class."""
    if module == "gemm":
        return TileWaveGemm.parse(raw, key)
    if module == "elementwise":
        require(bool(raw), key, raw, "at least one curve")
        return {kind: Curve.parse(curve, f"{key}.{kind}") for kind, curve in raw.items()}
    if module in ("prefill_attention", "decode_attention", "remote_attention"):
        form = PrefillClass if module == "prefill_attention" else DecodeClass
        classes = raw.get("classes")
        if not isinstance(classes, list) or not classes:
            raise SpecError(f"{key}.classes", classes, "a list with at least one class")
        return tuple(form.parse(item, f"{key}.classes[{n}]") for n, item in enumerate(classes))
    if module in ("all_reduce", "transfer", "hop"):
        return LinkTable.parse(raw, key)
    if module == "host_overhead":
        return HostOverhead.parse(raw, key)
    if module in PACKING:
        return TransferCost(positive(raw.get("gamma_s_per_byte"), f"{key}.gamma_s_per_byte", zero=True),
                            positive(raw.get("beta_s"), f"{key}.beta_s", zero=True))
    return TokenTables.parse(raw, key)


def _info(body: dict[str, Any], key: str) -> ModuleInfo:
    """Range, error and origin of one module."""
    status = body.get("status")
    require(status in STATUSES, f"{key}.status", status, " or ".join(STATUSES))
    ranges = {}
    for quantity, ends in (body.get("range") or {}).items():
        low, high = positive_list(ends, f"{key}.range.{quantity}", length=2, zero=True)
        require(low <= high, f"{key}.range.{quantity}", ends, "[least, largest]")
        ranges[quantity] = (low, high)
    error = body.get("held_out") or {}
    place = f"{key}.held_out"
    median, p95 = (None if error.get(name) is None else positive(error[name], f"{place}.{name}", zero=True)
                   for name in ("median", "p95"))
    sources = [item for item in body.get("sources") or [] if isinstance(item, dict)]
    text = "; ".join(str(item.get("file") or item.get("text", "")) for item in sources)
    return ModuleInfo(str(status), ranges, median, p95, text, str(body.get("note", "")))
