"""Frames on a TCP connection: a head and what belongs to it, both with their length in front."""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from threading import Condition, Thread
from typing import Any, NamedTuple

import numpy as np

from hetis_exec.errors import ExecutorError
from hetis_exec.net.codec import ALIGN_BYTES, ARRAYS_BYTES_MAX, HEAD_BYTES_MAX, offsets

PREFIX = struct.Struct("!IQd")
"""Bytes of the head, bytes of the body, and when the frame is due (see :mod:`hetis_exec.shaping`)."""

BUFFERS_MAX = 64
"""Pieces that are handed to the kernel at a time."""

PADDING = bytes(ALIGN_BYTES)


class FrameError(ExecutorError):
    """A peer that speaks something else."""


class Frame(NamedTuple):
    """What has come; ``body`` is of uint8 and can be written to."""

    head: bytearray
    body: np.ndarray[Any, Any]
    due_s: float


class FrameSocket:
    """One end of a connection: any thread sends, one receives.

    Sending never waits. What the kernel does not take at once is written by a thread that lives as long
    as there is something left.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = connection
        self._left: deque[memoryview] = deque()
        self._changed = Condition()
        self._broken = False

    def send(self, head: bytes, arrays: Sequence[np.ndarray[Any, Any]] = (), due_s: float = 0.0) -> None:
        """Have a frame written; its arrays must not change any more. A peer that is gone does not get it."""
        places = offsets([array.nbytes for array in arrays])
        parts: list[Any] = [PREFIX.pack(len(head), places[-1], due_s), head]
        for array, at, end in zip(arrays, places, places[1:], strict=False):
            parts += [array.reshape(-1).view(np.uint8), PADDING[:end - at - array.nbytes]]
        views = [memoryview(part) for part in parts]
        with self._changed:
            if self._broken:
                return
            if self._left:
                self._left.extend(views)
                return
            left = self._push(views)
            if left:
                self._left.extend(left)
                Thread(target=self._write, name="frames", daemon=True).start()

    def _push(self, views: list[memoryview]) -> list[memoryview]:
        """What the kernel does not take at once."""
        try:
            while views:
                sent = self._socket.sendmsg(views[:BUFFERS_MAX], [], socket.MSG_DONTWAIT)
                views = _after(views, sent)
        except (BlockingIOError, InterruptedError):
            return views
        except OSError:
            self._broken = True
            return []
        return views

    def _write(self) -> None:
        while True:
            with self._changed:
                if not self._left or self._broken:
                    self._left.clear()
                    self._changed.notify_all()
                    return
                views = [self._left[n] for n in range(min(BUFFERS_MAX, len(self._left)))]
            try:
                sent = self._socket.sendmsg(views)
            except OSError:
                self._broken = True
                continue
            with self._changed:
                for _ in views:
                    self._left.popleft()
                self._left.extendleft(reversed(_after(views, sent)))

    def receive(self) -> Frame | None:
        """The next frame; None when the connection has ended.

        Raises:
            FrameError: lengths that no frame has.
        """
        prefix = self._read(PREFIX.size)
        if prefix is None:
            return None
        head_bytes, body_bytes, due_s = PREFIX.unpack(prefix)
        if head_bytes > HEAD_BYTES_MAX or body_bytes > ARRAYS_BYTES_MAX:
            raise FrameError(f"a frame of {head_bytes} and {body_bytes} bytes is longer than any message")
        head = self._read(head_bytes)
        body = np.empty(body_bytes, dtype=np.uint8)
        if head is None or not self._fill(body.data):
            return None
        return Frame(head, body, due_s)

    def _read(self, size: int) -> bytearray | None:
        buffer = bytearray(size)
        return buffer if self._fill(memoryview(buffer)) else None

    def _fill(self, view: memoryview) -> bool:
        while view:
            try:
                got = self._socket.recv_into(view)
            except OSError:
                return False
            if not got:
                return False
            view = view[got:]
        return True

    def close(self, timeout_s: float) -> None:
        """Write what is left, if that is possible in time, and end the connection."""
        with self._changed:
            self._changed.wait_for(lambda: not self._left or self._broken, timeout_s)
            self._broken = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _after(views: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of buffers of which so many bytes have gone."""
    for n, view in enumerate(views):
        if sent < view.nbytes:
            return [view[sent:], *views[n + 1:]]
        sent -= view.nbytes
    return []
