"""Piecewise-multilinear surfaces over log2 axes: the smooth part of a fitted model."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hetis_sim.spec.errors import SpecError, require

Floats = npt.NDArray[np.float64]

# Values are stored as integers of this unit, so that profiles stay small and diff well.
STORED_UNIT = 1e-3


@dataclass(frozen=True)
class Grid:
    """log(measured / base) on a lattice of knots; constant beyond the outermost knots.

    Attributes:
        knots: one ascending tuple of log2 coordinates for each axis.
        values: one value for each lattice point, last axis fastest.
    """

    knots: tuple[tuple[float, ...], ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        size = 1
        for axis in self.knots:
            require(len(axis) >= 2 and list(axis) == sorted(set(axis)), "grid.knots", axis,
                    "at least two ascending coordinates")
            size *= len(axis)
        require(len(self.values) == size, "grid.values", len(self.values), f"{size} values")
        require(bool(np.all(np.isfinite(self.values))), "grid.values", "nan or inf", "finite numbers")

    @cached_property
    def _axes(self) -> tuple[Floats, ...]:
        return tuple(np.asarray(axis, dtype=np.float64) for axis in self.knots)

    @cached_property
    def _values(self) -> Floats:
        return np.asarray(self.values, dtype=np.float64)

    def at(self, *coordinates: Floats) -> Floats:
        """Interpolated value at log2 coordinates of equal shape."""
        index, weight = corners(self._axes, coordinates)
        found: Floats = (self._values[index] * weight).sum(axis=0)
        return found

    def at_point(self, *coordinates: float) -> float:
        """The same at a single point, without the cost of arrays."""
        terms = [(0, 1.0)]
        for axis, x in zip(self.knots, coordinates, strict=True):
            low = min(max(bisect_right(axis, x) - 1, 0), len(axis) - 2)
            share = (min(max(x, axis[0]), axis[-1]) - axis[low]) / (axis[low + 1] - axis[low])
            terms = [(index * len(axis) + low + step, weight * part) for index, weight in terms
                     for step, part in ((0, 1.0 - share), (1, share)) if part]
        return sum(self.values[index] * weight for index, weight in terms)

    @classmethod
    def parse(cls, raw: Any, key: str) -> Grid:
        """Read the form that :meth:`dump` writes; :class:`SpecError` names ``key`` otherwise."""
        try:
            knots = tuple(tuple(float(x) for x in axis) for axis in raw["knots"])
            values = tuple(float(x) * STORED_UNIT for x in raw["values_milli"])
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(key, raw, "{knots: [[log2 coordinates], ...], values_milli: [...]}") from error
        return cls(knots, values)

    @classmethod
    def parse_optional(cls, raw: Any, key: str) -> Grid | None:
        """:meth:`parse`, or None for a model without a correction."""
        return None if raw is None else cls.parse(raw, key)

    def dump(self) -> dict[str, Any]:
        """The form for a profile file."""
        return {"knots": [list(axis) for axis in self.knots],
                "values_milli": [round(value / STORED_UNIT) for value in self.values]}


def corners(axes: tuple[Floats, ...],
            coordinates: tuple[Floats, ...]) -> tuple[npt.NDArray[np.int64], Floats]:
    """(flat index, weight) of the 2^d lattice points around each point, each of shape (2^d, n)."""
    size = np.broadcast_shapes(*(np.shape(x) for x in coordinates))
    index = np.zeros((1, *size), dtype=np.int64)
    weight = np.ones((1, *size))
    for axis, x in zip(axes, coordinates, strict=True):
        inside = np.clip(x, axis[0], axis[-1])
        low = np.clip(np.searchsorted(axis, inside, side="right") - 1, 0, len(axis) - 2)
        share = (inside - axis[low]) / (axis[low + 1] - axis[low])
        index = np.concatenate([index * len(axis) + low, index * len(axis) + low + 1])
        weight = np.concatenate([weight * (1.0 - share), weight * share])
    return index, weight
