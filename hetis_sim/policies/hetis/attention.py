"""Decode-attention time of an instance as the dispatcher sees it.

A position's completion time is the line of :class:`PositionCost` over its average load per
micro-batch. An attention worker serves every stage of its instance; a job of one stage also
waits for one average job of every other stage (without their wire time, which overlaps),
the bound that the control plane charges too. Workers that a stage reaches through its host's network
interface share that: each waits for all that the stage sends through it, as the control plane charges
it too. The time of a stage is its slowest position, and

    F = sum over stages of layers * (slowest position of the stage)

is the attention time of one decode iteration. The paper minimises the slowest device of one
stage; the sum over stages is ours.

All times here are multiplied by the number of micro-batches, which spares a division in the
hot path: ``a*groups + b*group_tokens`` of the whole load, fixed costs times the number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add
from typing import NamedTuple

import numpy as np

from hetis_sim.policies.plan import InstancePlan, Placement
from hetis_sim.policies.view import InstanceView, PositionCost


class Local(NamedTuple):
    """A tensor-parallel rank in its stage: groups it may hold, and its line."""

    device: int
    owned: int
    a: float
    b: float
    fixed: float


class Remote(NamedTuple):
    """An attention worker in its role for one stage. ``wire`` and ``wire_fixed`` delay this stage alone.

    ``wire`` is the time of one group; where it is ``shared``, of any of the stage's at a worker that shares.
    """

    device: int
    a: float
    b: float
    fixed: float
    wire: float
    wire_fixed: float
    shared: bool


@dataclass(frozen=True, slots=True)
class Stage:
    """Constants of one pipeline stage.

    Its ranks are the positions ``first`` to ``middle - 1``, the attention workers, in the order of
    the plan, ``middle`` to ``last - 1``. ``remote_fixed`` is the least fixed time of a worker;
    ``nothing`` is a row of zeros, long enough for either. ``shared`` numbers the workers that are reached
    through one interface, with ``shared_wire`` seconds for every group at any of them.
    """

    index: int
    layers: int
    first: int
    middle: int
    last: int
    local: tuple[Local, ...]
    remote: tuple[Remote, ...]
    owned: tuple[int, ...]
    remote_fixed: float
    nothing: tuple[int, ...]
    shared: tuple[int, ...]
    shared_wire: float

    def sent(self, groups: Sequence[float]) -> float:
        """Seconds that the stage's interface is busy with the groups of a load, over all micro-batches."""
        return self.shared_wire * sum([groups[self.middle + w] for w in self.shared])


class AttentionContext:
    """What follows from an instance's plan and costs, worked out once; ``ranges`` for token ranges."""

    def __init__(self, plan: InstancePlan, costs: Sequence[PositionCost], lanes: int,
                 ranges: bool = False) -> None:
        self.ranges = ranges
        self.plan = plan
        self.costs = costs
        self.lanes = lanes
        self.kv_heads = sum(plan.stages[0].owned_groups)
        self.workers = plan.attention_workers
        self.local_placement: Placement = plan.local_placement
        self.stages = tuple(self._stage(s) for s in range(len(plan.stages)))
        self.layers = plan.layers
        self.positions = len(plan.positions)
        self.units_per_block = self.kv_heads * plan.layers
        # Rows a, b, fixed, wire (unless shared) and wire_fixed over the positions, for many loads at a time.
        self.table = np.array([(c.a_s_per_group, c.b_s_per_group_token, lanes * c.c_s,
                                0.0 if c.wire_sharers else self._wire_s(c), lanes * c.wire_fixed_s)
                               for c in costs]).T

    def _wire_s(self, cost: PositionCost) -> float:
        """Wire time of a group alone; with token ranges what is remote is taken to be in one."""
        wire = cost.still_wire_s_per_group if self.ranges else cost.wire_s_per_group
        return wire / max(1, cost.wire_sharers)

    def _stage(self, s: int) -> Stage:
        local: list[Local] = []
        remote: list[Remote] = []
        indices = self.plan.stage_positions[s]
        for p in indices:
            position, cost = self.plan.positions[p], self.costs[p]
            a, b, fixed = cost.a_s_per_group, cost.b_s_per_group_token, self.lanes * cost.c_s
            if position.remote:
                remote.append(Remote(position.device, a, b, fixed, self._wire_s(cost),
                                     self.lanes * cost.wire_fixed_s, cost.wire_sharers > 0))
            else:
                local.append(Local(position.device, position.owned_groups, a, b, fixed))
        stage = self.plan.stages[s]
        least = min((r.fixed + r.wire_fixed for r in remote), default=math.inf)
        return Stage(s, stage.layers, indices.start, indices.start + stage.tp, indices.stop, tuple(local),
                     tuple(remote), stage.owned_groups, least, (0,) * max(len(local), len(remote)),
                     tuple(w for w, r in enumerate(remote) if r.shared),
                     max((r.wire for r in remote if r.shared), default=0.0))

    def remote_load(self, groups: Sequence[float],
                    tokens: Sequence[float]) -> tuple[list[float], list[list[float]]]:
        """The attention workers under a load.

        Returns:
            The sum over stages of each worker's average job; and for every stage the wire time
            of each worker, minus infinity where it holds none of the stage's heads.
        """
        busy = [0.0] * len(self.workers)
        wires: list[list[float]] = []
        for stage in self.stages:
            row: list[float] = []
            middle, last, sent = stage.middle, stage.last, stage.sent(groups) if stage.shared else 0.0
            here = zip(groups[middle:last], tokens[middle:last], stage.remote, strict=True)
            for w, (g, t, (_, a, b, fixed, wire, wire_fixed, shared)) in enumerate(here):
                if g > 0:
                    busy[w] += a * g + b * t + fixed
                    row.append((sent if shared else wire * g) + wire_fixed)
                else:
                    row.append(-math.inf)
            wires.append(row)
        return busy, wires

    def stage_times(self, groups: Sequence[float], tokens: Sequence[float]) -> list[float]:
        """Slowest position of every stage under a load; seconds of one layer times micro-batches."""
        busy, wires = self.remote_load(groups, tokens)
        return [max(local_time(stage, groups, tokens), max(map(add, busy, row), default=0.0))
                for stage, row in zip(self.stages, wires, strict=True)]

    def total_time(self, groups: Sequence[float], tokens: Sequence[float]) -> float:
        """F of the module's text; seconds of one iteration times micro-batches."""
        times = self.stage_times(groups, tokens)
        return sum(stage.layers * time for stage, time in zip(self.stages, times, strict=True))


def local_time(stage: Stage, groups: Sequence[float], tokens: Sequence[float]) -> float:
    """Slowest tensor-parallel rank of a stage."""
    worst = 0.0
    ranks = zip(groups[stage.first:stage.middle], tokens[stage.first:stage.middle], stage.local, strict=True)
    for g, t, (_, _, a, b, fixed) in ranks:
        if g > 0:
            time = a * g + b * t + fixed
            if time > worst:
                worst = time
    return worst


class ContextTable:
    """Keeps the context of each instance for as long as its plan and costs are the same objects."""

    def __init__(self, ranges: bool = False) -> None:
        self._ranges = ranges
        self._known: dict[int, AttentionContext] = {}

    def get(self, view: InstanceView) -> AttentionContext:
        """The context of the instance that ``view`` shows."""
        found = self._known.get(view.index)
        if (found is None or found.plan is not view.plan or found.costs is not view.costs
                or found.lanes != view.lanes):
            found = AttentionContext(view.plan, view.costs, view.lanes, self._ranges)
            self._known[view.index] = found
        return found
