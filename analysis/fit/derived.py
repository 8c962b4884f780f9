"""Profiles of cards with little or no data of their own, each with its reasoning.

Nothing here is fitted to end-to-end results. A derived module is a measured module of a
relative, scaled by datasheet ratios or by whole-layer timings of the card itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.fit import data
from analysis.fit.cards import Ratio, fp32_card, ratio, spec
from analysis.fit.data import Store
from analysis.fit.errors import HeldOut, score
from analysis.fit.modules import (
    Module,
    body,
    gemm_module,
    scaled_curves,
    scaled_decode,
    scaled_gemm,
    scaled_prefill,
    streaming_module,
)
from analysis.fit.recipes import Fitted
from hetis_sim.cost.fitted import ProfileCost
from hetis_sim.cost.gemm import TileWaveGemm
from hetis_sim.cost.grid import STORED_UNIT, Grid
from hetis_sim.cost.profile import SCHEMA, Profile, parse_profile
from hetis_sim.cost.roofline import RooflineCost
from hetis_sim.spec.architectures import MODELS

HELIX_FILE = "kernels/helix/layer_time_by_batch.csv"
HELIX_MODELS = {"llama1_30b": "llama-30b", "llama2_70b": "llama2-70b"}
# Rows used: prompts long enough for the rounding to whole ms not to matter, decode batches
# so small that attention over a context of unknown length does not count.
LEAST_PROMPT_TOKENS = 1000
LARGEST_DECODE_BATCH = 4

@dataclass(frozen=True)
class Relative:
    """A card derived from another by datasheet ratios."""

    name: str
    source: str
    reason: str


RELATIVES = (
    Relative("a100-40gb", "a100-80gb", "same GA100 chip and clocks; memory at 1555 instead of 2039 GB/s"),
    Relative("a100-pcie-80gb", "a100-80gb", "same GA100 chip; memory at 1935 GB/s; its 300 W not modelled"),
    Relative("a100-pcie-40gb", "a100-80gb", "same GA100 chip; memory at 1555 GB/s; its 250 W not modelled"),
    Relative("h100-pcie", "h100-sxm", "same GH100 chip with 114 multiprocessors and HBM2e; datasheet ratios"),
    Relative("rtx6000-ada", "l40s", "same AD102 chip and 142 multiprocessors; datasheet ratios"),
    Relative("a10", "a40", "GA102 with 72 multiprocessors; datasheet ratios"),
    Relative("a10g", "a40", "GA102 with 80 multiprocessors at half the matrix rate; datasheet ratios"),
    Relative("v100-32gb", "v100-16gb", "same card with more memory"),
    Relative("v100-sxm2-16gb", "v100-16gb", "same GV100 chip at higher clocks; datasheet ratios"),
    Relative("v100-sxm2-32gb", "v100-16gb", "same GV100 chip at higher clocks; datasheet ratios"),
    Relative("p100-12gb", "p100-16gb", "same GP100 chip with three of four memory stacks: 549, not 732 GB/s"),
    Relative("p100-sxm2-16gb", "p100-16gb", "same GP100 chip at higher clocks; datasheet ratios"),
)

# Modules that a measured card lacks, and the relative that lends them.
LENT = (
    ("a40", "l40s", ("prefill_attention",), "FlashAttention 2 on the next generation of the same design"),
    ("a6000", "l40s", ("prefill_attention",), "FlashAttention 2 on the next generation of the same design"),
    ("rtx3090", "rtx4090", ("prefill_attention",),
     "FlashAttention 2 on the next generation, both at half matrix rate with fp32 accumulation"),
    ("h200", "h100-sxm", ("elementwise",), "same chip; kernels scaled by the bandwidth"),
    ("l40s", "rtx4090", ("elementwise",), "same AD102 chip and vLLM's kernels; scaled by the bandwidth"),
    ("v100-16gb", "a100-80gb", ("prefill_attention",),
     "no attention timings of Volta: the A100's shares of the peaks; an older kernel may reach less"),
)

# On the P100 products with rows of more than 2^13 fp32 elements are slow; timings start at 2^5 tokens.
LONG_ROW_LOG2 = 13.0
LEAST_MEASURED_LOG2 = 5.0

# Memory rate of streaming kernels on each card, column measured_max_GBps of hardware/gpu_catalogue.csv.
STREAM_BYTES_PER_S = {
    "a100-80gb": 1780e9, "h100-sxm": 3112e9, "h200": 4350e9, "l40s": 757e9, "rtx-pro-6000": 1632e9,
    "a30": 801e9, "rtx4090": 954e9, "a40": 557e9, "a6000": 747e9, "rtx3090": 887e9, "v100-16gb": 883e9,
    "t4": 247e9, "l4": 248e9, "p100-16gb": 559e9,
}
# Cards without decode timings, and the card whose kernel's launch and cost of a head they are given.
DECODE_DONORS = {"a40": "l40s", "a6000": "l40s", "rtx3090": "rtx4090", "v100-16gb": "a100-80gb",
                 "t4": "a100-80gb", "l4": "l40s", "p100-16gb": "a100-80gb"}


def lend(found: dict[str, Fitted], target: str, source: str, modules: tuple[str, ...], reason: str,
         by: Ratio | None = None) -> None:
    """Give ``target`` modules of ``source``, scaled by ``by`` or by datasheet ratios."""
    by = by or ratio(target, source)
    to, of = found[target], found[source]
    note = f"derived from {source}: {reason}"
    for module in modules:
        given = of.modules[module]
        if module == "gemm" and of.gemm is not None:
            to.gemm = scaled_gemm(of.gemm, by)
            coefficients: Any = to.gemm.dump()
        elif module == "elementwise":
            to.curves = scaled_curves(of.curves, by.bandwidth)
            coefficients = {kind: curve.dump() for kind, curve in to.curves.items()}
        elif module == "prefill_attention":
            to.prefill = scaled_prefill(of.prefill, by)
            coefficients = {"classes": [c.dump() for c in to.prefill]}
        else:
            to.decode = scaled_decode(of.decode, by.bandwidth)
            coefficients = {"classes": [c.dump() for c in to.decode]}
        to.modules[module] = {**given, "status": "derived", "coefficients": coefficients, "held_out": None,
                              "note": note + (f". {given['note']}" if given["note"] else "")}


def relatives(found: dict[str, Fitted]) -> None:
    """Add the cards that follow from another by datasheet ratios, all modules of it."""
    for relative in RELATIVES:
        found[relative.name] = Fitted(relative.name)
        lend(found, relative.name, relative.source, tuple(found[relative.source].modules), relative.reason)


def profile_of(card: Fitted) -> Profile:
    """The parsed form, as the simulator will read it."""
    return parse_profile({"schema": SCHEMA, "name": card.name, "device": card.name, "modules": card.modules})


def helix_layers(store: Store, device: str) -> pd.DataFrame:
    """Whole layers that dense work dominates: long prompts, tiny decode batches."""
    rows = data.layers_helix(store, device)
    prompts = (rows["phase"] == "prompt") & (rows["tokens"] >= LEAST_PROMPT_TOKENS)
    decodes = (rows["phase"] == "decode") & (rows["tokens"] <= LARGEST_DECODE_BATCH)
    return rows[prompts | decodes].reset_index(drop=True)


def predicted_layers(card: Fitted, rows: pd.DataFrame) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Dense layer of the profile for each row of whole-layer timings."""
    cost = ProfileCost({card.name: (profile_of(card),)}, RooflineCost())
    facts = spec(card.name)
    pairs = zip(rows["architecture"].tolist(), rows["tokens"].tolist(), strict=True)
    return np.array([cost.dense_layer_s(facts, MODELS[HELIX_MODELS[name]], int(tokens), 1)
                     for name, tokens in pairs])


def layer_check(store: Store, card: Fitted, device: str, architecture: str | None = None) -> HeldOut:
    """Error of the dense layers against whole-layer timings that no coefficient was fitted to."""
    rows = helix_layers(store, device)
    if architecture is not None:
        rows = rows[rows["architecture"] == architecture].reset_index(drop=True)
    measured = rows["seconds"].to_numpy()
    return score(predicted_layers(card, rows), measured, np.ones(len(rows), dtype=bool),
                 f"whole decoder layers of {architecture or 'both models'} in vLLM on this card "
                 f"(attention and kernel gaps are in the measurement, not in the prediction)")


def whole_layer_card(store: Store, found: dict[str, Fitted], name: str, donor: str) -> None:
    """A card timed in whole layers only: a relative's shapes, rates set on one model, tested on another."""
    card, base, giver = found[name], ratio(name, donor), found[donor]
    assert giver.gemm is not None
    rows = helix_layers(store, name)
    rows = rows[rows["architecture"] == "llama1_30b"].reset_index(drop=True)
    measured, prompt = rows["seconds"].to_numpy(), (rows["phase"] == "prompt").to_numpy()
    most = spec(name).memory_bandwidth_bytes_per_s / giver.gemm.bytes_per_s
    by = base
    for _ in range(4):
        lend(found, name, donor, ("gemm",), "", by)
        share = predicted_layers(card, rows) / measured
        by = replace(by, compute=by.compute * float(np.median(share[prompt])),
                     bandwidth=min(by.bandwidth * float(np.median(share[~prompt])), most))
    lend(found, name, donor, ("gemm",), "", by)
    error = layer_check(store, card, name, "llama2_70b")
    card.modules["gemm"].update(
        sources=[*store.sources([HELIX_FILE]), *giver.modules["gemm"]["sources"]],
        held_out=error.dump(),
        note=f"tile structure of {donor}; compute and memory rates set by whole layers of Llama-30B timed on "
             f"this card ({by.compute / base.compute:.2f} and {by.bandwidth / base.bandwidth:.2f} of the "
             f"datasheet ratios), tested on those of Llama-2-70B")
    lend(found, name, donor, ("prefill_attention",),
         "its shares of the peaks, with the compute rate that whole layers of this card reach", by)


def neusight_elementwise(store: Store, card: Fitted, device: str) -> None:
    """Streaming kernels from fp32 layer norm and softmax."""
    files = [f"kernels/neusight_fp32/{split}_{kind}.csv.gz" for kind in ("ln", "softmax")
             for split in ("train", "test")]
    card.curves, card.modules["elementwise"] = streaming_module(
        data.elementwise_neusight(store, device), store.sources(files),
        "fp32 layer norm and softmax; small sizes there include the launch and are replaced by 2 us")


def pascal_card(store: Store, found: dict[str, Fitted], name: str, device: str) -> None:
    """P100: fp32 timings stand for 16-bit operands, because PyTorch accumulates in fp32.

    PyTorch calls cuBLAS with fp32 as the compute type for half operands (github.com/pytorch/pytorch,
    issue 123157; its later fp16 accumulation asks for compute capability 7.0), and this card
    has no matrix units, so that products run at the fp32 rate of the vector units.
    """
    card = found[name] = Fitted(name)
    files = [f"kernels/neusight_fp32/{split}_linear.csv.gz" for split in ("train", "test")]
    fitted, module = gemm_module(name, data.gemm_neusight(store, device), store.sources(files),
                                 bounds=fp32_card(name), status="derived")
    card.gemm = half_operands(fitted, STREAM_BYTES_PER_S[name])
    module["range"]["m"][0] = 1.0
    module.update(coefficients=card.gemm.dump(), note=(
        "error is that of fp32 operands, TF32 off; 16-bit operands run at the same rate with fp32 "
        "accumulation (PyTorch's only choice below compute capability 7.0) and half the bytes, and the fall "
        "beyond k = 8192 (taken to be address caches, so a matter of bytes) comes at twice the k; below 32 "
        "tokens nothing is measured: the time runs from that of streaming the weights once to the fit"))
    card.modules["gemm"] = module
    neusight_elementwise(store, card, device)
    donor = "a100-80gb"
    efficiency = _product_efficiency(store, device)
    rate = efficiency * spec(name).fp32_flops_per_s
    card.prefill = [replace(c, flops_per_s=rate, block_flops_per_s=c.block_flops_per_s * rate / c.flops_per_s)
                    for c in scaled_prefill(found[donor].prefill, ratio(name, donor))]
    batched = [f"kernels/neusight_fp32/{split}_bmm.csv.gz" for split in ("train", "test")]
    card.modules["prefill_attention"] = body(
        "flash_blocks", "derived", {"classes": [c.dump() for c in card.prefill]},
        ranges=found[donor].modules["prefill_attention"]["range"], sources=store.sources(batched),
        note=f"blocks of the A100's kernel at {efficiency:.2f} of this card's fp32 peak: the harmonic mean "
             f"of what its batched products reach in the shapes of QK and PV (inner or outer size 48 to 160, "
             f"256 rows and more)")


def half_operands(fitted: TileWaveGemm, stream_bytes_per_s: float) -> TileWaveGemm:
    """The fp32 fit for 16-bit operands: knots of long rows at twice the k, thin products nearer streaming."""
    assert fitted.correction is not None
    m_knots, n_knots, k_knots = fitted.correction.knots
    values = np.asarray(fitted.correction.values).reshape(len(m_knots), len(n_knots), len(k_knots))
    k_moved = tuple(knot + 1.0 if knot >= LONG_ROW_LOG2 else knot for knot in k_knots)
    first = m_knots.index(LEAST_MEASURED_LOG2)
    widths = np.meshgrid(2.0 ** np.array(n_knots), 2.0 ** np.array(k_moved), indexing="ij")
    n, k = (axis.ravel() for axis in widths)
    ones = np.ones(len(n))
    at_start = 2.0 * n * k / stream_bytes_per_s + fitted.fixed_s
    at_fit = fitted.base_s(ones * 2.0 ** m_knots[first], n, k, ones) * np.exp(values[first].ravel())
    for number, knot in enumerate(m_knots[:first]):
        share = knot / m_knots[first]
        wanted = np.exp((1.0 - share) * np.log(np.minimum(at_start, at_fit)) + share * np.log(at_fit))
        base = fitted.base_s(ones * 2.0**knot, n, k, ones)
        values[number] = np.log(wanted / base).reshape(values[number].shape)
    stored = np.round(values / STORED_UNIT) * STORED_UNIT
    return fitted.with_correction(Grid((m_knots, n_knots, k_moved), tuple(float(x) for x in stored.ravel())))


def streaming_decode(found: dict[str, Fitted], name: str, donor: str) -> None:
    """Decode attention from the streaming rate measured on the card itself."""
    card, share = found[name], decode_over_stream(found)
    rate = min(share * STREAM_BYTES_PER_S[name], spec(name).memory_bandwidth_bytes_per_s)
    card.decode = scaled_decode(found[donor].decode, rate * seconds_per_byte(found[donor]))
    card.modules["decode_attention"] = body(
        "linear", "derived", {"classes": [c.dump() for c in card.decode]},
        ranges=found[donor].modules["decode_attention"]["range"],
        sources=[{"text": "streaming rate: hardware/gpu_catalogue.csv, measured_max_GBps"},
                 *found[donor].modules["decode_attention"]["sources"]],
        note=f"streaming rate measured on this card ({STREAM_BYTES_PER_S[name] / 1e9:.0f} GB/s) times "
             f"{share:.2f}, the median of decode over streaming rate on seven measured cards; launch and "
             f"cost of a head from {donor}")


def _product_efficiency(store: Store, device: str) -> float:
    """Share of the fp32 peak in batched products shaped like QK and PV."""
    rows = pd.concat([pd.read_csv(store.path(f"kernels/neusight_fp32/{split}_bmm.csv.gz"))
                      for split in ("train", "test")])
    rows = rows[(rows["Device"] == device) & (rows["M"] >= 256) & (rows["Latency"] > 0.3)]
    rate = 2.0 * rows["B"] * rows["M"] * rows["N"] * rows["K"] / (rows["Latency"] * data.MS)
    share = rate / spec("p100-16gb").fp32_flops_per_s
    inner, outer = rows["N"].between(48, 160), rows["K"].between(48, 160)
    score_part = float(share[inner & (rows["K"] >= 256)].median())
    value_part = float(share[outer & (rows["N"] >= 256)].median())
    return 2.0 / (1.0 / score_part + 1.0 / value_part)


def seconds_per_byte(card: Fitted) -> float:
    """Cost of a byte in decode attention, median over the classes of head size 128."""
    return float(np.median([c.cost.b_s_per_byte for c in card.decode if c.head_dim == 128]))


def decode_over_stream(found: dict[str, Fitted]) -> float:
    """Median over measured cards of decode's memory rate over the streaming rate."""
    measured = [name for name in STREAM_BYTES_PER_S if name not in DECODE_DONORS]
    shares = [1.0 / seconds_per_byte(found[name]) / STREAM_BYTES_PER_S[name] for name in measured]
    return float(np.median(shares))


def derive_all(store: Store, found: dict[str, Fitted]) -> None:
    """Fill the gaps of measured cards and add those that have no data of their own."""
    for target, source, modules, reason in LENT:
        lend(found, target, source, modules, reason)
    neusight_elementwise(store, found["v100-16gb"], "Tesla V100-PCIE-32GB")
    for name, donor, device in (("t4", "v100-16gb", "Tesla T4"), ("l4", "l40s", "NVIDIA L4")):
        found[name] = Fitted(name)
        neusight_elementwise(store, found[name], device)
        whole_layer_card(store, found, name, donor)
    pascal_card(store, found, "p100-16gb", "Tesla P100-PCIE-16GB")
    for name, donor in DECODE_DONORS.items():
        streaming_decode(found, name, donor)
    relatives(found)
    for name, device in (("a100-40gb", "a100"), ("v100-16gb", "v100")):
        check = layer_check(store, found[name], device)
        module: Module = found[name].modules["gemm"]
        joint = "; " if module["note"] else ""
        module["note"] += (f"{joint}against whole layers timed on this card (not fitted): median "
                           f"{check.median:.1%}, p95 {check.p95:.1%} of {check.n}")
