"""Ranks joined by connections and torch.distributed, started here or by a launcher."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
import pytest
from exec_scenarios import LONG, SCENARIOS, SHORT, SPREAD, run_until_it_happens
from exec_toys import Fixed, Turning, expected_tokens, given, pipeline, workload

pytest.importorskip("torch", reason="workers over torch.distributed need the extra exec")

from hetis_exec.crew import WorkerSpec
from hetis_exec.crews import all_specs
from hetis_exec.distributed import DistributedCrew, _compare, serve
from hetis_exec.driver import Executor, ExecutorInput
from hetis_exec.errors import ExecutorError, WorkerError
from hetis_exec.joining import NetSettings, Seat, seats
from hetis_exec.net.endpoint import Channel
from hetis_exec.net.meeting import FAILED_KEY, Meeting, host_meeting, join_meeting
from hetis_exec.net.wires import PIECE_BYTES, GlooWire, Reaper, gloo_group
from hetis_exec.replay import replay
from hetis_exec.toy_backend import ToyBackend
from hetis_sim.metrics import record_violations

SOON_S = 20.0
WIRED = NetSettings(eager_bytes=0)
"""All arrays go over torch.distributed, however small."""


def check(what: ExecutorInput, settings: NetSettings = WIRED) -> tuple[Executor, Any]:
    """Run on ranks of this host: the tokens of one process, and the decisions of the simulator."""
    executor = Executor(what, lambda specs: DistributedCrew(specs, settings))
    result = executor.run()
    assert result.tokens == expected_tokens(what)
    assert replay(what, result.record).controller.log.lines == result.record.decisions
    assert record_violations(result.recorder.records()) == []
    assert {process.exitcode for process in executor.crew.processes.values()} == {0}
    return executor, result


def test_sums_of_ranks_are_the_same_on_all() -> None:
    """Tensor parallelism of uneven ranks, with heads that move."""
    policy = Turning([(3, 1, 0), (1, 0, 3), (0, 1, 3)])
    executor, _ = check(given(pipeline([[0, 1]], [4], [2], owned=[[3, 1]]), policy, LONG[:5]))
    assert sum(state.moves for state in executor.controller.states.values()) > 0


QUICK = ("two_stages", "moves_tight", "parts_move_ranks")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in SCENARIOS])
def test_tokens_and_decisions_are_those_of_one_process(name: str) -> None:
    """However heads, layers and prompts are split, requests preempted and heads moved in mid-decode."""
    scenario = SCENARIOS[name]
    run_until_it_happens(scenario, lambda: check(scenario.make()))


def test_small_arrays_ride_in_frames_and_large_ones_do_not() -> None:
    """Some of the messages of a run go one way, some the other: both arrive in order."""
    check(given(SPREAD, Fixed((1, 2, 1)), SHORT), NetSettings(eager_bytes=400))


# -- wires ---------------------------------------------------------------------------------------------------


def wires(*names: str) -> list[tuple[GlooWire, GlooWire]]:
    """Both ends of links, in one process."""
    meeting = host_meeting()
    made = []
    for name in names:
        def end(rank: int, name: str = name) -> GlooWire:
            store = join_meeting(meeting.place).store
            return GlooWire(gloo_group(store, name, rank, "127.0.0.1", SOON_S), 1 - rank, SOON_S)

        with ThreadPool(2) as pool:
            ends = pool.map(end, range(2))
        made.append((ends[0], ends[1]))
    return made


def test_wires_carry_arrays_of_every_size() -> None:
    """Packed or in pieces, in order, in both directions at once, sent before anybody asks for them."""
    (left, right), = wires("a")
    rng = np.random.default_rng(1)
    messages = [[rng.integers(0, 255, size, dtype=np.uint8) for size in sizes] for sizes in (
        [5], [0, 64, 3], [PIECE_BYTES], [PIECE_BYTES + 1, 7], [3 * PIECE_BYTES + 11, 0, 2 * PIECE_BYTES])]
    reaper = Reaper()
    for arrays in messages:
        reaper.add(left, left.send(arrays))
        reaper.add(right, right.send(arrays[::-1]))
    for arrays in messages:
        for wire, wanted in ((right, arrays), (left, arrays[::-1])):
            buffer = wire.receive([array.nbytes for array in wanted])
            at = 0
            for array in wanted:
                assert buffer[at:at + array.nbytes].tobytes() == array.tobytes()
                at += -(-array.nbytes // 64) * 64
    reaper.close(SOON_S)


def test_a_wire_whose_time_is_up_takes_no_other_one_with_it() -> None:
    """Each link has a process group of its own."""
    (slow, _), (left, right) = wires("a", "b")
    slow._timeout = type(slow._timeout)(seconds=0.2)
    with pytest.raises(RuntimeError):
        slow.receive([100])
    sends = left.send([np.arange(4)])
    assert right.receive([32])[:32].view(np.int64).tolist() == [0, 1, 2, 3]
    left.wait(sends[0])


# -- ranks of a launcher -------------------------------------------------------------------------------------


def _rank(place: Any, seat: Seat, spec: WorkerSpec | None) -> None:
    """A rank that hosts no driver."""
    raise SystemExit(0 if serve(place, seat, spec) else 3)


def ranks(meeting: Meeting, what: ExecutorInput, devices: Sequence[int],
          settings: NetSettings = WIRED) -> list[Any]:
    """Start ranks as a launcher would."""
    context = multiprocessing.get_context("forkserver")
    what = given_backend(what)
    specs = {spec.device: spec for spec in all_specs(what)}
    seated = seats(list(specs.values()), settings)
    made = [context.Process(target=_rank, daemon=True, args=(
        meeting.place, seated.get(device, Seat(device, (), settings, 1.0)), specs.get(device)))
        for device in devices]
    for process in made:
        process.start()
    return made


def given_backend(what: ExecutorInput) -> ExecutorInput:
    """A run that says what its workers compute with, so that every rank makes the same of it."""
    return replace(what, backend=ToyBackend(what.model, what.seed))


def joined(meeting: Meeting) -> Callable[[Sequence[WorkerSpec]], DistributedCrew]:
    """The crew of rank 0."""
    return lambda specs: DistributedCrew(specs, WIRED, local=(0,), meeting=meeting)


def test_ranks_of_a_launcher_serve_like_processes() -> None:
    """Rank 0 hosts the driver and its own worker; a rank that the plan has no use for waits for the end."""
    what = given_backend(given(pipeline([[0], [2]], [2, 2], [1]), Fixed((3, 1, 2, 2)), SHORT))
    meeting = host_meeting()
    others = ranks(meeting, what, [1, 2, 3])
    executor = Executor(what, joined(meeting))
    result = executor.run()
    assert list(executor.crew.processes) == [0]
    assert result.tokens == expected_tokens(what)
    replay(what, result.record)
    for process in others:
        process.join(SOON_S)
    assert [process.exitcode for process in others] == [0, 0, 0]


def test_a_rank_that_was_given_something_else_is_refused() -> None:
    """The driver says so before any worker computes, and all ranks end."""
    what = given_backend(given(SPREAD, Fixed((1, 2, 1)), SHORT))
    meeting = host_meeting()
    others = ranks(meeting, what, [1]) + ranks(meeting, what, [2], NetSettings(0, digest=":another"))
    begun_s = time.monotonic()
    with pytest.raises(WorkerError, match="device 2 is lost: it was given another configuration"):
        Executor(what, joined(meeting)).run()
    assert time.monotonic() - begun_s < SOON_S
    for process in others:
        process.join(SOON_S)
    assert all(process.exitcode is not None for process in others)


def test_a_rank_that_cannot_come_says_why() -> None:
    """What keeps it from coming reaches the driver through the store; so does the driver's own reason."""
    what = given_backend(given(SPREAD, Fixed((1, 2, 1)), SHORT))
    meeting = host_meeting()
    join_meeting(meeting.place).announce(FAILED_KEY, {"device": 2, "reason": "model.path='/x' is not there"})
    with pytest.raises(WorkerError, match=r"device 2 is lost: model.path='/x' is not there"):
        Executor(what, joined(meeting)).run()
    other = host_meeting()
    other.announce("driver", {FAILED_KEY: "rank 0 has failed: no plan"})
    with pytest.raises(ExecutorError, match="rank 0 has failed: no plan"):
        serve(other.place, Seat(1, (), WIRED, 1.0), None)


def test_workers_end_when_their_driver_is_gone() -> None:
    """Its connections end without a goodbye, as they do when it is killed."""
    what = given_backend(given(SPREAD, Fixed((1, 2, 1)), workload(1)))
    crew = DistributedCrew(all_specs(what), WIRED)
    crew.start()
    assert crew._endpoint.await_links(3, SOON_S)
    for link in crew._endpoint._links.values():
        link.frames.close(0.0)
    for process in crew.processes.values():
        process.join(SOON_S)
        assert process.exitcode is not None
    crew.stop(at_once=True)


def test_a_driver_that_is_told_to_end_says_so() -> None:
    """A launcher ends all ranks; what has finished is kept, and no worker is left."""
    what = given_backend(given(SPREAD, Fixed((1, 2, 1)), workload(12, output=(8, 12), gap_s=0.02)))
    meeting = host_meeting()
    others = ranks(meeting, what, [1, 2])
    before = signal.getsignal(signal.SIGTERM)
    executor = Executor(what, joined(meeting),
                        lambda ended: os.kill(os.getpid(), signal.SIGTERM) if ended == 2 else None)
    with pytest.raises(ExecutorError, match="told to end") as caught:
        executor.run()
    assert signal.getsignal(signal.SIGTERM) == before
    assert caught.value.result is not None
    assert 2 <= len(caught.value.result.tokens) < 12
    for process in others:
        process.join(SOON_S)
    assert [process.exitcode for process in others] == [0, 0]


def test_ranks_stay_on_the_cores_that_they_are_given() -> None:
    """As other worker processes do."""
    core = min(os.sched_getaffinity(0))
    what = given_backend(given(pipeline([[0]], [4]), Fixed(), workload(1), cores={0: core}))
    crew = DistributedCrew(all_specs(what), WIRED)
    try:
        crew.start()
        assert crew._endpoint.await_links(1, SOON_S)
        assert os.sched_getaffinity(crew.processes[0].pid) == {core}
    finally:
        crew.stop(at_once=True)


def test_links_are_those_that_messages_take() -> None:
    """Cache goes from any worker to any other one; everything else stays within an instance."""
    seat = Seat(1, ((0, 1), (2,)), WIRED, 1.0)
    assert seat.links() == [(0, 1, Channel.DATA), (0, 1, Channel.CACHE), (1, 2, Channel.CACHE)]
    assert Seat(3, ((0, 1), (2,)), WIRED, 1.0).links() == []


def test_types_of_numbers_must_be_the_same_everywhere() -> None:
    """Cards of different hosts may lead to different ones."""
    with pytest.raises(ExecutorError, match=r"executor\.dtype comes to float16 there and to bfloat16"):
        _compare("bfloat16:x", "float16:x")
    _compare("bfloat16:x", "bfloat16:x")
