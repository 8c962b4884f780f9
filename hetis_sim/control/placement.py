"""What follows from a placement, worked out once for each distinct one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetis_sim.control.step import Flow
from hetis_sim.policies.plan import InstancePlan, Placement
from hetis_sim.spec.errors import HetisError


class PlacementError(HetisError):
    """A policy returned a placement that its instance cannot carry out."""


@dataclass(frozen=True, slots=True, eq=False)
class PlacementShape:
    """A placement in the forms that the hot path needs.

    Attributes:
        placement, vector: groups at every position, as a tuple and as an array.
        pairs: (position, groups) where groups > 0.
        block_units: (local device, units) that one block of tokens takes.
        pushes: (source device, target device, group-layers, layers): what a prefill sends to
            attention workers.
        staged_units: (local device, units) per block that wait at the primaries meanwhile.
        remote_share: share of the head-layers held by attention workers.
    """

    placement: Placement
    vector: NDArray[np.int64]
    pairs: tuple[tuple[int, int], ...]
    block_units: tuple[tuple[int, int], ...]
    pushes: tuple[tuple[int, int, int, int], ...]
    staged_units: tuple[tuple[int, int], ...]
    remote_share: float


class PlacementShapes:
    """Checks placements against the plan and remembers their shapes."""

    def __init__(self, plan: InstancePlan, kv_heads: int) -> None:
        self._plan = plan
        self._kv_heads = kv_heads
        self._local = {device: index for index, device in enumerate(plan.devices)}
        self._known: dict[Placement, PlacementShape] = {}
        self._facts = [(self._local[p.device], p.layers, -1 if p.remote else p.owned_groups)
                       for p in plan.positions]
        self._most = tuple(kv_heads if p.remote else p.owned_groups for p in plan.positions)

    def shape(self, placement: Placement) -> PlacementShape:
        """The shape of a placement.

        Raises:
            PlacementError: a stage's groups do not sum to the KV heads, are negative, or a
                rank is given groups whose weights it does not hold.
        """
        known = self._known.get(placement)
        if known is None:
            placement = tuple(int(groups) for groups in placement)
            known = self._known[placement] = self._make(placement)
        return known

    def _make(self, placement: Placement) -> PlacementShape:
        self._check(placement)
        units: dict[int, int] = {}
        staged: dict[int, int] = {}
        remote = 0
        for groups, (d, layers, owned) in zip(placement, self._facts, strict=True):
            if groups:
                units[d] = units.get(d, 0) + groups * layers
            if owned < 0:
                remote += groups * layers
            elif owned > groups:
                staged[d] = (owned - groups) * layers
        pairs = tuple([(p, groups) for p, groups in enumerate(placement) if groups])
        return PlacementShape(placement, np.array(placement, dtype=np.int64), pairs,
                              tuple(sorted(units.items())), tuple(self._pushes(placement)) if remote else (),
                              tuple(sorted(staged.items())), remote / (self._plan.layers * self._kv_heads))

    def _check(self, placement: Placement) -> None:
        positions = self._plan.positions
        if len(placement) != len(positions):
            raise PlacementError(f"placement={placement} has {len(placement)} entries, "
                                 f"the instance has {len(positions)} positions")
        for stage, indices in enumerate(self._plan.stage_positions):
            total = sum(placement[indices.start:indices.stop])
            if total != self._kv_heads:
                raise PlacementError(f"placement={placement} gives stage {stage} {total} KV groups, "
                                     f"must be {self._kv_heads}")
        for p, (groups, most) in enumerate(zip(placement, self._most, strict=True)):
            if not 0 <= groups <= most:
                raise PlacementError(f"placement={placement} gives position {p} {groups} KV groups, "
                                     f"must be between 0 and {most}")

    def _pushes(self, placement: Placement) -> list[tuple[int, int, int, int]]:
        pushes: list[tuple[int, int, int, int]] = []
        for indices in self._plan.stage_positions:
            positions = [self._plan.positions[p] for p in indices]
            give = [[q.device, q.owned_groups - placement[q.index]] for q in positions if not q.remote]
            take = [[q.device, placement[q.index]] for q in positions if q.remote]
            layers = positions[0].layers
            pushes += [(a, b, groups * layers, layers) for a, b, groups in match(give, take)]
        return pushes

    def move_flows(self, old: Placement, new: Placement, bytes_per_group_layer: float) -> tuple[Flow, ...]:
        """Flows that turn one placement into another; groups that stay are not sent."""
        flows: list[Flow] = []
        for indices in self._plan.stage_positions:
            positions = [self._plan.positions[p] for p in indices]
            give = [[q.device, old[q.index] - new[q.index]] for q in positions if old[q.index] > new[q.index]]
            take = [[q.device, new[q.index] - old[q.index]] for q in positions if new[q.index] > old[q.index]]
            layers = positions[0].layers
            flows += [Flow(a, b, groups * layers * bytes_per_group_layer)
                      for a, b, groups in match(give, take)]
        return tuple(flows)


def match(give: list[list[int]], take: list[list[int]]) -> list[tuple[int, int, int]]:
    """Pair givers with takers in order: (giver, taker, amount) until all is taken."""
    matched: list[tuple[int, int, int]] = []
    givers = iter(give)
    giver, left = 0, 0
    for taker, wanted in take:
        while wanted:
            while left == 0:
                giver, left = next(givers)
            amount = min(left, wanted)
            matched.append((giver, taker, amount))
            left -= amount
            wanted -= amount
    return matched
