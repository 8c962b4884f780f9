"""Arrays of messages that stay on the device where they are.

Between threads of one process, and over links that carry tensors, a message holds such in place of NumPy's
arrays. Whoever makes a message knows which: a link carries them or it does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class Resident:
    """A tensor of a message.

    Attributes:
        tensor: contiguous; bfloat16 as the bits of its numbers, as arrays have it.
        dtype: what NumPy calls its type.
        ready: event after which it holds its numbers; None where it already does.
    """

    __slots__ = ("dtype", "ready", "tensor")

    def __init__(self, tensor: Any, dtype: np.dtype[Any], ready: Any = None) -> None:
        self.tensor = tensor
        self.dtype = dtype
        self.ready = ready

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.tensor.shape)

    @property
    def ndim(self) -> int:
        """Number of its axes."""
        return len(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return int(self.tensor.nbytes)

    def __repr__(self) -> str:
        return f"Resident({self.dtype}, {self.shape}, {self.tensor.device})"
