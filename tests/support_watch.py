"""Looks at a simulation at the end of every instant: whatever could run by then must be running."""

from __future__ import annotations

import math
from collections.abc import Callable

from hetis_sim.control.engine import Engine
from hetis_sim.control.lane import Lane
from hetis_sim.control.state import Status
from hetis_sim.sim.simulation import Simulation


def at_the_end_of_every_instant(simulation: Simulation, look: Callable[[float], None]) -> None:
    """Have ``look`` called whenever simulated time is about to go on, and see that it never goes back."""
    clock, step = simulation.clock, simulation.clock.step
    last_s = -math.inf

    def watched() -> None:
        nonlocal last_s
        assert clock.now >= last_s, "time has gone back"
        last_s = clock.now
        if clock.peek() > clock.now:
            look(clock.now)
        step()

    clock.step = watched  # type: ignore[method-assign]


def idle_work(simulation: Simulation, now_s: float) -> list[str]:
    """Work that fits and lies idle in an instance none of whose stages is busy.

    One thing may wait: after a preemption, nobody is admitted while cache is still on its way,
    lest what was taken from one request is given to it again at once.
    """
    found: list[str] = []
    for instance, engine in zip(simulation.instances, simulation.controller.engines, strict=True):
        if any(free_s > now_s for free_s in instance.pipeline.free_s):
            continue
        engine.sync()
        found += [f"{now_s}: instance {engine.index}: {what}" for what in _runnable(engine)]
    return found


def _runnable(engine: Engine) -> list[str]:
    found: list[str] = []
    for lane in engine.lanes:
        if lane.step is not None:
            # Its last iteration is past the last stage's compute, at most on the link to the next.
            continue
        if lane.partial:
            found.append(f"lane {lane.index} has prompts half prefilled")
        if (lane.members or lane.joins) and _room_for_a_token_each(engine, lane):
            found.append(f"lane {lane.index} could decode")
        full = lane.load >= engine.settings.limits.max_batch_requests
        if engine.waiting and not full and not _settling(engine) and _admissible(engine):
            found.append(f"lane {lane.index} could prefill request {engine.waiting[0].request_id}")
    return found


def _settling(engine: Engine) -> bool:
    concerned = [*engine.active.values(), *engine.waiting]
    on_its_way = any(s.status in (Status.SWAPPED, Status.TRANSFER) or s.move is not None
                     for s in engine.active.values())
    return on_its_way and any(s.preemptions for s in concerned)


def _room_for_a_token_each(engine: Engine, lane: Lane) -> bool:
    """Whether every request of a lane could have one more block of all its groups."""
    need = [0] * len(engine.plan.devices)
    for state in [*lane.members.values(), *lane.joins]:
        assert state.shape is not None
        for d, units in state.shape.block_units:
            need[d] += units
    return engine.books.ledger.fits(enumerate(need))


def _admissible(engine: Engine) -> bool:
    placed = engine.policy.dispatch([engine.request_view(engine.waiting[0])], engine.view())
    return bool(placed) and engine.books.fits(placed[0], engine.waiting[0].context_tokens, True)
