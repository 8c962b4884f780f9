"""Invariants 5 and 6: time goes on, and no instance idles while it holds work that fits."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from support_runs import Scenario, scenarios
from support_watch import at_the_end_of_every_instant, idle_work

from hetis_sim.control.engine import Engine
from hetis_sim.control.step import Step
from hetis_sim.sim.instance import StuckError
from hetis_sim.sim.simulation import Simulation

QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def idle_work_of(simulation: Simulation) -> list[str]:
    """What was found idle over a whole run."""
    found: list[str] = []
    at_the_end_of_every_instant(simulation, lambda now_s: found.extend(idle_work(simulation, now_s)))
    try:
        simulation.run()
    except StuckError:
        assert found, "the run has come to a halt, though nothing was seen to idle"
    return found


@QUICK
@given(scenarios())
def test_nothing_idles_while_it_could_work(scenario: Scenario) -> None:
    """At the end of every instant, an instance that computes nothing holds nothing that fits."""
    for collapse in (True, False):
        assert idle_work_of(scenario.simulation(collapse)) == []


@pytest.mark.slow
@settings(QUICK, max_examples=150)
@given(scenarios())
def test_nothing_idles_while_it_could_work_at_length(scenario: Scenario) -> None:
    """The same over many more systems."""
    test_nothing_idles_while_it_could_work.hypothesis.inner_test(scenario)


def test_an_instance_that_sleeps_on_its_work_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a scheduler that does not decode while somebody waits is caught."""
    begin = Engine.next_step

    def lazy(self: Engine, now_s: float) -> Step | None:
        return None if 0.5 < now_s < 0.8 else begin(self, now_s)

    monkeypatch.setattr(Engine, "next_step", lazy)
    assert any("decode" in text for text in idle_work_of(Scenario(rate=30.0).simulation()))
