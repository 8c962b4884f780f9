"""Where requests come from: a workload that is known before the run, or whoever asks while it goes on."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

from hetis_exec.texts import Prompt
from hetis_sim.control.state import Ending
from hetis_sim.spec.request import Request

POLL_S = 0.1
"""How often the workers are looked after while nothing happens."""

ONLINE_POLL_S = 0.005
"""How long a request that comes to an idle system may lie unseen."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes in; ``prompt`` is None where the run's input knows it."""

    request: Request
    prompt: Prompt | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A request is to end early."""

    request_id: int
    reason: Ending


class Source(Protocol):
    """Requests in the order in which they come.

    Attributes:
        poll_s: how often it is to be looked at while nothing happens.
    """

    poll_s: float

    def next_s(self) -> float:
        """When the next one is due, in seconds since the run began; infinite while none is known."""

    def take(self, start_s: float) -> Arrival | Ended:
        """The next one, which is due; the run began at ``start_s`` of the performance counter."""

    def due(self, now_s: float) -> int:
        """How many are due and not taken."""

    @property
    def over(self) -> bool:
        """Whether no more will come."""


class Trace:
    """The requests of a workload, each at its time."""

    poll_s = POLL_S

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._taken = 0

    def next_s(self) -> float:
        return math.inf if self.over else self._requests[self._taken].arrival_s

    def take(self, start_s: float) -> Arrival:
        self._taken += 1
        return Arrival(self._requests[self._taken - 1])

    def due(self, now_s: float) -> int:
        return bisect_right(self._requests, now_s, lo=self._taken, key=lambda r: r.arrival_s) - self._taken

    @property
    def over(self) -> bool:
        return self._taken == len(self._requests)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request from outside, and when it came, on the performance counter."""

    request_id: int
    prompt: Prompt
    max_tokens: int
    asked_s: float = field(default_factory=time.perf_counter)


class Counter:
    """Requests of whoever asks, from any thread, until it is closed."""

    poll_s = ONLINE_POLL_S

    def __init__(self) -> None:
        self._queue: SimpleQueue[Asked | Ended] = SimpleQueue()
        self._closed = False

    def ask(self, asked: Asked) -> None:
        """Hand a request in."""
        self._queue.put(asked)

    def end(self, ended: Ended) -> None:
        """Say that nobody waits for a request any more."""
        self._queue.put(ended)

    def close(self) -> None:
        """No more will come."""
        self._closed = True

    def next_s(self) -> float:
        return math.inf if self._queue.empty() else 0.0

    def take(self, start_s: float) -> Arrival | Ended:
        item = self._queue.get_nowait()
        if isinstance(item, Ended):
            return item
        arrival_s = max(0.0, item.asked_s - start_s)
        return Arrival(Request(item.request_id, arrival_s, len(item.prompt.tokens), item.max_tokens),
                       item.prompt)

    def due(self, now_s: float) -> int:
        return self._queue.qsize()

    @property
    def over(self) -> bool:
        return self._closed and self._queue.empty()
