"""Who may connect: both ends show that they know the run's token, and neither says it.

Each end names a number that is used once; the other answers with a keyed hash over both numbers and
over who calls whom.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from typing import NamedTuple

from hetis_exec.errors import ExecutorError

MAGIC = b"HETISX1\n"
NONCE_BYTES = 32
PROOF_BYTES = 32
TOKEN_BYTES = 32
PATIENCE_S = 10.0
"""How long the other end may take for its part."""

SECRET_NAME = "HETIS_SECRET"
"""Variable of the environment in which all hosts of a run may be given the same secret."""

HELLO = struct.Struct(f"!{len(MAGIC)}siiB{NONCE_BYTES}s")


class HandshakeError(ExecutorError):
    """Whoever is at the other end is not of this run."""


class Hello(NamedTuple):
    """Address of the caller, address that it calls, and what for."""

    sender: int
    target: int
    channel: int


def new_token() -> bytes:
    """A token for one run."""
    return secrets.token_bytes(TOKEN_BYTES)


def run_token(announced: bytes, environment: Mapping[str, str] | None = None) -> bytes:
    """What proofs are made with: the token that the store holds and, where hosts share one, their secret.

    With a secret it is not enough to reach the store.
    """
    secret = (os.environ if environment is None else environment).get(SECRET_NAME, "")
    return hmac.new(secret.encode(), announced, hashlib.sha256).digest() if secret else announced


def call(connection: socket.socket, token: bytes, hello: Hello) -> None:
    """The part of the end that connects.

    Raises:
        HandshakeError: the other end does not know the token.
        OSError: the connection has ended, or it has taken too long.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    own = secrets.token_bytes(NONCE_BYTES)
    connection.settimeout(PATIENCE_S)
    connection.sendall(HELLO.pack(MAGIC, *hello, own))
    answer = _read(connection, NONCE_BYTES + PROOF_BYTES, deadline_s)
    other, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(token, b"answer", hello, own, other)):
        raise HandshakeError("whoever listens there does not know the token of this run")
    connection.sendall(_proof(token, b"call", hello, own, other))


def answer(connection: socket.socket, token: bytes, address: int) -> Hello:
    """The part of the end that listens.

    Raises:
        HandshakeError: the caller does not know the token, or calls somebody else.
        OSError: the connection has ended, or it has taken too long.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    connection.settimeout(PATIENCE_S)
    magic, sender, target, channel, other = HELLO.unpack(_read(connection, HELLO.size, deadline_s))
    hello = Hello(sender, target, channel)
    if magic != MAGIC or target != address:
        raise HandshakeError(f"a call that is not for {address}")
    own = secrets.token_bytes(NONCE_BYTES)
    connection.sendall(own + _proof(token, b"answer", hello, other, own))
    if not hmac.compare_digest(_read(connection, PROOF_BYTES, deadline_s),
                               _proof(token, b"call", hello, other, own)):
        raise HandshakeError("a caller that does not know the token of this run")
    return hello


def _proof(token: bytes, role: bytes, hello: Hello, caller: bytes, listener: bytes) -> bytes:
    text = b"|".join((role, struct.pack("!iiB", *hello), caller, listener))
    return hmac.new(token, text, hashlib.sha256).digest()


def _read(connection: socket.socket, size: int, deadline_s: float) -> bytes:
    got = b""
    while len(got) < size:
        connection.settimeout(max(1e-3, deadline_s - time.monotonic()))
        part = connection.recv(size - len(got))
        if not part:
            raise ConnectionError("the other end has hung up")
        got += part
    return got
