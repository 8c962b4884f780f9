"""The same objective with another unit of division: whole requests, or blocks of tokens.

Hetis divides a request's attention by KV groups. For the question what that is worth, the same
plan, the same F (:mod:`.attention`) under the same free cache, and the same triggers are used
here to place all heads of a request at the ranks or at one attention worker of each stage
(``request``), or whole blocks of its tokens, with all heads, over ranks and workers
(``sequence``). All of this is ours.

Stages are placed one after the other, those with most to gain first; of the ways to place a
stage the one with the smallest F is taken. For blocks these are the fillings of the ranks and of
the first k workers, in the order in which they would be done with one block: every block of a
request takes the same time at a given position, so that :func:`.filling.fill` gives the smallest
largest completion time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hetis_sim.policies.hetis.attention import AttentionContext, Stage
from hetis_sim.policies.hetis.filling import fill
from hetis_sim.policies.hetis.placing import Load
from hetis_sim.policies.ranges import (
    AnyPlacement,
    TokenSplit,
    computed_groups,
    group_blocks,
    group_tokens,
    token_split,
)


class Asked(NamedTuple):
    """What is to be placed.

    Attributes:
        tokens: context of the request.
        blocks: blocks of one group that it needs.
        block_tokens: tokens of a block.
        old: blocks of one group that it has at every position already; what stays needs no room.
    """

    tokens: int
    blocks: int
    block_tokens: int
    old: Sequence[int]

    @property
    def most(self) -> int:
        """Blocks that may be in ranges: the last token of the context is in the tail."""
        return (self.tokens - 1) // self.block_tokens


class Row(NamedTuple):
    """One way to place a stage: groups of the tail and blocks of ranges at its positions.

    ``extra`` is what it costs beyond F, in the same measure.
    """

    tail: tuple[int, ...]
    blocks: tuple[int, ...]
    extra: float = 0.0


class Unit(ABC):
    """A unit of division: how a stage may be placed."""

    @abstractmethod
    def rows(self, context: AttentionContext, stage: Stage, load: Load, asked: Asked) -> Iterator[Row]:
        """Ways to place a stage of a request on a load without it, all at home left out."""

    def place(self, context: AttentionContext, load: Load, asked: Asked) -> AnyPlacement | None:
        """The placement of one request, or None where it does not fit."""
        trial = load.copy()
        tail, blocks = list(context.local_placement), [0] * context.positions
        at_home = {stage.index: _home_time(stage, load, asked.tokens) for stage in context.stages}
        for stage in sorted(context.stages, key=lambda s: (-s.layers * at_home[s.index], s.index)):
            home = _at_home(stage)
            fits_home = _fits(stage, home, trial, asked)
            if fits_home and at_home[stage.index] <= stage.remote_fixed:
                best = home
            else:
                chosen = self._best(context, stage, trial, asked, home if fits_home else None)
                if chosen is None:
                    return None
                best = chosen
            _book(stage, best, trial, asked)
            tail[stage.first:stage.last], blocks[stage.first:stage.last] = best.tail, best.blocks
        return token_split(tuple(tail), blocks)

    def take_off(self, context: AttentionContext, load: Load, asked: Asked, placement: AnyPlacement,
                 here: Sequence[int], wanted: int) -> AnyPlacement | None:
        """The request, placed as given, with up to ``wanted`` units less at the positions ``here``.

        ``load`` is without it; None where nothing can leave. Of the ways to place a stage the one with
        the smallest F is taken among those that free enough, or that free most.
        """
        trial = load.copy()
        rows = _rows_of(context, placement)
        for stage, row in zip(context.stages, rows, strict=True):
            _count(stage, row, trial, asked.tokens, asked.block_tokens, 1)
        changed = False
        for p in here:
            s = context.plan.positions[p].stage
            stage, now = context.stages[s], rows[s]
            if wanted <= 0 or not asked.old[p]:
                continue
            _count(stage, now, trial, asked.tokens, asked.block_tokens, -1)
            found: tuple[int, float, Row] | None = None
            for row in self.off_rows(context, stage, trial, asked, now, p - stage.first, wanted):
                left = _contents(stage, row, asked.blocks, 1)[p - stage.first]
                freed = min(wanted, (asked.old[p] - left) * stage.layers)
                if freed > 0 and _fits(stage, row, trial, asked):
                    time = _time(context, stage, row, trial, asked)
                    if found is None or (-freed, time) < found[:2]:
                        found = (-freed, time, row)
            if found is not None:
                changed, rows[s], wanted = True, found[2], wanted + found[0]
            _book(stage, rows[s], trial, asked)
        if not changed:
            return None
        tail = tuple(n for row in rows for n in row.tail)
        return token_split(tail, [n for row in rows for n in row.blocks])

    def off_rows(self, context: AttentionContext, stage: Stage, load: Load, asked: Asked, now: Row, i: int,
                 wanted: int) -> Iterator[Row]:
        """Ways to place a stage anew with nothing at its i-th position."""
        for row in (_at_home(stage), *self.rows(context, stage, load, asked)):
            if not row.tail[i] and not row.blocks[i]:
                yield row

    def _best(self, context: AttentionContext, stage: Stage, trial: Load, asked: Asked,
              home: Row | None) -> Row | None:
        """The row with the smallest F, at home if that is one."""
        found, least = home, float("inf")
        if home is not None:
            least = _time(context, stage, home, trial, asked)
        for row in self.rows(context, stage, trial, asked):
            if _fits(stage, row, trial, asked):
                time = _time(context, stage, row, trial, asked)
                if time < least:
                    found, least = row, time
        return found


class WholeRequests(Unit):
    """All heads of a request in one place."""

    def rows(self, context: AttentionContext, stage: Stage, load: Load, asked: Asked) -> Iterator[Row]:
        """All at one worker."""
        for w in range(len(stage.remote)):
            yield _all_at(context, stage, w)


class TokenBlocks(Unit):
    """Blocks of tokens, each with all heads."""

    def rows(self, context: AttentionContext, stage: Stage, load: Load, asked: Asked) -> Iterator[Row]:
        """The tail at home or, where home has no room for it, at a worker; or all at one worker."""
        lines = _Lines(context, stage, load, asked)
        for w in range(len(stage.remote)):
            more = context.costs[stage.middle + w]
            wire = (more.wire_s_per_group - more.still_wire_s_per_group) / max(1, more.wire_sharers)
            yield _all_at(context, stage, w)._replace(extra=stage.layers * context.kv_heads * wire)
        order = sorted(range(1, len(lines.start)), key=lambda i: (lines.start[i] + lines.step[i], i))
        if lines.limit[0] >= asked.blocks - asked.most:
            for k in range(1, len(order) + 1):
                counts = lines.filled(0, order[:k])
                if counts is not None:
                    yield lines.row(0, counts)
            return
        for holder in order:
            counts = lines.filled(holder, [i for i in order if i != holder])
            if counts is not None:
                yield lines.row(holder, counts)


    def off_rows(self, context: AttentionContext, stage: Stage, load: Load, asked: Asked, now: Row, i: int,
                 wanted: int) -> Iterator[Row]:
        """As many blocks as are wanted from one holder of a stage to another one."""
        ranks = len(stage.local)
        tails = {max(0, p - ranks + 1) for p, n in enumerate(now.tail) if n}
        if len(tails) > 1 or (0 in tails and now.tail[:ranks] != stage.owned):
            yield from super().off_rows(context, stage, load, asked, now, i, wanted)
            return
        lines = _Lines(context, stage, load, asked)
        (tail,) = tails
        held = {0: now.blocks[0]} | {w + 1: now.blocks[ranks + w] for w in range(len(stage.remote))}
        holder = max(0, i - ranks + 1)
        unit = stage.layers * (context.kv_heads if holder else stage.owned[i])
        movable = asked.most - sum(held.values()) if holder == tail else held[holder]
        for other in held:
            room = lines.limit[other] - lines.old[other]
            n = min(movable, -(-wanted // unit), room)
            if other != holder and n > 0:
                counts = {**held, holder: held[holder] - n, other: held[other] + n}
                yield lines.row(tail, counts)


class _Lines:
    """The holders of a stage, home first: when each is done with n blocks of a request, and its room."""

    def __init__(self, context: AttentionContext, stage: Stage, load: Load, asked: Asked) -> None:
        self._context = context
        self._stage = stage
        self._asked = asked
        unit, size = stage.layers, asked.block_tokens
        busy, wires = context.remote_load(load.groups, load.tokens)
        ranks = list(enumerate(stage.local, stage.first))
        self.start = [_home_time(stage, load, 0)]
        self.step = [max(r.b * r.owned * size for _, r in ranks)]
        self.old = [min(asked.old[p] // r.owned for p, r in ranks)]
        self.limit = [min(_room(load, r.device) // (unit * r.owned) for _, r in ranks) + self.old[0]]
        for w, (p, remote) in enumerate(enumerate(stage.remote, stage.middle)):
            held = wires[stage.index][w]
            opening = remote.fixed + remote.wire_fixed + (stage.sent(load.groups) if remote.shared else 0.0)
            waits = held if held >= 0.0 else opening
            self.start.append(busy[w] + waits + context.kv_heads * (remote.a + remote.wire))
            self.step.append(context.kv_heads * remote.b * size)
            self.old.append(asked.old[p] // context.kv_heads)
            self.limit.append(_room(load, remote.device) // (unit * context.kv_heads) + self.old[-1])

    def filled(self, tail: int, ranges: Sequence[int]) -> dict[int, int] | None:
        """Blocks in ranges of the holders of ranges, and in the tail beyond the least; None without room."""
        keep = self._asked.blocks - self._asked.most
        holders = [tail, *ranges]
        # Behind an interface each waits for the queries of all others too.
        remote, shared = self._stage.remote, set(self._stage.shared)
        others = sum(i - 1 in shared for i in holders) - 1
        others_s = self._stage.shared_wire * self._context.kv_heads * others
        start = [self.start[i] + (keep * self.step[i] if i == tail else 0.0)
                 + (others_s if i and remote[i - 1].shared else 0.0) for i in holders]
        limit = [self.limit[i] - (keep if i == tail else 0) for i in holders]
        if limit[0] < 0:
            return None
        found = fill(start, [self.step[i] for i in holders], limit, self._asked.most)
        return None if found is None else dict(zip(holders, found[0], strict=True))

    def row(self, tail: int, counts: dict[int, int]) -> Row:
        """The row of a filling, with the time of merging where anything is to be merged."""
        stage, ranks = self._stage, len(self._stage.local)
        groups = list(stage.owned) + [0] * len(stage.remote)
        if tail:
            groups = [0] * len(groups)
            groups[ranks + tail - 1] = self._context.kv_heads
        blocks = [0] * len(groups)
        for i, n in counts.items():
            if i != tail and i:
                blocks[ranks + i - 1] = n
            elif i != tail:
                blocks[:ranks] = [n] * ranks
        holders = sum(1 for i, n in counts.items() if n and i != tail)
        return Row(tuple(groups), tuple(blocks), self._merging(holders) if holders else 0.0)

    def _merging(self, ranges: int) -> float:
        """What the slowest rank reads, one output of every holder, and writes."""
        costs, stage = self._context.costs, self._stage
        return stage.layers * max((ranges + 2) * rank.owned * costs[p].merge_s_per_group
                                  for p, rank in enumerate(stage.local, stage.first))


def _at_home(stage: Stage) -> Row:
    return Row((*stage.owned, *[0] * len(stage.remote)), (0,) * (stage.last - stage.first))


def _rows_of(context: AttentionContext, placement: AnyPlacement) -> list[Row]:
    """A placement by stage."""
    split = placement if isinstance(placement, TokenSplit) else TokenSplit(placement, (0,) * len(placement))
    return [Row(split.tail[stage.first:stage.last], split.blocks[stage.first:stage.last])
            for stage in context.stages]


def _all_at(context: AttentionContext, stage: Stage, worker: int) -> Row:
    tail = [0] * (stage.last - stage.first)
    tail[len(stage.local) + worker] = context.kv_heads
    return Row(tuple(tail), (0,) * len(tail))


def _room(load: Load, device: int) -> int:
    return max(0, load.free[device])


def _home_time(stage: Stage, load: Load, tokens: int) -> float:
    """The slowest rank with all of a request at home."""
    return max(r.a * (load.groups[p] + r.owned) + r.b * (load.tokens[p] + r.owned * tokens) + r.fixed
               for p, r in enumerate(stage.local, stage.first))


def _contents(stage: Stage, row: Row, count: int, unit: int) -> list[int]:
    """KV heads times blocks (or tokens, ``unit`` a block) at the positions of a stage, ``count`` in all."""
    full = [*stage.owned, *[sum(stage.owned)] * len(stage.remote)]
    ranges = sum(row.blocks[len(stage.local):]) + row.blocks[0]
    return [groups * (count - ranges * unit) + most * n * unit
            for groups, most, n in zip(row.tail, full, row.blocks, strict=True)]


def _fits(stage: Stage, row: Row, load: Load, asked: Asked) -> bool:
    held = _contents(stage, row, asked.blocks, 1)
    devices = [r.device for r in stage.local] + [r.device for r in stage.remote]
    return all(stage.layers * (n - old) <= _room(load, device) for n, old, device
               in zip(held, asked.old[stage.first:stage.last], devices, strict=True) if n > old)


def _book(stage: Stage, row: Row, load: Load, asked: Asked) -> None:
    """Count a placed stage in."""
    _count(stage, row, load, asked.tokens, asked.block_tokens, 1)
    held = _contents(stage, row, asked.blocks, 1)
    devices = [r.device for r in stage.local] + [r.device for r in stage.remote]
    for n, old, device in zip(held, asked.old[stage.first:stage.last], devices, strict=True):
        load.free[device] -= stage.layers * max(0, n - old)


def _count(stage: Stage, row: Row, load: Load, tokens: int, block_tokens: int, sign: int) -> None:
    full = [*stage.owned, *[sum(stage.owned)] * len(stage.remote)]
    groups, held = list(load.groups), list(load.tokens)
    for i, n in enumerate(_contents(stage, row, tokens, block_tokens)):
        groups[stage.first + i] += sign * (row.tail[i] or (full[i] if row.blocks[i] else 0))
        held[stage.first + i] += sign * n
    load.groups, load.tokens = groups, held


def _time(context: AttentionContext, stage: Stage, row: Row, load: Load, asked: Asked) -> float:
    """F with a stage of the request placed, the stages not yet placed without it."""
    _count(stage, row, load, asked.tokens, asked.block_tokens, 1)
    time = context.total_time(load.groups, load.tokens) + row.extra
    _count(stage, row, load, asked.tokens, asked.block_tokens, -1)
    return time


def count_in(context: AttentionContext, load: Load, placement: AnyPlacement, tokens: int, block_tokens: int,
             sign: int = 1) -> None:
    """Count a request's groups and group-tokens into a load, or out of it."""
    plan = context.plan
    more = group_tokens(plan, placement, tokens, block_tokens)
    load.groups = [g + sign * n for g, n in zip(load.groups, computed_groups(plan, placement), strict=True)]
    load.tokens = [t + sign * n for t, n in zip(load.tokens, more, strict=True)]


def take_blocks(context: AttentionContext, load: Load, placement: AnyPlacement, blocks: int) -> None:
    """Take a request's blocks out of what is free."""
    held = group_blocks(context.plan, placement, blocks)
    for position, n in zip(context.plan.positions, held, strict=True):
        load.free[position.device] -= n * position.layers
