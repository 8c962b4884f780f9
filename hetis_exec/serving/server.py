"""Runs the HTTP server until it is told to stop, or its engine ends."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread, current_thread, main_thread

import uvicorn

from hetis_exec.serving.engine import ServingEngine
from hetis_exec.serving.http import Api
from hetis_sim.spec.errors import SpecError

GRACE_S = 5
"""How long texts that are being sent may take, once the server is to stop."""

SPARE_CONNECTIONS = 256
"""Beyond the requests that may be in the system: for those that are told to come later, and for monitors."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        SpecError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        raise SpecError("serve.host", f"{host}:{port}", f"an address to listen on ({error})") from None


def run_server(engine: ServingEngine, api: Api, door: socket.socket, requests_max: int,
               ready: Callable[[], None] = lambda: None) -> bool:
    """Serve until an interrupt or SIGTERM comes or the engine ends; whether it has ended in peace."""
    server = uvicorn.Server(uvicorn.Config(
        api.app(), log_level="warning", lifespan="off", timeout_graceful_shutdown=GRACE_S,
        limit_concurrency=requests_max + SPARE_CONNECTIONS))

    def watch() -> None:
        engine.wait()
        server.should_exit = True

    Thread(target=watch, name="watch", daemon=True).start()
    ready()
    try:
        with _terminable():
            server.run(sockets=[door])
    except KeyboardInterrupt:
        pass
    finally:
        engine.close()
    return engine.error is None


@contextmanager
def _terminable() -> Iterator[None]:
    """Have SIGTERM do what an interrupt does, which uvicorn passes on as it does that once it has stopped."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
