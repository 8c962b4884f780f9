"""A smooth surface through scattered logarithms: what a fitted form leaves over."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from hetis_sim.cost.grid import STORED_UNIT, Grid, corners

Floats = npt.NDArray[np.float64]

STIFFNESS = 0.25
"""Weight of curvature against the points: noise of single points is not followed."""

PULL = 0.02
"""Weight of a pull to nothing, for knots without points."""

OCTAVES = 2.0
"""Least distance of two knots, unless otherwise said."""


def knots_for(values: Floats, octaves: float = OCTAVES) -> tuple[float, ...]:
    """Knots from the least to the greatest of some log2 coordinates, at least two."""
    low, high = float(np.floor(values.min())), float(np.ceil(values.max()))
    number = max(2, int((high - low) / octaves) + 1)
    return tuple(np.linspace(low, max(high, low + 1.0), number).tolist())


def fit_surface(coordinates: tuple[Floats, ...], target: Floats, octaves: float = OCTAVES) -> Grid:
    """A piecewise multilinear surface by least squares, with its curvature held down along every axis."""
    knots = tuple(knots_for(values, octaves) for values in coordinates)
    shape = tuple(len(axis) for axis in knots)
    index, weight = corners(tuple(np.array(axis) for axis in knots), coordinates)
    design = np.zeros((len(target), int(np.prod(shape))))
    for at, share in zip(index, weight, strict=True):
        np.add.at(design, (np.arange(len(target)), at), share)
    rows = np.vstack([design, PULL * np.eye(design.shape[1]), *_curvature(shape)])
    right = np.concatenate([target, np.zeros(len(rows) - len(target))])
    values = np.linalg.lstsq(rows, right, rcond=None)[0]
    return Grid(knots, tuple((np.round(values / STORED_UNIT) * STORED_UNIT).tolist()))


def _curvature(shape: tuple[int, ...]) -> list[Floats]:
    """Second differences between neighbours along every axis."""
    lattice = np.arange(int(np.prod(shape))).reshape(shape)
    found: list[Floats] = []
    for axis in range(len(shape)):
        lines = np.moveaxis(lattice, axis, 0)
        for (a, b), c in zip(pairwise(lines), lines[2:], strict=False):
            for left, middle, right in zip(a.ravel(), b.ravel(), c.ravel(), strict=True):
                row = np.zeros((1, lattice.size))
                row[0, [left, middle, right]] = STIFFNESS, -2 * STIFFNESS, STIFFNESS
                found.append(row)
    return found
