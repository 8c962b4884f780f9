"""Runs tasks on several processes; the results come in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from typing import Generic, TypeVar

from hetis_sim.spec.errors import HetisError

T = TypeVar("T")
R = TypeVar("R")


class WorkerError(HetisError):
    """A task cannot run, or its process ended; the text says which task and why."""


@dataclass(frozen=True)
class _Answer(Generic[R]):
    """What a process sends back: errors as text, since not every error can be sent."""

    value: R | None
    refusal: str = ""
    failure: str = ""


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fan_out(function: Callable[[T], R], tasks: Sequence[T], workers: int | None = None,
            done: Callable[[], None] | None = None) -> list[R]:
    """``[function(task) for task in tasks]`` on several processes.

    Processes are spawned, so ``function`` and tasks must be importable and picklable, and a
    script that calls this must do so under ``if __name__ == "__main__"``. Whatever ends this
    call early (an error, Ctrl-C) ends the processes as well.

    Args:
        workers: processes; None for one per core. With one, everything runs in this process.
        done: called whenever a task has ended by itself, well or not.

    Raises:
        WorkerError: the first task, by order, that cannot run.
        RuntimeError: a defect in a task, with its traceback.
    """
    workers = min(workers or cores(), len(tasks))
    if workers <= 1:
        return [_value(task, _inline(function, task, done)) for task in tasks]
    before = {child.pid for child in multiprocessing.active_children()}
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    try:
        futures = [pool.submit(_answer, function, task) for task in tasks]
        values = _collect(futures, tasks, done)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            if child.pid not in before:
                child.terminate()
        raise
    pool.shutdown()
    return values


def _collect(futures: list[Future[_Answer[R]]], tasks: Sequence[T],
             done: Callable[[], None] | None) -> list[R]:
    """All values in order, or the error of the first task that has one, whichever ends first."""
    if done is not None:
        for future in futures:
            future.add_done_callback(partial(_count, done))
    try:
        return [_value(task, future.result()) for task, future in zip(tasks, futures, strict=True)]
    except BrokenProcessPool as error:
        raise WorkerError("a worker process ended abruptly (killed, or out of memory?); "
                          "one worker (study.workers=1, --workers 1) runs all in one process") from error


def _count(done: Callable[[], None], future: Future[_Answer[R]]) -> None:
    """Tasks that were dropped, or whose process ended, have not been done."""
    if not future.cancelled() and future.exception() is None:
        done()


def _inline(function: Callable[[T], R], task: T, done: Callable[[], None] | None) -> _Answer[R]:
    answer = _answer(function, task)
    if done is not None:
        done()
    return answer


def _answer(function: Callable[[T], R], task: T) -> _Answer[R]:
    try:
        return _Answer(function(task))
    except HetisError as error:
        return _Answer(None, refusal=str(error))
    except Exception:  # noqa: BLE001 - whatever it is, the parent reports it
        return _Answer(None, failure=traceback.format_exc())


def _value(task: T, answer: _Answer[R]) -> R:
    if answer.refusal:
        raise WorkerError(f"{task}: {answer.refusal}")
    if answer.failure:
        raise RuntimeError(f"{task} failed:\n{answer.failure}")
    return answer.value  # type: ignore[return-value]


def _begin() -> None:
    """In a new process: leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
