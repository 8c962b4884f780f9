"""SimPy's environment with absolute wake-up times and a limit on events."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from operator import attrgetter
from typing import Any

import simpy

from hetis_sim.spec.errors import HetisError

# SimPy's own events have priorities 0 and 1. Whoever takes work acts after everything else
# that happens at the same instant, so that a decision sees all of it.
LAST = 2


class EventBudgetError(HetisError):
    """A run took more events than its workload can need."""


class Clock(simpy.Environment):
    """Simulated time.

    SimPy schedules by delay, and ``now + (t - now)`` need not equal ``t``; an exact time
    makes runs with and without collapsed steps comparable to the last bit. Beside SimPy's events the
    queue holds plain calls: what nobody waits for needs no event.
    """

    # Read several times in every event: a property without a Python function.
    now = property(attrgetter("_now"))

    def __init__(self, event_budget: int) -> None:
        super().__init__()
        self.event_budget = event_budget
        self.events = 0

    def at(self, time_s: float, priority: int = 1) -> simpy.Event:
        """An event that happens at an absolute time, at the earliest now."""
        event = simpy.Event(self)
        event._ok = True
        event._value = None
        entry: Any = (max(time_s, self._now), priority, next(self._eid), event)
        heappush(self._queue, entry)
        return event

    def call(self, time_s: float, action: Callable[[], None], priority: int = LAST) -> None:
        """Do something at an absolute time."""
        now = self._now
        entry: Any = (time_s if time_s > now else now, priority, next(self._eid), action)
        heappush(self._queue, entry)

    def step(self) -> None:
        """Process the next event.

        Raises:
            EventBudgetError: the budget is used up.
        """
        self.events += 1
        if self.events > self.event_budget:
            raise EventBudgetError(f"event_budget={self.event_budget} is used up at {self.now:.3f} simulated "
                                   "seconds; raise sim.event_budget if the workload really needs more")
        queue: list[Any] = self._queue
        if not queue or isinstance(queue[0][3], simpy.Event):
            super().step()
        else:
            self._now, _, _, action = heappop(queue)
            action()
