"""Taking calls: a listening socket, and a thread that answers it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from threading import BoundedSemaphore, Thread

from hetis_exec.errors import ExecutorError
from hetis_exec.net.frames import FrameSocket
from hetis_exec.net.handshake import PATIENCE_S, Hello, answer, call

CALLERS_MAX = 64
"""Handshakes at a time."""


class Listener:
    """Answers calls to one party, and hands over connections of callers that know the token.

    Attributes:
        place: (host, port) to call.
    """

    def __init__(self, host: str, address: int, token: bytes,
                 connected: Callable[[Hello, FrameSocket], None]) -> None:
        self._address = address
        self._token = token
        self._connected = connected
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, backlog=128)
        self.place: tuple[str, int] = (host, self._socket.getsockname()[1])
        self._room = BoundedSemaphore(CALLERS_MAX)
        Thread(target=self._run, name=f"listener-{address}", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            # Each call has a thread for its handshake: whoever hangs there holds up nobody.
            self._room.acquire()
            Thread(target=self._answer, args=(connection,), name="handshake", daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            hello = answer(connection, self._token, self._address)
        except (ExecutorError, OSError):
            # Somebody else's call is not this run's concern.
            connection.close()
        else:
            self._connected(hello, FrameSocket(connection))
        finally:
            self._room.release()

    def close(self) -> None:
        """Take no more calls."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def connect(place: tuple[str, int], token: bytes, hello: Hello) -> FrameSocket:
    """Call a party.

    Raises:
        ExecutorError: there is nobody, or nobody of this run.
    """
    try:
        connection = socket.create_connection(place, timeout=PATIENCE_S)
        call(connection, token, hello)
    except OSError as error:
        raise ExecutorError(f"{_name(hello.sender)} cannot reach {_name(hello.target)} at "
                            f"{place[0]}:{place[1]}: {error}") from error
    return FrameSocket(connection)


def _name(address: int) -> str:
    return "the driver" if address < 0 else f"device {address}"
