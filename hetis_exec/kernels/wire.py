"""Tensors as the arrays of messages: in host memory as NumPy's, or where they are.

NumPy has no bfloat16: such tensors travel as the bits of their numbers, in int16. Nothing else that
is sent as a tensor has that type, so both sides know what it means, wherever they compute.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hetis_exec.messages import Array
from hetis_exec.resident import Resident

TYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float16: np.dtype("<f2"), torch.float32: np.dtype("<f4"), torch.float64: np.dtype("<f8"),
    torch.int16: np.dtype("<i2"), torch.int32: np.dtype("<i4"), torch.int64: np.dtype("<i8"),
    torch.uint8: np.dtype("|u1")}
OF_NUMPY = {there: here for here, there in TYPES.items()}


def array_of(tensor: torch.Tensor) -> Array:
    """The memory of a tensor on the CPU as an array."""
    array: Array = _bits(tensor).numpy()
    return array


def tensor_of(array: Array) -> torch.Tensor:
    """The memory of an array as a tensor on the CPU."""
    return _numbers(torch.from_numpy(array))


def resident_of(tensor: torch.Tensor, ready: Any = None) -> Any:
    """A tensor as an array that stays where it is; ``ready`` is an event after which it is there."""
    bits = _bits(tensor.contiguous())
    return Resident(bits, TYPES[bits.dtype], ready)


def in_place(resident: Resident, device: torch.device) -> torch.Tensor:
    """The tensor of a resident array on a device, for what this thread asks the device for from now on."""
    tensor: torch.Tensor = resident.tensor
    if tensor.is_cuda:
        here: Any = torch.cuda.current_stream(tensor.device)
        if resident.ready is not None:
            here.wait_event(resident.ready)
        # It was another stream's memory, which must not have it back before this one has read it.
        tensor.record_stream(here)
    return _numbers(tensor if tensor.device == device else tensor.to(device, non_blocking=True))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
