"""Checks of the control plane's invariants (see ``docs/invariants.md``), for debugging runs."""

from __future__ import annotations

from hetis_sim.control.controller import Controller
from hetis_sim.control.engine import Engine
from hetis_sim.control.mesh.check import mesh_violations
from hetis_sim.control.mesh.controller import MeshController
from hetis_sim.control.placement import PlacementShape
from hetis_sim.control.state import RequestState, Status
from hetis_sim.spec.errors import HetisError


class InvariantError(HetisError):
    """An invariant does not hold: a defect of the program."""


def check_controller(controller: Controller | MeshController) -> None:
    """Check invariants 1 to 4 at this instant.

    Raises:
        InvariantError: requests or tokens are lost or doubled, or heads do not sum up.
        LedgerError: cache is lost or doubled.
    """
    counts = controller.counts()
    accounted = counts["running"] + counts["waiting"] + counts["finished"] + counts["rejected"]
    if counts["submitted"] != accounted:
        raise InvariantError(f"invariant 1 (requests): {counts}")
    for state in controller.states.values():
        if state.status == Status.FINISHED and not _all_tokens(state):
            raise InvariantError(f"invariant 2 (tokens): request {state.request_id} has ended with "
                                 f"{state.generated_base} of {state.request.output_tokens} tokens")
    if isinstance(controller, MeshController):
        found = mesh_violations(controller.engine)
        if found:
            raise InvariantError(found[0])
        return
    for engine in controller.engines:
        engine.sync()
        check_engine(engine)


def _all_tokens(state: RequestState) -> bool:
    """Whether a finished request has the tokens it was to have, or fewer because it was told to stop."""
    made, wanted = state.generated_base, state.request.output_tokens
    return made == wanted or (state.ending == "stop" and 0 < made < wanted)


def check_ranges(engine: Engine, state: RequestState, shape: PlacementShape) -> None:
    """Of every KV head of a stage, every cached token is at exactly one position (invariants 3 and 4)."""
    assert shape.ranges is not None
    decodes = state.status == Status.DECODE
    cached = engine.lanes[state.lane].cached_tokens(state) if decodes else state.cached_tokens
    held = shape.group_tokens(cached)
    for stage, positions in enumerate(engine.plan.stage_positions):
        ranges = [p for p in positions if shape.ranges.blocks[p]]
        counted = sum(held[p] for p in positions)
        whole = all(held[p] == shape.ranges.groups[p] * shape.ranges.blocks[p] * engine.books.block_tokens
                    for p in ranges)
        if counted != engine.model.kv_heads * cached or min(held) < 0 or not whole:
            raise InvariantError(f"invariant 4 (heads): request {state.request_id} has "
                                 f"{[held[p] for p in positions]} tokens of KV heads by position in stage "
                                 f"{stage}, {engine.model.kv_heads} x {cached} are cached")


def check_engine(engine: Engine) -> None:
    """Check the books and the head counts of one instance."""
    outside = [s for s in engine.active.values() if s.status != Status.DECODE]
    engine.books.check(engine.lanes, outside, engine.landings.values())
    members = sum(len(lane.members) for lane in engine.lanes)
    if members + len(outside) != len(engine.active):
        raise InvariantError(f"invariant 1 (requests): {members} decode, {len(outside)} are elsewhere, "
                             f"{len(engine.active)} are active in instance {engine.index}")
    for state in engine.active.values():
        if state.shape is None:
            continue
        for stage, positions in enumerate(engine.plan.stage_positions):
            groups = sum(state.shape.placement[p] for p in positions)
            if groups != engine.model.kv_heads:
                raise InvariantError(f"invariant 4 (heads): request {state.request_id} has {groups} of "
                                     f"{engine.model.kv_heads} KV groups in stage {stage}")
        if state.shape.ranges is not None:
            check_ranges(engine, state, state.shape)
    if not engine.active and not engine.landings and any(engine.books.ledger.used):
        raise InvariantError("invariant 3 (cache): nobody is active, "
                             f"{engine.books.ledger.used} units are used")
