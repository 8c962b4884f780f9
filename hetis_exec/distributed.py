"""Workers as processes of one or many hosts, joined by connections and torch.distributed."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from threading import current_thread, main_thread
from typing import Any

from hetis_exec.crew import STOP_AT_ONCE_S, STOP_S, WorkerSpec, build_worker
from hetis_exec.errors import ExecutorError
from hetis_exec.joining import NetSettings, Seat, meet, seats
from hetis_exec.messages import DRIVER, Failed, Stop
from hetis_exec.net.endpoint import Channel, NetworkEndpoint
from hetis_exec.net.frames import FrameSocket
from hetis_exec.net.handshake import Hello, new_token, run_token
from hetis_exec.net.listener import Listener, connect
from hetis_exec.net.meeting import (
    DRIVER_FIELDS,
    DRIVER_KEY,
    Meeting,
    MeetingPlace,
    host_meeting,
    join_meeting,
)
from hetis_exec.net.wires import release_devices
from hetis_exec.processes import end_processes
from hetis_exec.sums import Reducer
from hetis_exec.transport import Endpoint

REAP_S = 0.5
"""A process whose connection has ended is given so long to show its exit code."""

FAREWELL_S = 30.0
"""A worker that has failed waits so long for the driver to end the run."""


def serve(place: MeetingPlace, seat: Seat, spec: WorkerSpec | None) -> bool:
    """Life of a worker, from the meeting to the end of the run; without a spec it only waits for that.

    Returns:
        Whether the run has come to its end without this worker failing.

    Raises:
        ExecutorError: it has found no driver.
    """
    if spec is not None and spec.core is not None:
        os.sched_setaffinity(0, {spec.core})
    meeting = join_meeting(place)
    driver = meeting.look_up(DRIVER_KEY, DRIVER_FIELDS)
    token = run_token(bytes.fromhex(driver["token"]))
    endpoint = NetworkEndpoint(seat.device, seat.settings.eager_bytes, seat.settings.shapes,
                               orphaned=lambda: os._exit(1))
    hello = Hello(seat.device, DRIVER, Channel.CONTROL)
    endpoint.add(DRIVER, Channel.CONTROL, connect((driver["host"], driver["port"]), token, hello))
    failed = False
    reducer: Reducer | None = None
    try:
        _compare(driver["digest"], seat.settings.digest)
        if spec is not None:
            reducer = meet(meeting, seat, endpoint, token, where=spec.backend.place(seat.device))
            worker = build_worker(spec, endpoint, reducer)
    except ExecutorError as error:
        failed = True
        endpoint.send(DRIVER, Failed(seat.device, str(error)))
    except Exception:  # noqa: BLE001 - the driver is told, and raises
        failed = True
        endpoint.send(DRIVER, Failed(seat.device, traceback.format_exc()))
    else:
        if spec is not None:
            worker.run()
            failed = not endpoint.stopped
    endpoint.await_stop(FAREWELL_S if failed else float("inf"))
    if reducer is not None:
        reducer.close()
    endpoint.close(STOP_S)
    release_devices()
    return not failed


def _compare(driver: str, own: str) -> None:
    """Look whether a worker was given what the driver was.

    Raises:
        ExecutorError: it was not.
    """
    theirs, ours = (digest.partition(":")[0] for digest in (driver, own))
    if theirs != ours:
        raise ExecutorError(f"executor.dtype comes to {ours} there and to {theirs} at the driver: say which")
    if driver != own:
        raise ExecutorError("it was given another configuration, other files or another version than the "
                            "driver")


def _work(place: MeetingPlace, seat: Seat, spec: WorkerSpec, joins: bool) -> None:
    """Life of a worker process. Interrupts, from the keyboard or from a launcher, are the driver's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if joins:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve(place, seat, spec)


class DistributedCrew:
    """Workers that call the driver from wherever they are.

    Args:
        specs: of all workers.
        local: devices whose workers this process starts; by default all.
        meeting: where they all find each other; by default a store on the loopback interface.

    Attributes:
        processes: those started here, by device.
    """

    def __init__(self, specs: Sequence[WorkerSpec], settings: NetSettings | None = None,
                 local: Sequence[int] | None = None, meeting: Meeting | None = None) -> None:
        self._settings = settings or NetSettings()
        self._meeting = meeting
        self._specs = {spec.device: spec for spec in specs}
        self._local = list(self._specs) if local is None else [d for d in local if d in self._specs]
        self._start_s = max((spec.backend.start_s for spec in specs), default=0.0)
        self._listener: Listener | None = None
        self._joins = meeting is not None
        self._on_sigterm: Any = None
        self._told_to_end_s = math.inf
        self._endpoint = NetworkEndpoint(DRIVER, self._settings.eager_bytes)
        self.endpoint: Endpoint = self._endpoint
        self.processes: dict[int, BaseProcess] = {}

    def start(self) -> None:
        """Take calls, and start the processes that belong here."""
        if self._meeting is None:
            self._meeting = host_meeting(start_s=self._start_s)
        place, token = self._meeting.place, new_token()
        self._listener = Listener(place.bind, DRIVER, run_token(token), self._connected)
        host, port = self._listener.place
        # Workers are forked from a server that has imported what they need: torch takes seconds.
        context = multiprocessing.get_context("forkserver")
        modules = {name for spec in self._specs.values() for name in spec.backend.modules}
        context.set_forkserver_preload(sorted({__name__, *modules}))
        seated = seats(list(self._specs.values()), self._settings)
        if self._joins and current_thread() is main_thread():
            # A launcher ends all ranks when one has failed; what the driver knows of that is worth saying.
            # In another thread it is up to whoever has the main one, such as a server.
            self._on_sigterm = signal.signal(signal.SIGTERM, self._told_to_end)
        for device in self._local:
            process = context.Process(target=_work, args=(place, seated[device], self._specs[device],
                                                          self._joins), name=f"worker-{device}", daemon=True)
            self.processes[device] = process
            process.start()
        self._meeting.announce(DRIVER_KEY, {"host": host, "port": port, "token": token.hex(),
                                            "digest": self._settings.digest})

    def _connected(self, hello: Hello, frames: FrameSocket) -> None:
        self._endpoint.add(hello.sender, Channel.CONTROL, frames)

    def _told_to_end(self, *_: object) -> None:
        self._told_to_end_s = min(self._told_to_end_s, time.monotonic())

    def dead(self) -> list[tuple[int, str]]:
        """Workers that have ended or cannot be reached any more.

        Raises:
            ExecutorError: it is the driver that has been told to end.
        """
        lost = list(self._endpoint.lost.items())
        if self._told_to_end_s < min([at_s for _, (_, at_s) in lost], default=math.inf):
            raise ExecutorError("the driver has been told to end (SIGTERM)")
        found = [(device, self._exit_of(device, REAP_S) or how) for device, (how, _) in lost]
        known = {device for device, _ in found}
        found += [(device, how) for device in self.processes
                  if device not in known and (how := self._exit_of(device, 0.0))]
        if not found and not self._specs.keys() <= set(self._endpoint.peers):
            # Whoever has called says for itself what is wrong.
            assert self._meeting is not None
            failure = self._meeting.failure()
            return [failure] if failure else []
        return found

    def _exit_of(self, device: int, timeout_s: float) -> str:
        """How a process of this host has ended; empty if it has not, or is not of this host."""
        process = self.processes.get(device)
        if process is None:
            return ""
        process.join(timeout_s)
        return "" if process.exitcode is None else f"its process has ended with exit code {process.exitcode}"

    def stop(self, at_once: bool) -> None:
        """Ask all workers to end; those of this host that do not in time are killed."""
        for device in {*self._specs, *self._endpoint.peers}:
            self._endpoint.send(device, Stop(at_once))
        deadline_s = time.monotonic() + (STOP_AT_ONCE_S if at_once else STOP_S)
        end_processes(self.processes.values(), deadline_s)
        # What those of other hosts have to say is heard until they hang up.
        self._endpoint.await_parting(max(0.0, deadline_s - time.monotonic()))
        self._endpoint.close(max(0.1, deadline_s - time.monotonic()))
        if self._listener is not None:
            self._listener.close()
        if self._on_sigterm is not None:
            signal.signal(signal.SIGTERM, self._on_sigterm)
