"""Places the heads of one request: the dispatcher's fast path.

For one request the linear program has a combinatorial answer. Every KV group of the request
takes the same time at a given position, so the k-th group put there completes at
``start + k*step``; the H smallest of these numbers over all positions are the placement with
the smallest largest completion time, in whole groups and under limits per position; workers behind one
network interface also wait for all that passes it (:mod:`.filling`). This is
exact for one stage. Stages share attention workers, so they are placed one after the other,
and a stage keeps groups at its ranks that would cost the other stages more than it gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import add

from hetis_sim.policies.hetis.attention import AttentionContext, Stage
from hetis_sim.policies.hetis.filling import INFINITY, Interface, fill_shared, interface_of
from hetis_sim.policies.plan import Placement

IDEAL_PARTS = 64


class Load:
    """The load and the free cache that placements are decided on.

    Attributes:
        groups, tokens: KV groups and group-tokens at every position.
        free: units by device id; negative where a reserve is used already.
    """

    __slots__ = ("free", "groups", "tokens")

    def __init__(self, groups: Sequence[int], tokens: Sequence[int], free: dict[int, int]) -> None:
        self.groups = groups
        self.tokens = tokens
        self.free = free

    def copy(self) -> Load:
        """A load that may change."""
        return Load(list(self.groups), list(self.tokens), dict(self.free))

    def add(self, context: AttentionContext, placement: Sequence[int], tokens: int, blocks: int,
            sign: int = 1) -> None:
        """Count a request's heads in and take its blocks; the reverse with ``sign=-1``."""
        groups, held = list(self.groups), list(self.tokens)
        for position, n in zip(context.plan.positions, placement, strict=True):
            if n:
                groups[position.index] += sign * n
                held[position.index] += sign * n * tokens
                self.free[position.device] -= sign * n * position.layers * blocks
        self.groups, self.tokens = groups, held


def place(context: AttentionContext, load: Load, tokens: int, blocks: int,
          old: Placement | None = None) -> Placement | None:
    """Groups of one request at every position, or None where it does not fit.

    Args:
        context: the instance.
        load: groups, group-tokens and free units, without this request.
        tokens: its context.
        blocks: blocks of one of its groups.
        old: where its cache is now, for a request that moves. Cache that stays needs no new
            room, and among equally fast placements one that moves little is chosen.
    """
    groups, held, free = load.groups, load.tokens, load.free
    levels: list[float] = []
    shortage = tempting = False
    for stage in context.stages:
        unit = stage.layers * blocks
        level, p = 0.0, stage.first
        for device, owned, a, b, fixed in stage.local:
            if free[device] < owned * unit:
                shortage = True
            time = a * (groups[p] + owned) + b * (held[p] + owned * tokens) + fixed
            if time > level:
                level = time
            p += 1
        levels.append(level)
        tempting = tempting or level > stage.remote_fixed
    if not shortage and not tempting:
        return context.local_placement
    if not context.workers:
        return None if shortage and old is None else context.local_placement
    placing = _Placing(context, load, tokens, blocks, old, levels)
    if shortage:
        return placing.run(range(len(context.stages)), shortage=True)
    paying = placing.paying()
    return placing.run(paying, shortage=False) if paying else context.local_placement


def spread_many(context: AttentionContext, count: float, tokens: float, blocks: float,
                capacity: dict[int, int]) -> list[float] | None:
    """Groups at every position when ``count`` equal requests are all placed afresh, cut in small parts.

    None where the parts do not fit.
    """
    parts = max(1, -(-IDEAL_PARTS // context.kv_heads))
    weight = count / parts
    empty = Load([0] * context.positions, [0] * context.positions, capacity)
    levels = [max(rank.owned * count * (rank.a + rank.b * tokens) + rank.fixed for rank in stage.local)
              for stage in context.stages]
    placing = _Placing(context, empty, tokens, blocks, None, levels, parts, weight)
    placement = placing.run(range(len(context.stages)), shortage=True)
    return None if placement is None else [n * weight for n in placement]


class _Placing:
    """One request on its way to its positions.

    ``busy``, ``wires`` and ``room`` are the attention workers' jobs, wire times by stage, and free units, and
    ``sent`` is the time of each stage's interface; they follow the stages placed so far. ``levels`` holds
    the time of every stage's ranks: of stages not yet placed, with all heads at home. What is placed are
    ``parts`` portions of every KV group of the model, each worth ``weight`` groups; one portion worth one,
    for a request.
    """

    __slots__ = ("blocks", "busy", "context", "levels", "load", "old", "parts", "placement", "room", "sent",
                 "tokens", "weight", "wires")

    def __init__(self, context: AttentionContext, load: Load, tokens: float, blocks: float,
                 old: Placement | None, levels: list[float], parts: int = 1, weight: float = 1) -> None:
        self.context = context
        self.load = load
        self.tokens = tokens
        self.blocks = blocks if weight == 1 else blocks * weight
        self.old = old
        self.parts = parts
        self.weight = weight
        self.levels = levels
        self.busy, self.wires = context.remote_load(load.groups, load.tokens)
        self.sent = [stage.sent(load.groups) for stage in context.stages]
        self.room: list[float] = [load.free[device] for device in context.workers]
        self.placement = list(context.local_placement)

    def paying(self) -> list[int]:
        """Stages of which a first group completes at some attention worker before their ranks do."""
        found: list[int] = []
        stages = self.context.stages
        for stage, level, row, sent in zip(stages, self.levels, self.wires, self.sent, strict=True):
            workers = zip(self.busy, row, stage.remote, strict=True)
            for busy, held, (_, a, b, fixed, wire, wire_fixed, shared) in workers:
                ahead = held if held >= 0.0 else fixed + wire_fixed + (sent if shared else 0.0)
                if busy + ahead + a + b * self.tokens + wire < level:
                    found.append(stage.index)
                    break
        return found

    def run(self, spread: Sequence[int], *, shortage: bool) -> Placement | None:
        """Place the stages ``spread``; the others stay at home.

        Those that lack cache go first, then those with most to gain.
        """
        stages, kv_heads, levels = self.context.stages, self.context.kv_heads * self.parts, self.levels
        if shortage:
            limits = [self._local_limits(stage) for stage in stages]
            lack = [max(0, kv_heads - sum(limit)) for limit in limits]
        else:
            limits = [[n * self.parts for n in stage.owned] for stage in stages]
            lack = [0] * len(stages)
        home = 0.0 if shortage or len(stages) == 1 else self._now()
        owed = 0.0
        if shortage:
            owed = sum(n * stage.layers * self.blocks for n, stage in zip(lack, stages, strict=True))
        for s in sorted(spread, key=lambda s: (-lack[s], -stages[s].layers * levels[s], s)):
            work = self._stage_work(stages[s], limits[s])
            filled = fill_shared(work.start, work.step, work.limit, kv_heads, work.interface)
            if filled is None:
                return self._pack(limits, lack)
            work.counts, level = filled
            most = kv_heads
            if owed:
                owed -= lack[s] * stages[s].layers * self.blocks
                room = sum(room for room in self.room if room > 0)
                most = max(lack[s], int((room - owed) / (stages[s].layers * self.blocks)))
            if len(stages) > 1 or most < kv_heads:
                self._draw_back(work, lack[s], most)
            if self.old is not None:
                _keep_in_place(self.old[stages[s].first:stages[s].last], work, level)
            self._book(work)
        return self.context.local_placement if home and self._now() >= home else tuple(self.placement)

    def _now(self) -> float:
        """F with the stages placed so far, all others at home."""
        total = 0.0
        for stage, level, row in zip(self.context.stages, self.levels, self.wires, strict=True):
            total += stage.layers * max(level, *map(add, self.busy, row))
        return total

    def _local_limits(self, stage: Stage) -> list[int]:
        unit, free = stage.layers * self.blocks, self.load.free
        old = self.old[stage.first:stage.middle] if self.old else stage.nothing
        return [max(0, min(rank.owned * self.parts, int(free[rank.device] // unit) + kept))
                for rank, kept in zip(stage.local, old, strict=False)]

    def _stage_work(self, stage: Stage, limit: list[int]) -> _Work:
        load, tokens, weight, unit = self.load, self.tokens, self.weight, stage.layers * self.blocks
        kv_heads = self.context.kv_heads * self.parts
        start: list[float] = []
        step: list[float] = []
        p = stage.first
        for _, _, a, b, fixed in stage.local:
            start.append(a * load.groups[p] + b * load.tokens[p] + fixed)
            step.append((a + b * tokens) * weight)
            p += 1
        limit = limit[:]
        opening: list[float] = []
        old = self.old[stage.middle:stage.last] if self.old else stage.nothing
        row, sent = self.wires[stage.index], self.sent[stage.index]
        for busy, held, room, kept, (_, a, b, fixed, wire, wire_fixed, shared) in zip(
                self.busy, row, self.room, old, stage.remote, strict=False):
            if held >= 0.0:
                opening.append(0.0)
                start.append(busy + held)
            else:
                opening.append(fixed)
                start.append(busy + fixed + wire_fixed + (sent if shared else 0.0))
            step.append((a + b * tokens + (0.0 if shared else wire)) * weight)
            fits = int(room // unit) + kept
            limit.append(kv_heads if fits > kv_heads else fits if fits > 0 else 0)
        return _Work(stage, start, step, limit, opening, interface_of(stage, row, weight))

    def _draw_back(self, work: _Work, least: int, most: int) -> None:
        """Take groups home from the workers while that shortens F or ``most`` are away.

        The time of the ranks rises in steps; between two steps groups come home for free, so
        F is looked at where a step ends.
        """
        away = sum(work.counts[work.first:])
        if away <= least:
            return
        best, harm = self._total(work)
        if not harm and away <= most:
            return
        kept = work.counts[:]
        while away > least:
            moved = work.bring_home(away - least)
            if not moved:
                break
            away -= moved
            total, _ = self._total(work)
            if total >= best and away + moved <= most:
                break
            best, kept = total, work.counts[:]
        work.counts = kept

    def _jobs(self, work: _Work) -> list[float]:
        """Jobs of the workers with the counts of one stage."""
        tokens, weight = self.tokens, self.weight
        workers = zip(self.busy, work.counts[work.first:], work.opening, work.stage.remote, strict=True)
        return [busy + n * weight * (remote.a + remote.b * tokens) + opening if n else busy
                for busy, n, opening, remote in workers]

    def _total(self, work: _Work) -> tuple[float, bool]:
        """F with the counts of one stage, and whether they delay another stage."""
        busy, here = self._jobs(work), work.stage.index
        worst, sent = 0.0, work.sent()
        first = work.first
        for s, n, w, held, remote in zip(work.start[first:], work.counts[first:], work.step[first:],
                                         self.wires[here], work.stage.remote, strict=True):
            if n or held >= 0.0:
                worst = max(worst, s + n * w + (sent if remote.shared else 0.0))
        total = work.stage.layers * max(worst, work.local_level())
        harm = False
        for stage, level, row in zip(self.context.stages, self.levels, self.wires, strict=True):
            if stage.index != here:
                remote = max(map(add, busy, row))
                if remote > level:
                    harm, level = True, remote
                total += stage.layers * level
        return total, harm

    def _book(self, work: _Work) -> None:
        """Write the counts of a stage down and charge the workers."""
        stage, counts = work.stage, work.counts
        self.placement[stage.first:stage.last] = counts
        self.levels[stage.index] = work.local_level()
        if not any(counts[work.first:]):
            return
        self.busy = self._jobs(work)
        row, unit = self.wires[stage.index], stage.layers * self.blocks
        old = self.old[stage.middle:stage.last] if self.old else stage.nothing
        more = work.sent()
        self.sent[stage.index] += more
        for w, (n, kept, remote) in enumerate(zip(counts[work.first:], old, stage.remote, strict=False)):
            if remote.shared:
                if n or row[w] >= 0.0:
                    row[w] = self.sent[stage.index] + remote.wire_fixed
            elif n:
                row[w] = n * self.weight * remote.wire + (row[w] if row[w] >= 0.0 else remote.wire_fixed)
            if n > kept:
                self.room[w] -= (n - kept) * unit

    def _pack(self, limits: list[list[int]], lack: list[int]) -> Placement | None:
        """Ranks as full as they can be, the rest on whichever workers have most room."""
        room: list[float] = [self.load.free[device] for device in self.context.workers]
        placement = [0] * self.context.positions
        for s in sorted(range(len(lack)), key=lambda s: (-self.context.stages[s].layers, s)):
            stage, away = self.context.stages[s], lack[s]
            unit = stage.layers * self.blocks
            home = self.context.kv_heads * self.parts - away
            for p, limit in enumerate(limits[s], stage.first):
                placement[p] = min(limit, home)
                home -= placement[p]
            for p in range(stage.middle, stage.last):
                placement[p] = min(away, self.old[p]) if self.old else 0
                away -= placement[p]
            for _ in range(away):
                w = max(range(len(room)), key=lambda w: (room[w], -w), default=-1)
                if w < 0 or room[w] < unit:
                    return None
                room[w] -= unit
                placement[stage.middle + w] += 1
        return tuple(placement)


class _Work:
    """The positions of one stage as sequences: ranks first, then attention workers."""

    __slots__ = ("counts", "first", "interface", "limit", "opening", "stage", "start", "step")

    def __init__(self, stage: Stage, start: list[float], step: list[float], limit: list[int],
                 opening: list[float], interface: Interface | None) -> None:
        self.stage = stage
        self.start = start
        self.step = step
        self.limit = limit
        self.opening = opening
        self.first = len(stage.local)
        self.interface = interface
        self.counts: list[int] = []

    def sent(self) -> float:
        """Time that the counts keep the interface busy."""
        if self.interface is None:
            return 0.0
        return self.interface.wire * sum([n for n, through in zip(self.counts, self.interface.of, strict=True)
                                          if through])

    def completion(self, i: int) -> float:
        """Completion time of the last group at a position."""
        ahead = self.sent() if self.interface is not None and self.interface.of[i] else 0.0
        return self.start[i] + self.counts[i] * self.step[i] + ahead

    def local_level(self) -> float:
        """Time of the slowest rank."""
        level = 0.0
        for s, n, w in zip(self.start[:self.first], self.counts, self.step, strict=False):
            if s + n * w > level:
                level = s + n * w
        return level

    def bring_home(self, most: int) -> int:
        """Move groups from the slowest workers to the fastest ranks, up to the end of a step.

        Returns:
            How many were moved; 0 where no rank has room.
        """
        first, counts, start, step, limit = self.first, self.counts, self.start, self.step, self.limit
        homes = [start[i] + (counts[i] + 1) * step[i] if counts[i] < limit[i] else INFINITY
                 for i in range(first)]
        # Of those behind an interface all come earlier when one group less passes it.
        ends = [self.completion(i) if counts[i] else 0.0 for i in range(first, len(counts))]
        level = self.local_level()
        moved = 0
        while moved < most:
            after = min(homes)
            if after == INFINITY or (moved and after > level):
                break
            if after > level:
                level = after
            i = homes.index(after)
            counts[i] += 1
            homes[i] = after + step[i] if counts[i] < limit[i] else INFINITY
            w = ends.index(max(ends))
            counts[first + w] -= 1
            ends[w] = ends[w] - step[first + w] if counts[first + w] else 0.0
            if self.interface is not None and self.interface.of[first + w]:
                ends = [end - self.interface.wire if end and through else end
                        for end, through in zip(ends, self.interface.of[first:], strict=True)]
            moved += 1
        return moved


def _keep_in_place(old: Sequence[int], work: _Work, level: float) -> None:
    """Shift groups back to where their cache is, as long as no position passes ``level``."""
    counts, behind = work.counts, work.interface.of if work.interface is not None else []
    for home, before in enumerate(old):
        while counts[home] < min(before, work.limit[home]):
            away = max((i for i, n in enumerate(counts) if n > old[i]), key=work.completion, default=-1)
            if away < 0:
                return
            counts[away] -= 1
            counts[home] += 1
            affected = [i for i in range(len(counts)) if behind[i]] if behind and behind[home] else [home]
            if max(work.completion(i) for i in affected if counts[i]) > level:
                counts[away] += 1
                counts[home] -= 1
                break
