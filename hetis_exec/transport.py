"""How messages travel: an interface, and its implementation inside one process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from heapq import heappop, heappush
from queue import Empty, SimpleQueue
from typing import Protocol

from hetis_exec.messages import Message
from hetis_exec.shaping import Shaper, Shapes, is_bulk

Delay = Callable[[int, int, Message], float]
"""Seconds that a message from a sender to a target spends on the wire."""


class Endpoint(Protocol):
    """One party's access to the others. Messages from one sender come in the order of sending."""

    def send(self, target: int, message: Message) -> None:
        """Hand a message over; returns without waiting for its receiver."""

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None if none comes in time."""

    def keeps(self, target: int, bulk: bool = False) -> bool:
        """Whether arrays for a target may be tensors that stay on their device; ``bulk`` ones are cache."""


class Transport(Protocol):
    """Connects the driver and the workers.

    Attributes:
        cards: addresses of workers whose tensors lie on cards that all of them can reach.
    """

    cards: frozenset[int]

    def endpoint(self, address: int) -> Endpoint:
        """The endpoint of a party. Each is used by one thread only."""


class Inbox:
    """Messages for one party, each handed out when it is due; any thread puts, one gets.

    Points in time are on the monotonic clock, which all processes of a host share.
    """

    def __init__(self) -> None:
        self._incoming: SimpleQueue[tuple[float, Message]] = SimpleQueue()
        self._on_the_way: list[tuple[float, int, Message]] = []
        self._received = 0

    def put(self, message: Message, due_s: float = 0.0) -> None:
        """Take a message in."""
        self._incoming.put((due_s, message))

    def get(self, timeout_s: float) -> Message | None:
        """The next message that is due within the time; None if there is none."""
        if timeout_s <= 0.0 and not self._on_the_way and self._incoming.empty():
            return None
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._take_in()
            now_s = time.monotonic()
            if self._on_the_way and self._on_the_way[0][0] <= now_s:
                return heappop(self._on_the_way)[2]
            until_s = min(deadline_s, self._on_the_way[0][0] if self._on_the_way else deadline_s)
            if until_s <= now_s:
                return None
            try:
                self._push(self._incoming.get(timeout=until_s - now_s))
            except Empty:
                continue

    @property
    def next_due_s(self) -> float:
        """When the first of the messages that are on their way is due; infinite if there is none."""
        self._take_in()
        return self._on_the_way[0][0] if self._on_the_way else math.inf

    def _take_in(self) -> None:
        while True:
            try:
                self._push(self._incoming.get_nowait())
            except Empty:
                return

    def _push(self, item: tuple[float, Message]) -> None:
        self._received += 1
        heappush(self._on_the_way, (item[0], self._received, item[1]))


class InProcessTransport:
    """Queues between threads.

    ``delay`` puts messages on a wire of some length, ``shapes`` on links of some latency and bandwidth.
    Cache is sent at low priority: it never holds up other messages of its link, and keeps its own order.
    """

    def __init__(self, delay: Delay | None = None, shapes: Shapes | None = None) -> None:
        self._delay = delay
        self.shapes = shapes or {}
        self.cards: frozenset[int] = frozenset()
        self._inboxes: dict[int, Inbox] = {}

    def inbox(self, address: int) -> Inbox:
        """What is on its way to a party."""
        return self._inboxes.setdefault(address, Inbox())

    def delay_s(self, sender: int, target: int, message: Message) -> float:
        """Seconds on the wire."""
        return self._delay(sender, target, message) if self._delay else 0.0

    def endpoint(self, address: int) -> QueueEndpoint:
        """The endpoint of a party."""
        return QueueEndpoint(self, address)


class QueueEndpoint:
    """One party of an :class:`InProcessTransport`."""

    def __init__(self, transport: InProcessTransport, address: int) -> None:
        self._transport = transport
        self._address = address
        self._inbox = transport.inbox(address)
        self._shaper = Shaper(address, transport.shapes)
        self._last_due_s: dict[tuple[int, bool], float] = {}

    def send(self, target: int, message: Message) -> None:
        """Put a message into the target's queue, due when its time on the wire is over."""
        delay_s = self._transport.delay_s(self._address, target, message)
        due_s = self._shaper.due_s(target, message)
        if delay_s > 0 or self._last_due_s:
            link = (target, is_bulk(message))
            due_s = max(due_s, time.monotonic() + delay_s, self._last_due_s.get(link, 0.0))
            self._last_due_s[link] = due_s
        self._transport.inbox(target).put(message, due_s)

    def keeps(self, target: int, bulk: bool = False) -> bool:
        """Between cards of one process."""
        return {self._address, target} <= self._transport.cards

    def receive(self, timeout_s: float) -> Message | None:
        """The next message that is due within the time."""
        return self._inbox.get(timeout_s)
