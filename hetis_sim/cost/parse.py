"""Checks on numbers read from profile files."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from hetis_sim.spec.errors import SpecError


def positive(value: Any, key: str, *, zero: bool = False) -> float:
    """``value`` as a float; :class:`SpecError` unless finite and > 0 (>= 0 where ``zero`` is set)."""
    allowed = "a finite number >= 0" if zero else "a finite number > 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SpecError(key, value, allowed)
    if value < 0 or (value == 0 and not zero):
        raise SpecError(key, value, allowed)
    return float(value)


def positive_list(value: Any, key: str, *, length: int | None = None, zero: bool = False) -> list[float]:
    """``value`` as a list of floats, each checked as :func:`positive` does."""
    if not isinstance(value, (list, tuple)) or not value or (length is not None and len(value) != length):
        raise SpecError(key, value, f"a list of {length or 'at least 1'} numbers")
    return [positive(item, f"{key}[{number}]", zero=zero) for number, item in enumerate(value)]


def ascending(value: Any, key: str) -> list[float]:
    """``value`` as a list of strictly ascending numbers >= 0."""
    numbers = positive_list(value, key, zero=True)
    if any(b <= a for a, b in pairwise(numbers)):
        raise SpecError(key, value, "strictly ascending")
    return numbers
