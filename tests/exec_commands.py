"""``python -m hetis_exec replay`` in processes of its own, and what becomes of them."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from exec_models import folder

WORDS = ("output=none", "rate=50", "requests=6", "workload.output_scale=0.02", "workload.prompt_scale=0.05",
         "executor.timeout_s=60")
SOON_S = 120.0
"""Starting torch several times takes its time on a busy host."""


def words(*more: str, run: Path | None = None) -> list[str]:
    """The command line of a small run; the model's window rejects nothing."""
    where = [f"hydra.run.dir={run}"] if run else []
    return ["replay", f"model.path={folder('llama')}", *WORDS, *where, *more]


def command(*more: str, run: Path) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    line = [sys.executable, "-m", "hetis_exec", *words(*more, run=run)]
    return subprocess.Popen(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def children(pid: int) -> list[int]:
    """Processes that another one has started, in any of its threads, on Linux."""
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def workers(pid: int) -> list[int]:
    """Worker processes of a driver: it has one server, from which they are forked."""
    return [worker for child in children(pid) for worker in children(child)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: object, what: str) -> None:
    """Wait until something holds."""
    assert callable(condition)
    deadline_s = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)
