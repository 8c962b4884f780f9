"""Which runs a validation consists of, in which order, and what of it fits into a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from hetis_exec.measure_config import ValidateConfig

OVERHEAD_S = 10.0
"""What a run takes besides warming up and its arrivals, until some runs have shown it."""

SHARE = 0.95
"""Of the time that is left, so much is planned for."""


@dataclass(frozen=True, slots=True)
class Run:
    """A real run.

    Attributes:
        load: share of the capacity; None for the overloaded run that measures it.
        turn: 0 for the first time, then again and again with the same requests.
    """

    policy: str
    load: float | None
    seed: int
    turn: int = 0

    @property
    def name(self) -> str:
        """The same in every validation."""
        what = "capacity" if self.load is None else f"{self.load:g}"
        return f"{self.policy}/{what}/{self.seed}/{self.turn}"


def runs_of(policies: Sequence[str], given: ValidateConfig, seed: int) -> list[Run]:
    """All runs: capacities; every load of every policy once; then again, and with further seeds, in turns.

    Policies take turns at each load, so that a machine that drifts drifts for all of them.
    """
    rounds = [(0, turn) for turn in range(1 + (given.repeats if given.noise_runs else 0))]
    rounds += [(n, turn) for n in range(1, given.seeds)
               for turn in range(1 + (given.repeats if n < given.noise_runs else 0))]
    found = [Run(policy, None, seed) for policy in policies]
    for n, turn in sorted(rounds, key=lambda pair: (sum(pair), pair[0])):
        found += [Run(policy, load, seed + n, turn) for load in given.loads for policy in policies]
        if n == 0 and turn:
            found += [Run(policy, None, seed, turn) for policy in policies]
    return found


def count_of(given: ValidateConfig, rate_rps: float, run_s: float) -> int:
    """Requests of a run."""
    return int(min(given.requests_max, max(given.requests_min, rate_rps * run_s)))


class Watch:
    """How long runs take, and what of them fits.

    Args:
        budget_s: from now on; None for no limit.

    Attributes:
        warmup_s: before the requests of a run.
    """

    def __init__(self, budget_s: float | None, warmup_s: float = 0.0,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end_s = None if budget_s is None else clock() + budget_s
        self.warmup_s = warmup_s
        self._over_s: list[float] = []

    def took(self, seconds: float, count: int, rate_rps: float) -> None:
        """A run has taken so long for so many requests."""
        self._over_s.append(max(0.0, seconds - self.warmup_s - count / rate_rps))

    def expects_s(self, count: int, rate_rps: float) -> float:
        """What a run will take."""
        over_s = median(self._over_s) if self._over_s else OVERHEAD_S
        return self.warmup_s + count / rate_rps + over_s

    def left_s(self) -> float | None:
        """What is left of the budget."""
        return None if self._end_s is None else self._end_s - self._clock()

    def fits(self, seconds: float) -> bool:
        """Whether something that takes so long ends in time."""
        left = self.left_s()
        return left is None or seconds <= left

    def run_s(self, given: ValidateConfig, rates_rps: Sequence[float]) -> float:
        """How long requests may arrive in each run so that these rates fit once; ``run_s`` at most."""
        left = self.left_s()

        def need_s(run_s: float) -> float:
            return sum(self.expects_s(count_of(given, rate, run_s), rate) for rate in rates_rps)

        if left is None or need_s(given.run_s) <= SHARE * left:
            return given.run_s
        low, high = 0.0, given.run_s
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if need_s(middle) <= SHARE * left else (low, middle)
        return low
