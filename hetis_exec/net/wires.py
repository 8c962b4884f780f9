"""Large arrays between two processes, over torch.distributed.

Each link has a process group of its own: gloo ends all that goes on in a group when one operation runs
into its time limit, and a link must not take others with it. Groups are made of a store and two ranks, at
the start, by both ends in the same order. Sends are never waited for before they are posted: gloo's wait
until the other end has asked for the data.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed

from hetis_exec.net.codec import offsets

distributed: Any = torch.distributed

PIECE_BYTES = 1 << 20
"""Larger messages are cut, so that they share a network with others."""

PIECES_AHEAD = 2
"""Pieces that the receiver has asked for at a time."""

NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"
"""Where NCCL reads which interface to use; with ``=`` in front exactly that one."""

REAP_COUNT = 16
REAP_BYTES = 1 << 20
"""Sends are looked after in batches: each look wakes a thread."""

Bytes = np.ndarray[Any, Any]


class Sent(NamedTuple):
    """A send under way: gloo needs both until it is over."""

    work: Any
    tensor: Any


def gloo_group(store: Any, name: str, rank: int, bind: str, start_s: float, size: int = 2) -> Any:
    """A process group of its own, by default of the two ends of a link; returns when all have come.

    Args:
        bind: the address of this host to talk from, or the name of one of its interfaces.

    Raises:
        RuntimeError: another one has not come within ``start_s``.
    """
    gloo = distributed.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [_device(bind)]
    options._threads = 1
    options._timeout = timedelta(seconds=start_s)
    return gloo(distributed.PrefixStore(name, store), rank, size, options)


def nccl_group(store: Any, name: str, rank: int, size: int, timeout_s: float, interface: str = "", *,
               urgent: bool) -> Any:
    """The same of NCCL, for cards; the others are waited for when it is first used.

    Args:
        timeout_s: the watchdog ends this process when an operation has taken longer.
        interface: of the network, for what does not go from card to card; without one NCCL chooses.
        urgent: its streams go before others.
    """
    if interface:
        os.environ.setdefault(NCCL_INTERFACE, f"={interface}")
    options = distributed.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = urgent
    options._timeout = timedelta(seconds=timeout_s)
    return distributed.ProcessGroupNCCL(distributed.PrefixStore(name, store), rank, size, options)


_DEVICES: dict[str, Any] = {}


def _device(bind: str) -> Any:
    """Gloo's access to the network: one for all groups of a process, which costs one thread."""
    if bind not in _DEVICES:
        create = distributed.ProcessGroupGloo.create_device
        interface = bind.removeprefix("interface:")
        _DEVICES[bind] = create(hostname=bind) if interface == bind else create(interface=interface)
    return _DEVICES[bind]


def release_devices() -> None:
    """Give gloo's access to the network back, after all groups that use it."""
    _DEVICES.clear()


class GlooWire:
    """One end of a link. One thread sends, one receives."""

    def __init__(self, group: Any, peer: int, timeout_s: float) -> None:
        self._group = group
        self._peer = peer
        self._timeout = timedelta(seconds=timeout_s)

    def send(self, arrays: Sequence[Bytes]) -> list[Sent]:
        """Post the arrays of a message; the results must be kept until they have been waited for."""
        flat = [array.reshape(-1).view(np.uint8) for array in arrays]
        places = offsets([array.nbytes for array in flat])
        if places[-1] <= PIECE_BYTES:
            packed = np.empty(places[-1], dtype=np.uint8)
            for array, at in zip(flat, places, strict=False):
                packed[at:at + array.nbytes] = array
            flat = [packed]
        pieces = [array[at:at + PIECE_BYTES] for array in flat for at in range(0, array.nbytes, PIECE_BYTES)]
        tensors = [torch.from_numpy(piece) for piece in pieces]
        return [Sent(self._group.send([tensor], self._peer, 0), tensor) for tensor in tensors]

    def receive(self, sizes: Sequence[int]) -> Bytes:
        """The arrays of a message, of the given sizes in bytes, in one buffer at :func:`offsets`.

        Raises:
            RuntimeError: the link is lost.
        """
        places = offsets(sizes)
        buffer = np.empty(places[-1], dtype=np.uint8)
        whole = places[-1] <= PIECE_BYTES
        parts = [buffer] if whole else [buffer[at:at + size] for at, size in zip(places, sizes, strict=False)]
        pieces = [part[at:at + PIECE_BYTES] for part in parts for at in range(0, part.nbytes, PIECE_BYTES)]
        asked: list[Any] = []
        for n, piece in enumerate(pieces):
            asked.append(self._group.recv([torch.from_numpy(piece)], self._peer, 0))
            if n + 1 >= PIECES_AHEAD:
                asked[n + 1 - PIECES_AHEAD].wait(self._timeout)
        for work in asked[-(PIECES_AHEAD - 1):]:
            work.wait(self._timeout)
        return buffer

    def wait(self, sent: Sent, timeout_s: float | None = None) -> None:
        """Wait until a send is over; what has become of the link is for its receiver to find out."""
        with suppress(RuntimeError):
            sent.work.wait(self._timeout if timeout_s is None else timedelta(seconds=timeout_s))


class Waiting(Protocol):
    """One end of a link, of any kind."""

    def wait(self, sent: Sent, timeout_s: float | None = None) -> None:
        """Wait until a send is over, or has failed."""


class Reaper:
    """Keeps sends until they are over, in a thread of its own."""

    def __init__(self) -> None:
        self._batch: list[tuple[Waiting, Sent]] = []
        self._batch_bytes = 0
        self._batches: SimpleQueue[list[tuple[Waiting, Sent]] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="reaper", daemon=True)
        self._thread.start()

    def add(self, wire: Waiting, sends: Sequence[Sent]) -> None:
        """Keep some sends."""
        self._batch += [(wire, sent) for sent in sends]
        self._batch_bytes += sum(sent.tensor.nbytes for sent in sends)
        if len(self._batch) >= REAP_COUNT or self._batch_bytes >= REAP_BYTES:
            self._batches.put(self._batch)
            self._batch, self._batch_bytes = [], 0

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            for wire, sent in batch:
                wire.wait(sent)

    def close(self, timeout_s: float) -> None:
        """See what is under way to its end, within a time."""
        deadline_s = time.monotonic() + timeout_s
        self._batches.put(self._batch)
        self._batches.put(None)
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
