"""A measured duration against one size, as a few knots: elementwise kernels, collectives, tables."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hetis_sim.cost.parse import ascending, positive_list
from hetis_sim.spec.errors import SpecError, require


@dataclass(frozen=True)
class Curve:
    """Seconds by size, straight between knots in log-log coordinates, never falling unless it may.

    Below the first knot its value holds (the launch is the limit there); beyond the last one
    time grows in proportion to the size.

    Attributes:
        falls: it may fall. Products do on the machine that they were measured on: a processor's library
            takes less time for 4 tokens than for 3.
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]
    falls: bool = False

    def __post_init__(self) -> None:
        require(len(self.sizes) == len(self.seconds) >= 1, "curve", len(self.seconds),
                "as many seconds as sizes")
        require(self.falls or not any(b < a for a, b in pairwise(self.seconds)), "curve.seconds",
                self.seconds, "a sequence that never falls")

    def at(self, size: float) -> float:
        """Seconds for ``size``."""
        sizes, seconds = self.sizes, self.seconds
        if size <= sizes[0]:
            return seconds[0]
        if size >= sizes[-1]:
            return seconds[-1] * size / sizes[-1]
        i = bisect_right(sizes, size)
        share = math.log(size / sizes[i - 1]) / math.log(sizes[i] / sizes[i - 1])
        return seconds[i - 1] * math.pow(seconds[i] / seconds[i - 1], share)

    @classmethod
    def parse(cls, raw: Any, key: str, size: str = "bytes", falls: bool = False) -> Curve:
        """Read ``{size: [...], seconds: [...]}``; :class:`SpecError` names the faulty key."""
        if not isinstance(raw, dict):
            raise SpecError(key, raw, f"an object with {size} and seconds")
        sizes = ascending(raw.get(size), f"{key}.{size}")
        require(sizes[0] > 0, f"{key}.{size}", sizes, "sizes > 0")
        seconds = positive_list(raw.get("seconds"), f"{key}.seconds", length=len(sizes))
        return cls(tuple(sizes), tuple(seconds), falls)

    def dump(self, size: str = "bytes") -> dict[str, Any]:
        """The form for a profile file."""
        return {size: [float(f"{x:.6g}") for x in self.sizes],
                "seconds": [float(f"{x:.4g}") for x in self.seconds]}
