"""The workers of a run: what each is to be, and threads of this process that run them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Protocol

from hetis_exec.backend import Backend
from hetis_exec.kvcache import KvPool
from hetis_exec.mesh.worker import NodeWorker
from hetis_exec.messages import DRIVER, Stop
from hetis_exec.places import CPU, AnyEngine, TeamPlan, stages_of, units_of
from hetis_exec.primary import PrimaryWorker, Rank
from hetis_exec.sums import Reducer
from hetis_exec.throttle import NONE, Throttle
from hetis_exec.transport import Endpoint, InProcessTransport, Transport
from hetis_exec.workers import AttentionWorker, Worker
from hetis_sim.policies.plan import MeshPlan

STOP_S = 2.0
STOP_AT_ONCE_S = 1.0
"""How long the workers are given to end, after their work or at once."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker needs to know to come to life, wherever that is.

    Attributes:
        stage, rank: place of a primary worker; an attention worker has stage -1.
        capacity_units: of its cache, as the ledger has it.
        backend: what it computes with.
        timeout_s: how long it waits for a peer.
        throttle: slows it down.
        core: that it may run on alone, where it is a process; None for any.
        rows_max, tokens_max: requests and tokens of the largest step, which it prepares for.
    """

    device: int
    plan: TeamPlan
    stage: int
    rank: int
    capacity_units: int
    block_tokens: int
    backend: Backend
    timeout_s: float
    throttle: Throttle = NONE
    core: int | None = None
    rows_max: int = 1
    tokens_max: int = 1


def worker_specs(engine: AnyEngine, backend: Backend, timeout_s: float,
                 throttles: Mapping[int, Throttle] | None = None,
                 cores: Mapping[int, int] | None = None) -> list[WorkerSpec]:
    """One worker for each device of an instance or a mesh; throttles and cores by device."""
    throttles, cores = throttles or {}, cores or {}
    plan, units = engine.plan, units_of(engine)
    places = [(device, s, rank) for s, stage in enumerate(stages_of(plan))
              for rank, device in enumerate(stage.devices)]
    places += [(device, -1, 0) for device in plan.devices[len(places):]]
    limits = engine.settings.limits
    return [WorkerSpec(device, plan, stage, rank, units[device], limits.block_tokens, backend,
                       timeout_s, throttles.get(device, NONE), cores.get(device), limits.max_batch_requests,
                       limits.max_batch_tokens)
            for device, stage, rank in places]


def build_worker(spec: WorkerSpec, endpoint: Endpoint, reducer: Reducer | None = None) -> Worker:
    """Make a worker; ``reducer`` adds up over the ranks of its stage, where that is not left to messages."""
    pool = KvPool(spec.capacity_units, spec.block_tokens,
                  spec.backend.kernels(spec.device, spec.capacity_units, spec.block_tokens))
    limits = spec.rows_max, spec.tokens_max
    if spec.stage < 0:
        return AttentionWorker(spec.device, endpoint, pool, spec.timeout_s, spec.throttle,
                               spec.backend.warm_up(pool.kernels, None, None, *limits))
    shard = spec.backend.shard(spec.device, spec.plan, spec.stage, spec.rank)
    place = Rank(spec.plan, spec.stage, spec.rank)
    # Parts of a step that is one piece could not be slowed down apart.
    steps = spec.backend.whole_steps(spec.device, spec.plan, shard, pool) if spec.throttle == NONE else None
    make = NodeWorker if isinstance(spec.plan, MeshPlan) else PrimaryWorker
    return make(spec.device, endpoint, pool, spec.timeout_s, place, shard, steps, spec.throttle,
                spec.backend.warm_up(pool.kernels, shard, steps, *limits), reducer)


class Crew(Protocol):
    """Runs workers, wherever they are. ``endpoint`` is the driver's."""

    endpoint: Endpoint

    def start(self) -> None:
        """Set the workers to work."""

    def dead(self) -> list[tuple[int, str]]:
        """Workers that have ended: device, and how."""

    def stop(self, at_once: bool) -> None:
        """End the workers, after all they have been told or at once; returns when they are gone."""


class ThreadCrew:
    """Workers as threads. They are daemons: one that hangs cannot keep the process alive.

    Args:
        device_links: workers with cards pass tensors on where they are.

    Attributes:
        workers: by device.
    """

    def __init__(self, specs: Sequence[WorkerSpec], transport: Transport | None = None, *,
                 device_links: bool = True) -> None:
        transport = transport or InProcessTransport()
        transport.cards = frozenset(spec.device for spec in specs
                                    if device_links and spec.backend.place(spec.device) != CPU)
        self.endpoint: Endpoint = transport.endpoint(DRIVER)
        self.workers = {spec.device: build_worker(spec, transport.endpoint(spec.device)) for spec in specs}
        self._threads = {device: Thread(target=worker.run, name=f"worker-{device}", daemon=True)
                         for device, worker in self.workers.items()}

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads.values():
            thread.start()

    def dead(self) -> list[tuple[int, str]]:
        """Threads that have ended."""
        return [(device, "its thread has ended without a word")
                for device, thread in self._threads.items() if not thread.is_alive()]

    def stop(self, at_once: bool) -> None:
        """Ask the threads to end; those that do not come back in time are left behind."""
        for device in self.workers:
            self.endpoint.send(device, Stop(at_once))
        deadline_s = time.monotonic() + (STOP_AT_ONCE_S if at_once else STOP_S)
        for thread in self._threads.values():
            if thread.ident is not None:
                thread.join(max(0.0, deadline_s - time.monotonic()))
