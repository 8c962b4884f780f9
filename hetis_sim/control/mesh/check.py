"""Checks of the invariants of a mesh, for debugging runs."""

from __future__ import annotations

from collections.abc import Iterable

from hetis_sim.control.mesh.engine import MeshEngine
from hetis_sim.control.mesh.walk import Walk


def mesh_violations(engine: MeshEngine) -> list[str]:
    """Sentences on what is wrong: a request in two places, or a path that does not pass each layer once.

    Raises:
        LedgerError: cache is lost or doubled.
    """
    engine.books.check(engine.active.values())
    found: list[str] = []
    seen = [walk.state.request_id for walk in _standing(engine)]
    if len(seen) != len(set(seen)) or not set(seen) <= set(engine.active):
        found.append(f"invariant 1 (requests): {sorted(seen)} wait or are computed, active are "
                     f"{sorted(engine.active)}")
    for request_id, walk in engine.active.items():
        passed = 0
        for n, layers in zip(walk.path.nodes, walk.path.layers, strict=True):
            if walk.path.first_layers[n] != passed:
                found.append(f"invariant 4 (layers): request {request_id} skips or repeats some at node {n}")
            passed += layers
        if passed != engine.model.layers:
            found.append(f"invariant 4 (layers): request {request_id} passes {passed} of "
                         f"{engine.model.layers} layers")
    if not engine.active and any(engine.books.ledger.used):
        found.append(f"invariant 3 (cache): nobody is active, {engine.books.ledger.used} units are used")
    for number, queue in enumerate(engine.queues):
        tokens = len(queue.tokens) + sum(walk.tokens for walk in queue.prompts)
        if engine.routing.queued_tokens[number] < tokens:
            found.append(f"invariant 2 (tokens): {tokens} tokens wait at node {number}, "
                         f"{engine.routing.queued_tokens[number]} are counted")
    return found


def _standing(engine: MeshEngine) -> Iterable[Walk]:
    """Walks that are not on a wire."""
    yield from engine.stalled
    for queue in engine.queues:
        yield from queue.prompts
        yield from queue.tokens
        if queue.step is not None:
            yield from queue.step.walks
