"""Tensors between two processes without a way through the memory of their hosts.

A link has two process groups of two, one for each direction: who sends in one never receives in it. NCCL's
messages have no names, they meet in the order in which both ends ask for them. So the head of a message
goes in a frame of the link's connection, frames keep the order of sending, and the one thread that takes them
in asks for one message at a time. Neither end ever waits for the other to get its own turn. Cache has a link
of its own (:class:`hetis_exec.net.endpoint.Channel`), whose streams give way to those of activations.

The same goes over gloo for tensors of processors, which is how it is tested without cards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from hetis_exec.kernels.wire import OF_NUMPY, in_place, resident_of
from hetis_exec.net.codec import ArraySpec, CodecError, offsets
from hetis_exec.net.meeting import MeetingPlace
from hetis_exec.net.wires import Sent, gloo_group, nccl_group
from hetis_exec.resident import Resident

PACK_BYTES = 1 << 20
"""Messages up to this size take one operation; of larger ones a copy would cost more than several."""

LOOK_S = 2e-5
"""An operation of NCCL is looked at so often."""

MARGIN_S = 30.0
"""NCCL's watchdog gives an operation so much longer than its receiver does."""

Wait = Callable[[Any, float], None]
"""Waits for an operation, within some seconds; raises RuntimeError if that fails."""


def wait_gloo(work: Any, timeout_s: float) -> None:
    """Of gloo."""
    work.wait(timedelta(seconds=timeout_s))


def wait_nccl(work: Any, timeout_s: float) -> None:
    """Of NCCL, whose own wait lets a stream wait."""
    until_s = time.monotonic() + timeout_s
    while not work.is_completed():
        if time.monotonic() > until_s:
            raise RuntimeError(f"nothing has come for {timeout_s:g} s")
        time.sleep(LOOK_S)
    error = work.exception()
    if error is not None:
        raise RuntimeError(str(error))


class TensorWire:
    """One end of a link. One thread sends, one receives.

    Args:
        outward, inward: groups for what is sent and for what is received.
        peer: rank of the other end in both.
        device: where tensors lie at this end.
    """

    def __init__(self, outward: Any, inward: Any, peer: int, device: torch.device, timeout_s: float,
                 wait: Wait) -> None:
        self._outward = outward
        self._inward = inward
        self._peer = peer
        self._device = device
        self._timeout_s = timeout_s
        self._wait = wait

    def send(self, arrays: Sequence[Resident]) -> list[Sent]:
        """Post the arrays of a message; the results must be kept until they have been waited for.

        Small ones are packed into one buffer. Large ones go as they are, and must not change any more.
        """
        sizes = [array.nbytes for array in arrays]
        places = offsets(sizes)
        if places[-1] > PACK_BYTES:
            pieces = [self._flat(array) for array in arrays if array.nbytes]
        else:
            packed = torch.empty(places[-1], dtype=torch.uint8, device=self._device)
            for array, at in zip(arrays, places, strict=False):
                packed[at:at + array.nbytes].copy_(self._flat(array))
            pieces = [packed] if places[-1] else []
        return [Sent(self._outward.send([piece], self._peer, 0), piece) for piece in pieces]

    def _flat(self, array: Resident) -> torch.Tensor:
        return in_place(array, self._device).reshape(-1).view(torch.uint8)

    def receive(self, specs: Sequence[ArraySpec]) -> list[Resident]:
        """The arrays of the next message.

        Raises:
            RuntimeError: the link is lost.
            CodecError: arrays that no tensors are.
        """
        sizes = [spec.size_bytes for spec in specs]
        places = offsets(sizes)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        packed = places[-1] <= PACK_BYTES
        buffers = [torch.empty(size, dtype=torch.uint8, device=self._device)
                   for size in ([places[-1]] if packed else sizes)]
        under_way = [self._inward.recv([buffer], self._peer, 0) for buffer in buffers if len(buffer)]
        for work in under_way:
            self._wait(work, self._timeout_s)
        if packed:
            buffers = [buffers[0][at:at + size] for at, size in zip(places, sizes, strict=False)]
        return [_resident(buffer, spec) for buffer, spec in zip(buffers, specs, strict=True)]

    def wait(self, sent: Sent, timeout_s: float | None = None) -> None:
        """Wait until a send is over; what has become of the link is for its receiver to find out."""
        with suppress(RuntimeError):
            self._wait(sent.work, self._timeout_s if timeout_s is None else timeout_s)

    def try_out(self, *, first: bool) -> None:
        """Send something there and back; both ends do, one of them first.

        Raises:
            RuntimeError: it does not come.
        """
        probe = [resident_of(torch.full((1,), 7, dtype=torch.int32, device=self._device))]
        for sends in (first, not first):
            if sends:
                self._wait(self.send(probe)[0].work, self._timeout_s)
            elif self.receive([ArraySpec("<i4", (1,))])[0].tensor.item() != 7:
                raise RuntimeError("another number has come than was sent")

    def close(self) -> None:
        """Give the link up; nothing that is under way is waited for."""
        for group in (self._outward, self._inward):
            if self._device.type == "cuda":
                group.abort()
        self._outward = self._inward = None


def _resident(part: torch.Tensor, spec: ArraySpec) -> Resident:
    """Bytes as the array that they are."""
    dtype = np.dtype(spec.dtype)
    if dtype not in OF_NUMPY:
        raise CodecError(f"a tensor of {dtype} does not travel")
    return Resident(part.view(OF_NUMPY[dtype]).view(spec.shape), dtype)


def make_tensor_wire(store: Any, name: str, rank: int, library: str, place: MeetingPlace, timeout_s: float,
                     device: str, *, urgent: bool) -> TensorWire:
    """One end of a link, tried out; both ends make it at the same time.

    Args:
        rank: 0 or 1.
        library: ``nccl`` or ``gloo``.
        device: torch device of this end.
        urgent: what travels there goes before other things.

    Raises:
        RuntimeError: the link cannot be made.
    """
    groups: list[Any] = []
    for way in ("up", "down"):
        full = f"{name}/{way}"
        groups.append(gloo_group(store, full, rank, place.gloo_bind, place.start_s) if library == "gloo" else
                      nccl_group(store, full, rank, 2, timeout_s + MARGIN_S, place.nccl_interface,
                                 urgent=urgent))
    up, down = groups
    outward, inward = (up, down) if rank == 0 else (down, up)
    wire = TensorWire(outward, inward, 1 - rank, torch.device(device), timeout_s,
                      wait_gloo if library == "gloo" else wait_nccl)
    wire.try_out(first=rank == 0)
    return wire
