"""Closed loops: users who wait for an answer, think, and ask again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from hetis_sim.spec.errors import require
from hetis_sim.spec.request import Request
from traces.lengths import Lengths, LengthSource
from traces.limits import Limits, collect, joined
from traces.rng import RngStreams
from traces.table import FloatArray, TraceTable
from traces.workload import Workload, prefix_of

POOL_MIN = 1024
HASHED_MAX = 100_000


class Pool:
    """Lengths and think times by index, drawn as far as they are needed."""

    def __init__(self, source: LengthSource, limits: Limits, think_s: float, think: str,
                 streams: RngStreams) -> None:
        self._source = source
        self._limits = limits
        self._think_s = think_s
        self._think = think
        self._rng = streams.stream("think")
        self.lengths = Lengths(np.zeros(0, np.int64), np.zeros(0, np.int64))
        self.think_times_s: FloatArray = np.zeros(0)

    def reach(self, count: int) -> None:
        """Make sure that indices below ``count`` are there."""
        have = len(self.think_times_s)
        if count <= have:
            return
        more = max(count - have, have, POOL_MIN)
        block = collect(self._source, self._limits, more)
        self.lengths = joined(block) if not have else joined(self.lengths, block)
        unit = self._rng.standard_exponential(more) if self._think == "exponential" else np.ones(more)
        self.think_times_s = np.concatenate((self.think_times_s, unit * self._think_s))


@dataclass(frozen=True, slots=True, eq=False)
class ClosedLoopWorkload(Workload):
    """N users, each with at most one request in the system.

    The k-th request of user u has the lengths and the think time of index ``u + k N`` of
    two endless random rows (a trace is gone round again and again), so a user asks for
    the same under every policy, however fast it answers. With ``common_queue`` the k-th request of all has
    index k.

    Attributes:
        users: N.
        stagger_s: user u begins u times as much later.
        request_limit: requests over all users, ``None`` for no limit.
        duration_s: no request is issued at this time or later, ``None`` for no limit.
    """

    closed: ClassVar[bool] = True

    users: int = field(kw_only=True)
    request_limit: int | None = field(kw_only=True)
    duration_s: float | None = field(kw_only=True)
    pool: Pool = field(kw_only=True, repr=False)
    trace: TraceTable | None = field(default=None, kw_only=True, repr=False)
    stagger_s: float = field(default=0.0, kw_only=True)
    common_queue: bool = field(default=False, kw_only=True)

    def begin(self) -> ClosedLoopRun:
        """A new run from the start; two runs of equal answers are equal."""
        return ClosedLoopRun(self)

    def known_lengths(self) -> Lengths:
        shown = min(self.request_limit or HASHED_MAX, HASHED_MAX)
        self.pool.reach(shown)
        return Lengths(self.pool.lengths.prompt_tokens[:shown], self.pool.lengths.output_tokens[:shown])

    def describe(self) -> dict[str, Any]:
        """As for open workloads; lengths and sha256 are of the first indices of the rows."""
        lengths = self.known_lengths()
        think_s = self.pool.think_times_s[:len(lengths.prompt_tokens)]
        return {"n": self.request_limit, "users": self.users, "duration_s": self.duration_s,
                "think_time_s": float(think_s.mean()), **self._describe(lengths, think_s)}


class ClosedLoopRun:
    """Hands out the requests of one run; ``session`` of a request is its user.

    A driver submits :meth:`initial`, and whenever a request has finished or was rejected,
    submits what :meth:`next_request` returns for its user.
    """

    def __init__(self, workload: ClosedLoopWorkload) -> None:
        self._workload = workload
        self._asked = [0] * workload.users
        self.issued = 0

    def initial(self) -> list[Request]:
        """The first request of every user after one think time, by time of arrival.

        With fewer requests than users, those who finish thinking first get them.
        """
        workload = self._workload
        workload.pool.reach(workload.users)
        users = workload.users
        think_s = workload.pool.think_times_s[:users] + workload.stagger_s * np.arange(users)
        order = np.argsort(think_s, kind="stable").tolist()
        issued = (self._issue(user, float(think_s[user])) for user in order)
        return [request for request in issued if request is not None]

    def next_request(self, user: int, now_s: float) -> Request | None:
        """The user's next request, to arrive after a think time from ``now_s``.

        ``None`` once the limit of requests or the duration is reached.
        """
        require(0 <= user < self._workload.users, "user", user, f"in [0, {self._workload.users})")
        require(math.isfinite(now_s) and now_s >= 0, "now_s", now_s, "finite and >= 0 seconds")
        index = self._index(user)
        self._workload.pool.reach(index + 1)
        return self._issue(user, now_s + float(self._workload.pool.think_times_s[index]))

    def _index(self, user: int) -> int:
        """Row of the user's next request."""
        if self._workload.common_queue:
            return self.issued
        return user + self._asked[user] * self._workload.users

    def _issue(self, user: int, arrival_s: float) -> Request | None:
        workload, lengths = self._workload, self._workload.pool.lengths
        if workload.request_limit is not None and self.issued >= workload.request_limit:
            return None
        if workload.duration_s is not None and arrival_s >= workload.duration_s:
            return None
        index = self._index(user)
        prompt = int(lengths.prompt_tokens[index])
        prefix: tuple[int, ...] = ()
        if workload.trace is not None and lengths.rows is not None:
            prefix = prefix_of(workload.trace, int(lengths.rows[index]), prompt)
        request = Request(self.issued, arrival_s, prompt, int(lengths.output_tokens[index]), prefix, user)
        self.issued += 1
        self._asked[user] += 1
        return request
