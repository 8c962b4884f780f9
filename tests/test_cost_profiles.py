"""Profile files: what is shipped, what is refused, which one is used, and what is warned about."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetis_sim.cost import load_cost_model, read_profile, shipped_devices
from hetis_sim.cost.curve import Curve
from hetis_sim.cost.grid import Grid
from hetis_sim.cost.links import LinkTable
from hetis_sim.cost.load import read_shipped
from hetis_sim.cost.profile import SCHEMA, parse_profile
from hetis_sim.cost.tables import TokenTables
from hetis_sim.spec.architectures import MODELS
from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.gpus import GPUS
from hetis_sim.spec.links import LINKS

WANTED = ("a100-80gb", "a100-40gb", "h100-sxm", "h200", "l40s", "a40", "a30", "a6000", "rtx3090", "rtx4090",
          "rtx-pro-6000", "v100-16gb", "t4", "l4", "p100-12gb", "p100-16gb")
MODULES = ("gemm", "elementwise", "prefill_attention", "decode_attention")
LARGEST_FILE_BYTES = 60_000
LLAMA = MODELS["llama2-70b"]
CPU = GpuSpec("my-cpu", 2**34, 50e9, 1e12, 1e12, 1e12, source="a test")


def raw_profile() -> dict[str, Any]:
    """The shipped profile of a card, to be spoilt."""
    folder = Path(load_cost_model.__code__.co_filename).parent / "profiles"
    return copy.deepcopy(json.loads((folder / "rtx4090.json").read_text()))


def saved(folder: Path, raw: dict[str, Any]) -> Path:
    """``raw`` as a file."""
    path = folder / "profile.json"
    path.write_text(json.dumps(raw))
    return path


def numbers(raw: Any) -> list[float]:
    """All numbers in nested lists and objects, corrections aside (they are logarithms)."""
    if isinstance(raw, dict):
        return [x for key, value in raw.items() if key != "correction" for x in numbers(value)]
    if isinstance(raw, list):
        return [x for value in raw for x in numbers(value)]
    return [raw] if isinstance(raw, (int, float)) and not isinstance(raw, bool) else []


@pytest.mark.parametrize("device", WANTED)
def test_a_profile_is_shipped_with_every_module(device: str) -> None:
    """The cards that the documentation promises have all four modules, each with its origin."""
    profile = read_shipped(device)
    assert profile is not None
    assert set(MODULES) <= set(profile.infos)
    for module, info in profile.infos.items():
        assert info.source, module
        assert info.status in ("measured", "derived")
        if info.status == "derived":
            assert info.note, module


def test_shipped_profiles_are_compact_and_positive() -> None:
    """Coefficients are finite and not negative, and a file holds figures, not tables of timings."""
    folder = Path(load_cost_model.__code__.co_filename).parent / "profiles"
    files = sorted(folder.glob("*.json"))
    assert [path.stem for path in files] == list(shipped_devices())
    for path in files:
        assert path.stat().st_size <= LARGEST_FILE_BYTES, path.name
        raw = json.loads(path.read_text())
        assert raw["schema"] == SCHEMA
        assert raw["device"] == path.stem
        assert raw["device"] == "links" or raw["device"] in GPUS
        for module, body in raw["modules"].items():
            found = numbers(body["coefficients"])
            assert all(math.isfinite(x) and x >= 0 for x in found), (path.name, module)
            for source in body["sources"]:
                assert "text" in source or len(source["sha256"]) == 64, (path.name, module)


def test_a_profile_for_another_card_is_refused(tmp_path: Path) -> None:
    """A file made for one card cannot be used on a cluster of others; the text names both."""
    path = saved(tmp_path, raw_profile())
    with pytest.raises(SpecError, match=r"rtx4090.*a100-80gb"):
        load_cost_model(profiles=[path], gpus=[GPUS["a100-80gb"]])
    with pytest.raises(SpecError, match=r"rtx4090.*a100-80gb"):
        read_profile(path).check_device(GPUS["a100-80gb"])
    load_cost_model(profiles=[path], gpus=[GPUS["a100-80gb"], GPUS["rtx4090"]])


def test_a_swapped_profile_is_caught(tmp_path: Path) -> None:
    """Renaming a profile to another card changes its durations there: the right one is what differs."""
    swapped = raw_profile() | {"device": "a100-80gb"}
    honest = load_cost_model()
    fooled = load_cost_model(profiles=[saved(tmp_path, swapped)])
    gpu = GPUS["a100-80gb"]
    ratio = fooled.dense_layer_s(gpu, LLAMA, 2048, 1) / honest.dense_layer_s(gpu, LLAMA, 2048, 1)
    assert ratio > 1.3


def spoil(path: tuple[str | int, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    """A function that overwrites one place of a profile."""
    def change(raw: Any) -> None:
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = value
    return change


GEMM = ("modules", "gemm", "coefficients")


@pytest.mark.parametrize(("path", "value", "text"), [
    (("schema",), 99, "schema"),
    (("device",), "", "device"),
    (("modules",), {}, "modules"),
    (("modules", "gemm", "model"), "neural", "tile_wave"),
    (("modules", "gemm", "status"), "guessed", "measured"),
    (("modules", "gemm", "coefficients"), None, "coefficients"),
    ((*GEMM, "bytes_per_s"), math.nan, "bytes_per_s"),
    ((*GEMM, "bytes_per_s"), 0, "bytes_per_s"),
    ((*GEMM, "fixed_s"), -1e-6, "fixed_s"),
    ((*GEMM, "depth"), "many", "depth"),
    ((*GEMM, "tiles"), [], "tiles"),
    ((*GEMM, "tiles", 0), [128, 128], "tiles"),
    ((*GEMM, "tiles", 0, 2), math.inf, "tiles"),
    ((*GEMM, "splits"), [2], "splits"),
    ((*GEMM, "correction", "values_milli"), [1, 2], "grid.values"),
    (("modules", "gemm", "range", "m"), [5, 1], "range.m"),
    (("modules", "elementwise", "coefficients", "norm", "seconds", 0), -1.0, "seconds"),
    (("modules", "decode_attention", "coefficients", "classes", 0, "b_s_per_byte"), math.nan, "b_s_per_byte"),
    (("modules", "decode_attention", "coefficients", "classes"), [], "classes"),
    (("modules", "prefill_attention", "coefficients", "classes", 0, "flops_per_s"), -5, "flops_per_s"),
])
def test_a_faulty_profile_names_the_fault(tmp_path: Path, path: tuple[str | int, ...], value: Any,
                                          text: str) -> None:
    """Schema, unknown forms and nan, negative or missing coefficients are errors before any work."""
    raw = raw_profile()
    spoil(path, value)(raw)
    with pytest.raises(SpecError, match=text):
        load_cost_model(profiles=[saved(tmp_path, raw)])


def test_an_unknown_module_is_refused() -> None:
    """A misspelt module is an error, not a silent fallback."""
    raw = raw_profile()
    raw["modules"]["gem"] = raw["modules"].pop("gemm")
    with pytest.raises(SpecError, match="gem"):
        parse_profile(raw)


def test_files_that_are_no_profiles_are_refused(tmp_path: Path) -> None:
    """A missing file, text that is not JSON and a list are named as such."""
    with pytest.raises(SpecError, match="readable"):
        read_profile(tmp_path / "absent.json")
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(SpecError, match="JSON"):
        read_profile(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SpecError, match="object"):
        read_profile(tmp_path / "list.json")


def test_an_unknown_kind_is_refused() -> None:
    """The text names what is allowed; profiles with the roofline are a contradiction."""
    with pytest.raises(SpecError, match="profile, roofline"):
        load_cost_model("magic")
    with pytest.raises(SpecError, match="roofline"):
        load_cost_model("roofline", profiles=["x.json"])


def cpu_profile() -> dict[str, Any]:
    """What a calibration run on a CPU would write: one model shape measured whole."""
    model = MODELS["llama3.2-1b"]
    table = TokenTables.dump_table(model, 1, Curve((1.0, 64.0, 512.0), (0.02, 0.05, 0.3)))
    module = {"model": "token_tables", "status": "measured", "coefficients": {"tables": [table]},
              "sources": [{"text": "this machine"}]}
    return {"schema": SCHEMA, "name": "mine", "device": CPU.name, "modules": {"dense_layer": module}}


def test_a_measured_shape_goes_before_everything(tmp_path: Path) -> None:
    """Where a table fits the shape exactly it is used; another shape or degree falls through."""
    model = MODELS["llama3.2-1b"]
    mine = load_cost_model(profiles=[saved(tmp_path, cpu_profile())])
    roofline = load_cost_model("roofline")
    assert mine.dense_layer_s(CPU, model, 64, 1) == pytest.approx(0.05)
    assert mine.dense_layer_s(CPU, model, 512, 1) == pytest.approx(0.3)
    assert 0.02 < mine.dense_layer_s(CPU, model, 30, 1) < 0.05
    assert mine.dense_layer_s(CPU, model, 64, 2) == pytest.approx(roofline.dense_layer_s(CPU, model, 64, 2))
    other = MODELS["llama3-8b"]
    assert mine.dense_layer_s(CPU, other, 64, 1) == pytest.approx(roofline.dense_layer_s(CPU, other, 64, 1))


def test_a_users_profile_replaces_modules_one_by_one(tmp_path: Path) -> None:
    """A user's file with decode attention only leaves the shipped products in place."""
    raw = raw_profile()
    raw["modules"] = {"decode_attention": raw["modules"]["decode_attention"]}
    for found in raw["modules"]["decode_attention"]["coefficients"]["classes"]:
        found["c_s"] = 1.0
    gpu, shipped = GPUS["rtx4090"], load_cost_model()
    mine = load_cost_model(profiles=[saved(tmp_path, raw)])
    assert mine.decode_attention(gpu, LLAMA).c_s == 1.0
    assert mine.dense_layer_s(gpu, LLAMA, 100, 1) == shipped.dense_layer_s(gpu, LLAMA, 100, 1)


def test_a_query_far_outside_the_range_warns_once() -> None:
    """Within twice the range nothing is said; beyond it one sentence, however often it is asked."""
    cost, gpu = load_cost_model(), GPUS["a30"]
    cost.dense_layer_s(gpu, LLAMA, 4096, 1)
    assert not any(" m " in text for text in cost.warnings)
    for tokens in (20_000, 20_001, 30_000):
        cost.dense_layer_s(gpu, LLAMA, tokens, 1)
    about_tokens = [text for text in cost.warnings if " m above" in text]
    assert len(about_tokens) == 1
    assert "hetis-a30" in about_tokens[0]


def test_fp32_weights_do_not_use_16_bit_products() -> None:
    """A model in fp32 runs on the vector units: far slower than its 16-bit twin."""
    cost, gpu = load_cost_model(), GPUS["a100-80gb"]
    single = replace(LLAMA, weight_bytes=4)
    assert cost.dense_layer_s(gpu, single, 2048, 1) > 10 * cost.dense_layer_s(gpu, LLAMA, 2048, 1)
    origin = {row.module: row.kind for row in cost.provenance([gpu], single, [])}
    assert origin["gemm"] == "roofline"


def test_quantized_weights_stream_faster_but_compute_the_same() -> None:
    """One byte a weight halves the decode floor and leaves large prompts as they are."""
    cost, gpu = load_cost_model(), GPUS["a100-80gb"]
    small = replace(LLAMA, weight_bytes=1)
    assert cost.dense_layer_s(gpu, small, 1, 1) < 0.7 * cost.dense_layer_s(gpu, LLAMA, 1, 1)
    assert cost.dense_layer_s(gpu, small, 8192, 1) == pytest.approx(
        cost.dense_layer_s(gpu, LLAMA, 8192, 1), rel=0.05)


def test_curves_hold_below_and_grow_beyond() -> None:
    """Launch-bound below the first knot, proportional beyond the last, never falling."""
    curve = Curve((10.0, 1000.0), (1.0, 4.0))
    assert curve.at(1) == 1.0
    assert curve.at(100) == pytest.approx(2.0)
    assert curve.at(2000) == pytest.approx(8.0)
    with pytest.raises(SpecError):
        Curve((1.0, 2.0), (2.0, 1.0))


def test_ranks_between_and_beyond_the_measured() -> None:
    """Three ranks lie between two and four; sixteen cost more than eight."""
    sizes = (1e3, 1e9)
    table = LinkTable({}, {"x": {2: Curve(sizes, (1e-5, 1e-2)), 4: Curve(sizes, (2e-5, 1.5e-2))}}, {})
    for size in (1e3, 1e6, 1e9):
        two, three, four, eight = (table.all_reduce_s("x", size, ranks) for ranks in (2, 3, 4, 8))
        assert two is not None and three is not None and four is not None and eight is not None
        assert two < three < four < eight
    assert table.all_reduce_s("y", 1.0, 2) is None


@pytest.mark.parametrize(("pairs", "text"), [
    (["a>b"], "an object"), ({"a-b": {"gamma_s_per_byte": 1.0, "beta_s": 0.0}}, r"pairs='a-b'.*rank>worker"),
    ({"a>b": 3}, r"pairs\.a>b=3"),
    ({"a>b": {"gamma_s_per_byte": -1.0, "beta_s": 0.0}}, r"a>b\.gamma_s_per_byte"),
])
def test_bad_pairs_of_a_link_are_refused(pairs: Any, text: str) -> None:
    """The text names the key and what is allowed."""
    with pytest.raises(SpecError, match=text):
        LinkTable.parse({"wire": {"gamma_s_per_byte": 1e-9, "beta_s": 1e-5, "pairs": pairs}}, "transfer")


def test_an_unmeasured_link_gets_a_ring() -> None:
    """A link that no profile knows is a ring of its own messages, slower with more ranks."""
    cost = load_cost_model()
    link = LinkSpec("carrier-pigeon", 1e6, 0.5)
    two, four = (cost.all_reduce_s(GPUS["a100-80gb"], link, 10**6, ranks) for ranks in (2, 4))
    assert 2 * 0.5 < two < four
    assert cost.transfer(link).gamma_s_per_byte >= 1e-6


def test_a_card_without_collectives_takes_those_of_the_link() -> None:
    """An A100 over PCIe uses the curve of the link; over NVLink its own."""
    cost = load_cost_model()
    nvlink, pcie = (cost.all_reduce_s(GPUS["a100-80gb"], LINKS[name], 10**8, 4)
                    for name in ("nvlink3", "pcie4x16"))
    assert nvlink < pcie / 5


def test_grid_points_agree_with_arrays() -> None:
    """The scalar path and the array path of a surface and of prompt attention are the same function."""
    rng = np.random.default_rng(3)
    grid = Grid(((0.0, 1.0, 4.0), (0.0, 2.0), (1.0, 3.0, 5.0)), tuple(rng.normal(size=18)))
    points = rng.uniform(-1.0, 6.0, size=(50, 3))
    at_once = grid.at(*points.T)
    assert [grid.at_point(*point) for point in points] == pytest.approx(at_once)
    profile = read_shipped("a100-80gb")
    assert profile is not None
    fitted = profile.prefill_attention[0]
    for heads, kv_heads, new, context in ((8, 1, 5, 0), (64, 8, 700, 300), (40, 40, 2048, 0)):
        arrays = (np.array([float(x)]) for x in (heads, kv_heads, new, context))
        together = fitted.seconds(*arrays, kv_bytes=2, head_dim=128)
        assert fitted.seconds_one(heads, kv_heads, new, context, 2, 128) == pytest.approx(together[0])
