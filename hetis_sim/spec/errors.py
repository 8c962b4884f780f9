"""Errors of input: they name the key, the value and what is allowed."""

from __future__ import annotations

import math
from typing import Any


class HetisError(Exception):
    """Base of every error that a user's input can cause."""


class SpecError(HetisError, ValueError):
    """A value outside what its key allows."""

    def __init__(self, key: str, value: Any, allowed: str) -> None:
        super().__init__(f"{key}={value!r} is not allowed: must be {allowed}")
        self.key = key
        self.value = value
        self.allowed = allowed


class InfeasibleError(HetisError):
    """A combination of model, cluster and policy that cannot run; the text says why."""


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise :class:`SpecError` unless ``condition`` holds."""
    if not condition:
        raise SpecError(key, value, allowed)


def require_finite(key: str, value: Any, low: float, high: float = math.inf, *,
                   open_low: bool = False) -> None:
    """Raise :class:`SpecError` unless ``value`` is a finite number in the given range.

    The lower end is excluded when ``open_low`` is set. ``nan`` is never allowed.
    """
    bracket = "(" if open_low else "["
    allowed = f"a finite number in {bracket}{low}, {high}{']' if math.isfinite(high) else ')'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SpecError(key, value, allowed)
    if value < low or value > high or (open_low and value == low):
        raise SpecError(key, value, allowed)
