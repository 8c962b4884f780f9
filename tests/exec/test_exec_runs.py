"""Whole runs of the executor: tokens, cache and decisions, however the work is split and disturbed."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
from exec_scenarios import ONE, SCENARIOS, SHORT, TWO, Scenario, has_happened, run_until_it_happens
from exec_toys import Fixed, expected_tokens, given, pipeline, run, threads, workload

from hetis_exec.cachekeeper import CacheKeeper
from hetis_exec.driver import ExecutionResult, Executor, ExecutorInput
from hetis_exec.messages import DRIVER, Control
from hetis_exec.replay import replay
from hetis_sim.metrics import Recorder, record_violations


@dataclass(frozen=True)
class Done:
    """A run that has been made."""

    scenario: Scenario
    given: ExecutorInput
    executor: Executor
    result: ExecutionResult
    checks: list[tuple[int, int, int]]


@pytest.fixture(scope="module", params=SCENARIOS)
def done(request: pytest.FixtureRequest) -> Done:
    """Each scenario, run once, with every worker's tables counted after every message."""
    what = SCENARIOS[request.param]
    checks: list[tuple[int, int, int]] = []
    apply = CacheKeeper.apply

    def counting(self: CacheKeeper, control: Control) -> None:
        apply(self, control)
        checks.append((self.device, physical_units(self), control.used_units))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheKeeper, "apply", counting)
        inputs = what.make()
        executor, result = run(inputs, what.delay)
    return Done(what, inputs, executor, result, checks)


def physical_units(keeper: CacheKeeper) -> int:
    """Units that the tables of a device really have, each in one table only."""
    tables = keeper.pool.tables.values()
    units = np.concatenate([table.units.ravel() for table in tables]) if tables else np.empty(0, dtype=int)
    assert len(np.unique(units)) == len(units)
    assert all(0 <= unit < keeper.pool.capacity_units for unit in units)
    return len(units)


def test_what_is_done_between_steps_takes_no_time_of_the_run() -> None:
    """The clock stands still, no step is under way, and arrivals wait as long."""
    moments: list[float] = []
    computing: list[bool] = []

    def rest(now_s: float) -> None:
        moments.append(now_s)
        computing.append(executor.crew.endpoint.receive(0.0) is not None)
        time.sleep(0.05)

    what = given(ONE, Fixed(), workload(6, gap_s=0.03))
    executor = Executor(what, threads(), rest=rest)
    begun_s = time.perf_counter()
    result = executor.run()
    took_s = time.perf_counter() - begun_s
    steps = result.recorder.steps()
    assert result.tokens == expected_tokens(what)
    assert len(moments) == len(steps) > 10
    assert moments == sorted(moments)
    assert took_s > 0.05 * len(moments)
    assert steps["end_s"].max() < took_s - 0.05 * len(moments) + 0.02
    assert (steps["end_s"] - steps["start_s"]).max() < 0.05
    requests = result.recorder.requests()
    assert (requests["first_scheduled_s"] >= requests["arrival_s"]).all()
    assert not any(computing)


def test_nothing_is_done_between_steps_that_overlap() -> None:
    """Two stages compute at once: only when the last report has come is there time."""
    idle: list[bool] = []
    what = given(pipeline([[0], [1]], [2, 2]), Fixed(), workload(8, output=(6, 10)))
    executor = Executor(what, threads(), rest=lambda _: idle.append(executor._fleet.computing))
    result = executor.run()
    assert result.tokens == expected_tokens(what)
    assert len(idle) < 2 * len(result.recorder.steps())


def gaps(recorder: Recorder) -> list[tuple[float, int]]:
    """Gaps between tokens, each with the number of requests that felt it."""
    itl = recorder.records().itl
    return list(zip(itl.low_s.tolist(), itl.weight.tolist(), strict=True))


def test_tokens_are_those_of_one_process(done: Done) -> None:
    """However heads, layers and prompts are split and moved, the same tokens come out."""
    assert done.result.tokens == expected_tokens(done.given)


def test_what_the_scenario_is_about_has_happened(done: Done) -> None:
    """Preemptions, moves, transfers and kinds of steps occur where the scenario needs them."""
    what = done.scenario
    if not has_happened(what, done.executor, done.result):
        run_until_it_happens(what, lambda: run(what.make(), what.delay))


def test_physical_cache_is_booked_cache_at_every_message(done: Done) -> None:
    """The units in the tables of each device are those of the ledger, after every single message."""
    assert len(done.checks) >= len(done.result.record.steps)
    assert [(device, held) for device, held, _ in done.checks] == [
        (device, booked) for device, _, booked in done.checks]
    assert max(held for _, held, _ in done.checks) > 0


def test_all_cache_is_free_at_the_end(done: Done) -> None:
    """No table, no parked cache and no unit in use is left."""
    for worker in done.executor.crew.workers.values():
        assert worker.cache.pool.used_units == 0
        assert worker.cache.pool.tables == {}
        assert worker.cache.parked == {}


def test_simulator_makes_the_same_decisions(done: Done) -> None:
    """A simulation fed with the measured times logs the same decisions and ends every request alike."""
    assert len(done.result.record.decisions) > 0
    simulation = replay(done.given, done.result.record)
    assert simulation.controller.log.lines == done.result.record.decisions
    simulated, measured = simulation.recorder, done.result.recorder
    assert simulated.requests().equals(measured.requests())
    assert sorted(gaps(simulated)) == sorted(gaps(measured))
    columns = ["instance", "lane", "kind", "start_s", "end_s", "requests", "prefill_tokens", "decode_tokens"]
    assert simulated.steps()[columns].equals(measured.steps()[columns])


def test_records_hold(done: Done) -> None:
    """Measured records pass the checks of simulated ones, and the parts of a step make its time."""
    recorder = done.result.recorder
    assert record_violations(recorder.records()) == []
    steps = recorder.steps()
    parts = [name for name in steps if name.endswith("_s") and name not in ("start_s", "end_s")]
    assert np.allclose(steps[parts].sum(axis=1), steps["end_s"] - steps["start_s"], atol=1e-12)
    # Host time is what nothing else accounts for: it must not come out below zero.
    assert (steps["host_s"] > 0).all()


def test_reports_may_overtake_each_other() -> None:
    """A last stage that is heard of before the first one ends the step all the same."""
    what = given(TWO, Fixed((2, 2, 3, 1)), SHORT)
    _, result = run(what, lambda sender, target, message: 0.02 * (sender == 0 and target == DRIVER))
    assert result.tokens == expected_tokens(what)
    assert replay(what, result.record).recorder.requests().equals(result.recorder.requests())
    steps = result.recorder.steps()
    assert len(steps) == len(result.record.steps)
    assert (steps["dense_s"] > 0).all()


def test_steps_are_single_iterations_whatever_the_settings_say() -> None:
    """What lies ahead is unknown to a real driver: it asks for one iteration at a time."""
    what = given(ONE, Fixed(), SHORT[:3])
    assert what.settings.collapse
    _, result = run(what)
    assert set(result.recorder.steps()["iterations"]) == {1}
