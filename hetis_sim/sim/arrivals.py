"""How requests enter: at given times, or each when its user is done with the former one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

import simpy

from hetis_sim.control.state import RequestState
from hetis_sim.sim.clock import Clock
from hetis_sim.spec.request import Request


class UserLoop(Protocol):
    """Users who each keep one request in the system and think between two."""

    def initial(self) -> list[Request]:
        """The first request of every user."""

    def next_request(self, user: int, now_s: float) -> Request | None:
        """A user's next request, given that the former one has just ended; None when the run is over."""


class OpenArrivals:
    """Requests at their own times, whatever the system does."""

    def __init__(self, clock: Clock, requests: Sequence[Request], submit: Callable[[Request], None]) -> None:
        self._clock = clock
        self._requests = requests
        self._submit = submit
        self.next_s = requests[0].arrival_s if requests else float("inf")
        clock.process(self.arrive())

    def arrive(self) -> Generator[simpy.Event, None, None]:
        """Submit each request when it is due."""
        requests = self._requests
        for n, request in enumerate(requests):
            if request.arrival_s > self._clock.now:
                yield self._clock.at(request.arrival_s)
            self.next_s = requests[n + 1].arrival_s if n + 1 < len(requests) else float("inf")
            self._submit(request)

    def ended(self, state: RequestState) -> None:
        """Open arrivals do not react."""

    @property
    def reacts(self) -> bool:
        """Whether ends of requests bring about arrivals."""
        return False


class ClosedArrivals:
    """Requests of users who wait for their answers."""

    def __init__(self, clock: Clock, users: UserLoop, submit: Callable[[Request], None]) -> None:
        self._clock = clock
        self._users = users
        self._submit = submit
        for request in users.initial():
            self._plan(request)

    def _plan(self, request: Request) -> None:
        event = self._clock.at(request.arrival_s)
        assert event.callbacks is not None
        event.callbacks.append(lambda _: self._submit(request))

    def ended(self, state: RequestState) -> None:
        """The user thinks, then asks again."""
        request = self._users.next_request(state.request.session, self._clock.now)
        if request is not None:
            self._plan(request)

    @property
    def next_s(self) -> float:
        """Any event may be or bring about the next arrival."""
        return self._clock.peek()

    @property
    def reacts(self) -> bool:
        """Whether ends of requests bring about arrivals."""
        return True


Arrivals = OpenArrivals | ClosedArrivals
