"""Tasks on several processes: order, errors, and nothing that stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support_tasks import die, fail, refuse, sleepy_square, square

from hetis_sim.study.parallel import WorkerError, fan_out

SCRIPT = """
import sys
from support_tasks import say_and_sleep
from hetis_sim.study.parallel import fan_out
if __name__ == "__main__":
    fan_out(say_and_sleep, sys.argv[1:], workers=2)
"""


def test_results_come_in_the_order_of_the_tasks() -> None:
    """Whoever ends first, and however many processes there are."""
    ended = []
    expected = [n * n for n in range(5)]
    assert fan_out(sleepy_square, range(5), workers=3, done=lambda: ended.append(1)) == expected
    assert len(ended) == 5
    assert fan_out(square, range(5), workers=1) == expected
    assert fan_out(square, [], workers=4) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_input_in_a_process_is_an_error_of_input_here(workers: int) -> None:
    """The first task by order that is refused is named, with its reason."""
    with pytest.raises(WorkerError, match=r"^2: number=2 is not allowed: must be below 2$"):
        fan_out(refuse, range(5), workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_defect_in_a_process_comes_with_its_traceback(workers: int) -> None:
    """It is no error of input, and it says where it happened."""
    with pytest.raises(RuntimeError, match=r"(?s)0 failed:.*in fail.*ZeroDivisionError: task 0"):
        fan_out(fail, range(2), workers)


def test_a_process_that_is_killed_is_an_error() -> None:
    """Nobody waits for its result, and it does not count as done."""
    ended: list[int] = []
    with pytest.raises(WorkerError, match="ended abruptly"):
        fan_out(die, range(2), workers=2, done=lambda: ended.append(1))
    assert ended == []


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def hear_ctrl_c() -> None:
    """Undo that a shell has its background jobs ignore Ctrl-C, which all their processes inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to look for processes")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_behind(sent: signal.Signals, tmp_path: Path, project_root: Path) -> None:
    """Ctrl-C, and even the sudden death of the parent, ends the processes."""
    notes = [tmp_path / "one", tmp_path / "two"]
    path = os.pathsep.join([str(project_root), str(project_root / "tests")])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, str(script), *map(str, notes)], stderr=subprocess.DEVNULL,
                              env={**os.environ, "PYTHONPATH": path}, preexec_fn=hear_ctrl_c)
    until = time.monotonic() + 60
    while not all(note.exists() and note.read_text() for note in notes) and time.monotonic() < until:
        time.sleep(0.05)
    children = [int(note.read_text()) for note in notes]
    parent.send_signal(sent)
    assert parent.wait(30) != 0
    until = time.monotonic() + 30
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, children))
