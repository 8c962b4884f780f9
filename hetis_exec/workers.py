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
    AttentionItem,
    AttentionRequest,
    AttentionResult,
    Beat,
    CacheData,
    Control,
    Failed,
    Message,
    Stop,
)
from hetis_exec.shares import in_rows
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
    """The rows that a primary worker asks about in every layer of step ``seq``.

    Attributes:
        rows: of whole contexts; those of parts follow.
        plan, parts_plan: where their cache is, as of ``version`` of the pool.
    """

    seq: int
    items: tuple[AttentionItem, ...]
    parts: tuple[AttentionItem, ...]
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
        for _ in range(len(self._requests)):
            request = self._requests.popleft()
            if self._can_answer(request):
                self._answer(request)
            else:
                self._requests.append(request)

    def take(self, message: Message) -> None:
        match message:
            case Control():
                self._controls.append(message)
            case AttentionRequest():
                self._requests.append(message)
            case Stop():
                raise Stopped
            case _:
                raise ExecutorError(f"attention worker {self.device} does not know what to do with {message}")

    def _can_answer(self, request: AttentionRequest) -> bool:
        return request.after <= self.cache.seq and (request.items is None or all(
            self.cache.ready(item.request_id, request.stage, item.groups)
            for item in (*request.items, *request.parts)))

    def _answer(self, request: AttentionRequest) -> None:
        begun_s = time.perf_counter()
        kernels, batch = self.cache.pool.kernels, self._batch(request)
        q = in_rows(kernels.from_wire(request.queries), 2)
        k, v = (in_rows(kernels.from_wire(array), 1) for array in (request.keys, request.values))
        rows, whole, parts = batch.rows, None, None
        if batch.items:
            whole = self.cache.decode_attention(batch.plan, request.layer, q[:rows], k[:rows], v[:rows])
        if batch.parts:
            parts = self.cache.decode_parts(batch.parts_plan, request.layer, q[rows:], k[rows:], v[rows:])
        attended = [part for part in (whole, parts[0] if parts is not None else None) if part is not None]
        found = attended[0] if len(attended) == 1 else kernels.concatenate(attended)
        values, *more = self.packed(request.sender, [found, *([parts[1]] if parts is not None else ())])
        if self.keeps(request.sender):
            kernels.wait()  # nothing else has, and it is to be told how long this took
        self.throttle.after_attention(begun_s, kernels.synchronize)
        sums = more[0] if more else None
        self.send(request.sender, AttentionResult(request.after, request.layer, self.device, values,
                                                  time.perf_counter() - begun_s, sums))

    def _batch(self, request: AttentionRequest) -> Batch:
        """What a request is about; a sender goes through the layers of one batch at a time."""
        if request.items is not None:
            rows = sum(len(item.groups) for item in request.items)
            self._batches[request.sender] = Batch(request.after, request.items, request.parts, rows)
        batch = self._batches[request.sender]
        if batch.seq != request.after:
            raise ExecutorError(f"device {request.sender} asks about step {request.after}, its last known "
                                f"step is {batch.seq}")
        if batch.version != self.cache.pool.version:
            batch.plan = self.cache.plan(request.stage, batch.items) if batch.items else None
            batch.parts_plan = self.cache.plan_parts(request.stage, batch.parts) if batch.parts else None
            batch.version = self.cache.pool.version
        return batch
