"""Time of a matrix product on a GPU: tiles in waves over the multiprocessors, then a smooth correction.

    t = (fixed + soft minimum over tiles of the best split's [ (compute^p + memory^p)^(1/p) + reduction ])
        * exp(correction)

    compute   = waves * 2*bm*bn * (k/splits + depth) / (rate of the tile on one multiprocessor)
    waves     = full + ragged * (ceil(full) - full),
                full = max(1, ceil(m/bm) * ceil(n/bn) * count * splits / multiprocessors)
    memory    = bytes of weights, input and output / reached bandwidth
    reduction = (splits > 1) * (split_fixed + partial sums / reached bandwidth)

The library picks a tile shape and a number of splits along k; the minimum stands for that choice, and
its softness, (sum of t^-q)^(-1/q), for choices that are not the best. Every term grows with m, so
the minimum does; the correction is what is left in the measured
times as a smooth function of (log m, log n, log k). The form is ours; tile quantisation is
described in NVIDIA's "Matrix Multiplication Background User's Guide".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hetis_sim.cost.grid import Floats, Grid
from hetis_sim.cost.parse import positive, positive_list
from hetis_sim.spec.errors import SpecError, require

# Bytes of a partial sum, which is kept in fp32: written once, read once.
PARTIAL_SUM_BYTES = 8
NUMBERS = ("ragged", "depth", "bytes_per_s", "fixed_s", "split_fixed_s", "reduction", "sharpness",
           "choice")
MAY_BE_ZERO = ("ragged", "depth", "fixed_s", "split_fixed_s", "reduction")


def soft_minimum(candidates: Floats, choice: float) -> Floats:
    """(sum of t^-q)^(-1/q) over the first axis, scaled so that nothing overflows."""
    least = candidates.min(axis=0)
    soft: Floats = least * ((candidates / least) ** -choice).sum(axis=0) ** (-1.0 / choice)
    return soft


@dataclass(frozen=True)
class Tile:
    """A tile shape and the FLOP/s that the whole card reaches with it when no wave is ragged."""

    rows: int
    columns: int
    flops_per_s: float


@dataclass(frozen=True)
class TileWaveGemm:
    """Coefficients of the model above for one card and one precision of the operands.

    Attributes:
        multiprocessors: units that work on tiles side by side.
        tiles, splits: what the library may choose from.
        ragged: share of a full wave's time that the empty part of the last wave costs; below 1
            where a part-filled wave runs faster (clocks, shared caches) or work is spread evenly.
        depth: steps along k that a tile costs on top (prologue and epilogue).
        bytes_per_s: reached memory bandwidth.
        fixed_s: cost of a product whatever its size.
        split_fixed_s: extra cost of splitting along k.
        reduction: share of the partial sums' traffic that reaches device memory.
        sharpness: p; large where compute and memory time overlap fully.
        choice: q; large where the library always finds the fastest tile.
        correction: log of what is left, over (log2 m, log2 n*count, log2 k).
    """

    multiprocessors: int
    tiles: tuple[Tile, ...]
    splits: tuple[int, ...]
    ragged: float
    depth: float
    bytes_per_s: float
    fixed_s: float
    split_fixed_s: float
    reduction: float
    sharpness: float
    choice: float
    correction: Grid | None = None

    def seconds(self, m: Floats, n: Floats, k: Floats, count: Floats, weight_bytes: int = 2,
                activation_bytes: int = 2) -> Floats:
        """Seconds of ``count`` products (m, k) x (k, n) in one launch; arrays of equal shape."""
        seconds = self.base_s(m, n, k, count, weight_bytes, activation_bytes)
        if self.correction is None:
            return seconds
        log_m, log_n, log_k = np.log2(np.maximum(m, 1.0)), np.log2(n * count), np.log2(k)
        return seconds * np.exp(self.correction.at(log_m, log_n, log_k))

    def base_s(self, m: Floats, n: Floats, k: Floats, count: Floats, weight_bytes: int = 2,
               activation_bytes: int = 2) -> Floats:
        """The same without the correction."""
        memory = count * (weight_bytes * n * k + activation_bytes * m * (n + k)) / self.bytes_per_s
        partial = PARTIAL_SUM_BYTES * self.reduction * m * n * count / self.bytes_per_s
        candidates = np.full((len(self.tiles), *np.shape(memory)), np.inf)
        for number, tile in enumerate(self.tiles):
            blocks = np.ceil(m / tile.rows) * np.ceil(n / tile.columns) * count
            wave_flops = 2.0 * tile.rows * tile.columns * self.multiprocessors
            for split in self.splits:
                full = np.maximum(blocks * split / self.multiprocessors, 1.0)
                waves = full + self.ragged * (np.ceil(full) - full)
                compute = waves * (k / split + self.depth) * (wave_flops / tile.flops_per_s)
                seconds = (compute**self.sharpness + memory**self.sharpness) ** (1.0 / self.sharpness)
                if split > 1:
                    seconds = seconds + self.split_fixed_s + split * partial
                candidates[number] = np.minimum(candidates[number], seconds)
        return soft_minimum(candidates, self.choice) + self.fixed_s

    def with_correction(self, correction: Grid) -> TileWaveGemm:
        """The same base with another correction."""
        return replace(self, correction=correction)

    @classmethod
    def parse(cls, raw: Any, key: str) -> TileWaveGemm:
        """Read a profile's coefficients; :class:`SpecError` names the faulty key."""
        tiles = []
        for number, tile in enumerate(raw.get("tiles", ())):
            sizes = positive_list(tile, f"{key}.tiles[{number}]", length=3)
            tiles.append(Tile(int(sizes[0]), int(sizes[1]), sizes[2]))
        require(len(tiles) >= 1, f"{key}.tiles", raw.get("tiles"), "at least one [rows, columns, FLOP/s]")
        splits = tuple(int(s) for s in positive_list(raw.get("splits"), f"{key}.splits"))
        if 1 not in splits:
            raise SpecError(f"{key}.splits", splits, "a list with 1 in it")
        numbers = {name: positive(raw.get(name), f"{key}.{name}", zero=name in MAY_BE_ZERO)
                   for name in NUMBERS}
        return cls(int(positive(raw.get("multiprocessors"), f"{key}.multiprocessors")), tuple(tiles), splits,
                   correction=Grid.parse_optional(raw.get("correction"), f"{key}.correction"), **numbers)

    def dump(self) -> dict[str, Any]:
        """The form for a profile file."""
        raw: dict[str, Any] = {
            "multiprocessors": self.multiprocessors,
            "tiles": [[tile.rows, tile.columns, float(f"{tile.flops_per_s:.4g}")] for tile in self.tiles],
            "splits": list(self.splits)}
        for name in NUMBERS:
            raw[name] = float(f"{getattr(self, name):.4g}")
        if self.correction is not None:
            raw["correction"] = self.correction.dump()
        return raw
