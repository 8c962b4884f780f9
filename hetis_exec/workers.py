"""Workers: what computes. Each has the cache of one device and talks through one endpoint.

A primary worker (:mod:`hetis_exec.primary`) holds weights: it computes the steps it is told to,
in order. An attention worker holds cache and nothing else: it answers whoever asks. Neither
decides anything.

No two workers ever wait for each other. The driver numbers its messages alike for all workers
of an instance; a primary works through them in that order and waits only for results that
belong to the same or an earlier number, and an attention worker never waits for anything but
its inbox.
"""

from __future__ import annotations

import math
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hetis_exec.backend import Tensor
from hetis_exec.cachekeeper import CacheKeeper
from hetis_exec.errors import ExecutorError
from hetis_exec.kvcache import KvPool
from hetis_exec.messages import (
    DRIVER,
    AttentionBatch,
    AttentionRequest,
    AttentionResult,
    Beat,
    CacheData,
    Control,
    Failed,
    Message,
    Stop,
)
from hetis_exec.rows import in_rows
from hetis_exec.throttle import NONE, Throttle
from hetis_exec.transport import Endpoint

BEAT_S = 0.2
"""A worker that works or waits shows that it is alive this often."""


COPY_S = 5e-4
"""Copies that are on their way out of a device are looked after so often."""


class Stopped(Exception):  # noqa: N818 - not an error
    """The driver has said stop."""


class Worker(ABC):
    """What both kinds of worker share: the inbox and the cache.

    Attributes:
        device: id of the device.
        cache: its cache.
        throttle: how it is slowed down.
    """

    def __init__(self, device: int, endpoint: Endpoint, pool: KvPool, timeout_s: float,
                 throttle: Throttle = NONE, warm_up: Callable[[], None] | None = None) -> None:
        self.device = device
        self.throttle = throttle
        self.cache = CacheKeeper(device, pool, endpoint.send, endpoint.keeps)
        self.send = endpoint.send
        self.keeps = endpoint.keeps
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._beat_s = -math.inf
        self._warm_up = warm_up

    def run(self) -> None:
        """Work until told to stop; whatever goes wrong is reported to the driver."""
        try:
            self.cache.pool.kernels.enter()
            with self.cache.pool.kernels.working():
                self.prepare()
                while True:
                    self.turn()
        except Stopped:
            return
        except Exception:  # noqa: BLE001 - the driver is told, and raises
            self.send(DRIVER, Failed(self.device, traceback.format_exc()))

    def prepare(self) -> None:
        """Do once what would take time at the first step."""
        if self._warm_up is not None:
            self._warm_up()

    @abstractmethod
    def turn(self) -> None:
        """Deal with what has come."""

    @abstractmethod
    def take(self, message: Message) -> None:
        """Sort one message in."""

    def pump(self, soon_s: float = BEAT_S) -> bool:
        """Take in one message, if one comes soon; whether one has.

        Raises:
            Stopped: it said so.
        """
        self.beat()
        message = self._endpoint.receive(min(COPY_S, soon_s) if self.cache.copying else soon_s)
        self.cache.send_copies()
        if isinstance(message, Stop) and message.at_once:
            raise Stopped
        if isinstance(message, CacheData):
            self.cache.take(message)
        elif message is not None:
            self.take(message)
        return message is not None

    def look_around(self, for_s: float = 0.0) -> None:
        """Take in what has come, and what comes within some time.

        Raises:
            Stopped: a message said so.
        """
        until_s = time.monotonic() + for_s
        while self.pump(max(0.0, min(BEAT_S, until_s - time.monotonic()))) or time.monotonic() < until_s:
            pass

    def packed(self, target: int, tensors: Sequence[Tensor], bulk: bool = False) -> list[Any]:
        """Tensors for a message: as they are where its link carries them, else in host memory.

        Args:
            bulk: of cache.
        """
        kernels = self.cache.pool.kernels
        return kernels.keep(tensors) if self.keeps(target, bulk) else kernels.pack(tensors)

    def beat(self) -> None:
        """Show that this worker is alive, if it has not done so lately."""
        now_s = time.monotonic()
        if now_s - self._beat_s >= BEAT_S:
            self._beat_s = now_s
            self.send(DRIVER, Beat(self.device))

    def wait_until(self, done: Callable[[], bool], for_what: str) -> None:
        """Take in messages until something holds.

        Raises:
            ExecutorError: it does not come about in time.
        """
        deadline_s = time.monotonic() + self._timeout_s
        while not done():
            self.pump()
            if time.monotonic() > deadline_s:
                raise ExecutorError(f"device {self.device} has waited {self._timeout_s:g} s for {for_what}")


@dataclass(slots=True)
class Batch:
    """The rows that a primary worker asks about in every layer of a step.

    Attributes:
        rows: of whole contexts; those of parts follow.
        plan, parts_plan: where their cache is, as of ``version`` of the pool; -1 before that is known.
    """

    about: AttentionBatch
    rows: int
    plan: Any = None
    parts_plan: Any = None
    version: int = -1


class AttentionWorker(Worker):
    """Cache and decode attention of one device, for all stages of its instance."""

    def __init__(self, device: int, endpoint: Endpoint, pool: KvPool, timeout_s: float,
                 throttle: Throttle = NONE, warm_up: Callable[[], None] | None = None) -> None:
        super().__init__(device, endpoint, pool, timeout_s, throttle, warm_up)
        self._controls: deque[Control] = deque()
        self._requests: deque[AttentionRequest] = deque()
        self._batches: dict[int, Batch] = {}

    def turn(self) -> None:
        self.pump()
        while self._controls and self.cache.may_apply(self._controls[0]):
            self.cache.apply(self._controls.popleft())
        for batch in self._batches.values():
            if batch.version < 0 and self._is_ready(batch):
                self._plan(batch)
        for _ in range(len(self._requests)):
            request = self._requests.popleft()
            if self._batch_of(request).version >= 0:
                self._answer(request)
            else:
                self._requests.append(request)

    def take(self, message: Message) -> None:
        match message:
            case AttentionRequest():
                self._requests.append(message)
            case AttentionBatch():
                # A sender goes through the layers of one batch at a time.
                rows = sum(len(item.groups) for item in message.items)
                self._batches[message.sender] = Batch(message, rows)
            case Control():
                self._controls.append(message)
            case Stop():
                raise Stopped
            case _:
                raise ExecutorError(f"attention worker {self.device} does not know what to do with {message}")

    def _batch_of(self, request: AttentionRequest) -> Batch:
        batch = self._batches.get(request.sender)
        if batch is None or batch.about.after != request.after:
            known = "of none" if batch is None else f"of step {batch.about.after}"
            raise ExecutorError(f"device {request.sender} asks about step {request.after}, it has told "
                                f"{known}")
        return batch

    def _is_ready(self, batch: Batch) -> bool:
        """Whether all that a batch reads is here."""
        about, cache = batch.about, self.cache
        return about.after <= cache.seq and all(cache.ready(item.request_id, about.stage, item.groups)
                                                for item in (*about.items, *about.parts))

    def _plan(self, batch: Batch) -> None:
        """Find out where the cache of a batch is."""
        about, cache = batch.about, self.cache
        batch.plan = cache.plan(about.stage, about.items) if about.items else None
        batch.parts_plan = cache.plan_parts(about.stage, about.parts) if about.parts else None
        batch.version = cache.pool.version

    def _answer(self, request: AttentionRequest) -> None:
        begun_s, batch = time.perf_counter(), self._batch_of(request)
        if batch.version != self.cache.pool.version:
            self._plan(batch)
        kernels, keeps, parts = self.cache.pool.kernels, self.keeps(request.sender), None
        q, k, v = (kernels.from_wire(array) for array in (request.queries, request.keys, request.values))
        if batch.parts_plan is None:
            found = self.cache.decode_attention(batch.plan, request.layer, q, k, v)
        else:
            found, parts = self._with_parts(batch, request.layer, in_rows(q, 2), in_rows(k, 1), in_rows(v, 1))
        values, *more = self.packed(request.sender, [found, *([parts] if parts is not None else ())])
        if keeps:
            kernels.wait()  # nothing else has, and it is to be told how long this took
        self.throttle.after_attention(begun_s, kernels.synchronize)
        sums = more[0] if more else None
        self.send(request.sender, AttentionResult(request.after, request.layer, self.device, values,
                                                  time.perf_counter() - begun_s, sums))

    def _with_parts(self, batch: Batch, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of all rows where some are parts, and the sums of these."""
        rows, cache = batch.rows, self.cache
        found, sums = cache.decode_parts(batch.parts_plan, layer, q[rows:], k[rows:], v[rows:])
        if batch.plan is None:
            return found, sums
        whole = cache.decode_attention(batch.plan, layer, q[:rows], k[:rows], v[:rows])
        return cache.pool.kernels.concatenate([whole, found]), sums
