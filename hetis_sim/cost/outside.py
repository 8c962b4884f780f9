"""Predictions that lie outside what a profile was fitted on: which, by how much, how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hetis_sim.cost.model import CostModel
from hetis_sim.spec.gpu import GpuSpec

Ends = tuple[float, float]


@dataclass(slots=True)
class OutsideRange:
    """One quantity of one module on one device, as far as it left the range that was fitted.

    Attributes:
        low, high: ends of the range.
        least, most: extremes of the values outside.
        iterations: in which it lay outside.
        of_iterations: in which it was asked for at all.
    """

    module: str
    device: str
    quantity: str
    low: float
    high: float
    least: float
    most: float
    iterations: int
    of_iterations: int

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


class RangeWatch:
    """Follows the values that the iterations of a run ask a cost model for.

    Args:
        cost: says what was fitted on which range.
    """

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._ends: dict[tuple[str, str], Mapping[str, Ends]] = {}
        self._asked: dict[tuple[str, str, str], int] = {}
        self._found: dict[tuple[str, str, str], OutsideRange] = {}

    def ends(self, gpu: GpuSpec, module: str) -> Mapping[str, Ends]:
        """The ranges of a module."""
        key = (gpu.name, module)
        found = self._ends.get(key)
        if found is None:
            found = self._ends[key] = self._cost.ranges(gpu, module)
        return found

    def note(self, gpu: GpuSpec, module: str, quantity: str, first: float, last: float, count: int) -> None:
        """A quantity ran evenly from ``first`` to ``last`` >= first in ``count`` iterations."""
        ends = self.ends(gpu, module).get(quantity)
        if ends is None:
            return
        key = (module, gpu.name, quantity)
        self._asked[key] = self._asked.get(key, 0) + count
        low, high = ends
        if low <= first and last <= high:
            return
        outside = _outside(low, high, first, last, count)
        least, most = (first if first < low else max(first, high)), (last if last > high else min(last, low))
        found = self._found.get(key)
        if found is None:
            self._found[key] = OutsideRange(*key, low, high, least, most, outside, 0)
            return
        found.least, found.most = min(found.least, least), max(found.most, most)
        found.iterations += outside

    def found(self) -> tuple[OutsideRange, ...]:
        """What was outside, in order of first sight."""
        for key, mark in self._found.items():
            mark.of_iterations = self._asked[key]
        return tuple(self._found.values())


def _outside(low: float, high: float, first: float, last: float, count: int) -> int:
    """How many of ``count`` evenly spaced values lie outside ``[low, high]``."""
    if count == 1 or last <= first:
        return count
    step = (last - first) / (count - 1)
    below = min(count, max(0, -int(-(low - first) // step)))
    above = min(count, max(0, -int(-(last - high) // step)))
    return min(count, below + above)


def sentence(mark: Mapping[str, Any]) -> str:
    """One mark in words, for a person; takes what :meth:`OutsideRange.to_dict` gives."""
    sides = []
    if mark["least"] < mark["low"]:
        sides.append(f"down to {mark['least']:g}")
    if mark["most"] > mark["high"]:
        sides.append(f"up to {mark['most']:g}")
    share = 100.0 * mark["iterations"] / max(1, mark["of_iterations"])
    return (f"outside the fitted range: {mark['module'].replace('_', ' ')} on {mark['device']}, "
            f"{mark['quantity'].replace('_', ' ')} {' and '.join(sides)} where {mark['low']:g} to "
            f"{mark['high']:g} was fitted, in {share:.3g}% of {mark['of_iterations']} iterations")
