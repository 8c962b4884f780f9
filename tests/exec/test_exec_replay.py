"""Replays notice whatever differs from the recorded run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from exec_toys import Fixed, Relieving, Turning, given, pipeline, run, slow_cache, workload

from hetis_exec.driver import ExecutionResult, Executor, ExecutorInput
from hetis_exec.errors import ReplayError
from hetis_exec.records import RunRecord
from hetis_exec.replay import replay
from hetis_exec.toy import ToyTrace, toy_input
from hetis_sim.policies.plan import Placement
from hetis_sim.policies.view import InstanceView, RequestView

TWO = pipeline([[0], [1]], [3, 1], [2])


@pytest.fixture(scope="module")
def recorded() -> tuple[ExecutorInput, ExecutionResult]:
    """A run with pushes, moves and preemptions on two stages."""
    policy = Turning([(2, 2, 3, 1), (4, 0, 0, 4), (0, 4, 2, 2)], "swap")
    what = given(TWO, policy, workload(8, (8, 30), (10, 24), 0.0), units=200)
    return what, run(what, slow_cache(0.002))[1]


def copy(record: RunRecord) -> RunRecord:
    """A record that may be changed."""
    return RunRecord(list(record.requests), [replace(step) for step in record.steps], list(record.arrivals),
                     list(record.decisions), list(record.ends))


def test_a_record_survives_its_file(recorded: tuple[ExecutorInput, ExecutionResult], tmp_path: Path) -> None:
    """What was written can be read and replayed, to the last bit of every time."""
    what, result = recorded
    result.record.write(tmp_path / "record.json")
    read = RunRecord.read(tmp_path / "record.json")
    assert read == result.record
    assert replay(what, read).controller.log.lines == result.record.decisions


def test_decisions_hold_no_times(recorded: tuple[ExecutorInput, ExecutionResult]) -> None:
    """A decision's line names requests, a snapshot's hash and the decision; a wall clock leaves no trace."""
    _, result = recorded
    assert all(set(line) >= set('"decision""snapshot"') for line in result.record.decisions)
    assert not any("_s\"" in line for line in result.record.decisions)


def test_another_decision_is_shown(recorded: tuple[ExecutorInput, ExecutionResult]) -> None:
    """The first line that differs is in the error, as it was and as it is."""
    what, result = recorded
    record = copy(result.record)
    record.decisions[3] = record.decisions[3].replace('"decision"', '"Decision"')
    with pytest.raises(ReplayError, match=r"decision 3 differs:\nrecorded .*Decision.*\nreplayed .*decision"):
        replay(what, record)


def test_a_missing_decision_is_noticed(recorded: tuple[ExecutorInput, ExecutionResult]) -> None:
    """A log that is a beginning of the other is not the same."""
    what, result = recorded
    record = copy(result.record)
    del record.decisions[-1]
    with pytest.raises(ReplayError, match="decisions were recorded"):
        replay(what, record)


def test_another_duration_is_noticed(recorded: tuple[ExecutorInput, ExecutionResult]) -> None:
    """A step that ends at another time leads to steps that the run did not make."""
    what, result = recorded
    record = copy(result.record)
    middle = record.steps[len(record.steps) // 2]
    middle.ended_s += 0.05
    with pytest.raises(ReplayError, match="another step"):
        replay(what, record)


def test_a_transfer_at_another_time_is_noticed(recorded: tuple[ExecutorInput, ExecutionResult]) -> None:
    """Cache that arrives later changes what can be decided."""
    what, result = recorded
    record = copy(result.record)
    request_id, kind, ended_s = record.arrivals[0]
    record.arrivals[0] = (request_id, kind, ended_s + 0.05)
    with pytest.raises(ReplayError):
        replay(what, record)


def test_another_policy_is_noticed(recorded: tuple[ExecutorInput, ExecutionResult]) -> None:
    """Policies are compared, not only schedules."""
    what, result = recorded
    with pytest.raises(ReplayError):
        replay(replace(what, policy=Fixed((2, 2, 3, 1), "swap")), result.record)


class Moody(Fixed):
    """Breaks the rule that a decision depends on what is shown: it counts how often it was asked."""

    name = "moody"
    asked = 0

    def choice(self, request: RequestView, view: InstanceView) -> Placement:
        Moody.asked += 1
        return (4, 0, 0) if Moody.asked % 7 else (2, 1, 1)


def test_a_policy_with_a_memory_is_caught() -> None:
    """State between calls makes the replay decide otherwise."""
    what = given(pipeline([[0]], [4], [1, 2]), Moody(), workload(12))
    _, result = run(what)
    Moody.asked += 3
    with pytest.raises(ReplayError):
        replay(what, result.record)


@pytest.mark.parametrize(("name", "requests"), [("hetis", 40), ("vllm", 20)])
def test_shipped_policies_run_and_replay(name: str, requests: int) -> None:
    """The policies of the simulator run on workers as they are, and decide the same in the simulator."""
    what = toy_input(name, ToyTrace(requests, rate_per_s=2000.0))
    executor = Executor(replace(what, debug=True))
    result = executor.run()
    assert len(result.tokens) == requests
    simulation = replay(what, result.record)
    assert simulation.recorder.requests().equals(result.recorder.requests())
    if name == "hetis":
        assert {"push", "move"} <= {kind for _, kind, _ in result.record.arrivals}
        assert what.plan.instances[0].attention_workers


def test_preemption_ends_when_a_move_relieves() -> None:
    """The same trace: heads that move off a full device spare the requests that staying would cost."""
    requests: Sequence[object] = workload(8, (8, 30), (10, 24), 0.0)
    plan = pipeline([[0]], [4], [1, 2])
    preemptions = []
    for policy in (Fixed((4, 0, 0)), Relieving((4, 0, 0))):
        executor, _ = run(given(plan, policy, requests, units={0: 260, 1: 2000, 2: 2000}))
        preemptions.append(sum(state.preemptions for state in executor.controller.states.values()))
    assert preemptions[0] > preemptions[1]
