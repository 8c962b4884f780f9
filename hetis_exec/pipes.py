"""Messages between processes of this host: a pipe for each pair, and beside it rings of shared memory.

What a step sends in each layer goes through a ring (:mod:`hetis_exec.net.lanes`), where there is one and it
has room; all else goes through the pipe. Between workers messages are numbered, so that they come in the
order of sending whichever way they take. A receiver that finds nothing looks a little longer, if that has
been worth while lately, and then sleeps on its pipes; whoever writes to a ring then wakes it by an empty
message.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from threading import Lock, Thread

from hetis_exec.messages import DRIVER, Message, Stop
from hetis_exec.net.lanes import LaneReader, LaneWriter
from hetis_exec.net.rings import Region, RingReader, RingWriter
from hetis_exec.shaping import Shaper, Shapes
from hetis_exec.transport import Inbox

AT_ONCE_BYTES = 1 << 15
"""Messages up to this size are written by whoever sends them: a free pipe has room for several."""

RING_BYTES = 4 << 20
"""Of one direction between two workers. Memory that is never written to is never taken."""

LOOK_S = 1e-2
"""A receiver that always finds something in its rings looks at its pipes this often."""

INTERRUPTED_S = 5e-4
"""Looking once takes some microseconds: when it has taken so long, something else has had the core."""

REST_LEAST_S, REST_MOST_S = 2e-3, 0.5
"""A receiver whose core something else wants sleeps at once for so long: who sleeps has the core when it is
woken, who looks all the time may have to wait for it."""

REST_GROWS, REST_SHRINKS = 4.0, 0.9
"""How that changes when looking is interrupted, and when it finds something: a driver beside a worker
interrupts it once in a step, other work again and again."""

WAKE = b""
"""What wakes a receiver: no message is as short."""

CLOSE_S = 2.0
"""What is left at the end is given so long to be written."""

Packed = memoryview | bytes


def pair_region() -> Region:
    """Memory for both directions between two workers."""
    return Region(2 * RING_BYTES)


@dataclass(slots=True)
class Peer:
    """What leads to another party.

    Attributes:
        inward, outward: its rings; None where messages go through the pipe alone.
        sent, expected: numbers of the next message there and from there.
        early: messages of the pipe before which others are to come: number, when it is due, and it.
    """

    pipe: Connection
    inward: LaneReader | None = None
    outward: LaneWriter | None = None
    sent: int = 0
    expected: int = 0
    early: deque[tuple[int, float, Message]] = field(default_factory=deque)


class PipeEndpoint:
    """One party of a set of processes: a pipe to every other one.

    A party whose peer is busy or gone goes on receiving: what a pipe does not take at once is written
    by a thread of its own, and so is all that comes after it.
    A pipe whose other end is gone is forgotten: the driver sees to the rest. If it is the driver
    that is gone, the party is told to stop.

    Args:
        regions: memory that is shared with a peer, by its address.
        spin_s: how long to look for messages before sleeping, at most.
    """

    def __init__(self, address: int, pipes: Mapping[int, Connection], shapes: Shapes | None = None,
                 regions: Mapping[int, Region] | None = None, spin_s: float = 0.0) -> None:
        self._address = address
        self._inbox = Inbox()
        self._shaper = Shaper(address, shapes or {})
        self._outbox: SimpleQueue[tuple[Connection, Packed] | None] = SimpleQueue()
        self._in_outbox = 0
        self._counting = Lock()
        self._readable = select.poll()
        self._peers = {target: Peer(pipe) for target, pipe in pipes.items()}
        for target, region in (regions or {}).items():
            mine, other = (0, RING_BYTES) if address < target else (RING_BYTES, 0)
            self._peers[target].outward = LaneWriter(RingWriter(region, mine, RING_BYTES))
            self._peers[target].inward = LaneReader(RingReader(region, other, RING_BYTES))
        self._laned = [(peer, peer.inward) for peer in self._peers.values() if peer.inward is not None]
        self._open: dict[int, Peer] = {}
        for peer in self._peers.values():
            self._open[peer.pipe.fileno()] = peer
            self._readable.register(peer.pipe, select.POLLIN)
        self._looked_s = 0.0
        self._rest_until_s, self._rest_s = 0.0, REST_LEAST_S
        self._spin_max_s = self._spin_s = spin_s if self._laned else 0.0
        self._writer = Thread(target=self._write, name=f"outbox-{address}", daemon=True)
        self._writer.start()

    # -- sending -------------------------------------------------------------------------------------

    def send(self, target: int, message: Message) -> None:
        """Have a message written."""
        if target == self._address:
            self._inbox.put(message)
            return
        peer, due_s = self._peers[target], self._shaper.due_s(target, message)
        number = peer.sent
        peer.sent += 1
        wakes = peer.outward.send(number, due_s, message) if peer.outward is not None else None
        if wakes is None:
            self._post(peer.pipe, ForkingPickler.dumps((number, due_s, message)))
        elif wakes:
            self._post(peer.pipe, WAKE)

    def _post(self, pipe: Connection, packed: Packed) -> None:
        if not self._in_outbox and len(packed) <= AT_ONCE_BYTES and _takes(pipe):
            _write_to(pipe, packed)
            return
        with self._counting:
            self._in_outbox += 1
        self._outbox.put((pipe, packed))

    def keeps(self, target: int, bulk: bool = False) -> bool:
        """Pipes and rings carry bytes."""
        return False

    def close(self) -> None:
        """Write what is left."""
        self._outbox.put(None)
        self._writer.join(CLOSE_S)

    def _write(self) -> None:
        while (item := self._outbox.get()) is not None:
            _write_to(*item)
            with self._counting:
                self._in_outbox -= 1

    # -- receiving -----------------------------------------------------------------------------------

    def receive(self, timeout_s: float) -> Message | None:
        """The next message from anyone, within the time."""
        begun_s = time.monotonic()
        if begun_s - self._looked_s > LOOK_S and self._laned and (stop := self._look_at_pipes(0.0)):
            return stop
        message = self._at_hand()
        if message is not None or timeout_s <= 0.0:
            return message or self._look_at_pipes(0.0) or self._at_hand()
        deadline_s = begun_s + timeout_s
        if self._spin_max_s and begun_s > self._rest_until_s:
            message = self._spin(begun_s, min(deadline_s, begun_s + self._spin_s))
        if message is None:
            message = self._sleep(deadline_s)
        # Looking pays where messages come soon; where they do not it is given up step by step.
        soon = time.monotonic() - begun_s <= self._spin_max_s
        self._spin_s = self._spin_max_s if soon else self._spin_s / 2
        return message

    def _at_hand(self) -> Message | None:
        """A message that has been taken in and is due, or that is in a ring."""
        return self._inbox.get(0.0) or self._from_rings()

    def _from_rings(self) -> Message | None:
        for peer, lane in self._laned:
            while lane.ring.next() == peer.expected:
                due_s, message = lane.take()
                peer.expected += 1
                self._take_early(peer)
                if not due_s:
                    return message
                self._inbox.put(message, due_s)
        return None

    def _take_early(self, peer: Peer) -> None:
        """Take in what has come through a pipe, as far as it is its turn."""
        while peer.early and peer.early[0][0] == peer.expected:
            _, due_s, message = peer.early.popleft()
            self._inbox.put(message, due_s)
            peer.expected += 1

    def _spin(self, now_s: float, until_s: float) -> Message | None:
        """Look for a message for some time, or until something else has had this core meanwhile."""
        while now_s < until_s:
            before_s = now_s
            for _ in range(8):
                message = self._from_rings()
                if message is not None:
                    self._rest_s = max(REST_LEAST_S, self._rest_s * REST_SHRINKS)
                    return message
            message = self._look_at_pipes(0.0) or self._inbox.get(0.0)
            if message is not None:
                return message
            # A driver that shares the core is let in at once.
            os.sched_yield()
            now_s = time.monotonic()
            if now_s - before_s > INTERRUPTED_S:
                self._rest_until_s = now_s + self._rest_s
                self._rest_s = min(REST_MOST_S, self._rest_s * REST_GROWS)
                return None
        return None

    def _sleep(self, deadline_s: float) -> Message | None:
        while True:
            for _, lane in self._laned:
                lane.ring.sleep()
            message, left_s = self._at_hand(), 0.0
            if message is None:
                now_s = time.monotonic()
                left_s = max(0.0, min(deadline_s, self._inbox.next_due_s) - now_s)
                message = self._look_at_pipes(left_s)
            for _, lane in self._laned:
                lane.ring.wake()
            message = message or self._at_hand()
            if message is not None or time.monotonic() >= deadline_s:
                return message

    def _look_at_pipes(self, timeout_s: float) -> Stop | None:
        """Take in a message of each pipe that has some, within the time; Stop if the driver is gone."""
        if not self._open:
            time.sleep(timeout_s)
            return None
        found = self._readable.poll(math.ceil(1e3 * timeout_s))
        stopped = [not self._take_in(self._open[number]) for number, _ in found]
        self._looked_s = time.monotonic()
        return Stop(at_once=True) if any(stopped) else None

    def _take_in(self, peer: Peer) -> bool:
        """Take in one message; False if the driver is gone."""
        try:
            packed = peer.pipe.recv_bytes()
        except (EOFError, OSError):
            number = peer.pipe.fileno()
            self._readable.unregister(number)
            del self._open[number]
            driver = self._peers.get(DRIVER)
            return peer is not driver
        if packed == WAKE:
            return True
        # Its sender is a process that this one's driver has started, over a pipe that both were given.
        peer.early.append(ForkingPickler.loads(packed))
        self._take_early(peer)
        return True


def _takes(pipe: Connection) -> bool:
    """Whether a pipe takes a small message at once; it says so while most of its buffer is free."""
    asked = select.poll()
    asked.register(pipe, select.POLLOUT)
    return asked.poll(0) == [(pipe.fileno(), select.POLLOUT)]


def _write_to(pipe: Connection, packed: Packed) -> None:
    with suppress(OSError):
        pipe.send_bytes(packed)
