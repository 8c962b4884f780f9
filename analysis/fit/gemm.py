"""Fits the tile-and-wave model of matrix products: coordinate descent, then a smooth correction.

The minimum over tiles has no useful gradient, so each coefficient in turn is scaled up and
down, keeping what lowers the loss; a few starts with perturbed tile rates guard against a poor
local minimum. The correction is the least-absolute-error surface on a lattice with a
curvature penalty; base and correction are refitted in turn twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.linalg import spsolve

from analysis.fit.errors import Floats
from hetis_sim.cost.gemm import PARTIAL_SUM_BYTES, Tile, TileWaveGemm, soft_minimum
from hetis_sim.cost.grid import STORED_UNIT, Grid, corners

TILES = ((256, 128), (128, 256), (128, 128), (256, 64), (64, 256), (128, 64), (64, 128), (64, 64), (32, 128))
TILE_SHARES = (0.85, 0.88, 0.82, 0.8, 0.75, 0.72, 0.68, 0.62, 0.5)
SPLITS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24)
SHARED = ("bytes_per_s", "fixed_s", "ragged", "depth", "sharpness", "split_fixed_s", "reduction")
# Softness of the choice of tile: 8 to 1000 were tried on cards with few shapes, 15 left least error.
CHOICE = 15.0
LIMITS = {"sharpness": (1.2, 12.0), "ragged": (0.0, 1.0)}

M_KNOTS = (0.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 15.0)
WIDTH_KNOTS = (5.0, 7.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 16.0)


@dataclass(frozen=True)
class Card:
    """What bounds the search: peaks of the datasheet and the number of multiprocessors."""

    flops_per_s: float
    bytes_per_s: float
    multiprocessors: int
    operand_bytes: int = 2


class Descent:
    """Coordinate descent over one sample of rows, with each tile's columns kept."""

    def __init__(self, rows: pd.DataFrame, card: Card, scale: Floats | None = None) -> None:
        m, n, k = (rows[key].to_numpy(dtype=np.float64) for key in "mnk")
        self._log_time = np.log(rows["seconds"].to_numpy())
        self._log_scale = np.zeros(len(rows)) if scale is None else np.log(scale)
        self._card = card
        self._k, self._mn = k, m * n
        self._bytes = card.operand_bytes * (n * k + m * (n + k))
        self._blocks = {tile: np.ceil(m / tile[0]) * np.ceil(n / tile[1]) for tile in TILES}

    def run(self, model: TileWaveGemm, rounds: int, step: float) -> tuple[float, TileWaveGemm]:
        """(loss, model) after ``rounds`` passes with shrinking steps."""
        best = self._loss(self._columns(model), model)
        for _ in range(rounds):
            best, model = self._shared_pass(best, model, step)
            best, model = self._tile_pass(best, model, step)
            step *= 0.75
        return best, model

    def _shared_pass(self, best: float, model: TileWaveGemm, step: float) -> tuple[float, TileWaveGemm]:
        for key in SHARED:
            for factor in (np.exp(step), np.exp(-step)):
                low, high = LIMITS.get(key, (0.0, np.inf))
                if key == "bytes_per_s":
                    high = self._card.bytes_per_s
                changed: dict[str, Any] = {key: float(np.clip(getattr(model, key) * factor, low, high))}
                trial = replace(model, **changed)
                loss = self._loss(self._columns(trial), trial)
                if loss < best:
                    best, model = loss, trial
        return best, model

    def _tile_pass(self, best: float, model: TileWaveGemm, step: float) -> tuple[float, TileWaveGemm]:
        columns = self._columns(model)
        for number, tile in enumerate(model.tiles):
            for factor in (np.exp(step), np.exp(-step)):
                rate = min(tile.flops_per_s * factor, self._card.flops_per_s)
                trial = replace(tile, flops_per_s=rate)
                changed = columns.copy()
                changed[number] = self._column(model, trial)
                loss = self._loss(changed, model)
                if loss < best:
                    best, columns, tile = loss, changed, trial
            tiles = (*model.tiles[:number], tile, *model.tiles[number + 1:])
            model = replace(model, tiles=tiles)
        return best, model

    def _columns(self, model: TileWaveGemm) -> Floats:
        return np.array([self._column(model, tile) for tile in model.tiles])

    def _column(self, model: TileWaveGemm, tile: Tile) -> Floats:
        """Time with one tile shape and the best number of splits, without the fixed cost."""
        memory = (self._bytes / model.bytes_per_s) ** model.sharpness
        partial = PARTIAL_SUM_BYTES * model.reduction * self._mn / model.bytes_per_s
        wave_s = 2.0 * tile.rows * tile.columns * model.multiprocessors / tile.flops_per_s
        best = np.full(len(memory), np.inf)
        for split in model.splits:
            full = np.maximum(self._blocks[tile.rows, tile.columns] * split / model.multiprocessors, 1.0)
            waves = full + model.ragged * (np.ceil(full) - full)
            compute = waves * (self._k / split + model.depth) * wave_s
            seconds = (compute**model.sharpness + memory) ** (1.0 / model.sharpness)
            if split > 1:
                seconds += model.split_fixed_s + split * partial
            best = np.minimum(best, seconds)
        return best

    def _loss(self, columns: Floats, model: TileWaveGemm) -> float:
        """Mean absolute log error plus a weight on its 95th percentile."""
        seconds = soft_minimum(columns, model.choice) + model.fixed_s
        error = np.abs(np.log(seconds) + self._log_scale - self._log_time)
        return float(error.mean() + 0.3 * np.quantile(error, 0.95))


def start(card: Card, generator: np.random.Generator | None) -> TileWaveGemm:
    """A first guess; perturbed when a generator is given."""
    shares = np.array(TILE_SHARES)
    if generator is not None:
        shares = np.clip(shares * np.exp(generator.normal(0.0, 0.15, len(shares))), 0.1, 0.99)
    tiles = tuple(Tile(*size, float(share) * card.flops_per_s)
                  for size, share in zip(TILES, shares, strict=True))
    return TileWaveGemm(card.multiprocessors, tiles, SPLITS, ragged=0.9, depth=160.0,
                        bytes_per_s=0.85 * card.bytes_per_s, fixed_s=3e-6, split_fixed_s=1.5e-6,
                        reduction=0.5, sharpness=4.0, choice=CHOICE)


def fit_base(rows: pd.DataFrame, card: Card, starts: int = 5, sample: int = 4000) -> TileWaveGemm:
    """The base model of the best of several starts on a sample of the rows."""
    generator = np.random.default_rng(0)
    chosen = rows if len(rows) <= sample else rows.sample(sample, random_state=1)
    descent = Descent(chosen, card)
    tries = [descent.run(start(card, generator if number else None), 14, 0.3) for number in range(starts)]
    return min(tries, key=lambda found: found[0])[1]


def fit_correction(rows: pd.DataFrame, base_s: Floats, knots: tuple[tuple[float, ...], ...],
                   stiffness: float = 0.3) -> Grid:
    """The smooth surface of log(measured / base) over (log2 m, log2 n, log2 k), rounded as stored."""
    logs = tuple(np.log2(rows[key].to_numpy(dtype=np.float64)) for key in "mnk")
    target = np.log(rows["seconds"].to_numpy() / base_s)
    return fit_surface(logs, target, knots, stiffness)


def fit_surface(coordinates: tuple[Floats, ...], target: Floats, knots: tuple[tuple[float, ...], ...],
                stiffness: float = 0.3) -> Grid:
    """Least-absolute-error surface on a lattice by reweighted least squares, curvature penalised."""
    axes = tuple(np.asarray(axis) for axis in knots)
    index, weight = corners(axes, coordinates)
    row = np.tile(np.arange(len(target)), len(index))
    size = int(np.prod([len(axis) for axis in axes]))
    design = sparse.csr_matrix((weight.ravel(), (row, index.ravel())), shape=(len(target), size))
    roughness = _roughness(tuple(len(axis) for axis in axes), stiffness)
    penalty = (roughness.T @ roughness).tocsc()
    importance = np.ones(len(target))
    values = np.zeros(size)
    for _ in range(4):
        weighted = design.T @ sparse.diags(importance)
        values = spsolve((weighted @ design + penalty).tocsc(), weighted @ target)
        importance = 0.03 / np.maximum(np.abs(target - design @ values), 0.03)
    stored = np.round(values / STORED_UNIT) * STORED_UNIT
    return Grid(knots, tuple(float(value) for value in stored))


def _roughness(shape: tuple[int, ...], stiffness: float) -> sparse.csr_matrix:
    """Second differences along every axis, and a weak pull to zero where there is no data."""
    lattice = np.arange(int(np.prod(shape))).reshape(shape)
    parts = [sparse.eye(lattice.size) * (0.02 * stiffness)]
    for axis in range(len(shape)):
        moved = np.moveaxis(lattice, axis, 0)
        left, middle, right = moved[:-2].ravel(), moved[1:-1].ravel(), moved[2:].ravel()
        row = np.arange(len(left))
        entries = np.concatenate([np.ones(len(row)), -2.0 * np.ones(len(row)), np.ones(len(row))])
        column = np.concatenate([left, middle, right])
        parts.append(sparse.csr_matrix((entries * stiffness, (np.tile(row, 3), column)),
                                       shape=(len(row), lattice.size)))
    return sparse.vstack(parts).tocsr()


def predict(model: TileWaveGemm, rows: pd.DataFrame, operand_bytes: int, *, corrected: bool = True) -> Floats:
    """Seconds for each row."""
    m, n, k = (rows[key].to_numpy(dtype=np.float64) for key in "mnk")
    ones = np.ones(len(rows))
    if corrected:
        return model.seconds(m, n, k, ones, operand_bytes)
    return model.base_s(m, n, k, ones, operand_bytes)


def fit(rows: pd.DataFrame, card: Card, knots: tuple[tuple[float, ...], ...] | None = None,
        base_rows: pd.DataFrame | None = None, starts: int = 5) -> TileWaveGemm:
    """Base and correction, refitted in turn; ``base_rows`` restricts what the base is fitted on."""
    knots = knots or (M_KNOTS, WIDTH_KNOTS, WIDTH_KNOTS)
    chosen = rows if base_rows is None else base_rows
    model = fit_base(chosen, card, starts)
    sample = chosen if len(chosen) <= 4000 else chosen.sample(4000, random_state=1)
    for refits in range(3):
        if refits:
            scale = predict(model, sample, card.operand_bytes) / predict(model, sample, card.operand_bytes,
                                                                         corrected=False)
            _, base = Descent(sample, card, scale).run(replace(model, correction=None), 8, 0.15)
            model = base
        correction = fit_correction(rows, predict(model, rows, card.operand_bytes, corrected=False), knots)
        model = model.with_correction(correction)
    return model


def ideal_s(rows: pd.DataFrame, card: Card) -> Floats:
    """Datasheet time of each product: the larger of FLOPs and bytes over their peaks."""
    m, n, k = (rows[key].to_numpy(dtype=np.float64) for key in "mnk")
    moved = card.operand_bytes * (n * k + m * (n + k))
    ideal: Floats = np.maximum(2.0 * m * n * k / card.flops_per_s, moved / card.bytes_per_s)
    return ideal
