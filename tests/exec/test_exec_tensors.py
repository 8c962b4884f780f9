"""Tensors that stay on their devices on the way to another worker: over links, and between threads.

Links of NCCL need cards; gloo's for tensors of processors are used in the same way.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import Any

import numpy as np
import pytest
from exec_models import given_for, torch
from exec_scenarios import SPREAD
from exec_toys import Fixed, given, pipeline, workload

from hetis_exec import joining
from hetis_exec.crews import all_specs
from hetis_exec.errors import ExecutorError
from hetis_exec.joining import NetSettings, library_of_link, meet, seats
from hetis_exec.kernels.cpu import CpuKernels
from hetis_exec.kernels.wire import in_place, resident_of
from hetis_exec.messages import (
    AttentionRequest,
    CacheData,
    Hidden,
    Message,
)
from hetis_exec.net.cards import NO_CARD, Card
from hetis_exec.net.codec import ArraySpec, CodecError, encode, parse
from hetis_exec.net.endpoint import Channel, NetworkEndpoint
from hetis_exec.net.frames import FrameSocket
from hetis_exec.net.handshake import new_token
from hetis_exec.net.meeting import host_meeting, join_meeting
from hetis_exec.net.tensor_wires import TensorWire, make_tensor_wire, wait_gloo, wait_nccl
from hetis_exec.net.wires import Reaper
from hetis_exec.resident import Resident
from hetis_exec.shaping import size_bytes

SOON_S = 20.0
CPU = torch.device("cpu")
KERNELS = CpuKernels(1, 4, 4)


# -- who has such links --------------------------------------------------------------------------------------

A, B, C = (Card(f"GPU-{name}", "2.28.9") for name in "abc")


@pytest.mark.parametrize(("wish", "cards", "library"), [
    ("auto", [A, B], "nccl"), ("auto", [A, B, C], "nccl"), ("host", [A, B], ""), ("gloo", [A, B], "gloo"),
    ("auto", [A, NO_CARD], ""), ("auto", [A, A], ""), ("auto", [A, B, B], ""), ("auto", [A, B, A], ""),
    ("auto", [A, B, C, C], "nccl"), ("auto", [NO_CARD, NO_CARD], ""), ("auto", [A, B, NO_CARD], "nccl"),
    ("auto", [A, B._replace(nccl="2.30.3")], ""),
])
def test_both_ends_of_a_link_need_cards_of_their_own(wish: str, cards: list[Card], library: str) -> None:
    """That no other worker of the run computes on."""
    assert library_of_link(wish, 0, 1, dict(enumerate(cards))) == library


@pytest.mark.parametrize(("links", "keeps"), [("gloo", True), ("auto", False), ("host", False)])
def test_workers_that_meet_know_which_links_carry_tensors(links: str, keeps: bool) -> None:
    """Both channels of a pair do, or neither; nobody has a link to the driver that does."""
    what = given(SPREAD, Fixed(), workload(1), **given_for("llama"))
    seated = seats(all_specs(what), NetSettings(device_links=links))
    meeting, token = host_meeting(), new_token()

    def come(device: int) -> NetworkEndpoint:
        endpoint = NetworkEndpoint(device)
        assert meet(join_meeting(meeting.place), seated[device], endpoint, token, control=0) is None
        return endpoint

    with ThreadPool(3) as pool:
        made = pool.map(come, range(3))
    assert [made[a].keeps(b, bulk) for a in range(3) for b in range(3) for bulk in (False, True)
            if a != b] == [keeps] * 12
    assert not made[0].keeps(0)
    assert not made[0].keeps(-1)
    with ThreadPool(3) as pool:
        pool.map(lambda endpoint: endpoint.close(1.0), made)


def test_a_library_that_carries_nothing_is_named_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first request."""

    def refuse(*given: Any, **more: Any) -> Any:
        raise RuntimeError("no route to card")

    monkeypatch.setattr(joining, "make_tensor_wire", refuse)
    what = given(pipeline([[0]], [4], [1]), Fixed(), workload(1), **given_for("llama"))
    seated = seats(all_specs(what), NetSettings(device_links="gloo"))
    meeting, token = host_meeting(), new_token()

    def come(device: int) -> str:
        endpoint = NetworkEndpoint(device)
        with pytest.raises(ExecutorError) as caught:
            meet(join_meeting(meeting.place), seated[device], endpoint, token, control=0)
        endpoint.close(1.0)
        return str(caught.value)

    with ThreadPool(2) as pool:
        said = pool.map(come, range(2))
    assert said == ["gloo carries no tensors between devices 0 and 1 (no route to card); "
                    "executor.device_links=host does without it"] * 2


# -- the order of messages -----------------------------------------------------------------------------------


class Mailbox:
    """A stand-in for one of NCCL's groups: sends and receives meet in the order in which they are asked for.

    One end sends and the other receives; what is asked for must have the size of what meets it.
    """

    def __init__(self) -> None:
        self._posted: SimpleQueue[Any] = SimpleQueue()
        self._lock = Lock()
        self.users: dict[str, set[int]] = {"send": set(), "recv": set()}

    def end(self, rank: int) -> MailboxEnd:
        """The group as one of its ranks has it."""
        return MailboxEnd(self, rank)


class MailboxEnd:
    """See :class:`Mailbox`."""

    def __init__(self, box: Mailbox, rank: int) -> None:
        self._box = box
        self._rank = rank

    def send(self, tensors: list[Any], peer: int, tag: int) -> Event:
        self._box.users["send"].add(self._rank)
        assert peer == 1 - self._rank
        over = Event()
        self._box._posted.put((tensors[0], over))
        return over

    def recv(self, tensors: list[Any], peer: int, tag: int) -> Event:
        self._box.users["recv"].add(self._rank)
        try:
            sent, over = self._box._posted.get(timeout=SOON_S)
        except Empty:
            raise RuntimeError("nothing has been sent") from None
        if sent.nbytes != tensors[0].nbytes:
            raise RuntimeError(f"{sent.nbytes} bytes meet a receiver of {tensors[0].nbytes}")
        tensors[0].copy_(sent)
        over.set()
        return over


def wait_event(work: Event, timeout_s: float) -> None:
    """Wait for an operation of a mailbox."""
    if not work.wait(timeout_s):
        raise RuntimeError("it does not end")


def joined(boxes: dict[tuple[Channel, str], Mailbox]) -> tuple[NetworkEndpoint, NetworkEndpoint]:
    """Two workers of one process whose links carry tensors by mailboxes."""
    made, reaper = (NetworkEndpoint(0), NetworkEndpoint(1)), Reaper()
    for channel in (Channel.DATA, Channel.CACHE):
        for rank, end in enumerate(socket.socketpair()):
            made[rank].add(1 - rank, channel, FrameSocket(end))
            up, down = (boxes.setdefault((channel, way), Mailbox()).end(rank) for way in ("up", "down"))
            outward, inward = (up, down) if rank == 0 else (down, up)
            made[rank].add_wire(1 - rank, channel, None, reaper)  # type: ignore[arg-type]
            made[rank].add_tensors(1 - rank, channel, TensorWire(outward, inward, 1 - rank, CPU, SOON_S,
                                                                 wait_event))
    return made


def message(number: int, rng: np.random.Generator, *, cache: bool) -> Message:
    """One of either link; each has another size, some are arrays of the host."""
    values = torch.full((int(rng.integers(1, 40)), 4), float(number))
    part = values.numpy() if rng.random() < 0.2 else resident_of(values)
    if cache:
        return CacheData(0, number, 0, 0, (0,), (0,), 0, part, part, False)
    return Hidden(number, part, 0.0)


def test_messages_meet_in_the_order_of_sending() -> None:
    """On two links in both directions at once, arrays of the host among them, with a busy receiver."""
    boxes: dict[tuple[Channel, str], Mailbox] = {}
    ends, count = joined(boxes), 150
    for rank, end in enumerate(ends):
        rng = np.random.default_rng(rank)
        for number in range(count):
            end.send(1 - rank, message(number, rng, cache=bool(number % 2)))
    for end in ends:
        found: dict[bool, list[int]] = {False: [], True: []}
        while sum(map(len, found.values())) < count:
            got = end.receive(SOON_S)
            assert isinstance(got, Hidden | CacheData)
            cache = isinstance(got, CacheData)
            number, values = (got.tag, got.keys) if isinstance(got, CacheData) else (got.seq, got.values)
            assert (KERNELS.from_wire(values) == number).all()
            found[cache].append(number)
        assert found == {False: list(range(0, count, 2)), True: list(range(1, count, 2))}
    for (_, way), box in boxes.items():
        assert box.users == ({"send": {0}, "recv": {1}} if way == "up" else {"send": {1}, "recv": {0}})
    for end in ends:
        end.close(1.0)


def test_cache_that_nobody_takes_holds_up_no_activations() -> None:
    """It has a link of its own."""
    boxes: dict[tuple[Channel, str], Mailbox] = {}
    left, right = joined(boxes)
    stuck = Event()
    wire = right._links[0, Channel.CACHE].tensors
    assert wire is not None
    wire._wait = lambda work, timeout_s: stuck.wait(SOON_S)  # type: ignore[assignment]
    values = resident_of(torch.ones(3, 4))
    left.send(1, CacheData(0, 1, 0, 0, (0,), (0,), 0, values, values, False))
    left.send(1, Hidden(5, values, 0.0))
    got = right.receive(SOON_S)
    assert isinstance(got, Hidden)
    assert got.seq == 5
    stuck.set()
    assert isinstance(right.receive(SOON_S), CacheData)
    for end in (left, right):
        end.close(1.0)


def test_a_link_that_carries_no_tensors_is_no_way_for_them() -> None:
    """Neither for who sends, nor for who is told that some come."""
    one, other = socket.socketpair()
    left, right = NetworkEndpoint(0), NetworkEndpoint(1)
    left.add(1, Channel.DATA, FrameSocket(one))
    right.add(0, Channel.DATA, FrameSocket(other))
    sent = Hidden(5, resident_of(torch.ones(3, 4)), 0.0)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="device 0 has no way for tensors to device 1"):
        left.send(1, sent)
    left._links[1, Channel.DATA].frames.send(encode(sent)[0])
    deadline_s = time.monotonic() + SOON_S
    while 0 not in right.lost and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert "tensors on a link that carries none" in right.lost[0][0]


# -- wires ---------------------------------------------------------------------------------------------------


def wires() -> tuple[TensorWire, TensorWire]:
    """Both ends of a link over gloo, in one process."""
    meeting = host_meeting()

    def end(rank: int) -> TensorWire:
        return make_tensor_wire(join_meeting(meeting.place).store, "a", rank, "gloo", meeting.place, SOON_S,
                                "cpu", urgent=True)

    with ThreadPool(2) as pool:
        left, right = pool.map(end, range(2))
    return left, right


def test_wires_carry_tensors_of_every_type_and_shape() -> None:
    """Strided ones, empty ones and numbers; bfloat16 as its bits; in both directions at once."""
    left, right = wires()
    tensors = [torch.arange(24.0).view(2, 3, 4).transpose(0, 2), torch.empty(0, 3), torch.tensor(7),
               torch.randn(5, 7).bfloat16(), torch.randn(3).half(), torch.randn(2).double(),
               torch.arange(9, dtype=torch.uint8), torch.randn(300_000)]
    sent = [resident_of(tensor) for tensor in tensors]
    specs = [ArraySpec(array.dtype.str, array.shape) for array in sent]
    posted = [wire.send(sent) for wire in (left, right)]
    small = [resident_of(tensor) for tensor in tensors[:-1]]
    posted += [left.send(small)]
    assert [len(pieces) for pieces in posted] == [7, 7, 1]
    for wire in (right, left):
        for got, wanted in zip(wire.receive(specs), tensors, strict=True):
            tensor = in_place(got, CPU)
            assert tensor.dtype == wanted.dtype
            assert torch.equal(tensor, wanted)
    assert [array.shape for array in right.receive(specs[:-1])] == [array.shape for array in small]
    for wire, pieces in zip((left, right, left), posted, strict=True):
        for piece in pieces:
            wire.wait(piece)
    assert left.send([resident_of(torch.empty(0, 3))]) == []
    assert right.receive([ArraySpec("<f4", (0, 3))])[0].shape == (0, 3)


def test_what_small_messages_hold_may_change() -> None:
    """They have a copy."""
    left, right = wires()
    values = torch.ones(4)
    sent = left.send([resident_of(values)])
    values.zero_()
    assert right.receive([ArraySpec("<f4", (4,))])[0].tensor.tolist() == [1.0] * 4
    left.wait(sent[0])


def test_a_wire_whose_other_end_is_gone_is_lost() -> None:
    """And one on which nothing comes in time."""
    left, right = wires()
    right.close()
    with pytest.raises(RuntimeError):
        left.receive([ArraySpec("<f4", (4,))])
    left, right = wires()
    left._timeout_s = 0.1
    with pytest.raises(RuntimeError):
        left.receive([ArraySpec("<f4", (4,))])


class Work:
    """An operation of NCCL."""

    def __init__(self, looks: float, error: Exception | None = None) -> None:
        self._looks = looks
        self._error = error

    def is_completed(self) -> bool:
        self._looks -= 1
        return self._looks < 0

    def exception(self) -> Exception | None:
        return self._error


def test_operations_of_nccl_are_looked_at_until_they_are_over() -> None:
    """Its own wait lets the stream wait, which says nothing of whether something has come."""
    wait_nccl(Work(5), SOON_S)
    with pytest.raises(RuntimeError, match=r"nothing has come for 0\.05 s"):
        wait_nccl(Work(float("inf")), 0.05)
    with pytest.raises(RuntimeError, match="unhandled cuda error"):
        wait_nccl(Work(0, RuntimeError("unhandled cuda error")), SOON_S)
    assert wait_gloo is not wait_nccl


# -- messages ------------------------------------------------------------------------------------------------


def test_heads_say_that_arrays_stay_on_devices() -> None:
    """All of a message's, or none."""
    here, there = resident_of(torch.ones(2, 3).bfloat16()), np.ones((2, 3), dtype=np.float32)
    head, arrays = encode(AttentionRequest(1, 0, 0, here, here, here))
    read = parse(head)
    assert read.stay
    assert arrays == [here] * 3
    assert read.arrays == (ArraySpec("<i2", (2, 3)),) * 3
    assert not parse(encode(AttentionRequest(1, 0, 0, there, there, there))[0]).stay
    with pytest.raises(CodecError, match="AttentionRequest with some of its arrays on devices"):
        encode(AttentionRequest(1, 0, 0, here, there, there))
    assert size_bytes(AttentionRequest(1, 0, 0, here, here, here)) == 64 + 3 * 12


@pytest.mark.parametrize("make", [lambda: CpuKernels(8, 4, 4, dtype=torch.bfloat16)])
def test_cache_may_leave_as_tensors(make: Callable[[], CpuKernels]) -> None:
    """The same as arrays; what is read may be freed meanwhile."""
    kernels, units = make(), np.arange(4).reshape(1, 2, 2)
    spots = kernels.spots(np.repeat(np.arange(4), 4)[None], np.tile(np.arange(4), 4))
    kernels.write(spots, 0, torch.randn(16, 4).bfloat16(), torch.randn(16, 4).bfloat16())
    kept, packed = kernels.leave(units, slice(1, 7), True), kernels.leave(units, slice(1, 7))
    assert all(isinstance(array, Resident) for array in kept.arrays())
    before: Sequence[Any] = [kernels.from_wire(array) for array in packed.arrays()]
    kernels.write(spots, 0, torch.zeros(16, 4).bfloat16(), torch.zeros(16, 4).bfloat16())
    for array, wanted in zip(kept.arrays(), before, strict=True):
        assert torch.equal(kernels.from_wire(array), wanted)
