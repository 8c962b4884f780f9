"""Invariant 7: nobody who decides knows how many tokens a request will make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import pytest
from support_policies import SpyPolicy, WanderPolicy
from support_runs import Scenario

from hetis_sim.control.engine import Engine
from hetis_sim.control.state import RequestState
from hetis_sim.policies.view import RequestView
from hetis_sim.sim.simulation import Simulation

HIDDEN = ("output_tokens", "total_tokens")
QUESTIONS = {"route", "dispatch", "rebalance", "relieve", "victim", "handoff"}
SCENARIOS = (
    Scenario(layers=(2, 4), workers=2, interval=3, blocks=24, worker_blocks=30, instances=2, rate=60.0),
    Scenario(workers=1, interval=4, blocks=22, chunked=True, rate=60.0, preemption="swap"),
    Scenario(roles=("prefill", "decode", "decode"), rate=30.0),
)


def hidden_names(thing: Any, seen: dict[int, Any] | None = None, path: str = "") -> list[str]:
    """Where ``thing``, or anything that can be reached from it by public names, tells an output length."""
    seen = {} if seen is None else seen  # keeps what it has seen alive, so that no id comes back
    if id(thing) in seen or isinstance(thing, str | bytes | int | float | Enum | type | None):
        return []
    seen[id(thing)] = thing
    if isinstance(thing, Mapping):
        return [name for key, value in thing.items()
                for name in hidden_names(value, seen, f"{path}[{key!r}]")]
    found: list[str] = []
    if isinstance(thing, Sequence):
        found = [name for n, value in enumerate(thing) for name in hidden_names(value, seen, f"{path}[{n}]")]
    if isinstance(thing, tuple | list):
        return found
    for name in (name for name in dir(thing) if not name.startswith("_")):
        value = getattr(thing, name)
        if name in HIDDEN:
            found.append(f"{path}.{name}")
        elif not callable(value):
            found += hidden_names(value, seen, f"{path}.{name}")
    return found


def looked_at(scenario: Scenario) -> tuple[set[str], list[str]]:
    """Which questions a policy was asked in a run, and what it could have read that it must not."""
    asked: set[str] = set()
    found: list[str] = []

    def saw(question: str, about: tuple[Any, ...]) -> None:
        asked.add(question)
        found.extend(f"{question}{name}" for name in hidden_names(about))

    policy = SpyPolicy(scenario.decider(), saw)
    replace(scenario, policy=policy).simulation().run()
    return asked, found


def test_policies_see_no_output_lengths() -> None:
    """Nothing that a policy is handed leads to an output length, whatever it is asked."""
    asked: set[str] = set()
    for scenario in SCENARIOS:
        more, found = looked_at(scenario)
        assert found == []
        asked |= more
    assert asked == QUESTIONS


@dataclass(frozen=True, slots=True)
class LeakyView(RequestView):
    """A view of a request that says too much."""

    output_tokens: int = 0


def test_a_scheduler_that_tells_output_lengths_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view with the length in it is found, also inside the lists of running requests."""
    view = Engine.request_view

    def leaky(self: Engine, state: RequestState) -> RequestView:
        seen = view(self, state)
        values = {name: getattr(seen, name) for name in RequestView.__slots__}
        return LeakyView(**values, output_tokens=state.request.output_tokens)

    monkeypatch.setattr(Engine, "request_view", leaky)
    _, found = looked_at(SCENARIOS[0])
    for question in ("dispatch", "rebalance", "victim"):
        assert any(name.startswith(question) and name.endswith(".output_tokens") for name in found)


def decisions_before_the_first_end(scenario: Scenario, longer: int) -> tuple[list[str], float]:
    """All that a policy was asked and shown, with the times, and when the first request ended.

    ``longer`` tokens are added to every output.
    """
    told: list[tuple[float, str]] = []

    def saw(question: str, about: tuple[Any, ...]) -> None:
        told.append((simulation.clock.now, f"{question} {[shown(item) for item in about]}"))

    policy = SpyPolicy(WanderPolicy(scenario.seed), lambda *_: None)
    given = replace(scenario, policy=policy).given()
    requests = [replace(r, output_tokens=r.output_tokens + 20 + longer * (1 + r.request_id % 3))
                for r in given.workload]
    simulation = Simulation(replace(given, workload=requests))
    policy.saw = saw
    ends = simulation.run().records().requests["finish_s"]
    return [f"{now_s!r} {text}" for now_s, text in told], float(ends.min())


def shown(item: Any) -> str:
    """What a policy sees of an argument."""
    return repr(list(item)) if isinstance(item, Sequence) and not isinstance(item, str) else repr(item)


@pytest.mark.parametrize("chunked", [False, True])
def test_output_lengths_change_no_decision_before_the_first_end(chunked: bool) -> None:
    """Workloads that differ in output lengths alone are decided alike until a request has ended."""
    scenario = Scenario(layers=(2, 4), workers=2, interval=3, blocks=60, worker_blocks=90, rate=60.0,
                        requests=12, chunked=chunked)
    first, first_end_s = decisions_before_the_first_end(scenario, 0)
    second, second_end_s = decisions_before_the_first_end(scenario, 15)
    end_s = min(first_end_s, second_end_s)
    early = [[line for line in lines if float(line.split()[0]) < end_s] for lines in (first, second)]
    assert len(early[0]) > 15
    assert early[0] == early[1]
    assert first != second
