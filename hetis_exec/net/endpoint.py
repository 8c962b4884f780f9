"""An endpoint on connections: one for each peer and channel.

A thread for each connection takes in what comes, so that a slow link holds up no other one, and so that
data moves while its receiver computes. Small arrays ride in the frames (they are *eager*); larger ones
follow over a wire (:mod:`hetis_exec.net.wires`), once their frame has told the receiver to ask for them.
Tensors on devices do so whatever their size, where a link has a way for them
(:mod:`hetis_exec.net.tensor_wires`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from threading import Condition, Thread, Timer
from typing import TYPE_CHECKING

from hetis_exec.errors import ExecutorError
from hetis_exec.messages import DRIVER, Failed, Message, Stop
from hetis_exec.net.codec import CodecError, build, encode, message_of, parse
from hetis_exec.net.frames import Frame, FrameSocket
from hetis_exec.resident import Resident
from hetis_exec.shaping import Shaper, Shapes, is_bulk
from hetis_exec.transport import Inbox

if TYPE_CHECKING:
    from hetis_exec.net.tensor_wires import TensorWire
    from hetis_exec.net.wires import GlooWire, Reaper

GOODBYE = b"bye"
"""Head of the last frame of a connection that ends in peace."""

GRACE_S = 1.0
"""A worker that has lost a peer leaves it to the driver to notice, for so long: it may know more."""

LAST_S = 2.0
"""A worker whose driver is gone ends within this time, whatever it is doing."""

PATIENCE_S = 60.0
"""How long a thread sleeps at a time."""

EAGER_BYTES = 1 << 20


class Channel(IntEnum):
    """What a connection is for."""

    CONTROL = 0
    DATA = 1
    CACHE = 2


@dataclass(slots=True)
class Link:
    """A connection to a peer.

    Attributes:
        wire: carries its large arrays, if it has one.
        tensors: carries tensors that lie on devices, if it has one.
        parted: the peer has said goodbye.
        ended: nothing comes from it any more.
    """

    peer: int
    channel: Channel
    frames: FrameSocket
    wire: GlooWire | None = None
    tensors: TensorWire | None = None
    parted: bool = False
    ended: bool = False
    thread: Thread | None = None


class NetworkEndpoint:
    """One party of a run: the driver, or a worker.

    Args:
        eager_bytes: arrays of a message up to so many bytes ride in its frame.
        shapes: links to emulate.
        orphaned: called some time after a worker's driver is gone, should the worker not have ended by then.

    Attributes:
        lost: peers whose connection has ended without a goodbye, in that order: how, and when on the
            monotonic clock.
        stopped: whether this party has been told to stop.
    """

    def __init__(self, address: int, eager_bytes: int = EAGER_BYTES, shapes: Shapes | None = None,
                 orphaned: Callable[[], object] | None = None) -> None:
        self.address = address
        self.lost: dict[int, tuple[str, float]] = {}
        self.stopped = False
        self._eager_bytes = eager_bytes
        self._orphaned = orphaned
        self._shaper = Shaper(address, shapes or {})
        self._inbox = Inbox()
        self._links: dict[tuple[int, Channel], Link] = {}
        self._early: defaultdict[int, list[Message]] = defaultdict(list)
        self._changed = Condition()
        self._closing = False
        self._ending = False
        self._reaper: Reaper | None = None

    # -- connections ---------------------------------------------------------------------------------

    def add(self, peer: int, channel: Channel, frames: FrameSocket) -> None:
        """Take a connection into use."""
        link = Link(peer, channel, frames)
        link.thread = Thread(target=self._take_in, args=(link,), name=f"link-{self.address}-{peer}",
                             daemon=True)
        with self._changed:
            self._links[peer, channel] = link
            for message in self._early.pop(peer, []) if channel == Channel.CONTROL else ():
                frames.send(*encode(message))
            self._changed.notify_all()
        link.thread.start()

    def add_wire(self, peer: int, channel: Channel, wire: GlooWire, reaper: Reaper) -> None:
        """Give a link a wire for large arrays; both ends have one before either uses it."""
        self._links[peer, channel].wire = wire
        self._reaper = reaper

    def add_tensors(self, peer: int, channel: Channel, wire: TensorWire) -> None:
        """The same for tensors on devices; the link has got a wire for arrays before."""
        self._links[peer, channel].tensors = wire

    def keeps(self, target: int, bulk: bool = False) -> bool:
        link = self._links.get((target, Channel.CACHE if bulk else Channel.DATA))
        return link is not None and link.tensors is not None

    @property
    def peers(self) -> list[int]:
        """Whoever is connected or has been."""
        return sorted({peer for peer, _ in list(self._links)})

    def await_links(self, count: int, timeout_s: float) -> bool:
        """Wait for so many connections; whether they have come in time, and before the run has ended."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._links) >= count or self._ending, timeout_s)
            return len(self._links) >= count

    # -- messages ------------------------------------------------------------------------------------

    def send(self, target: int, message: Message) -> None:
        """Hand a message over; what a target that is gone does not get is lost.

        Raises:
            ExecutorError: there is no such connection, between workers.
        """
        if target == self.address:
            self._inbox.put(message)
            return
        channel = self._channel(target, message)
        link = self._links.get((target, channel))
        if link is None:
            self._hold(target, channel, message)
            return
        head, arrays = encode(message)
        due_s = self._shaper.due_s(target, message)
        wire: GlooWire | TensorWire | None = link.wire
        if any(isinstance(array, Resident) for array in arrays):
            wire = link.tensors
            if wire is None:
                raise ExecutorError(f"device {self.address} has no way for tensors to device {target}")
        elif wire is None or sum(array.nbytes for array in arrays) <= self._eager_bytes:
            link.frames.send(head, arrays, due_s)
            return
        assert self._reaper is not None
        try:
            sends = wire.send(arrays)
        except RuntimeError as error:
            self._lose(link, f"its wire has failed: {error}")
            return
        link.frames.send(head, (), due_s)
        self._reaper.add(wire, sends)

    def _channel(self, target: int, message: Message) -> Channel:
        if DRIVER in (target, self.address):
            return Channel.CONTROL
        return Channel.CACHE if is_bulk(message) else Channel.DATA

    def _hold(self, target: int, channel: Channel, message: Message) -> None:
        """Keep what is meant for a worker that has not called yet."""
        if channel != Channel.CONTROL:
            raise ExecutorError(f"device {self.address} has no connection to device {target} for "
                                f"{type(message).__name__}")
        with self._changed:
            link = self._links.get((target, channel))
            if link is None:
                self._early[target].append(message)
                return
        link.frames.send(*encode(message))

    def receive(self, timeout_s: float) -> Message | None:
        """The next message from anyone, within the time."""
        message = self._inbox.get(timeout_s)
        if isinstance(message, Stop):
            self.stopped = True
        return message

    # -- a connection's thread -----------------------------------------------------------------------

    def _take_in(self, link: Link) -> None:
        """Take in what comes on one link, to its end."""
        try:
            while (frame := link.frames.receive()) is not None:
                if frame.head == GOODBYE:
                    link.parted = True
                else:
                    self._put(self._message(link, frame), frame.due_s)
        except (ExecutorError, RuntimeError, MemoryError) as error:
            self._lose(link, f"its connection has failed: {error}")
        else:
            self._lose(link, "its connection has ended")

    def _put(self, message: Message, due_s: float) -> None:
        self._inbox.put(message, due_s)
        if isinstance(message, Stop):
            with self._changed:
                self._ending = True
                self._changed.notify_all()

    def _message(self, link: Link, frame: Frame) -> Message:
        head = parse(frame.head)
        if head.stay:
            if link.tensors is None or len(frame.body):
                raise CodecError("tensors on a link that carries none, or in a frame")
            return message_of(head, link.tensors.receive(head.arrays))
        body = frame.body
        if link.wire is not None and not len(body) and head.offsets[-1]:
            body = link.wire.receive([spec.size_bytes for spec in head.arrays])
        if len(body) != head.offsets[-1]:
            raise CodecError(f"{len(body)} bytes of arrays, their message has {head.offsets[-1]}")
        return build(head, body)

    def _lose(self, link: Link, how: str) -> None:
        with self._changed:
            link.ended = True
            known = self._closing or link.parted or link.peer in self.lost
            if not known:
                self.lost[link.peer] = how, time.monotonic()
            self._changed.notify_all()
        if self.address == DRIVER or self._closing:
            return
        if link.peer == DRIVER:
            # Whatever this worker waits for will not come.
            self._put(Stop(at_once=True), 0.0)
            _daemon(LAST_S, self._end)
        elif not known:
            _daemon(GRACE_S, lambda: self._report(link.peer, how))

    def _end(self) -> None:
        if self._orphaned is not None and not self._closing:
            self._orphaned()

    def _report(self, peer: int, how: str) -> None:
        """Tell the driver of a lost peer, unless it has ended the run meanwhile."""
        if not self.stopped and not self._closing:
            self.send(DRIVER, Failed(self.address, f"device {peer} is lost to it: {how}"))

    # -- the end -------------------------------------------------------------------------------------

    def await_stop(self, timeout_s: float) -> None:
        """Wait to be told to stop."""
        deadline_s = time.monotonic() + timeout_s
        while not self.stopped and (left_s := deadline_s - time.monotonic()) > 0:
            self.receive(min(left_s, PATIENCE_S))

    def await_parting(self, timeout_s: float) -> bool:
        """Wait for all peers to hang up; whether they have."""
        with self._changed:
            return self._changed.wait_for(lambda: all(link.ended for link in self._links.values()), timeout_s)

    def close(self, timeout_s: float) -> None:
        """Send what is left and say goodbye, within a time."""
        self._closing = True
        deadline_s = time.monotonic() + timeout_s
        if self._reaper is not None:
            self._reaper.close(timeout_s)
        for link in self._links.values():
            link.frames.send(GOODBYE)
        for link in self._links.values():
            link.frames.close(max(0.0, deadline_s - time.monotonic()))
        # Threads inside torch.distributed must not outlive the interpreter.
        for link in self._links.values():
            if link.thread is not None:
                link.thread.join(max(0.0, deadline_s - time.monotonic()))
            if link.tensors is not None:
                link.tensors.close()
            link.wire = link.tensors = None
        self._reaper = None


def _daemon(after_s: float, action: Callable[[], object]) -> None:
    timer = Timer(after_s, action)
    timer.daemon = True
    timer.start()
