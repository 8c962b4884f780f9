"""What tests of studies share: tasks for other processes, small configurations, bounds of scenarios."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from support import TINY
from support_runs import Scenario

from hetis_sim.metrics.recorder import Recorder
from hetis_sim.spec.errors import SpecError
from hetis_sim.study.bound import Bound, upper_bound

SMALL = ("cluster=single-a100", "model=llama3-8b", "workload=humaneval", "study.workers=1", "output=json")
"""A system whose runs take a tenth of a second."""


def square(number: int) -> int:
    """A task that works."""
    return number * number


def sleepy_square(number: int) -> int:
    """A task that takes longer the earlier it is."""
    time.sleep(0.3 / (1 + number))
    return number * number


def refuse(number: int) -> int:
    """A task with bad input, from 2 on; the later ones fail sooner."""
    if number >= 2:
        time.sleep(0.5 / number)
        raise SpecError("number", number, "below 2")
    return number


def fail(number: int) -> int:
    """A task with a defect."""
    raise ZeroDivisionError(f"task {number}")


def die(number: int) -> int:
    """A task whose process is killed."""
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def say_and_sleep(path: str) -> int:
    """A task that writes its process id to a file and then takes very long."""
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)
    return 0


@dataclass(frozen=True)
class Reached:
    """A run against the bound for the requests that it finished."""

    throughput_rps: float
    bound: Bound

    @property
    def share(self) -> float:
        """Throughput over bound."""
        return self.throughput_rps / self.bound.requests_per_s


def reached(scenario: Scenario, recorder: Recorder | None = None) -> Reached | None:
    """A scenario's throughput from first arrival to last end, and the bound; None where nothing finished."""
    requests = (recorder or scenario.run()).records().requests
    finished = requests.rows(requests["status"] == 0)
    if not len(finished):
        return None
    span_s = finished["finish_s"].max() - requests["arrival_s"].min()
    lengths = (finished["prompt_tokens"], finished["output_tokens"])
    bound = upper_bound(scenario.cluster(), TINY, scenario.cost, scenario.settings(), [lengths])
    return Reached(len(finished) / span_s, bound)
