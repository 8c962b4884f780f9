"""Tensors as the NumPy arrays of messages.

NumPy has no bfloat16: such tensors travel as the bits of their numbers, in int16. Nothing else that
is sent as a tensor has that type, so both sides know what it means, wherever they compute.
"""

from __future__ import annotations

import numpy as np
import torch

from hetis_exec.messages import Array


def array_of(tensor: torch.Tensor) -> Array:
    """The memory of a tensor on the CPU as an array."""
    array: Array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def tensor_of(array: Array) -> torch.Tensor:
    """The memory of an array as a tensor on the CPU."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.int16 else tensor
