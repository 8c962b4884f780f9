"""Workers as processes of this host, joined by one pipe for each pair."""

from __future__ import annotations

import math
import multiprocessing
import os
import select
import signal
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import combinations
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from threading import Lock, Thread

from hetis_exec.crew import STOP_AT_ONCE_S, STOP_S, WorkerSpec, build_worker
from hetis_exec.messages import DRIVER, Failed, Message, Stop
from hetis_exec.shaping import Shaper, Shapes
from hetis_exec.transport import Endpoint, Inbox

AT_ONCE_BYTES = 1 << 15
"""Messages up to this size are written by whoever sends them: a free pipe has room for several."""

Packed = memoryview | bytes


class PipeEndpoint:
    """One party of a set of processes: a pipe to every other one.

    A party whose peer is busy or gone goes on receiving: what a pipe does not take at once is written
    by a thread of its own, and so is all that comes after it.
    A pipe whose other end is gone is forgotten: the driver sees to the rest. If it is the driver
    that is gone, the party is told to stop.
    """

    def __init__(self, address: int, pipes: dict[int, Connection], shapes: Shapes | None = None) -> None:
        self._address = address
        self._pipes = pipes
        self._inbox = Inbox()
        self._shaper = Shaper(address, shapes or {})
        self._outbox: SimpleQueue[tuple[Connection, Packed] | None] = SimpleQueue()
        self._in_outbox = 0
        self._counting = Lock()
        self._readable = select.poll()
        self._open: dict[int, Connection] = {}
        for pipe in pipes.values():
            self._open[pipe.fileno()] = pipe
            self._readable.register(pipe, select.POLLIN)
        self._writer = Thread(target=self._write, name=f"outbox-{address}", daemon=True)
        self._writer.start()

    def send(self, target: int, message: Message) -> None:
        """Have a message written."""
        if target == self._address:
            self._inbox.put(message)
            return
        due_s = self._shaper.due_s(target, message)
        pipe, packed = self._pipes[target], ForkingPickler.dumps((due_s, message))
        if not self._in_outbox and len(packed) <= AT_ONCE_BYTES and _takes(pipe):
            _write_to(pipe, packed)
            return
        with self._counting:
            self._in_outbox += 1
        self._outbox.put((pipe, packed))

    def keeps(self, target: int, bulk: bool = False) -> bool:
        """Pipes carry bytes."""
        return False

    def receive(self, timeout_s: float) -> Message | None:
        """The next message from anyone, within the time."""
        deadline_s = time.monotonic() + timeout_s
        while (message := self._inbox.get(0.0)) is None:
            now_s = time.monotonic()
            left_s = max(0.0, min(deadline_s, self._inbox.next_due_s) - now_s)
            if not self._open:
                time.sleep(left_s)
            elif ready := self._readable.poll(math.ceil(1e3 * left_s)):
                stopped = [not self._take_in(self._open[number]) for number, _ in ready]
                if any(stopped):
                    return Stop(at_once=True)
                continue
            if now_s + left_s >= deadline_s:
                return self._inbox.get(0.0)
        return message

    def _take_in(self, pipe: Connection) -> bool:
        """Take in one message; False if the driver is gone."""
        try:
            due_s, message = pipe.recv()
        except (EOFError, OSError):
            number = pipe.fileno()
            self._readable.unregister(number)
            del self._open[number]
            return pipe is not self._pipes.get(DRIVER)
        self._inbox.put(message, due_s)
        return True

    def close(self) -> None:
        """Write what is left."""
        self._outbox.put(None)
        self._writer.join(STOP_S)

    def _write(self) -> None:
        while (item := self._outbox.get()) is not None:
            _write_to(*item)
            with self._counting:
                self._in_outbox -= 1


def _takes(pipe: Connection) -> bool:
    """Whether a pipe takes a small message at once; it says so while most of its buffer is free."""
    asked = select.poll()
    asked.register(pipe, select.POLLOUT)
    return asked.poll(0) == [(pipe.fileno(), select.POLLOUT)]


def _write_to(pipe: Connection, packed: Packed) -> None:
    with suppress(OSError):
        pipe.send_bytes(packed)


def _work(spec: WorkerSpec, pipes: dict[int, Connection], shapes: Shapes) -> None:
    """Life of a worker process. Interrupts from the keyboard are the driver's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if spec.core is not None:
        os.sched_setaffinity(0, {spec.core})
    endpoint = PipeEndpoint(spec.device, pipes, shapes)
    try:
        worker = build_worker(spec, endpoint)
    except Exception:  # noqa: BLE001 - the driver is told, and raises
        endpoint.send(DRIVER, Failed(spec.device, traceback.format_exc()))
    else:
        worker.run()
    endpoint.close()


class ProcessCrew:
    """Workers as processes. They end with this one. ``shapes`` are links to emulate.

    Attributes:
        processes: by device.
    """

    def __init__(self, specs: Sequence[WorkerSpec], shapes: Shapes | None = None) -> None:
        # Workers are forked from a server that has imported what they need: torch takes seconds.
        context = multiprocessing.get_context("forkserver")
        modules = {name for spec in specs for name in spec.backend.modules}
        context.set_forkserver_preload(sorted({__name__, *modules}))
        pipes: dict[int, dict[int, Connection]] = {DRIVER: {}, **{spec.device: {} for spec in specs}}
        for a, b in combinations(pipes, 2):
            pipes[a][b], pipes[b][a] = context.Pipe()
        self.endpoint: Endpoint = PipeEndpoint(DRIVER, pipes[DRIVER])
        self._pipes = {spec.device: pipes[spec.device] for spec in specs}
        self.processes = {
            spec.device: context.Process(target=_work, args=(spec, pipes[spec.device], shapes or {}),
                                         name=f"worker-{spec.device}", daemon=True) for spec in specs}

    def start(self) -> None:
        """Start the processes; from then on their ends of the pipes are theirs alone."""
        for process in self.processes.values():
            process.start()
        for ends in self._pipes.values():
            for pipe in ends.values():
                pipe.close()

    def dead(self) -> list[tuple[int, str]]:
        """Processes that have ended."""
        return [(device, f"its process has ended with exit code {process.exitcode}")
                for device, process in self.processes.items() if process.exitcode is not None]

    def stop(self, at_once: bool) -> None:
        """Ask the processes to end; those that do not in time are killed."""
        for device in self.processes:
            self.endpoint.send(device, Stop(at_once))
        deadline_s = time.monotonic() + (STOP_AT_ONCE_S if at_once else STOP_S)
        end_processes(self.processes.values(), deadline_s)


def end_processes(processes: Iterable[BaseProcess], deadline_s: float) -> None:
    """Wait for processes that were told to end; those that do not in time (monotonic clock) are killed."""
    for process in processes:
        if process.pid is None:
            continue
        process.join(max(0.0, deadline_s - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
