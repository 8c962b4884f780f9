"""Sums over tensor-parallel ranks, exchanged by messages or left to torch.distributed."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import reduce
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
import pytest
from exec_models import given_for, torch, wrong
from exec_scenarios import LONG, SCENARIOS, SHORT, run_until_it_happens
from exec_toys import Fixed, Turning, expected_tokens, given, pipeline

from hetis_exec.crew import WorkerSpec
from hetis_exec.distributed import DistributedCrew
from hetis_exec.driver import Executor, ExecutorInput
from hetis_exec.errors import ExecutorError
from hetis_exec.joining import NetSettings
from hetis_exec.kernels.cpu import CpuKernels
from hetis_exec.messages import Message, Partial
from hetis_exec.net import reducers, wires
from hetis_exec.net.cards import NO_CARD, Card, card_at, have_own
from hetis_exec.net.meeting import MeetingPlace, host_meeting, join_meeting
from hetis_exec.net.reducers import ABANDONED, CardReducer, HostReducer, library_for, make_reducer
from hetis_exec.net.wires import gloo_group
from hetis_exec.replay import replay
from hetis_exec.sums import OrderedSums, ReducedSums
from hetis_exec.toy_backend import ToyKernels

SOON_S = 20.0
KERNELS = CpuKernels(1, 4, 4)


def crew(collectives: str) -> Callable[[Sequence[WorkerSpec]], DistributedCrew]:
    """Ranks of this host."""
    return lambda specs: DistributedCrew(specs, NetSettings(collectives=collectives))


def check(what: ExecutorInput, collectives: str) -> tuple[Executor, Any]:
    """Run to the end; the simulator makes the same decisions."""
    executor = Executor(what, crew(collectives))
    result = executor.run()
    replay(what, result.record)
    assert {process.exitcode for process in executor.crew.processes.values()} == {0}
    return executor, result


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uneven_ranks", pytest.param("moves_ranks", marks=pytest.mark.slow),
                                  pytest.param("parts_move_ranks", marks=pytest.mark.slow)])
def test_reduced_sums_change_no_token(name: str) -> None:
    """Of ranks with attention workers beside them, before another stage, with heads that move."""
    scenario = SCENARIOS[name]
    what = scenario.make()
    _, result = run_until_it_happens(scenario, lambda: check(scenario.make(), "all_reduce"))
    assert result.tokens == expected_tokens(what)


def test_ranks_whose_heads_move_meanwhile() -> None:
    """Cache that others send comes while sums are waited for."""
    policy = Turning([(3, 1, 0), (1, 0, 3), (0, 1, 3)])
    what = given(pipeline([[0, 1]], [4], [2], owned=[[3, 1]]), policy, LONG[:5])
    executor, result = check(what, "all_reduce")
    assert result.tokens == expected_tokens(what)
    assert sum(state.moves for state in executor.controller.states.values()) > 0


# Nine query heads with three KV heads.
UNEVEN = {"two": (pipeline([[0, 1]], [4], owned=[[2, 1]]), (2, 1)),
          "three": (pipeline([[0, 1, 2]], [4], owned=[[1, 1, 1]]), (1, 1, 1))}


@pytest.mark.parametrize("collectives", ["ordered", "all_reduce"])
@pytest.mark.parametrize("ranks", UNEVEN)
def test_tokens_of_uneven_ranks_are_those_of_transformers(ranks: str, collectives: str) -> None:
    """However their sums are made."""
    plan, placement = UNEVEN[ranks]
    what = given(plan, Fixed(placement), SHORT, timeout_s=60.0, **given_for("smol"))
    _, result = check(what, collectives)
    assert wrong("smol", what, result.tokens) == []


# -- the libraries -------------------------------------------------------------------------------------------


def groups(size: int) -> list[Any]:
    """Both or all ends of a group of gloo, in one process."""
    meeting = host_meeting()

    def end(rank: int) -> Any:
        return gloo_group(join_meeting(meeting.place).store, "sums", rank, "127.0.0.1", SOON_S, size)

    with ThreadPool(size) as pool:
        return pool.map(end, range(size))


PARTS = np.random.default_rng(7).standard_normal((3, 5, 8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_come_to_the_same_sum(size: int, dtype: str) -> None:
    """Of two it is the ordered one to the bit, of three to rounding; tensors may be strided."""
    kind = getattr(torch, dtype)
    tensors = [torch.from_numpy(part).to(kind).T for part in PARTS[:size]]
    wanted = reduce(operator.add, tensors)
    ends = [HostReducer(group, SOON_S) for group in groups(size)]
    posted = [end.post(KERNELS, tensor.clone(memory_format=torch.preserve_format))
              for end, tensor in zip(ends, tensors, strict=True)]
    assert all(one.over(SOON_S) for one in posted)
    sums = [one.result() for one in posted]
    assert sums[0].dtype == kind
    assert all(torch.equal(sums[0], other) for other in sums)
    if size == 2:
        assert torch.equal(sums[0], wanted)
    else:
        assert torch.allclose(sums[0], wanted, rtol=torch.finfo(kind).eps * 4, atol=torch.finfo(kind).eps * 4)
    for end in ends:
        end.close()
    assert not ABANDONED


def test_arrays_of_the_toy_are_added_up_as_well() -> None:
    """They are no tensors."""
    kernels, ends = ToyKernels(1, 4, 4), [HostReducer(group, SOON_S) for group in groups(2)]
    posted = [end.post(kernels, part.copy()) for end, part in zip(ends, PARTS, strict=False)]
    assert all(one.over(SOON_S) for one in posted)
    assert (posted[0].result() == PARTS[0] + PARTS[1]).all()


def test_a_sum_that_others_do_not_join_is_not_over() -> None:
    """It can be asked after again, and its group is left alone when it is given up."""
    left, right = (HostReducer(group, SOON_S) for group in groups(2))
    try:
        first = left.post(KERNELS, torch.ones(3))
        assert not first.over(0.05)
        assert not first.over(0.05)
        left.close()
        assert len(ABANDONED) == 1
        assert right.post(KERNELS, torch.ones(3)).over(SOON_S)
        assert first.over(SOON_S)
        assert first.result().tolist() == [2.0] * 3
    finally:
        ABANDONED.clear()


def test_a_sum_whose_other_rank_is_gone_is_lost() -> None:
    """At once, and not only when its time is up."""
    left, right = groups(2)
    posted = HostReducer(left, 10 * SOON_S).post(KERNELS, torch.ones(3))
    del right
    with pytest.raises(RuntimeError, match=r"[Cc]onnection|closed"):
        for _ in range(100):
            posted.over(0.2)


class StreamGroup:
    """A stand-in for NCCL's group: sums are over when they are told to be; who waits is the stream."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: Exception | None = None
        self.finished = False

    def allreduce(self, tensors: list[Any]) -> StreamGroup:
        self.calls.append("allreduce")
        tensors[0].mul_(2)
        return self

    def wait(self) -> None:
        self.calls.append("wait")

    def is_completed(self) -> bool:
        return self.finished or self.error is not None

    def exception(self) -> Exception | None:
        return self.error

    def abort(self) -> None:
        self.calls.append("abort")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def test_sums_on_cards_are_there_for_the_stream_at_once() -> None:
    """The host asks later whether they are over; what is under way at the end is aborted."""
    group = StreamGroup()
    reducer = CardReducer(group)
    assert not reducer.waits
    posted = reducer.post(KERNELS, torch.ones(2))
    assert posted.result().tolist() == [2.0, 2.0]
    assert group.calls == ["allreduce", "wait"]
    assert not posted.over(0.01)
    reducer.close()
    assert group.calls[-1] == "abort"
    again = CardReducer(group)
    posted = again.post(KERNELS, torch.ones(2))
    group.finished = True
    assert posted.over(0.0)
    again.close()
    assert group.calls[-1] == "shutdown"
    group.error = RuntimeError("a card has fallen off the bus")
    with pytest.raises(RuntimeError, match="fallen off"):
        posted.over(0.0)


# -- a worker's part -----------------------------------------------------------------------------------------


class Colleague:
    """The worker of a sum; counts how often it has looked around."""

    device = 1
    kernels = KERNELS

    def __init__(self) -> None:
        self.sent: list[tuple[int, Message]] = []
        self.looks: list[float] = []
        self.box: dict[tuple[object, ...], Message] = {}

    def send(self, target: int, message: Message) -> None:
        self.sent.append((target, message))

    def packed(self, target: int, tensors: Sequence[Any]) -> list[Any]:
        return KERNELS.pack(tensors)

    def fetch(self, key: tuple[object, ...], what: str) -> Message:
        return self.box.pop(key)

    def look_around(self, for_s: float = 0.0) -> None:
        self.looks.append(for_s)


class Later:
    """A reducer whose sums are over after some looks."""

    def __init__(self, looks: float, *, waits: bool, error: str = "") -> None:
        self.waits = waits
        self._looks = looks
        self._error = error

    def post(self, kernels: Any, values: Any) -> Later:
        return self

    def over(self, timeout_s: float) -> bool:
        if self._error:
            raise RuntimeError(self._error)
        self._looks -= 1
        return self._looks < 0

    def result(self) -> str:
        return "the sum"

    def close(self) -> None:
        """Nothing is under way."""


def test_who_waits_for_a_sum_goes_on_taking_in_what_comes() -> None:
    """A sum in host memory is waited for at once, one on a card when the worker asks for that."""
    for waits in (True, False):
        worker = Colleague()
        sums = ReducedSums(worker, (0, 1), Later(3, waits=waits), 10.0)
        assert sums.total(5, 0, torch.ones(1)) == "the sum"
        assert len(worker.looks) == (3 if waits else 0)
        sums.settle()
        assert len(worker.looks) == 3
        sums.settle()
        assert len(worker.looks) == 3


def test_sums_that_never_end_are_given_up() -> None:
    """The error says who has waited, how long and for whom."""
    times = iter(range(100))
    sums = ReducedSums(Colleague(), (0, 1), Later(float("inf"), waits=True), 10.0, clock=lambda: next(times))
    with pytest.raises(ExecutorError, match=r"device 1 has waited 10 s for a sum over devices \[0, 1\]"):
        sums.total(5, 0, torch.ones(1))


def test_the_driver_hears_of_a_lost_sum_only_after_a_while() -> None:
    """It may know better why."""
    worker = Colleague()
    sums = ReducedSums(worker, (0, 1), Later(0, waits=True, error="peer gone"), 10.0)
    with pytest.raises(ExecutorError, match=r"device 1 has lost a sum over devices \[0, 1\]: peer gone"):
        sums.total(5, 0, torch.ones(1))
    assert worker.looks[-1] > 1.0


def test_ordered_sums_are_added_in_the_order_of_ranks() -> None:
    """On every rank, so that all have the same bits; devices need not be numbered as ranks are."""
    values = [torch.tensor([x]) for x in (1e8, 1.0, -1e8)]
    worker = Colleague()
    for rank, device in enumerate((2, 1, 0)):
        if device != worker.device:
            worker.box[Partial, 7, 3, rank] = Partial(7, 3, rank, values[rank].numpy())
    total = OrderedSums(worker, (2, 1, 0)).total(7, 3, values[1])
    assert total.item() == ((values[0] + values[1]) + values[2]).item()
    assert [(target, message.rank) for target, message in worker.sent] == [(2, 1), (0, 1)]


# -- which one -----------------------------------------------------------------------------------------------

A, B = Card("GPU-a", "2.28.9"), Card("GPU-b", "2.28.9")


@pytest.mark.parametrize(("wish", "cards", "library"), [
    ("ordered", [A, B], ""), ("auto", [A, B], "nccl"), ("all_reduce", [A, B], "nccl"),
    ("auto", [A, A], ""), ("all_reduce", [A, A], "gloo"),
    ("auto", [A, NO_CARD], ""), ("all_reduce", [A, NO_CARD], "gloo"),
    ("auto", [NO_CARD, NO_CARD], ""), ("all_reduce", [NO_CARD, NO_CARD], "gloo"),
    ("auto", [A, B._replace(nccl="2.30.3")], ""), ("all_reduce", [A], ""),
])
def test_nccl_is_for_ranks_with_cards_of_their_own(wish: str, cards: list[Card], library: str) -> None:
    """And with the same version of it."""
    assert library_for(wish, cards) == library
    assert have_own([A, B])


def test_a_processor_is_no_card() -> None:
    """Nor is any device where torch has no NCCL."""
    assert card_at("cpu") == NO_CARD


def test_a_library_that_cannot_add_up_is_named_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first request."""

    def refuse(*given: Any, **more: Any) -> Any:
        raise RuntimeError("Duplicate GPU detected")

    monkeypatch.setattr(reducers, "nccl_group", refuse)
    meeting = host_meeting()
    said = r"devices \[3, 4\] \(Duplicate GPU detected\); executor.collectives=ordered does without it"
    with pytest.raises(ExecutorError, match=f"nccl cannot add up over {said}"):
        make_reducer(meeting.store, {3: A, 4: B}, 3, "auto", meeting.place, 1.0, "cuda:0")


class Nccl:
    """A stand-in for NCCL's groups: keeps what it is made with."""

    class Options:
        """What a group may be told."""

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        self.made = (rank, size, options.is_high_priority_stream, options._timeout.total_seconds())


@pytest.mark.parametrize(("settings", "set_before", "interface"), [
    ({}, None, "=lo"), ({"bind": "10.0.0.2"}, None, None), ({}, "eth7", "eth7"),
    ({"bind": "10.0.0.2", "interface": "eth1"}, None, "=eth1")])
def test_groups_of_nccl_are_told_what_they_need(
        settings: dict[str, str], set_before: str | None, interface: str | None,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Priority, patience, and the interface where that is known: without one NCCL would choose its own."""
    monkeypatch.setattr(wires.distributed, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", set_before or "")
    if set_before is None:
        monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    place = MeetingPlace("127.0.0.1", 1, **settings)
    group = wires.nccl_group(host_meeting().store, "a", 1, 2, 90.0, place.nccl_interface, urgent=True)
    assert group.made == (1, 2, True, 90.0)
    assert os.environ.get("NCCL_SOCKET_IFNAME") == interface


def test_gloo_takes_part_in_a_time_limit() -> None:
    """Its own, should nobody look after a sum."""
    left, _ = groups(2)
    reducer = HostReducer(left, 0.2)
    posted = reducer.post(KERNELS, torch.ones(1))
    with pytest.raises(RuntimeError):
        posted._work.wait(timedelta(seconds=SOON_S))
