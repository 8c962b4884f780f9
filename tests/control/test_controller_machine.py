"""The controller under verbs in any order, against a driver that counts tokens and cache by itself."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support_driver import SeamDriver
from support_runs import Scenario, scenarios

from hetis_sim.control.state import Ending, Status

INDEX = st.integers(0, 1000)


class ControllerMachine(RuleBasedStateMachine):
    """Arrivals, questions for steps, iterations, early and other ends, interleaved at will."""

    driver: SeamDriver

    @initialize(scenario=scenarios(requests=0, preemptions_max=st.sampled_from([2, 100])))
    def begin(self, scenario: Scenario) -> None:
        self.driver = SeamDriver(scenario)

    @rule(prompt=st.integers(1, 60), output=st.integers(1, 40))
    def submit(self, prompt: int, output: int) -> None:
        self.driver.submit(prompt, output)

    @rule(index=INDEX)
    def ask(self, index: int) -> None:
        self.driver.ask(index % len(self.driver.engines))

    @rule()
    def ask_everybody(self) -> None:
        for instance in range(len(self.driver.engines)):
            while self.driver.ask(instance):
                pass

    @precondition(lambda self: self.driver.steps)
    @rule(index=INDEX, iterations=st.integers(1, 30))
    def iterate(self, index: int, iterations: int) -> None:
        self.driver.iterate(index % len(self.driver.steps), iterations)

    @precondition(lambda self: self.driver.steps)
    @rule(index=INDEX)
    def complete(self, index: int) -> None:
        self.driver.complete(index % len(self.driver.steps))

    @precondition(lambda self: self.driver.transfers)
    @rule(index=INDEX)
    def arrive(self, index: int) -> None:
        self.driver.arrive(index % len(self.driver.transfers))

    @precondition(lambda self: self.driver.tokens)
    @rule(index=INDEX, reason=st.sampled_from(["stop", "aborted"]))
    def finish(self, index: int, reason: Ending) -> None:
        """Wherever a request is, it ends soon: at once, or when the step that computes it does."""
        driver = self.driver
        request_id = index % len(driver.tokens)
        state = driver.controller.states[request_id]
        computed = any(state in members or any(chunk.state is state for chunk in step.chunks)
                       for step, members in driver.steps)
        driver.finish(request_id, reason)
        assert (state.status >= Status.FINISHED) != (computed and request_id not in driver.ended)
        for step, members in driver.steps:
            assert state not in members or step.limit == step.issued

    @rule(gap_s=st.sampled_from([0.0, 0.1, 3.0]))
    def wait(self, gap_s: float) -> None:
        self.driver.now_s += gap_s

    @invariant()
    def the_books_balance(self) -> None:
        if hasattr(self, "driver"):
            self.driver.check()

    def teardown(self) -> None:
        """Every request ends, and nothing stays held."""
        if hasattr(self, "driver"):
            self.driver.drain()


ControllerMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=70, deadline=None,
                                               derandomize=True)
test_requests_end_whole_whatever_the_order = ControllerMachine.TestCase
