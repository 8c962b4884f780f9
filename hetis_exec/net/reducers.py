"""Sums over the ranks of a stage by torch.distributed: NCCL's all_reduce between cards, else gloo's.

See :mod:`hetis_exec.sums`. A rank that is gone ends gloo's sums at once; one that hangs ends nothing, so
both are looked at from time to time, and the driver says who is lost. NCCL has a watchdog beside that: it
ends the process of a rank whose sum has taken too long.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed

from hetis_exec.backend import Kernels
from hetis_exec.errors import ExecutorError
from hetis_exec.kernels.wire import tensor_of
from hetis_exec.messages import Array
from hetis_exec.net.cards import Card, have_own
from hetis_exec.net.meeting import MeetingPlace
from hetis_exec.net.wires import gloo_group, nccl_group
from hetis_exec.sums import Reducer

distributed: Any = torch.distributed

LOOK_S = 5e-5
"""A sum on cards is looked at so often."""

MARGIN_S = 30.0
"""NCCL's watchdog gives a worker so much longer than it gives itself: what that says is clearer."""

WITHOUT_CARDS = ""
"""What ``auto`` comes to where NCCL cannot be used: ordered sums, which take no longer there."""

ABANDONED: list[Any] = []
"""Groups that live as long as the process: to take one apart that has something under way takes as long."""


class HostSum:
    """A sum under way in host memory."""

    def __init__(self, work: Any, kernels: Kernels, array: Array) -> None:
        self._work = work
        self._kernels = kernels
        self._array = array

    def over(self, timeout_s: float) -> bool:
        with suppress(RuntimeError):
            self._work.wait(timedelta(seconds=timeout_s))
            return True
        if not self._work.is_completed():
            return False
        self._work.wait()  # says what is wrong
        return True

    def result(self) -> Any:
        return self._kernels.from_wire(self._array)


class HostReducer:
    """Gloo's all_reduce. What lies on a card passes through host memory."""

    waits = True

    def __init__(self, group: Any, timeout_s: float) -> None:
        self._group = group
        self._options = distributed.AllreduceOptions()
        self._options.timeout = timedelta(seconds=timeout_s)
        self._last: Any = None

    def post(self, kernels: Kernels, values: Any) -> HostSum:
        array = np.ascontiguousarray(kernels.to_wire(values))
        self._last = self._group.allreduce([tensor_of(array)], self._options)
        return HostSum(self._last, kernels, array)

    def close(self) -> None:
        if self._last is not None and not self._last.is_completed():
            ABANDONED.append(self._group)
        self._group = self._last = None


class CardSum:
    """A sum under way on a card, whose further work waits for it."""

    def __init__(self, work: Any, values: torch.Tensor) -> None:
        self._work = work
        self._values = values

    def over(self, timeout_s: float) -> bool:
        until_s = time.monotonic() + timeout_s
        while not self._work.is_completed():
            if time.monotonic() > until_s:
                return False
            time.sleep(LOOK_S)
        error = self._work.exception()
        if error is not None:
            raise RuntimeError(str(error))
        return True

    def result(self) -> torch.Tensor:
        return self._values


class CardReducer:
    """All_reduce of tensors where they lie, on the stream of whoever asks."""

    waits = False

    def __init__(self, group: Any) -> None:
        self._group = group
        self._last: Any = None

    def post(self, kernels: Kernels, values: torch.Tensor) -> CardSum:
        values = values.contiguous()
        self._last = work = self._group.allreduce([values])
        work.wait()  # NCCL's lets nobody wait but the stream
        return CardSum(work, values)

    def close(self) -> None:
        if self._last is not None and not self._last.is_completed():
            self._group.abort()
        else:
            self._group.shutdown()
        self._group = self._last = None


# -- which one ---------------------------------------------------------------------------------------------


def library_for(wish: str, cards: Sequence[Card]) -> str:
    """What adds up over ranks with the given cards: ``nccl``, ``gloo``, or empty for ordered sums.

    Args:
        wish: see :attr:`hetis_exec.config.ExecutorConfig.collectives`.
    """
    if wish == "ordered" or len(cards) < 2:
        return ""
    if have_own(cards):
        return "nccl"
    return "gloo" if wish == "all_reduce" else WITHOUT_CARDS


def make_reducer(store: Any, ranks: Mapping[int, Card], device: int, wish: str, place: MeetingPlace,
                 timeout_s: float, card: str) -> Reducer | None:
    """What adds up for one rank of a stage; None for ordered sums. All ranks call this.

    Args:
        ranks: the cards of the stage's devices, in the order of their ranks.
        timeout_s: how long one sum may take.
        card: torch device of this rank.

    Raises:
        ExecutorError: the library cannot add up.
    """
    devices = list(ranks)
    library = library_for(wish, list(ranks.values()))
    if not library:
        return None
    name, rank = f"sums/{'-'.join(map(str, devices))}", devices.index(device)
    try:
        if library == "gloo":
            made = gloo_group(store, name, rank, place.gloo_bind, place.start_s, len(devices))
            return HostReducer(made, timeout_s)
        group = nccl_group(store, name, rank, len(devices), timeout_s + MARGIN_S, place.nccl_interface,
                           urgent=True)
        # The first sum makes connections, and finds out whether there can be any.
        probe = torch.ones(1, device=card)
        group.allreduce([probe]).wait()
        if probe.item() != len(devices):
            raise RuntimeError(f"{len(devices)} ones add up to {probe.item()}")
        return CardReducer(group)
    except RuntimeError as error:
        raise ExecutorError(f"{library} cannot add up over devices {devices} ({error}); executor.collectives="
                            "ordered does without it") from error
