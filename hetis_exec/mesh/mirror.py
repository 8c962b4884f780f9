"""What the nodes of a mesh hold, kept in step with the ledger.

A request holds blocks at every node of its path, of the layers that it passes there.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from hetis_exec.messages import Drop, Grow, Op, Open
from hetis_exec.places import owned_groups
from hetis_sim.control.mesh.engine import MeshEngine
from hetis_sim.control.mesh.walk import Walk


class Held(NamedTuple):
    """A walk, and its blocks when it was last looked at."""

    walk: Walk
    blocks: int


class MeshMirror:
    """Follows the walks of a mesh; it decides nothing."""

    def __init__(self, engine: MeshEngine) -> None:
        self._engine = engine
        self._known: dict[int, Held] = {}
        self._tags = 0
        self._closes: defaultdict[int, list[Op]] = defaultdict(list)
        self._opens: defaultdict[int, list[Op]] = defaultdict(list)

    def follow(self) -> None:
        """Compare with the control plane and note what is to be done."""
        active = self._engine.active
        for request_id, held in list(self._known.items()):
            if active.get(request_id) is not held.walk:
                self._drop(self._known.pop(request_id).walk)
        for request_id, walk in active.items():
            known = self._known.get(request_id)
            if known is None:
                self._open(walk)
            elif known.blocks != walk.blocks:
                self._grow(walk)
            else:
                continue
            self._known[request_id] = Held(walk, walk.blocks)

    def take(self) -> dict[int, tuple[Op, ...]]:
        """Operations by device, noted since the last call."""
        found = {device: (*self._closes[device], *self._opens[device])
                 for device in {*self._closes, *self._opens}}
        self._closes.clear()
        self._opens.clear()
        return found

    def _drop(self, walk: Walk) -> None:
        for n in walk.path.nodes:
            for device in self._engine.plan.nodes[n].devices:
                self._closes[device].append(Drop(walk.state.request_id))

    def _open(self, walk: Walk) -> None:
        self._tags += 1
        for n, layers in zip(walk.path.nodes, walk.path.layers, strict=True):
            node = self._engine.plan.nodes[n]
            for rank, device in enumerate(node.devices):
                groups = tuple(owned_groups(node, rank))
                self._opens[device].append(Open(walk.state.request_id, n, groups, layers, walk.blocks,
                                                self._tags, skipped=node.layers - layers))

    def _grow(self, walk: Walk) -> None:
        for n in walk.path.nodes:
            node = self._engine.plan.nodes[n]
            for rank, device in enumerate(node.devices):
                self._opens[device].append(Grow(walk.state.request_id, n, tuple(owned_groups(node, rank)),
                                                walk.blocks))
