"""What follows from a placement, worked out once for each distinct one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import add

import numpy as np
from numpy.typing import NDArray

from hetis_sim.control.ledger import Units
from hetis_sim.control.step import Flow
from hetis_sim.policies.plan import InstancePlan, Placement
from hetis_sim.policies.ranges import (
    AnyPlacement,
    TokenSplit,
    full_groups,
    group_blocks,
    range_blocks,
    split_fault,
)
from hetis_sim.spec.errors import HetisError


class PlacementError(HetisError):
    """A policy returned a placement that its instance cannot carry out."""


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """What token ranges add to a shape; it does not grow.

    Attributes:
        blocks: blocks of each range, by position.
        tokens: tokens in ranges; a request must have as many in cache.
        groups: KV groups computed at every position, in a range or in the tail.
        still: of them, those in ranges.
        merged: those of a tail whose output is merged with that of ranges.
        group_tokens: at every position, what its range holds more, or a tail less, than its
            groups of all tokens.
        units: (local device, units), the same in units of the ledger.
        staged_units: (local device, units) that wait at the primaries until pushed, besides those
            of the shape.
    """

    blocks: tuple[int, ...]
    tokens: int
    groups: tuple[int, ...]
    still: NDArray[np.int64]
    merged: NDArray[np.int64]
    group_tokens: NDArray[np.int64]
    units: tuple[tuple[int, int], ...]
    staged_units: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class PlacementShape:
    """A placement in the forms that the hot path needs.

    Attributes:
        placement, vector: groups at every position that grow with every token, as a tuple and as an
            array; all groups but for those in ranges.
        pairs: (position, groups) where groups > 0.
        block_units: (local device, units) that one block of tokens takes.
        pushes: (source device, target device, group-layers, layers): what a prefill sends to
            attention workers.
        staged_units: (local device, units) per block that wait at the primaries meanwhile.
        remote_share: share of the head-layers held by attention workers.
        ranges: what token ranges add, None without any.
    """

    placement: Placement
    vector: NDArray[np.int64]
    pairs: tuple[tuple[int, int], ...]
    block_units: tuple[tuple[int, int], ...]
    pushes: tuple[tuple[int, int, int, int], ...]
    staged_units: tuple[tuple[int, int], ...]
    remote_share: float
    ranges: Ranges | None = None

    def units(self, blocks: int) -> Units:
        """(local device, units) of so many blocks of tokens."""
        fixed = self.ranges.units if self.ranges is not None else ()
        return _sum_units(self.block_units, blocks, fixed)

    def staged(self, blocks: int) -> Units:
        """(local device, units) of them that wait at the primaries until they are pushed."""
        fixed = self.ranges.staged_units if self.ranges is not None else ()
        return _sum_units(self.staged_units, blocks, fixed)

    @property
    def pushed(self) -> bool:
        """Whether a prefill sends anything away."""
        return bool(self.pushes) or self.ranges is not None

    def group_tokens(self, tokens: int) -> list[int]:
        """At every position, the sum over its KV groups of the tokens that are there."""
        if self.ranges is None:
            return [groups * tokens for groups in self.placement]
        found: list[int] = (self.vector * tokens + self.ranges.group_tokens).tolist()
        return found

    @property
    def groups(self) -> Placement:
        """KV groups computed at every position."""
        return self.placement if self.ranges is None else self.ranges.groups


def _sum_units(per_block: Units, blocks: int, fixed: Units) -> Units:
    if not fixed:
        return [(d, u * blocks) for d, u in per_block]
    total = dict(fixed)
    for d, u in per_block:
        total[d] = total.get(d, 0) + u * blocks
    return sorted(total.items())


class PlacementShapes:
    """Checks placements against the plan and remembers their shapes."""

    def __init__(self, plan: InstancePlan, kv_heads: int, block_tokens: int) -> None:
        self._plan = plan
        self._kv_heads = kv_heads
        self._block_tokens = block_tokens
        self._local = {device: index for index, device in enumerate(plan.devices)}
        self._known: dict[Placement, PlacementShape] = {}
        self._facts = [(self._local[p.device], p.layers, -1 if p.remote else p.owned_groups)
                       for p in plan.positions]
        self._most = tuple(kv_heads if p.remote else p.owned_groups for p in plan.positions)

    def shape(self, placement: AnyPlacement) -> PlacementShape:
        """The shape of a placement; those with token ranges are not remembered.

        Raises:
            PlacementError: a stage's groups do not sum to the KV heads, are negative, or a
                rank is given groups whose weights it does not hold; ranges break a rule of
                :class:`TokenSplit`.
        """
        if isinstance(placement, TokenSplit):
            return self._with_ranges(placement)
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

    def _with_ranges(self, split: TokenSplit) -> PlacementShape:
        tail = self.shape(split.tail)
        fault = split_fault(self._plan, split)
        if fault:
            raise PlacementError(f"placement={split} {fault}")
        fixed, full = group_blocks(self._plan, split, 0), full_groups(self._plan)
        units: dict[int, int] = {}
        staged: dict[int, int] = {}
        for groups, (d, layers, owned) in zip(fixed, self._facts, strict=True):
            units[d] = units.get(d, 0) + groups * layers
            if owned >= 0:
                staged[d] = -groups * layers
        still = [most if held else 0 for most, held in zip(full, split.blocks, strict=True)]
        merged = [0] * len(still)
        for indices in self._plan.stage_positions:
            if any(still[p] for p in indices):
                merged[indices.start:indices.stop] = split.tail[indices.start:indices.stop]
        tokens = self._block_tokens * max(range_blocks(self._plan, split.blocks))
        ranges = Ranges(split.blocks, tokens, tuple(map(add, split.tail, still)), np.array(still),
                        np.array(merged), self._block_tokens * np.array(fixed), tuple(sorted(units.items())),
                        tuple(sorted(staged.items())))
        return replace(tail, ranges=ranges)

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

    def move_flows(self, old: PlacementShape, new: PlacementShape, tokens: int,
                   bytes_per_group_token: int) -> tuple[Flow, ...]:
        """Flows that turn one placement of ``tokens`` into another; what stays is not sent."""
        return tuple(Flow(a, b, size) for a, b, size, _ in
                     self._sizes(old, new, tokens, bytes_per_group_token))

    def push_flows(self, shape: PlacementShape, tokens: int, bytes_per_group_token: int) -> tuple[Flow, ...]:
        """Flows of a computed prompt to attention workers; the last layer of each stage is the tail."""
        if shape.ranges is None:
            size = bytes_per_group_token * tokens
            return tuple(Flow(source, target, size * group_layers, size * group_layers / layers)
                         for source, target, group_layers, layers in shape.pushes)
        home = self.shape(self._plan.local_placement)
        return tuple(Flow(a, b, size, size / layers) for a, b, size, layers in
                     self._sizes(home, shape, tokens, bytes_per_group_token))

    def remote_share(self, shape: PlacementShape, tokens: int) -> float:
        """Share of a request's cache, of so many tokens, that attention workers hold."""
        if shape.ranges is None or not tokens:
            return shape.remote_share
        held = zip(self._facts, shape.group_tokens(tokens), strict=True)
        remote = sum([layers * group_tokens for (_, layers, owned), group_tokens in held if owned < 0])
        return remote / (self._plan.layers * self._kv_heads * tokens)

    def _sizes(self, old: PlacementShape, new: PlacementShape, tokens: int,
               bytes_per_group_token: int) -> list[tuple[int, int, int, int]]:
        """(source, target, bytes, layers of their stage) of what differs between two placements."""
        before, after = old.group_tokens(tokens), new.group_tokens(tokens)
        stay = staying(old, new, tokens)
        found: list[tuple[int, int, int, int]] = []
        for indices in self._plan.stage_positions:
            positions = [self._plan.positions[p] for p in indices]
            give = [[q.device, n] for q in positions if (n := before[q.index] - stay[q.index])]
            take = [[q.device, n] for q in positions if (n := after[q.index] - stay[q.index])]
            layers = positions[0].layers
            found += [(a, b, amount * layers * bytes_per_group_token, layers)
                      for a, b, amount in match(give, take)]
        return found


def staying(old: PlacementShape, new: PlacementShape, tokens: int) -> list[int]:
    """Group-tokens of a request at every position that two placements have in common."""
    pairs = zip(old.groups, new.groups, old.group_tokens(tokens), new.group_tokens(tokens), strict=True)
    # As many groups as both have, and of each as many tokens as both have.
    return [min(g, h) * min(before // g, after // h) if g and h else 0 for g, h, before, after in pairs]


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
