"""Schedulers, lanes and ledgers broken on purpose: each breakage is caught by the check meant for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from heapq import heappush

import pytest
from support_driver import SeamDriver
from support_policies import LocalPolicy, WanderPolicy
from support_runs import Scenario, assert_same_requests, assert_sound
from support_watch import at_the_end_of_every_instant

from hetis_sim.control.books import CacheBooks
from hetis_sim.control.engine import Engine
from hetis_sim.control.invariants import InvariantError
from hetis_sim.control.lane import Lane
from hetis_sim.control.ledger import KvLedger, LedgerError, Units
from hetis_sim.control.placement import PlacementError, PlacementShape, PlacementShapes
from hetis_sim.control.pressure import Pressure
from hetis_sim.control.state import RequestState
from hetis_sim.policies.plan import Placement
from hetis_sim.policies.ranges import AnyPlacement, TokenSplit
from hetis_sim.policies.view import InstanceView, RequestView
from hetis_sim.sim.clock import Clock, EventBudgetError
from hetis_sim.sim.instance import StuckError
from hetis_sim.sim.simulation import Simulation

Break = Callable[[pytest.MonkeyPatch], None]

ROOMY = Scenario(layers=(2, 4), workers=1, moves_max=0)
RANGED = Scenario(layers=(2, 4), workers=2, ranges=1.0, interval=3)
TIGHT = Scenario(layers=(2, 4), workers=1, blocks=20, worker_blocks=24, rate=60.0, prompt_max=30)
ONE_STAGE = Scenario(blocks=20, rate=60.0, prompt_max=30, policy=LocalPolicy())


def forgetful_ledger(patch: pytest.MonkeyPatch) -> None:
    """One unit of what is given back is never seen again."""
    give = KvLedger.give

    def broken(self: KvLedger, units: Units, times: int = 1) -> None:
        units = list(units)
        give(self, units, times)
        if times and units:
            self.used[units[0][0]] += 1

    patch.setattr(KvLedger, "give", broken)


def generous_ledger(patch: pytest.MonkeyPatch) -> None:
    """Blocks that a growing batch takes are not written down."""

    def broken(self: Lane, iterations: int, ledger: KvLedger) -> None:
        self.issued += iterations

    patch.setattr(Lane, "advance", broken)


def double_member(patch: pytest.MonkeyPatch) -> None:
    """A member is counted twice in the sums of its lane."""
    join = Lane.join

    def broken(self: Lane, state: RequestState) -> None:
        join(self, state)
        assert state.shape is not None
        self._add(state.shape, state.offset, 1)

    patch.setattr(Lane, "join", broken)


def dropped_request(patch: pytest.MonkeyPatch) -> None:
    """Every fifth request gets lost on its way into the queue."""
    submit = Engine.submit

    def broken(self: Engine, state: RequestState, now_s: float) -> None:
        submit(self, state, now_s)
        if state.request_id % 5 == 4:
            self.waiting.remove(state)

    patch.setattr(Engine, "submit", broken)


def forgotten_victim(patch: pytest.MonkeyPatch) -> None:
    """A preempted request is not queued again."""
    preempt = Pressure._preempt

    def broken(self: Pressure, state: RequestState, lane: Lane, now_s: float) -> None:
        preempt(self, state, lane, now_s)
        if state in self._engine.waiting:
            self._engine.waiting.remove(state)

    patch.setattr(Pressure, "_preempt", broken)


def token_early(patch: pytest.MonkeyPatch) -> None:
    """Requests end one token short."""
    at = Lane._finishes_at
    patch.setattr(Lane, "_finishes_at", staticmethod(lambda state: at(state) - 1))


def token_late(patch: pytest.MonkeyPatch) -> None:
    """Requests make one token too many."""
    at = Lane._finishes_at
    patch.setattr(Lane, "_finishes_at", staticmethod(lambda state: at(state) + 1))


def kept_at_the_end(patch: pytest.MonkeyPatch) -> None:
    """A move that is cancelled keeps its reservation."""

    def broken(self: CacheBooks, state: RequestState) -> None:
        state.move = None

    patch.setattr(CacheBooks, "cancel_move", broken)


def lost_head(patch: pytest.MonkeyPatch) -> None:
    """A request goes on without one of its KV groups, and nobody minds when it is placed."""
    shape = PlacementShapes.shape

    def broken(self: PlacementShapes, placement: Placement) -> PlacementShape:
        known = shape(self, placement)
        missing = (known.placement[0] - 1, *known.placement[1:])
        return replace(known, placement=missing) if known.placement[0] else known

    patch.setattr(PlacementShapes, "shape", broken)


def lost_block(patch: pytest.MonkeyPatch) -> None:
    """A token range is a token of every head shorter than its blocks."""
    shape = PlacementShapes.shape

    def broken(self: PlacementShapes, placement: AnyPlacement) -> PlacementShape:
        known = shape(self, placement)
        if known.ranges is None:
            return known
        short = known.ranges.group_tokens - known.ranges.still
        return replace(known, ranges=replace(known.ranges, group_tokens=short))

    patch.setattr(PlacementShapes, "shape", broken)


def growing_range(patch: pytest.MonkeyPatch) -> None:
    """The tail's new tokens are booked where the ranges are."""
    shape = PlacementShapes.shape

    def broken(self: PlacementShapes, placement: AnyPlacement) -> PlacementShape:
        known = shape(self, placement)
        (device, units), *rest = known.block_units
        if known.ranges is None or device:
            return known
        return replace(known, block_units=((len(self._plan.devices) - 1, units), *rest))

    patch.setattr(PlacementShapes, "shape", broken)


BREAKAGES: dict[str, tuple[Break, Scenario, type[Exception], str]] = {
    "a ledger that forgets to give back a block": (forgetful_ledger, ROOMY, LedgerError, "the ledger says"),
    "a ledger that is not told of growth": (generous_ledger, ROOMY, LedgerError, "the ledger says"),
    "a lane that counts a member twice": (double_member, ROOMY, LedgerError, "units"),
    "a scheduler that drops a request": (dropped_request, ROOMY, InvariantError, r"invariant 1 \(requests\)"),
    "a scheduler that forgets whom it preempts": (forgotten_victim, TIGHT, InvariantError, "invariant 1"),
    "a scheduler that ends a request a token early": (token_early, ROOMY, InvariantError, "invariant 2"),
    "a scheduler that ends a request a token late": (token_late, ROOMY, InvariantError, "invariant 2"),
    "a move that keeps its reservation": (kept_at_the_end, replace(TIGHT, interval=1), LedgerError, "ledger"),
    "a placement that loses a head": (lost_head, ROOMY, InvariantError, r"invariant 4 \(heads\)"),
    "a token range that loses tokens": (lost_block, RANGED, InvariantError, r"invariant 4 \(heads\)"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_breakage_is_caught_while_it_happens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with debug=true stops at the first violation and names it."""
    broken, scenario, error, text = BREAKAGES[name]
    scenario.run(debug=True)
    broken(monkeypatch)
    with pytest.raises(error, match=text):
        scenario.run(debug=True)


@pytest.mark.parametrize("broken", [dropped_request, forgotten_victim])
def test_a_lost_request_is_noticed_without_debugging(broken: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has lost somebody does not end as if all were well."""
    broken(monkeypatch)
    with pytest.raises(StuckError, match="submitted"):
        TIGHT.run()


@pytest.mark.parametrize("broken", [token_early, token_late])
def test_miscounted_tokens_show_in_the_records(broken: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gaps between tokens tell that a request has made another number than it should."""
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        assert_sound(ROOMY.run().records(), ROOMY.requests)


@pytest.mark.parametrize(("broken", "scenario"), [
    (forgetful_ledger, ROOMY), (double_member, ROOMY), (token_early, ROOMY), (dropped_request, ROOMY),
    (growing_range, RANGED)])
def test_a_driver_that_counts_for_itself_notices(broken: Break, scenario: Scenario,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The model behind the state machine sees the breakage from its own counts."""
    broken(monkeypatch)
    with pytest.raises((AssertionError, LedgerError, InvariantError)):
        driver = SeamDriver(scenario)
        for n in range(10):
            driver.submit(5 + n, 3 + n)
            driver.ask(0)
            driver.check()
        driver.drain()


def test_steps_that_run_too_far_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that goes on when the cache is used up overdraws the ledger."""
    monkeypatch.setattr(Engine, "_safe_iterations", lambda self: 1 << 30)
    with pytest.raises(LedgerError, match="would hold"):
        ONE_STAGE.run()


def test_a_collapse_that_misses_arrivals_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """If steps ran past arrivals, the comparison with single iterations would tell."""
    calm = Scenario(rate=4.0)
    single = calm.run(collapse=False).records()
    assert_same_requests(calm.run().records(), single)
    monkeypatch.setattr(Simulation, "_horizon", lambda self: float("inf"))
    with pytest.raises(AssertionError):
        assert_same_requests(calm.run().records(), single)


def test_time_that_goes_back_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events in the past do not pass unnoticed."""
    call = Clock.call

    def broken(self: Clock, time_s: float, action: Callable[[], None], priority: int = 2) -> None:
        call(self, time_s, action, priority)
        if self.now > 0.5:
            heappush(self._queue, (self.now - 0.25, 0, next(self._eid), action))

    monkeypatch.setattr(Clock, "call", broken)
    simulation = ONE_STAGE.simulation()
    at_the_end_of_every_instant(simulation, lambda now_s: None)
    with pytest.raises(AssertionError, match="time has gone back"):
        simulation.run()


def test_a_run_that_spins_is_stopped() -> None:
    """More events than the budget end a run with the figure and the setting to raise."""
    given = replace(ONE_STAGE.given(), event_budget=50)
    with pytest.raises(EventBudgetError, match=r"event_budget=50 is used up at .* sim.event_budget"):
        Simulation(given).run()


class Nowhere(WanderPolicy):
    """Finds no place for long prompts, even on an empty instance."""

    def dispatch(self, requests: list[RequestView], view: InstanceView) -> list[Placement]:
        placed = super().dispatch(requests, view)
        alone = len(requests) == 1 and requests[0].request_id == 0 and requests[0].arrival_s == 0.0
        return placed if alone else [p for p, r in zip(placed, requests, strict=False) if r.prompt_tokens < 4]


class Elsewhere(WanderPolicy):
    """Places a KV group more than there is."""

    def dispatch(self, requests: list[RequestView], view: InstanceView) -> list[Placement]:
        placed = super().dispatch(requests, view)
        return [(p[0] + 1, *p[1:]) for p in placed]


class TooLong(WanderPolicy):
    """Places more tokens in a range than a request has."""

    def dispatch(self, requests: list[RequestView], view: InstanceView) -> list[AnyPlacement]:
        placed = super().dispatch(requests, view)
        short = [r.request_id > 0 and r.context_tokens < 8 for r in requests]
        split = TokenSplit(view.plan.local_placement, (0, 2, 0, 2))
        return [split if less else p for p, less in zip(placed, short, strict=False)]


class TailTwice(WanderPolicy):
    """Gives the holder of the tail a range as well."""

    def dispatch(self, requests: list[RequestView], view: InstanceView) -> list[AnyPlacement]:
        return [TokenSplit(view.plan.local_placement, (1, 0, 0, 0))] * len(super().dispatch(requests, view))


@pytest.mark.parametrize(("policy", "text"), [
    (Nowhere(), "places request .* nowhere on the empty instance"), (Elsewhere(), "KV groups, must be"),
    (TooLong(), "8 tokens in ranges, the request has"), (TailTwice(), "gives the holder of the tail")])
def test_a_policy_that_cannot_place_is_named(policy: WanderPolicy, text: str) -> None:
    """Placements that cannot be carried out end the run with the numbers, not with a hang."""
    with pytest.raises(PlacementError, match=text):
        replace(ROOMY, policy=policy, preemption="recompute").run()
