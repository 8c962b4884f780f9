"""Which blocks of a request's cache live where.

Without token ranges all blocks of a KV group are at one position (:mod:`.groups`). With them the control
plane counts blocks of ranges at positions; which ones these are is decided here, by rules that are
deterministic: a position keeps the oldest of those that it has, and takes the oldest that are left over.
Attention does not mind in which order it sees tokens, so the blocks of a range need not lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from hetis_exec.groups import GroupMap, Groups, Holders
from hetis_sim.control.placement import PlacementShape
from hetis_sim.policies.plan import InstancePlan

Places = tuple[int, ...]
"""The position of each KV group."""

Key = tuple[int, int, int]
"""A stage, a group and a block."""


class Cover(NamedTuple):
    """Where the cache of a request lies.

    Attributes:
        holders: for every stage, the positions of the newest tokens.
        older: for every stage, the positions of each of the oldest blocks; all later ones are with the
            holders.
    """

    holders: Holders
    older: tuple[tuple[Places, ...], ...]

    def places(self, stage: int, block: int) -> Places:
        """The positions of one block."""
        older = self.older[stage]
        return older[block] if block < len(older) else self.holders[stage]


class Extent(NamedTuple):
    """What a position holds of some groups: all blocks before ``blocks`` but for those that are absent.

    ``grows``: it has the newest tokens.
    """

    stage: int
    position: int
    groups: Groups
    blocks: int
    absent: tuple[int, ...]
    grows: bool


class Journey(NamedTuple):
    """Blocks ``first .. last - 1`` of some groups go from one position to another of the same stage.

    ``early``: there is room for them at their target before anything leaves it. The ledger books
    the net gain of a position only; one that gives some away in exchange for others has no room for the
    newcomers until the switch.
    """

    stage: int
    source: int
    target: int
    groups: Groups
    first: int
    last: int
    early: bool


def extents(cover: Cover, blocks: int) -> Iterator[Extent]:
    """What every position holds of so many blocks."""
    for stage, (holders, older) in enumerate(zip(cover.holders, cover.older, strict=True)):
        for position in sorted({p for places in (holders, *older) for p in places}):
            found: dict[tuple[int, tuple[int, ...], bool], list[int]] = {}
            for group, holder in enumerate(holders):
                grows = holder == position
                here = {b for b, places in enumerate(older) if places[group] == position}
                if not grows and not here:
                    continue
                last = max(blocks, len(older)) if grows else max(here) + 1
                absent = tuple([b for b in range(min(last, len(older))) if b not in here])
                found.setdefault((last, absent, grows), []).append(group)
            for (last, absent, grows), groups in found.items():
                yield Extent(stage, position, tuple(groups), last, absent, grows)


class Covers:
    """Turns counts of groups and of blocks into places, for the requests of one instance."""

    def __init__(self, plan: InstancePlan, block_tokens: int) -> None:
        self._plan = plan
        self._block_tokens = block_tokens
        self.groups = GroupMap(plan)

    def initial(self, shape: PlacementShape) -> Cover:
        """The oldest blocks are in ranges, position by position, and all others with the tail."""
        holders = self.groups.initial(shape.placement)
        return Cover(holders, tuple([self._ranges(shape, stage, (), tail)
                                     for stage, tail in enumerate(holders)]))

    def rearranged(self, cover: Cover, shape: PlacementShape, tokens: int) -> Cover:
        """The same after a change of placement, with as few blocks as possible on the way.

        ``tokens`` of the request are complete.
        """
        holders = self.groups.rearranged(cover.holders, shape.placement)
        # A block that is still being filled stays with the newest tokens.
        before = range(tokens // self._block_tokens)
        return Cover(holders, tuple([
            self._ranges(shape, stage, [cover.places(stage, b) for b in before], tail)
            for stage, tail in enumerate(holders)]))

    def _ranges(self, shape: PlacementShape, stage: int, before: Collection[Places],
                tail: Places) -> tuple[Places, ...]:
        """Where the oldest blocks are; ``before`` says where each was."""
        if shape.ranges is None:
            return ()
        counts = shape.ranges.blocks
        indices = self._plan.stage_positions[stage]
        ranks = self._plan.stages[stage].tp
        left = {self._full(p): counts[p] for p in (*indices[ranks:], indices.start) if counts[p]}
        found: dict[int, Places] = {}
        for block, places in enumerate(before):
            if left.get(places):
                left[places] -= 1
                found[block] = places
        block = 0
        for places, number in left.items():
            for _ in range(number):
                while block in found:
                    block += 1
                found[block] = places
        return tuple([found.get(b, tail) for b in range(max(found, default=-1) + 1)])

    def _full(self, position: int) -> Places:
        """All groups at a worker, or each at the rank that owns it."""
        at = self._plan.positions[position]
        indices = self._plan.stage_positions[at.stage]
        if at.remote:
            return (position,) * sum(self._plan.positions[p].owned_groups for p in indices)
        return tuple([p for p in indices for _ in self.groups.owned(p)])

    def changes(self, old: Cover, new: Cover, blocks: int) -> dict[Key, bool]:
        """Blocks of groups that change their place, and whether there is room for each at once."""
        found: dict[Key, bool] = {}
        for stage, indices in enumerate(self._plan.stage_positions):
            pairs = [(old.places(stage, b), new.places(stage, b)) for b in range(blocks)]
            room = dict.fromkeys(indices, 0)
            for before, after in pairs:
                for source, target in zip(before, after, strict=True):
                    room[source] -= 1
                    room[target] += 1
            for group in range(len(old.holders[stage])):
                for block, (before, after) in enumerate(pairs):
                    if before[group] != after[group]:
                        room[after[group]] -= 1
                        found[stage, group, block] = room[after[group]] >= 0
        return found


def journeys(old: Cover, new: Cover, chosen: Iterable[Key],
             early: Callable[[Key], bool] = bool) -> list[Journey]:
    """Ways of some blocks, those that go together in one: runs of blocks, of all groups that share them."""
    runs: dict[tuple[int, int, int, bool, int], list[list[int]]] = {}
    for key in sorted(chosen):
        stage, group, block = key
        way = (stage, old.places(stage, block)[group], new.places(stage, block)[group], early(key), group)
        mine = runs.setdefault(way, [])
        if mine and mine[-1][1] == block:
            mine[-1][1] += 1
        else:
            mine.append([block, block + 1])
    together: dict[tuple[int, int, int, int, int, bool], list[int]] = {}
    for (stage, source, target, is_early, group), mine in runs.items():
        for first, last in mine:
            together.setdefault((stage, source, target, first, last, is_early), []).append(group)
    return [Journey(stage, source, target, tuple(groups), first, last, is_early)
            for (stage, source, target, first, last, is_early), groups in sorted(together.items())]


def every_key(cover: Cover, blocks: int) -> Iterator[Key]:
    """All blocks of all groups."""
    for stage, holders in enumerate(cover.holders):
        for group in range(len(holders)):
            for block in range(blocks):
                yield stage, group, block


def gathered(keys: Iterable[Key],
             place: Callable[[Key], int]) -> dict[tuple[int, int, tuple[int, ...]], Groups]:
    """By (stage, position, blocks): the groups of which these blocks belong there."""
    blocks: dict[tuple[int, int, int], list[int]] = {}
    for key in sorted(keys):
        stage, group, block = key
        blocks.setdefault((stage, place(key), group), []).append(block)
    found: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}
    for (stage, position, group), mine in blocks.items():
        found.setdefault((stage, position, tuple(mine)), []).append(group)
    return {at: tuple(groups) for at, groups in found.items()}
