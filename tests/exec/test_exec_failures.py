"""Workers that raise, die or hang, and input that cannot run: a clear error, soon."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
from exec_toys import MODEL, Fixed, expected_tokens, given, pipeline, run, workload

from hetis_exec.crew import Crew, WorkerSpec
from hetis_exec.driver import Executor, ExecutorInput
from hetis_exec.errors import ExecutorError, WorkerError
from hetis_exec.instance import InstanceDriver
from hetis_exec.kvcache import KvPool
from hetis_exec.messages import (
    DRIVER,
    AttentionBatch,
    AttentionItem,
    AttentionRequest,
    Control,
    Failed,
    Open,
)
from hetis_exec.processes import ProcessCrew
from hetis_exec.replay import replay
from hetis_exec.toy_backend import ToyKernels
from hetis_exec.toy_model import ToyShard
from hetis_exec.transport import Endpoint, InProcessTransport
from hetis_exec.workers import AttentionWorker
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.request import Request

SOON_S = 20.0
SPREAD = pipeline([[0], [1]], [2, 2], [2])


def what(requests: list[Request] | None = None, timeout_s: float = 10.0) -> ExecutorInput:
    """A run that takes its time: 12 requests, one after the other, on two stages and an attention worker."""
    return given(SPREAD, Fixed((2, 2, 2, 2)), requests or workload(12, output=(8, 12), gap_s=0.02),
                 timeout_s=timeout_s)


class Trap:
    """Makes a method do something else once two requests have finished."""

    def __init__(self, action: Callable[[], object], method: Callable[..., object]) -> None:
        self._action = action
        self._method = method
        self._sprung = False

    def progress(self, ended: int) -> None:
        """To be told how many have."""
        self._sprung = ended >= 2

    def method(self) -> Callable[..., object]:
        """What takes the place of the method."""

        def wrapped(*arguments: object) -> object:
            if self._sprung:
                self._action()
            return self._method(*arguments)

        return wrapped


def fail(executor: Executor) -> WorkerError:
    """Run into a lost worker; finished requests are kept, and the answer comes soon."""
    begun_s = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        executor.run()
    assert time.monotonic() - begun_s < SOON_S
    kept = caught.value.result
    assert kept is not None
    wanted = expected_tokens(executor.given)
    assert 1 <= len(kept.tokens) < len(executor.given.requests)
    assert kept.tokens == {request_id: wanted[request_id] for request_id in kept.tokens}
    finished = kept.recorder.requests()
    assert sorted(finished["request_id"]) == sorted(kept.tokens)
    return caught.value


def test_a_worker_that_raises_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error holds the device and the worker's own traceback."""

    def explode() -> None:
        raise ZeroDivisionError("a planted failure")

    trap = Trap(explode, ToyShard.sample)
    monkeypatch.setattr(ToyShard, "sample", trap.method())
    error = fail(Executor(what(), progress=trap.progress))
    assert error.device == 1
    assert "a planted failure" in str(error)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_without_a_word_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody looks after the workers while nothing comes from them."""

    def vanish() -> None:
        raise SystemExit

    trap = Trap(vanish, AttentionWorker._answer)
    monkeypatch.setattr(AttentionWorker, "_answer", trap.method())
    error = fail(Executor(what(), progress=trap.progress))
    assert error.device == 2
    assert "ended without a word" in str(error)


def test_a_worker_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that shows no sign of life for timeout_s is lost, and the run does not wait for it."""
    never = Event()
    trap = Trap(lambda: never.wait(SOON_S), AttentionWorker._answer)
    monkeypatch.setattr(AttentionWorker, "_answer", trap.method())
    try:
        error = fail(Executor(what(timeout_s=1.0), progress=trap.progress))
    finally:
        never.set()
    assert error.device == 2
    assert "no sign of life for 1 s" in str(error)


def test_a_lost_message_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that wait for a message which never comes are alive, but not for ever."""
    monkeypatch.setattr(AttentionWorker, "_answer", lambda self, request: None)
    begun_s = time.monotonic()
    with pytest.raises(ExecutorError, match=r"has waited|has ended for|no sign of life"):
        run(what(timeout_s=0.4))
    assert time.monotonic() - begun_s < SOON_S


def attention_worker() -> tuple[AttentionWorker, Endpoint, Endpoint]:
    """One for a single group of a request in one layer; a primary that asks it, and the driver."""
    transport = InProcessTransport()
    worker = AttentionWorker(2, transport.endpoint(2), KvPool(4, 4, ToyKernels(4, 4, 2)), 1.0)
    driver = transport.endpoint(DRIVER)
    driver.send(2, Control(1, (Open(7, 0, (0,), 1, 1, 0),), 1, None))
    return worker, transport.endpoint(0), driver


@pytest.mark.parametrize(("told", "said"), [((), "of none"), ((4,), "of step 4"), ((5, 6), "of step 6")])
def test_requests_that_nobody_has_told_of_are_refused(told: Sequence[int], said: str) -> None:
    """An attention worker answers about the last step that it was told of, and no other."""
    worker, primary, driver = attention_worker()
    for after in told:
        primary.send(2, AttentionBatch(after, 0, 0, ()))
    primary.send(2, AttentionRequest(5, 0, 0, *(np.zeros(shape) for shape in ((1, 1, 2), (1, 2), (1, 2)))))
    worker.run()
    found: list[Failed] = []
    while not found:
        message = driver.receive(SOON_S)
        assert message is not None
        found += [message] if isinstance(message, Failed) else []
    assert f"asks about step 5, it has told {said}" in found[0].reason


def test_an_attention_worker_looks_a_step_up_before_it_is_asked() -> None:
    """As soon as it has been told by the primary what is meant and by the driver that there is such cache."""
    worker, primary, _ = attention_worker()
    primary.send(2, AttentionBatch(1, 0, 0, (AttentionItem(7, 2, (0,)),)))
    for _ in range(2):
        worker.turn()
    assert worker._batches[0].version == worker.cache.pool.version
    primary.send(2, AttentionBatch(2, 0, 0, (AttentionItem(7, 3, (0,)),)))
    worker.turn()
    assert worker._batches[0].version < 0


def test_a_driver_that_forgets_a_step_comes_to_a_halt(monkeypatch: pytest.MonkeyPatch) -> None:
    """If nothing is under way, nothing is due and requests are left, the run says so."""
    monkeypatch.setattr(InstanceDriver, "begin_steps", lambda self, now_s: None)
    with pytest.raises(ExecutorError, match=r"come to a halt with.*'waiting': 12"):
        run(what())


def distributed(specs: Sequence[WorkerSpec]) -> Crew:
    """Ranks of this host; all arrays go over torch.distributed."""
    pytest.importorskip("torch", reason="workers over torch.distributed need the extra exec")
    from hetis_exec.distributed import DistributedCrew
    from hetis_exec.joining import NetSettings

    return DistributedCrew(specs, NetSettings(eager_bytes=0))


# The first one decides what the server of all worker processes imports, and torch takes long.
CREWS = pytest.mark.parametrize("make_crew", [distributed, ProcessCrew])


@CREWS
def test_processes_serve_and_replay_like_threads(make_crew: Callable[..., Crew]) -> None:
    """Nothing is shared between workers but messages."""
    given_ = what(workload(8, output=(4, 8), gap_s=0.0))
    executor = Executor(given_, make_crew)
    result = executor.run()
    assert result.tokens == expected_tokens(given_)
    assert {process.exitcode for process in executor.crew.processes.values()} == {0}
    replay(given_, result.record)


@CREWS
def test_a_killed_process_ends_the_run_and_leaves_no_orphans(make_crew: Callable[..., Crew]) -> None:
    """kill -9 of a worker is an error within seconds; the other processes are gone with it."""

    def kill(ended: int) -> None:
        if ended == 2:
            os.kill(executor.crew.processes[2].pid, signal.SIGKILL)

    executor = Executor(what(), make_crew, progress=kill)
    error = fail(executor)
    assert error.device == 2
    assert "exit code -9" in str(error)
    assert not any(process.is_alive() for process in executor.crew.processes.values())
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("worker-")]


@CREWS
def test_a_process_that_hangs_is_given_up(make_crew: Callable[..., Crew]) -> None:
    """SIGSTOP: its connections stay open, and nothing comes from it; it is killed with the others."""

    def hang(ended: int) -> None:
        if ended == 2:
            os.kill(executor.crew.processes[2].pid, signal.SIGSTOP)

    executor = Executor(what(timeout_s=1.5), make_crew, progress=hang)
    error = fail(executor)
    assert error.device == 2
    assert "no sign of life for 1.5 s" in str(error)
    assert not any(process.is_alive() for process in executor.crew.processes.values())


def reduced(specs: Sequence[WorkerSpec]) -> Crew:
    """Ranks of this host whose sums are all_reduces of gloo."""
    pytest.importorskip("torch", reason="workers over torch.distributed need the extra exec")
    from hetis_exec.distributed import DistributedCrew
    from hetis_exec.joining import NetSettings

    return DistributedCrew(specs, NetSettings(collectives="all_reduce"))


@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, "exit code -9"),
                                              (signal.SIGSTOP, "no sign of life for 2 s")])
def test_a_rank_that_is_lost_in_a_sum_ends_the_run(number: signal.Signals, said: str) -> None:
    """The rank that waits for it is neither lost with it nor taken for it, and no process is left."""

    def lose(ended: int) -> None:
        if ended == 2:
            os.kill(executor.crew.processes[1].pid, number)

    plan = pipeline([[0, 1]], [4], owned=[[3, 1]])
    executor = Executor(given(plan, Fixed((3, 1)), workload(12, output=(8, 12), gap_s=0.02), timeout_s=2.0),
                        reduced, progress=lose)
    error = fail(executor)
    assert error.device == 1
    assert said in str(error)
    assert not any(process.is_alive() for process in executor.crew.processes.values())


def test_what_a_worker_says_after_the_last_request_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in the last message of a run does not pass unnoticed."""
    send = InstanceDriver._follow

    def corrupt(self: InstanceDriver, outcome: object, step: object, now_s: float) -> None:
        if self._controller.counts()["finished"] == 1:
            self._endpoint.send(1, Control(self._seq + 1, (), 99, None))
        send(self, outcome, step, now_s)

    monkeypatch.setattr(InstanceDriver, "_follow", corrupt)
    with pytest.raises(WorkerError, match="the ledger says 99"):
        run(what(workload(1)))


# -- input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"requests": [Request(0, 1.0, 3, 3), Request(1, 0.5, 3, 3)]}, "sorted by arrival_s"),
    ({"requests": [Request(0, 0.0, 3, 3), Request(0, 0.5, 3, 3)]}, "each request_id once"),
    ({"timeout_s": 0.0}, "executor.timeout_s=0.0"),
    ({"timeout_s": float("nan")}, "executor.timeout_s=nan"),
])
def test_bad_input_is_refused(changes: dict[str, object], message: str) -> None:
    """The error names the key, the value and what is allowed, before any worker exists."""
    with pytest.raises(SpecError, match=message):
        replace(what(), **changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"experts": 4, "experts_per_token": 2}, "model.experts=4"),
    ({"gated_mlp": False}, "model.gated_mlp=False"),
    ({"qkv_biases": True}, "model.qkv_biases=True"),
    ({"head_dim": 5}, "model.head_dim=5"),
    ({"learned_positions": 512}, "model.learned_positions=512"),
])
def test_models_that_the_toy_does_not_compute_are_refused(changes: dict[str, object], message: str) -> None:
    """No worker is started for a model that would come out wrong."""
    with pytest.raises(SpecError, match=message):
        Executor(given(pipeline([[0]], [4]), Fixed(), workload(1), model=replace(MODEL, **changes)),
                 ProcessCrew)


def test_requests_that_never_fit_are_rejected_with_a_reason() -> None:
    """They are counted, and the others are served."""
    requests = [Request(0, 0.0, 300, 5), Request(1, 0.0, 200, 5), Request(2, 0.0, 8, 4)]
    executor, result = run(given(pipeline([[0]], [4]), Fixed(), requests, units=100))
    assert {state.request_id: state.reason for state in executor.controller.states.values()} == {
        0: "context_limit", 1: "cache_capacity", 2: ""}
    assert list(result.tokens) == [2]


def test_nothing_to_do_is_no_error() -> None:
    """An empty trace ends at once."""
    _, result = run(given(pipeline([[0]], [4]), Fixed(), []))
    assert result.tokens == {}
    assert result.submitted == 0
