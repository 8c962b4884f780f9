"""Which crew a configuration asks for, and what a rank that hosts no driver does."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from importlib import metadata
from typing import TYPE_CHECKING, Any

from hetis_exec.config import ExecutionConfig
from hetis_exec.crew import Crew, ThreadCrew, WorkerSpec, worker_specs
from hetis_exec.driver import ExecutorInput, engines_of
from hetis_exec.launch import Launch
from hetis_exec.processes import ProcessCrew
from hetis_exec.transport import InProcessTransport
from hetis_sim.metrics.manifest import value_sha256
from hetis_sim.spec.errors import HetisError, require

if TYPE_CHECKING:
    from hetis_exec.joining import NetSettings
    from hetis_exec.net.meeting import Meeting

REPORT_S = 3.0
"""A rank that has failed tries for so long to tell the others."""

MakeCrew = Callable[[Sequence[WorkerSpec]], Crew]


def workers_of(config: ExecutionConfig, launch: Launch | None) -> str:
    """The kind of workers: what ``auto`` stands for, or what the user has said.

    Raises:
        SpecError: a launcher has started many ranks, and each is to start workers of its own; or there is
            nothing that could do the sums as they are to be done.
    """
    asked = config.executor.workers
    if launch is None:
        kind = "processes" if asked == "auto" else asked
        require(kind == "distributed" or config.executor.collectives != "all_reduce", "executor.collectives",
                config.executor.collectives, f"auto or ordered where workers are {kind}; all_reduce needs "
                "executor.workers=distributed")
        return kind
    require(asked in ("auto", "distributed"), "executor.workers", asked,
            "auto or distributed where a launcher has started a rank for each device")
    network = config.executor.network
    require(not network.emulates or launch.one_host, "executor.network", asdict(network),
            "empty where ranks run on several hosts: links are emulated within one")
    return "distributed"


def crew_maker(config: ExecutionConfig, given: ExecutorInput, launch: Launch | None = None) -> MakeCrew:
    """How workers come to life."""
    kind = workers_of(config, launch)
    shapes = config.executor.network.shapes(given.cluster)
    if kind == "threads":
        keep = config.executor.device_links != "host"
        return lambda specs: ThreadCrew(specs, InProcessTransport(shapes=shapes), device_links=keep)
    if kind == "processes":
        return lambda specs: ProcessCrew(specs, shapes)
    from hetis_exec.distributed import DistributedCrew

    settings = net_settings(config, given)
    if launch is None:
        return lambda specs: DistributedCrew(specs, settings)
    return lambda specs: DistributedCrew(specs, settings, local=(0,), meeting=meeting_of(launch, given))


def net_settings(config: ExecutionConfig, given: ExecutorInput) -> NetSettings:
    """How the parties of a run talk, the same on all ranks."""
    from hetis_exec.joining import NetSettings

    settings = config.executor
    return NetSettings(int(settings.eager_kib * 1024), settings.network.shapes(given.cluster),
                       _digest(config, given), settings.collectives, settings.device_links)


def _digest(config: ExecutionConfig, given: ExecutorInput) -> str:
    """The type of its numbers, and a hash of all that decides what a worker is to do."""
    parts = [value_sha256(asdict(config)), value_sha256(given.plan.to_dict()), metadata.version("hetis-sim")]
    folder = getattr(given.backend, "folder", None)
    if folder is not None:
        parts += [f"{path.name} {path.stat().st_size}" for path in sorted(folder.glob("*.safetensors"))]
        parts.append(sha256((folder / "config.json").read_bytes()).hexdigest())
    return f"{getattr(given.backend, 'dtype', '')}:{sha256(chr(10).join(parts).encode()).hexdigest()}"


# -- ranks -------------------------------------------------------------------------------------------------


def meeting_of(launch: Launch, given: ExecutorInput | None = None) -> Meeting:
    """The store of the launcher; rank 0 opens it where the launcher has not.

    Raises:
        HetisError: it cannot be reached.
    """
    from hetis_exec.net.meeting import MeetingPlace, host_meeting, join_meeting

    start_s = REPORT_S if given is None or given.backend is None else given.backend.start_s
    settings: dict[str, Any] = {"prefix": launch.run, "bind": launch.bind(),
                                "interface": launch.interface, "start_s": start_s}
    if launch.rank == 0 and not launch.agent_store and given is not None:
        return host_meeting(settings["bind"], launch.master_port, **settings)
    return join_meeting(MeetingPlace(launch.master_addr, launch.master_port, **settings))


def all_specs(given: ExecutorInput) -> list[WorkerSpec]:
    """The workers of a run, as the driver makes them."""
    assert given.backend is not None
    return [spec for engine in engines_of(given.controller())
            for spec in worker_specs(engine, given.backend, 2 * given.timeout_s, given.throttles,
                                     given.cores)]


def serve_rank(config: ExecutionConfig, given: ExecutorInput, launch: Launch) -> bool:
    """Life of a rank that hosts no driver; whether it has come to its end without failing.

    Raises:
        HetisError: it has found no driver, or its host cannot hold its workers.
    """
    from hetis_exec.distributed import serve
    from hetis_exec.joining import Seat, seats
    from hetis_exec.net.reducers import ABANDONED

    # Interrupts from the keyboard reach all ranks of a node; they are the driver's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    workers_of(config, launch)
    if launch.leads_node:
        assert given.backend is not None
        given.backend.check(engines_of(given.controller()), launch.ranks_here)
    specs = {spec.device: spec for spec in all_specs(given)}
    settings = net_settings(config, given)
    idle = Seat(launch.rank, (), settings, 0.0)
    seat = seats(list(specs.values()), settings).get(launch.rank, idle)
    ended = serve(meeting_of(launch, given).place, seat, specs.get(launch.rank))
    if ABANDONED:
        # The end of the interpreter would take them apart.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if ended else 1)
    return ended


def report_failure(launch: Launch, reason: str) -> None:
    """Tell the other ranks, if they can be reached, why this one does not come."""
    from hetis_exec.net.meeting import DRIVER_KEY, FAILED_KEY

    try:
        meeting = meeting_of(launch)
        if launch.rank == 0:
            meeting.announce(DRIVER_KEY, {FAILED_KEY: f"rank 0 has failed: {reason}"})
        else:
            meeting.announce(FAILED_KEY, {"device": launch.rank, "reason": reason})
    except HetisError:
        return
