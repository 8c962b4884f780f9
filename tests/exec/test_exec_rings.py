"""Rings of shared memory, and messages through them: order, room, ends that are gone, nothing left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from hetis_exec import pipes
from hetis_exec.messages import (
    AttentionBatch,
    AttentionItem,
    AttentionRequest,
    AttentionResult,
    Beat,
    CacheData,
    Hidden,
    Message,
    Partial,
    Stop,
)
from hetis_exec.net.lanes import LaneReader, LaneWriter
from hetis_exec.net.rings import CONTROL_BYTES, LINE_BYTES, Region, RingReader, RingWriter, has_rings
from hetis_exec.pipes import RING_BYTES, PipeEndpoint, pair_region

pytestmark = pytest.mark.skipif(not has_rings(), reason="rings need Linux on an x86 processor")

SIZE = CONTROL_BYTES + 16 * LINE_BYTES
SOON_S = 20.0
LARGE = RING_BYTES // 96
"""Rows of a message that takes more than a ring: queries alone are as large."""


def ring(size: int = SIZE) -> tuple[RingWriter, RingReader]:
    """Both ends of a ring."""
    region = Region(size)
    return RingWriter(region, 0, size), RingReader(region, 0, size)


def put(writer: RingWriter, number: int, content: bytes) -> bool:
    """Write a record, if there is room for it."""
    place = writer.room(len(content))
    if place is None:
        return False
    writer.memory[place:place + len(content)] = content
    writer.publish(number)
    return True


def got(reader: RingReader, size: int) -> tuple[int | None, bytes]:
    """The next record, which is free again afterwards."""
    number = reader.next()
    return number, bytes(reader.take())[:size]


def heads(number: int, rows: int = 4, value: float = 0.0) -> AttentionRequest:
    """Heads of some rows in a layer of a step."""
    shapes = (rows, 3, 8), (rows, 8), (rows, 8)
    return AttentionRequest(number, 0, 1, *(np.full(s, value + n, np.float32)
                                                     for n, s in enumerate(shapes)))


def same(a: Message, b: Message) -> bool:
    """Whether two messages say the same."""
    return type(a) is type(b) and all(
        np.array_equal(x, y) and x.dtype == y.dtype if isinstance(x, np.ndarray) else x == y
        for x, y in zip(a, b, strict=True))


# -- rings -------------------------------------------------------------------------------------------------


def test_records_come_in_order_around_the_end() -> None:
    """Of all sizes, many times the ring's, with some under way most of the time."""
    writer, reader = ring()
    sizes = np.random.default_rng(0).integers(0, 5 * LINE_BYTES, 500).tolist()
    sent = [bytes([n % 251]) * size for n, size in enumerate(sizes)]
    came: list[bytes] = []
    for n, content in enumerate(sent):
        while not put(writer, n, content):
            assert reader.next() == len(came)
            came.append(got(reader, sizes[len(came)])[1])
    while reader.next() is not None:
        came.append(got(reader, sizes[len(came)])[1])
    assert came == sent


def test_a_record_larger_than_the_ring_has_no_room() -> None:
    """Nor has one that would fill it with its head; the largest has."""
    writer, reader = ring()
    assert writer.room(16 * LINE_BYTES) is None
    assert put(writer, 0, bytes(15 * LINE_BYTES))
    assert not put(writer, 1, b"")
    assert got(reader, 0) == (0, b"")
    assert put(writer, 1, b"x")
    assert got(reader, 1) == (1, b"x")


def test_what_is_read_stays_until_nothing_refers_to_it() -> None:
    """Whoever goes on reading an array is not written over, whatever has been read after it."""
    writer, reader = ring()
    for n in range(4):
        assert put(writer, n, bytes([n]) * 3 * LINE_BYTES)
    views = []
    for _ in range(4):
        assert reader.next() is not None
        views.append(np.frombuffer(reader.take(), np.uint8)[::2])
    del views[1:3]
    gc.collect()
    assert not put(writer, 4, b"x")
    assert (views[0] == 0).all()
    del views[0]
    gc.collect()
    assert put(writer, 4, bytes([4]) * 3 * LINE_BYTES)
    assert (views[0] == 3).all()


def test_an_empty_ring_begins_anew() -> None:
    """Records that are read at once use the same memory again."""
    writer, reader = ring()
    places = set()
    for n in range(20):
        places.add(writer.room(2 * LINE_BYTES))
        writer.publish(n)
        assert got(reader, 0)[0] == n
    assert len(places) <= 2


# -- messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [
    heads(7),
    heads(7)._replace(queries=np.arange(48, dtype=np.float64).reshape(2, 4, 6)[:, 1:3]),
    heads(7)._replace(queries=np.zeros((2, 3, 4, 5), np.int16), keys=np.zeros((0, 8), np.float32)),
    AttentionResult(7, 2, 1, np.ones((2, 3, 4), np.float32), 0.25),
    AttentionResult(np.int64(7), 2, 1, np.ones((2, 3, 4), np.float16), 0.25, np.ones((2, 3), np.float32)),
    Hidden(7, np.ones((3, 5), np.float32), 0.5),
    Partial(7, 3, 1, np.ones((3, 5), np.float32)),
])
def test_messages_of_a_layer_travel_as_they_are(message: Message) -> None:
    """With their types and shapes, also such as are not in one piece."""
    writer, reader = ring(1 << 14)
    assert LaneWriter(writer).send(5, 1.5, message) is False
    assert reader.next() == 5
    due_s, came = LaneReader(reader).take()
    assert due_s == 1.5
    assert same(came, message)


@pytest.mark.parametrize("message", [
    AttentionBatch(7, 0, 0, (AttentionItem(1, 2, (0,)),)),
    heads(7, rows=1000),
    Hidden(7, np.ones((1, 1, 1, 1, 1), np.float32), 0.0),
    Hidden(7, np.ones((1, 1), np.complex64), 0.0),
    Beat(1),
])
def test_others_are_left_to_the_pipe(message: Message) -> None:
    """And the ring is as it was."""
    writer, reader = ring(1 << 14)
    assert LaneWriter(writer).send(5, 0.0, message) is None
    assert reader.next() is None
    assert LaneWriter(writer).send(5, 0.0, heads(8)) is False
    assert same(LaneReader(reader).take()[1], heads(8))


def ends(spin_s: float = 0.0) -> tuple[PipeEndpoint, PipeEndpoint]:
    """Two parties of one process."""
    a, b = Pipe()
    region = pair_region()
    return (PipeEndpoint(0, {1: a}, regions={1: region}, spin_s=spin_s),
            PipeEndpoint(1, {0: b}, regions={0: region}, spin_s=spin_s))


def test_messages_keep_their_order_on_both_ways() -> None:
    """Small heads through the ring, cache and what the ring has no room for through the pipe."""
    left, right = ends()
    rng = np.random.default_rng(1)
    sent: list[Message] = []
    for n in range(60):
        kind = rng.integers(4)
        if kind == 0:
            cache = np.full((1, 1, 9, 8), n, np.float32)
            sent.append(CacheData(n, 0, 0, 0, (0,), (0,), 0, cache, cache, final=True))
        elif kind == 1:
            sent.append(heads(n, rows=int(rng.integers(1, LARGE)), value=n))
        else:
            sent.append(heads(n, value=n))
    came = []
    for n, message in enumerate(sent):
        left.send(1, message)
        if n % 7 == 6:
            came.append(right.receive(SOON_S))
    while len(came) < len(sent):
        came.append(right.receive(SOON_S))
    assert all(same(a, b) for a, b in zip(came, sent, strict=True))
    assert right.receive(0.0) is None


def test_a_full_ring_does_not_hold_up_its_sender() -> None:
    """What is sent to one that does not read waits for it elsewhere."""
    left, right = ends()
    for n in range(20):
        left.send(1, heads(n, rows=LARGE // 10, value=n))
    for n in range(20):
        message = right.receive(SOON_S)
        assert message is not None
        assert same(message, heads(n, rows=LARGE // 10, value=n))


@pytest.mark.parametrize("spin_s", [0.0, 0.01])
def test_a_receiver_that_sleeps_is_woken(spin_s: float) -> None:
    """By a message in the ring; it does not wait for its time to pass."""
    left, right = ends(spin_s)
    worker = multiprocessing.get_context("fork").Process(
        target=lambda: (time.sleep(0.3), left.send(1, heads(1)), time.sleep(SOON_S)), daemon=True)
    worker.start()
    begun_s = time.monotonic()
    assert right.receive(SOON_S) is not None
    assert 0.2 < time.monotonic() - begun_s < SOON_S / 2
    worker.kill()
    worker.join()


def test_a_receiver_that_is_interrupted_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer each time, up to a limit, and less again when looking finds something; it misses nothing."""
    left, right = ends(spin_s=0.01)
    monkeypatch.setattr(pipes, "INTERRUPTED_S", -1.0)
    rests = []
    for _ in range(6):
        right._rest_until_s = 0.0
        assert right.receive(0.001) is None
        rests.append(right._rest_s)
    assert rests == sorted(rests)
    assert pipes.REST_LEAST_S < rests[0] < rests[-1] == pipes.REST_MOST_S
    left.send(1, heads(1))
    assert right.receive(SOON_S) is not None
    monkeypatch.setattr(pipes, "INTERRUPTED_S", SOON_S)
    right._rest_until_s = 0.0
    worker = Thread(target=lambda: (time.sleep(0.005), left.send(1, heads(2))))
    right._spin_s = right._spin_max_s = SOON_S
    worker.start()
    assert right.receive(SOON_S) is not None
    worker.join()
    assert right._rest_s < rests[-1]


def test_a_receiver_without_messages_waits_as_long_as_it_was_told() -> None:
    """And not much longer, looking or asleep."""
    for spin_s in (0.0, 0.02):
        _, right = ends(spin_s)
        for timeout_s in (0.0, 0.005, 0.1):
            begun_s = time.monotonic()
            assert right.receive(timeout_s) is None
            assert timeout_s <= time.monotonic() - begun_s < timeout_s + 2.0


# -- processes ---------------------------------------------------------------------------------------------


def answer(pipe: object, region: Region) -> None:
    """Life of a process that sends back what it gets."""
    endpoint = PipeEndpoint(1, {-1: pipe}, regions={-1: region})  # type: ignore[dict-item]
    while not isinstance(message := endpoint.receive(SOON_S), Stop):
        if message is not None:
            endpoint.send(-1, message)


@pytest.fixture(params=["spawn", "forkserver"])
def answering(request: pytest.FixtureRequest) -> Iterator[tuple[PipeEndpoint, multiprocessing.Process]]:
    """An endpoint, and the process at the other end."""
    context = multiprocessing.get_context(request.param)
    here, there = context.Pipe()
    region = pair_region()
    process = context.Process(target=answer, args=(there, region), daemon=True)
    process.start()
    there.close()
    yield PipeEndpoint(-1, {1: here}, regions={1: region}), process
    process.kill()
    process.join()


def test_a_process_is_given_a_ring_when_it_starts(
        answering: tuple[PipeEndpoint, multiprocessing.Process]) -> None:
    """However it is started; nothing of it has a name in the file system."""
    before = set(Path("/dev/shm").iterdir())
    endpoint, process = answering
    for n in range(300):
        endpoint.send(1, heads(n, rows=50, value=n))
        message = endpoint.receive(SOON_S)
        assert message is not None
        assert same(message, heads(n, rows=50, value=n))
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "memfd:hetis-ring" in maps
    assert not [path for path in set(Path("/dev/shm").iterdir()) - before if "hetis" in path.name]


def test_a_peer_that_is_killed_holds_up_nobody(
        answering: tuple[PipeEndpoint, multiprocessing.Process]) -> None:
    """Who goes on sending to it comes through, and who waits for it gets nothing, in time."""
    endpoint, process = answering
    endpoint.send(1, heads(0))
    assert endpoint.receive(SOON_S) is not None
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    begun_s = time.monotonic()
    for n in range(40):
        endpoint.send(1, heads(n, rows=LARGE // 10))
    assert endpoint.receive(0.1) is None
    assert time.monotonic() - begun_s < SOON_S / 2


def test_a_process_whose_driver_is_gone_is_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its rings are never empty."""
    a, b = Pipe()
    driver, other = Pipe()
    region = pair_region()
    left = PipeEndpoint(0, {1: a}, regions={1: region})
    right = PipeEndpoint(1, {0: b, -1: other}, regions={0: region})
    driver.close()
    found: list[Message | None] = []
    begun_s = time.monotonic()
    while not any(isinstance(message, Stop) for message in found) and time.monotonic() - begun_s < SOON_S:
        left.send(1, heads(1))
        left.send(1, heads(1))
        found.append(right.receive(1.0))
    assert isinstance(found[-1], Stop)


def test_without_rings_all_goes_through_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other systems and processors."""
    monkeypatch.setattr("hetis_exec.net.rings.platform.machine", lambda: "aarch64")
    assert not has_rings()
    a, b = Pipe()
    left, right = PipeEndpoint(0, {1: a}), PipeEndpoint(1, {0: b})
    left.send(1, heads(3))
    message = right.receive(SOON_S)
    assert message is not None
    assert same(message, heads(3))
