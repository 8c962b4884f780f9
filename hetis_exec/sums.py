"""Sums over the tensor-parallel ranks of a stage, of which each layer has two.

*Ordered* sums go as messages: every rank sends its part to every other one and adds all of them up in the
order of ranks, so that all ranks, and all kinds of workers, come to the same bits. *Reduced* ones are
left to a library (:mod:`hetis_exec.net.reducers`), whose order is its own.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Protocol

from hetis_exec.backend import Kernels, Tensor
from hetis_exec.errors import ExecutorError
from hetis_exec.messages import Message, Partial

WAIT_S = 0.2
"""Who waits for a sum looks after all else this often."""

GRACE_S = 3.0
"""A rank that has lost a sum leaves it to the driver to notice why, for so long: it may know more."""


class Posted(Protocol):
    """A sum under way."""

    def over(self, timeout_s: float) -> bool:
        """Wait so long at most; whether it is over.

        Raises:
            RuntimeError: it will never be, for a rank is lost.
        """

    def result(self) -> Tensor:
        """The sum, or a tensor that will hold it for all that the device is asked for after this."""


class Reducer(Protocol):
    """What adds up over the ranks of one stage.

    Attributes:
        waits: a result is there only when it is over; otherwise the device waits for it, not its host.
    """

    waits: bool

    def post(self, kernels: Kernels, values: Tensor) -> Posted:
        """Begin to add up, in place where that is possible; all ranks do so in the same order.

        Raises:
            RuntimeError: a rank is lost.
        """

    def close(self) -> None:
        """Give up what is under way."""


class Sums(Protocol):
    """Adds up for one rank."""

    def total(self, seq: int, number: int, values: Tensor) -> Tensor:
        """Sum of all ranks' values, the ``number``-th of a step."""

    def settle(self) -> None:
        """Wait until no sum is under way any more."""


class Colleague(Protocol):
    """The worker that a sum belongs to."""

    device: int
    kernels: Kernels

    def send(self, target: int, message: Message) -> None:
        """Hand a message over."""

    def packed(self, target: int, tensors: Sequence[Tensor]) -> list[Any]:
        """Arrays for a message."""

    def fetch(self, key: tuple[object, ...], what: str) -> Message:
        """A message that a worker sends to this one."""

    def look_around(self, for_s: float = 0.0) -> None:
        """Take in what has come, and what comes within some time."""


class OrderedSums:
    """Everybody's part goes to everybody. ``peers`` are devices in the order of ranks."""

    def __init__(self, worker: Colleague, peers: Sequence[int]) -> None:
        self._worker = worker
        self._peers = peers
        self._rank = peers.index(worker.device)

    def total(self, seq: int, number: int, values: Tensor) -> Tensor:
        worker = self._worker
        for device in self._peers:
            if device != worker.device:
                worker.send(device, Partial(seq, number, self._rank, worker.packed(device, [values])[0]))
        total: Tensor = reduce(operator.add, (
            values if rank == self._rank else self._part(seq, number, rank)
            for rank in range(len(self._peers))))
        return total

    def _part(self, seq: int, number: int, rank: int) -> Tensor:
        message = self._worker.fetch((Partial, seq, number, rank), f"a sum from device {self._peers[rank]}")
        assert isinstance(message, Partial)
        return self._worker.kernels.from_wire(message.values)

    def settle(self) -> None:
        """There is none: each has been waited for."""


class ReducedSums:
    """A library adds up; meanwhile the worker goes on to take in what comes and to show that it is alive."""

    def __init__(self, worker: Colleague, peers: Sequence[int], reducer: Reducer, timeout_s: float,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._worker = worker
        self._peers = peers
        self._reducer = reducer
        self._timeout_s = timeout_s
        self._clock = clock
        self._last: Posted | None = None

    def total(self, seq: int, number: int, values: Tensor) -> Tensor:
        try:
            self._last = posted = self._reducer.post(self._worker.kernels, values)
        except RuntimeError as error:
            raise self._lost(error) from error
        if self._reducer.waits:
            self.settle()
        return posted.result()

    def settle(self) -> None:
        # They end in the order in which they were begun.
        deadline_s = self._clock() + self._timeout_s
        while self._last is not None and not self._over(self._last):
            self._worker.look_around()
            if self._clock() > deadline_s:
                raise ExecutorError(f"device {self._worker.device} has waited {self._timeout_s:g} s for a "
                                    f"sum over devices {list(self._peers)}")
        self._last = None

    def _over(self, posted: Posted) -> bool:
        try:
            return posted.over(WAIT_S)
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> ExecutorError:
        self._worker.look_around(GRACE_S)
        return ExecutorError(f"device {self._worker.device} has lost a sum over devices "
                             f"{list(self._peers)}: {error}")


def sums_for(worker: Colleague, peers: Sequence[int], reducer: Reducer | None, timeout_s: float) -> Sums:
    """How a worker's sums are made: by a reducer, where it has one."""
    return OrderedSums(worker, peers) if reducer is None else ReducedSums(worker, peers, reducer, timeout_s)
