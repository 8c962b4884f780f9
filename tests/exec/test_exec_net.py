"""Connections of a run: who may connect, frames, and endpoints whose peers are slow, odd or gone."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from hetis_exec.errors import ExecutorError
from hetis_exec.messages import DRIVER, Beat, CacheData, Failed, Hidden, Message, Stop
from hetis_exec.net import endpoint as endpoints
from hetis_exec.net.codec import encode
from hetis_exec.net.endpoint import Channel, NetworkEndpoint
from hetis_exec.net.frames import PREFIX, FrameError, FrameSocket
from hetis_exec.net.handshake import HELLO, MAGIC, Hello, call, new_token, run_token
from hetis_exec.net.listener import Listener, connect

SOON_S = 20.0
LOCAL = "127.0.0.1"
HELLO_THERE = Hello(1, 0, Channel.DATA)


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until something holds."""
    deadline_s = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.005)


def hidden(size: int = 4, seq: int = 0) -> Hidden:
    """Some message with an array."""
    return Hidden(seq, np.full((1, size), float(seq)), 0.0)


def hung_up(connection: socket.socket) -> bool:
    """Wait for the other end to hang up."""
    connection.settimeout(SOON_S)
    with suppress(ConnectionError):
        while connection.recv(1000):
            pass
    return True


# -- who may connect -----------------------------------------------------------------------------------------


class Door:
    """A listener, and whom it has let in."""

    def __init__(self) -> None:
        self.token = new_token()
        self.let_in: list[tuple[Hello, FrameSocket]] = []
        self.listener = Listener(LOCAL, 0, self.token, self._let_in)

    def _let_in(self, hello: Hello, frames: FrameSocket) -> None:
        self.let_in.append((hello, frames))


@pytest.fixture
def door() -> Iterator[Door]:
    """One that is open."""
    made = Door()
    yield made
    made.listener.close()


def test_callers_with_the_token_are_let_in(door: Door) -> None:
    """The listener learns who calls, and frames go both ways."""
    frames = connect(door.listener.place, door.token, HELLO_THERE)
    until(lambda: door.let_in, "the call is answered")
    hello, other = door.let_in[0]
    assert hello == HELLO_THERE
    frames.send(b"there", [np.arange(3)])
    other.send(b"back")
    got = other.receive()
    assert got is not None
    assert (got.head, got.body[:24].view(np.int64).tolist()) == (b"there", [0, 1, 2])
    assert frames.receive().head == b"back"  # type: ignore[union-attr]


def test_callers_without_the_token_are_not(door: Door) -> None:
    """Neither do they get through, nor do they keep others from getting through."""
    silent = socket.create_connection(door.listener.place)
    with pytest.raises(ExecutorError, match="does not know the token"):
        connect(door.listener.place, new_token(), HELLO_THERE)
    for said in (b"GET / HTTP/1.1\r\n\r\n" + bytes(100), HELLO.pack(MAGIC, 1, 7, 1, bytes(32)),
                 HELLO.pack(MAGIC, *HELLO_THERE, bytes(32)) + bytes(32)):
        with socket.create_connection(door.listener.place) as odd:
            odd.sendall(said)
            assert hung_up(odd)
    connect(door.listener.place, door.token, HELLO_THERE)
    until(lambda: door.let_in, "the right call is answered")
    assert [hello for hello, _ in door.let_in] == [HELLO_THERE]
    silent.close()


def test_a_recorded_call_is_worth_nothing(door: Door) -> None:
    """Each handshake has numbers of its own."""
    said: list[bytes] = []

    class Ear(socket.socket):
        def sendall(self, data: Any, *more: Any) -> None:
            said.append(bytes(data))
            super().sendall(data, *more)

    ear = Ear(socket.AF_INET)
    ear.connect(door.listener.place)
    call(ear, door.token, HELLO_THERE)
    until(lambda: len(door.let_in) == 1, "the call is answered")
    with socket.create_connection(door.listener.place) as again:
        again.sendall(b"".join(said))
        assert hung_up(again)
    assert len(door.let_in) == 1


def test_a_secret_of_the_hosts_is_worth_more_than_what_the_store_says(door: Door) -> None:
    """Whoever has read the store, but does not know the secret, has another token."""
    with_secret = run_token(door.token, {"HETIS_SECRET": "a"})
    assert len({door.token, with_secret, run_token(door.token, {"HETIS_SECRET": "b"})}) == 3
    assert run_token(door.token, {}) == run_token(door.token, {"HETIS_SECRET": ""}) == door.token
    with pytest.raises(ExecutorError, match="does not know the token"):
        connect(door.listener.place, with_secret, HELLO_THERE)


def test_nobody_at_the_other_end_is_an_error_that_says_where() -> None:
    """A port that nobody listens at."""
    with socket.create_server((LOCAL, 0)) as taken:
        place = taken.getsockname()
    with pytest.raises(ExecutorError, match=rf"device 1 cannot reach device 0 at {LOCAL}:{place[1]}"):
        connect(place, new_token(), HELLO_THERE)


def test_listeners_take_calls_on_their_own_address_only(door: Door) -> None:
    """On loopback nobody from outside gets as far as the handshake."""
    assert door.listener._socket.getsockname()[0] == LOCAL


# -- frames --------------------------------------------------------------------------------------------------


def pair() -> tuple[FrameSocket, FrameSocket]:
    """Both ends of a connection."""
    a, b = socket.socketpair()
    return FrameSocket(a), FrameSocket(b)


def test_sending_never_waits_and_loses_nothing() -> None:
    """Far more than the kernel holds goes out at once, and arrives once somebody reads it."""
    a, b = pair()
    begun_s = time.monotonic()
    for n in range(40):
        a.send(bytes([n]) * (1 + n * 1000), [np.full(50_000, n), np.full(n, 1, dtype=np.uint8)])
    assert time.monotonic() - begun_s < SOON_S
    for n in range(40):
        frame = b.receive()
        assert frame is not None
        assert frame.head == bytes([n]) * (1 + n * 1000)
        assert (frame.body[:400_000].view(np.int64) == n).all()
        assert len(frame.body) == 400_000 + 64 * (n > 0)
    a.close(1.0)
    assert b.receive() is None


def test_a_frame_that_is_too_long_is_refused_before_it_is_read() -> None:
    """Its length is not believed."""
    raw, other = socket.socketpair()
    raw.sendall(PREFIX.pack((1 << 32) - 1, 0, 0.0))
    with pytest.raises(FrameError, match="longer than any message"):
        FrameSocket(other).receive()


def test_a_connection_that_breaks_in_mid_frame_has_ended() -> None:
    """Half a frame is none."""
    raw, other = socket.socketpair()
    raw.sendall(PREFIX.pack(100, 0, 0.0) + bytes(50))
    raw.close()
    assert FrameSocket(other).receive() is None


def test_sending_to_nobody_is_no_error() -> None:
    """Whoever looks after the peers finds out."""
    a, b = pair()
    b.close(0.0)
    for _ in range(5):
        a.send(b"x" * 100_000)


# -- endpoints -----------------------------------------------------------------------------------------------


def joined(*links: tuple[int, int, Channel]) -> dict[int, NetworkEndpoint]:
    """Endpoints of one process, with connections between them."""
    made = {address: NetworkEndpoint(address) for link in links for address in link[:2]}
    for a, b, channel in links:
        one, other = pair()
        made[a].add(b, channel, one)
        made[b].add(a, channel, other)
    return made


def test_messages_arrive_in_order_on_channels_of_their_own() -> None:
    """From the driver, from workers, and from oneself."""
    made = joined((DRIVER, 0, Channel.CONTROL), (0, 1, Channel.DATA), (0, 1, Channel.CACHE))
    cache = CacheData(1, 2, 3, 0, (0,), (1,), 0, np.zeros((1, 1, 2, 4)), np.ones((1, 1, 2, 4)), True)
    for n in range(5):
        made[1].send(0, hidden(seq=n))
    made[1].send(0, cache)
    got = [made[0].receive(SOON_S) for _ in range(6)]
    assert [m.seq for m in got if isinstance(m, Hidden)] == [0, 1, 2, 3, 4]
    assert [m.tag for m in got if isinstance(m, CacheData)] == [2]
    made[0].send(DRIVER, Beat(0))
    made[0].send(0, Beat(7))
    assert made[DRIVER].receive(SOON_S) == Beat(0)
    assert made[0].receive(SOON_S) == Beat(7)
    assert made[0].receive(0.0) is None


def test_what_the_driver_says_before_a_worker_has_called_is_kept() -> None:
    """Above all that it is to stop."""
    driver, worker = NetworkEndpoint(DRIVER), NetworkEndpoint(3)
    driver.send(3, Stop(at_once=True))
    a, b = pair()
    driver.add(3, Channel.CONTROL, a)
    worker.add(DRIVER, Channel.CONTROL, b)
    assert worker.receive(SOON_S) == Stop(at_once=True)
    assert worker.stopped


def test_workers_without_a_connection_cannot_talk() -> None:
    """A defect of the program that must not pass for a slow link."""
    with pytest.raises(ExecutorError, match="device 0 has no connection to device 5 for Hidden"):
        NetworkEndpoint(0).send(5, hidden())


class StuckWire:
    """A wire on which nothing moves until it is told to."""

    def __init__(self) -> None:
        self.go = Event()

    def receive(self, sizes: list[int]) -> np.ndarray[Any, Any]:
        assert self.go.wait(SOON_S)
        return np.zeros(64 * -(-sizes[0] // 64), dtype=np.uint8)


def test_a_link_that_is_stuck_holds_up_no_other_one() -> None:
    """Not those of other peers, and cache not the messages of its own peer."""
    made = joined((0, 1, Channel.DATA), (0, 1, Channel.CACHE), (0, 2, Channel.DATA))
    wire = StuckWire()
    made[0].add_wire(1, Channel.CACHE, wire, None)  # type: ignore[arg-type]
    cache = CacheData(1, 2, 3, 0, (), (), 0, np.zeros(16, dtype=np.uint8), np.zeros(0), True)
    raw = made[1]._links[0, Channel.CACHE].frames
    raw.send(encode(cache)[0])
    made[1].send(0, hidden(seq=1))
    made[2].send(0, hidden(seq=2))
    assert {made[0].receive(SOON_S).seq for _ in range(2)} == {1, 2}  # type: ignore[union-attr]
    assert made[0].receive(0.05) is None
    wire.go.set()
    assert isinstance(made[0].receive(SOON_S), CacheData)


def test_the_driver_sees_which_connections_have_ended() -> None:
    """Those that say goodbye are not among them."""
    made = joined((DRIVER, 0, Channel.CONTROL), (DRIVER, 1, Channel.CONTROL))
    made[0].close(1.0)
    made[1]._links[DRIVER, Channel.CONTROL].frames.close(0.0)
    until(lambda: made[DRIVER].lost, "the loss is noticed")
    time.sleep(0.05)
    assert list(made[DRIVER].lost) == [1]


def test_a_worker_ends_with_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told to stop; and should it not listen, its process ends all the same."""
    ended: list[int] = []
    monkeypatch.setattr(endpoints, "LAST_S", 0.05)
    made = joined((DRIVER, 0, Channel.CONTROL))
    made[0]._orphaned = lambda: ended.append(1)
    made[DRIVER]._links[0, Channel.CONTROL].frames.close(0.0)
    assert made[0].receive(SOON_S) == Stop(at_once=True)
    until(lambda: ended == [1], "the process ends")
    # Not so if it is about to end by itself.
    other = joined((DRIVER, 0, Channel.CONTROL))
    other[0]._orphaned = lambda: ended.append(2)
    other[DRIVER]._links[0, Channel.CONTROL].frames.close(0.0)
    other[0].close(1.0)
    time.sleep(0.2)
    assert ended == [1]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_that_has_lost_a_peer_tells_the_driver(monkeypatch: pytest.MonkeyPatch,
                                                        stopped: bool) -> None:
    """Unless the driver has ended the run by then: it may know more."""
    monkeypatch.setattr(endpoints, "GRACE_S", 0.05)
    made = joined((DRIVER, 0, Channel.CONTROL), (0, 1, Channel.DATA))
    made[0].stopped = stopped
    made[1]._links[0, Channel.DATA].frames.close(0.0)
    said = made[DRIVER].receive(0.3 if stopped else SOON_S)
    if stopped:
        assert said is None
    else:
        assert isinstance(said, Failed)
        assert "device 1 is lost to it" in said.reason


@pytest.mark.parametrize("said", [b"rubbish", b'[0,[],[["|O",[1]]]]', struct.pack("!I", 3)])
def test_a_peer_that_talks_nonsense_is_lost(said: bytes) -> None:
    """Its connection is not believed any more, and the endpoint goes on."""
    made = joined((DRIVER, 0, Channel.CONTROL), (DRIVER, 1, Channel.CONTROL))
    made[0]._links[DRIVER, Channel.CONTROL].frames.send(said)
    until(lambda: 0 in made[DRIVER].lost, "the loss is noticed")
    assert "no head of a message" in made[DRIVER].lost[0][0]
    made[1].send(DRIVER, Beat(1))
    assert made[DRIVER].receive(SOON_S) == Beat(1)


def test_a_head_with_other_arrays_than_its_frame_is_refused() -> None:
    """What a message says of its arrays must be what comes."""
    made = joined((0, 1, Channel.DATA))
    made[0]._links[1, Channel.DATA].frames.send(encode(hidden(100))[0], [np.zeros(3)])
    until(lambda: 0 in made[1].lost, "the loss is noticed")
    assert "bytes of arrays" in made[1].lost[0][0]


def test_the_driver_hears_workers_out() -> None:
    """What they say between being told to stop and hanging up counts."""
    made = joined((DRIVER, 0, Channel.CONTROL), (DRIVER, 1, Channel.CONTROL))
    made[0].close(1.0)
    assert not made[DRIVER].await_parting(0.05)
    made[1].send(DRIVER, Failed(1, "at last"))
    made[1].close(1.0)
    assert made[DRIVER].await_parting(SOON_S)
    assert made[DRIVER].receive(0.0) == Failed(1, "at last")
    assert not made[DRIVER].lost


def test_close_writes_what_is_left() -> None:
    """A message that the kernel has no room for yet is not dropped."""
    made = joined((0, 1, Channel.DATA))
    got: list[Message | None] = []
    made[0].send(1, hidden(2_000_000, seq=1))
    reader = Thread(target=lambda: got.append(made[1].receive(SOON_S)))
    reader.start()
    made[0].close(SOON_S)
    reader.join()
    assert isinstance(got[0], Hidden)
    assert got[0].values.shape == (1, 2_000_000)
