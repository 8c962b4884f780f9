"""Tasks for other processes; a module of few imports, so that these start quickly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from hetis_sim.spec.errors import SpecError


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
