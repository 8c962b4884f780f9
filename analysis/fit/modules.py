"""Fits one module of one card and writes it as a profile has it: coefficients, range, error, origin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.fit import attention, curves, gemm
from analysis.fit.cards import CACHED_WEIGHT_BYTES, Ratio, cache_bytes, card
from analysis.fit.errors import Floats, HeldOut, Mask, held_out, score
from hetis_sim.cost.attention import DecodeClass, PrefillClass
from hetis_sim.cost.curve import Curve
from hetis_sim.cost.gemm import TileWaveGemm
from hetis_sim.cost.model import AttentionCost

Module = dict[str, Any]

LIMITED_S = 10e-6
SMALLEST_WIDTH = 256
FOLDS = 5
FOLD_STARTS = 2
RICH_SHAPES = 100
LARGEST_PROMPT_BATCH = 8
LARGEST_HEAD = 256
LEAST_PAIRS = 64
LEAST_LENGTH = 64
SMALL_CACHE_BYTES = 2e6

FEW_SHAPES = ((0.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0), (8.0, 17.0), (8.0, 17.0))
SOME_SHAPES = ((0.0, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0), (9.0, 11.0, 13.0, 15.0, 17.0),
               (9.0, 11.0, 13.0, 15.0))
SIZE_KNOTS = tuple(float(n) for n in range(12, 34, 2))
LIMITED = "rows whose datasheet time is at least 10 us, so that the launch is not the limit"


def body(model: str, status: str, coefficients: Any, *,
         ranges: Mapping[str, tuple[float, float]] | None = None, error: HeldOut | None = None,
         sources: list[dict[str, Any]] | None = None, note: str = "") -> Module:
    """One module of a profile."""
    return {"model": model, "status": status, "note": note,
            "range": {key: [float(low), float(high)] for key, (low, high) in (ranges or {}).items()},
            "held_out": None if error is None else error.dump(), "sources": sources or [],
            "coefficients": coefficients}


# -- matrix products ---------------------------------------------------------------------------


def gemm_rows(name: str, rows: pd.DataFrame, bounds: gemm.Card | None = None) -> pd.DataFrame:
    """Rows that a fit may use: widths of real layers, weights from device memory, physically possible."""
    bounds = bounds or card(name)
    rows = rows[(rows["n"] >= SMALLEST_WIDTH) & (rows["k"] >= SMALLEST_WIDTH)]
    weights = bounds.operand_bytes * rows["n"] * rows["k"].astype(float)
    floor_s = np.maximum(weights / bounds.bytes_per_s,
                         2.0 * rows["m"] * rows["n"] * rows["k"].astype(float) / bounds.flops_per_s)
    possible = rows["seconds"] >= 0.9 * floor_s
    return rows[possible & (weights > CACHED_WEIGHT_BYTES.get(name, 0.0))].reset_index(drop=True)


def gemm_split(rows: pd.DataFrame) -> Mask:
    """Held-out rows: whole weight shapes (n, k) with all their token counts."""
    return held_out(rows, ["n", "k"])


def gemm_limited(rows: pd.DataFrame, bounds: gemm.Card) -> Mask:
    """Rows where the GPU, not the launch, is the limit."""
    return np.asarray(gemm.ideal_s(rows, bounds) >= LIMITED_S)


def fit_gemm(rows: pd.DataFrame, bounds: gemm.Card, starts: int = 5) -> TileWaveGemm:
    """Base and correction with as many knots as the number of shapes bears."""
    shapes = len(rows.groupby(["n", "k"]))
    knots = None if shapes >= RICH_SHAPES else (SOME_SHAPES if shapes >= 40 else FEW_SHAPES)
    base_rows = rows[gemm.ideal_s(rows, bounds) > 3e-6]
    return gemm.fit(rows, bounds, knots, base_rows, starts)


def gemm_module(name: str, rows: pd.DataFrame, sources: list[dict[str, Any]], *,
                bounds: gemm.Card | None = None, status: str = "measured",
                note: str = "") -> tuple[TileWaveGemm, Module]:
    """The matrix products of a card.

    With many weight shapes a quarter of them is held out and never fitted on. With few, the
    error comes from five folds over the shapes and the shipped fit uses all of them.
    """
    bounds = bounds or card(name)
    rows = gemm_rows(name, rows, bounds)
    shapes = len(rows.groupby(["n", "k"]))
    if shapes >= RICH_SHAPES:
        held = gemm_split(rows)
        model = fit_gemm(rows[~held], bounds)
        tested = rows[held]
        predicted = gemm.predict(model, tested, bounds.operand_bytes)
        split = f"a quarter of {shapes} weight shapes (n, k), all their token counts"
    else:
        model, tested = fit_gemm(rows, bounds), rows
        predicted = _folded(rows, bounds)
        split = f"{FOLDS} folds over {shapes} weight shapes (n, k); the shipped fit uses all"
    limited = gemm_limited(tested, bounds)
    error = score(predicted, tested["seconds"].to_numpy(), limited, f"{split}; {LIMITED}")
    ranges = {key: (rows[key].min(), rows[key].max()) for key in "mnk"}
    return model, body("tile_wave", status, model.dump(), ranges=ranges, error=error, sources=sources,
                       note=note)


def folds(rows: pd.DataFrame) -> Floats:
    """Fold of each row; all rows of a weight shape share it."""
    group = rows.groupby(["n", "k"]).ngroup().to_numpy()
    order = np.random.default_rng(0).permutation(group.max() + 1)
    return (order % FOLDS)[group]


def _folded(rows: pd.DataFrame, bounds: gemm.Card) -> Floats:
    """Prediction of each row by a fit that did not see its weight shape."""
    fold, predicted = folds(rows), np.zeros(len(rows))
    for number in sorted(set(fold.tolist())):
        seen = rows[fold != number]
        model = fit_gemm(seen, bounds, FOLD_STARTS)
        predicted[fold == number] = gemm.predict(model, rows[fold == number], bounds.operand_bytes)
    return predicted


def scaled_gemm(model: TileWaveGemm, by: Ratio) -> TileWaveGemm:
    """The same model on a relative: rates by the ratio of peaks, bytes by that of bandwidths."""
    tiles = tuple(replace(tile, flops_per_s=tile.flops_per_s * by.compute) for tile in model.tiles)
    return replace(model, tiles=tiles, bytes_per_s=model.bytes_per_s * by.bandwidth,
                   multiprocessors=max(1, round(model.multiprocessors * by.multiprocessors)))


# -- elementwise kernels -----------------------------------------------------------------------


def elementwise_module(rows: pd.DataFrame, sources: list[dict[str, Any]],
                       note: str = "") -> tuple[dict[str, Curve], Module]:
    """One curve for each kind of kernel; held out: a quarter of the sizes."""
    found, errors = {}, []
    held = held_out(rows, ["kind", "bytes"])
    for kind, part in rows.groupby("kind"):
        mark = held[rows.index.get_indexer(part.index)]
        seen = part[~mark]
        curve = curves.fit_curve(seen["bytes"].to_numpy(float), seen["seconds"].to_numpy(), SIZE_KNOTS)
        found[str(kind)] = curve
        errors.append(part[mark].assign(predicted=curves.predict(curve, part[mark]["bytes"].to_numpy(float))))
    tested = pd.concat(errors)
    limited = (tested["seconds"] >= LIMITED_S).to_numpy()
    error = score(tested["predicted"].to_numpy(), tested["seconds"].to_numpy(), limited,
                  "a quarter of the sizes of each kernel; rows of at least 10 us")
    return found, body("curves", "measured", {kind: curve.dump() for kind, curve in found.items()},
                       ranges={"bytes": (rows["bytes"].min(), rows["bytes"].max())}, error=error,
                       sources=sources, note=note)


def streaming_module(rows: pd.DataFrame, sources: list[dict[str, Any]],
                     note: str) -> tuple[dict[str, Curve], Module]:
    """One streaming rate, from the large sizes of kernels that were timed with their launch."""
    large = rows[rows["bytes"] >= 64e6]
    rate = float(np.median(large["bytes"] / large["seconds"]))
    curve = curves.proportional(rate)
    found = {"activation": curve}
    predicted = curves.predict(curve, large["bytes"].to_numpy(float))
    error = score(predicted, large["seconds"].to_numpy(), np.ones(len(large), dtype=bool),
                  "spread of all sizes from 64 MB around one rate (nothing held out: one coefficient)")
    return found, body("curves", "measured", {"activation": curve.dump()}, error=error, sources=sources,
                       note=note, ranges={"bytes": (64e6, rows["bytes"].max())})


def scaled_curves(found: Mapping[str, Curve], bandwidth: float) -> dict[str, Curve]:
    """The same kernels on a relative: sizes at which a time is reached scale with the bandwidth."""
    return {kind: Curve(tuple(size * bandwidth for size in curve.sizes), curve.seconds)
            for kind, curve in found.items()}


# -- attention ---------------------------------------------------------------------------------


def prefill_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Prompts, at most eight at once, of head sizes that models have."""
    chosen = rows[(rows["batch"] <= LARGEST_PROMPT_BATCH) & (rows["head_dim"] <= LARGEST_HEAD)]
    return chosen.reset_index(drop=True)


def prefill_split(rows: pd.DataFrame) -> Mask:
    """Held-out rows: whole groups of (heads in all, new tokens, context)."""
    return held_out(rows.assign(slots=rows["batch"] * rows["heads"]), ["slots", "new", "context"])


def prefill_limited(name: str, rows: pd.DataFrame) -> Mask:
    """Rows whose FLOPs or bytes take at least 10 us at the peaks."""
    bounds = card(name)
    pairs = rows["new"] * rows["context"] + rows["new"] * (rows["new"] + 1.0) / 2.0
    flops = 4.0 * rows["batch"] * rows["heads"] * rows["head_dim"] * pairs
    moved = 4.0 * rows["batch"] * rows["kv_heads"] * rows["head_dim"] * (rows["new"] + rows["context"])
    ideal = np.maximum(flops / bounds.flops_per_s, moved / bounds.bytes_per_s)
    return np.asarray(ideal >= LIMITED_S)


def predict_prefill(classes: Iterable[PrefillClass], rows: pd.DataFrame) -> Floats:
    """Seconds for each row by the class of its head size."""
    predicted = np.zeros(len(rows))
    for found in classes:
        chosen = (rows["head_dim"] == found.head_dim).to_numpy()
        if chosen.any():
            predicted[chosen] = attention.predict_prefill(found, rows[chosen])
    return predicted


def prefill_module(name: str, rows: pd.DataFrame,
                   sources: list[dict[str, Any]]) -> tuple[list[PrefillClass], Module]:
    """Prompt attention of a card, one class for each head size."""
    bounds, rows = card(name), prefill_rows(rows)
    held = prefill_split(rows)
    classes = [attention.fit_prefill(part, bounds.flops_per_s, bounds.bytes_per_s)
               for _, part in rows[~held].groupby("head_dim")]
    tested = rows[held]
    error = score(predict_prefill(classes, tested), tested["seconds"].to_numpy(),
                  prefill_limited(name, tested),
                  "a quarter of the groups (heads in all, new tokens, context), at most eight prompts; "
                  f"{LIMITED}")
    keys = rows["new"] + rows["context"]
    return classes, body("flash_blocks", "measured", {"classes": [c.dump() for c in classes]},
                         ranges={"keys": (keys.min(), keys.max())}, error=error, sources=sources)


def decode_rows(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that a serving decode resembles: cache from device memory, at least 64 pairs and tokens.

    A layer's cache never stays in the last-level cache between two iterations, since all other
    layers pass through; rows between 2 MB and that size are left out. Rows below 2 MB, where
    the launch is the limit, stay: they fix c.
    """
    _, moved = attention.decode_work(rows)
    pairs = rows["batch"] * rows["kv_heads"]
    small = moved < SMALL_CACHE_BYTES
    streamed = (moved > 1.1 * cache_bytes(name)) & (pairs >= LEAST_PAIRS).to_numpy()
    possible = rows["seconds"].to_numpy() >= moved / card(name).bytes_per_s
    chosen = (small | streamed) & possible & (rows["length"] >= LEAST_LENGTH).to_numpy()
    return rows[chosen & (rows["head_dim"] <= LARGEST_HEAD).to_numpy()].reset_index(drop=True)


def decode_split(rows: pd.DataFrame) -> Mask:
    """Held-out rows: whole shapes (batch, length, heads)."""
    return held_out(rows, ["batch", "length", "heads", "kv_heads"])


def decode_limited(rows: pd.DataFrame) -> Mask:
    """Rows that stream their cache from device memory."""
    return np.asarray(attention.decode_work(rows)[1] >= SMALL_CACHE_BYTES)


def predict_decode(classes: Iterable[DecodeClass], rows: pd.DataFrame) -> Floats:
    """Seconds for each row by its class; nan where the class was not fitted."""
    predicted = np.full(len(rows), np.nan)
    group = (rows["heads"] // rows["kv_heads"]).to_numpy()
    for found in classes:
        chosen = (rows["head_dim"] == found.head_dim).to_numpy() & (group == found.heads_per_group)
        if chosen.any():
            predicted[chosen] = attention.predict_decode(found.cost, rows[chosen])
    return predicted


def decode_module(name: str, rows: pd.DataFrame,
                  sources: list[dict[str, Any]]) -> tuple[list[DecodeClass], Module]:
    """The linear decode model of a card, one class for each head size and heads per group."""
    rows = decode_rows(name, rows)
    held = decode_split(rows)
    seen = rows[~held].reset_index(drop=True)
    classes = attention.decode_classes(seen, decode_limited(seen), card(name).bytes_per_s)
    tested = rows[held]
    predicted = predict_decode(classes, tested)
    known = ~np.isnan(predicted)
    error = score(predicted[known], tested["seconds"].to_numpy()[known], decode_limited(tested)[known],
                  "a quarter of the shapes (batch, length, heads), at least 64 tokens; rows that stream more "
                  "than the last-level cache for at least 64 pairs of sequence and KV head")
    group = [c.heads_per_group for c in classes]
    ranges = {"heads_per_group": (min(group), max(group)),
              "head_dim": (rows["head_dim"].min(), rows["head_dim"].max())}
    return classes, body("linear", "measured", {"classes": [c.dump() for c in classes]}, ranges=ranges,
                         error=error, sources=sources)


def scaled_prefill(classes: Iterable[PrefillClass], by: Ratio) -> list[PrefillClass]:
    """Prompt attention of a relative: the same shares of its own peaks."""
    return [replace(c, flops_per_s=c.flops_per_s * by.compute, bytes_per_s=c.bytes_per_s * by.bandwidth,
                    block_flops_per_s=c.block_flops_per_s * by.compute / by.multiprocessors) for c in classes]


def scaled_decode(classes: Iterable[DecodeClass], bandwidth: float) -> list[DecodeClass]:
    """Decode attention of a relative: work in proportion to the bandwidth, the same launch."""
    return [replace(c, cost=AttentionCost(c.cost.a_s_per_head / bandwidth, c.cost.b_s_per_byte / bandwidth,
                                          c.cost.c_s)) for c in classes]
