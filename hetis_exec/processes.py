"""Workers as processes of this host, joined by pipes and rings of shared memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from hetis_exec.crew import STOP_AT_ONCE_S, STOP_S, WorkerSpec, build_worker
from hetis_exec.messages import DRIVER, Failed, Stop
from hetis_exec.net.rings import Region, has_rings
from hetis_exec.pipes import PipeEndpoint, pair_region
from hetis_exec.shaping import Shapes
from hetis_exec.throttle import have_cores
from hetis_exec.transport import Endpoint

SPIN_S = 4e-3
"""A worker looks so long for its next message before it sleeps, where each has a core: about as long as the
dense modules of a layer take, after which an attention worker is asked again."""


@dataclass
class Ways:
    """What leads from one party to the others, by their addresses."""

    pipes: dict[int, Connection] = field(default_factory=dict)
    regions: dict[int, Region] = field(default_factory=dict)


def _work(spec: WorkerSpec, ways: Ways, shapes: Shapes, spin_s: float) -> None:
    """Life of a worker process. Interrupts from the keyboard are the driver's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if spec.core is not None:
        os.sched_setaffinity(0, {spec.core})
    endpoint = PipeEndpoint(spec.device, ways.pipes, shapes, ways.regions, spin_s)
    try:
        worker = build_worker(spec, endpoint)
    except Exception:  # noqa: BLE001 - the driver is told, and raises
        endpoint.send(DRIVER, Failed(spec.device, traceback.format_exc()))
    else:
        worker.run()
    endpoint.close()


class ProcessCrew:
    """Workers as processes. They end with this one.

    Args:
        shapes: links to emulate.
        rings: whether workers share memory; by default where the system has rings.

    Attributes:
        processes: by device.
    """

    def __init__(self, specs: Sequence[WorkerSpec], shapes: Shapes | None = None, *,
                 rings: bool | None = None) -> None:
        # Workers are forked from a server that has imported what they need: torch takes seconds.
        context = multiprocessing.get_context("forkserver")
        modules = {name for spec in specs for name in spec.backend.modules}
        context.set_forkserver_preload(sorted({__name__, *modules}))
        rings = has_rings() if rings is None else rings
        ways = {DRIVER: Ways(), **{spec.device: Ways() for spec in specs}}
        for a, b in combinations(ways, 2):
            ways[a].pipes[b], ways[b].pipes[a] = context.Pipe()
            if rings and DRIVER not in (a, b):
                ways[a].regions[b] = ways[b].regions[a] = pair_region()
        self.endpoint: Endpoint = PipeEndpoint(DRIVER, ways.pop(DRIVER).pipes)
        self._ways = ways
        spin_s = SPIN_S if have_cores(len(specs), [spec.core for spec in specs]) else 0.0
        self.processes = {
            spec.device: context.Process(target=_work, args=(spec, ways[spec.device], shapes or {}, spin_s),
                                         name=f"worker-{spec.device}", daemon=True) for spec in specs}

    def start(self) -> None:
        """Start the processes; from then on their pipes and rings are theirs alone."""
        for process in self.processes.values():
            process.start()
        for ways in self._ways.values():
            for pipe in ways.pipes.values():
                pipe.close()
            for region in ways.regions.values():
                region.close()

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
