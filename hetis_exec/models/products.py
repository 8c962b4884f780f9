"""Matrix products with weights that stay the same: by torch, or packed for oneDNN on processors.

Torch multiplies by MKL, which takes up to twice as long for the few rows of a decode step as oneDNN does on
weights that it has laid out beforehand (``docs/exec.md`` has figures).
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch.nn import functional

ROWS_HINT = 32
"""Rows that weights are packed for. The layout serves 1 to 1024 rows about as well as one made for them."""

ROWS_LEAST = 4
"""Fewer rows are filled up to so many: oneDNN reads weights a fifth faster for four rows than for one."""

PACKED_TYPES = (torch.float32, torch.bfloat16)


class Product(Protocol):
    """Activations (rows, columns of the weight) times a transposed weight, plus a bias.

    Attributes:
        span: address and bytes of the weight in the memory of this host; (0, 0) where it cannot be told.
    """

    @property
    def span(self) -> tuple[int, int]: ...

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Shape (rows, rows of the weight)."""


class PlainProduct:
    """By torch, on any device. Weight: (outputs, inputs); bias: (outputs,)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    @property
    def span(self) -> tuple[int, int]:
        weight = self._weight
        return (weight.data_ptr(), weight.nbytes) if weight.device.type == "cpu" else (0, 0)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows, self._weight, self._bias)


class PackedProduct:
    """By oneDNN, on a weight in a layout of its own. The weight that is given can be dropped."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._outputs = len(weight)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)
        self._bias = bias
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._bytes = weight.nbytes

    @property
    def span(self) -> tuple[int, int]:
        try:
            return int(torch.ops.mkldnn.data_ptr(self._packed)), self._bytes
        except (AttributeError, NotImplementedError, RuntimeError):
            return 0, 0

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        number = len(rows)
        if not number:
            return rows.new_empty((0, self._outputs))
        if number < ROWS_LEAST:
            rows = functional.pad(rows, (0, 0, 0, ROWS_LEAST - number))
        found: torch.Tensor = self._multiply(rows, self._packed, self._bias, "none", [], "")
        return found[:number] if number < ROWS_LEAST else found


def product(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Product:
    """The faster of the two where the weight lies."""
    if weight.device.type == "cpu" and weight.dtype in PACKED_TYPES and _packs(weight.dtype):
        return PackedProduct(weight, bias)
    return PlainProduct(weight, bias)


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether this torch on this processor can multiply by packed weights of a type, and does so rightly.

    The operators are torch's own, for its compiler, and may change with its version.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(shape, generator=generator).to(dtype) for shape in ((24, 40), (3, 40)))
    bias = torch.randn(24, generator=generator).to(dtype)
    try:
        found = PackedProduct(weight, bias)(rows)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    close = 1e-4 if dtype == torch.float32 else 0.1
    return bool(torch.allclose(found.float(), functional.linear(rows.float(), weight.float(), bias.float()),
                               atol=close, rtol=close))
