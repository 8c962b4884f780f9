"""Rows of decode attention: pairs of a request and a KV group, on one axis or on two."""

from __future__ import annotations

from typing import Any


def in_rows(values: Any, axes: int) -> Any:
    """An array or a tensor with rows on one axis: what comes before so many last axes is a row's place."""
    return values if values.ndim == axes + 1 else values.reshape(-1, *values.shape[values.ndim - axes:])
