"""Fills positions with the KV groups of one request, in the order in which they complete."""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

from hetis_sim.policies.hetis.attention import Stage

INFINITY = math.inf
BULK_GROUPS = 16


def divisible_level(start: Sequence[float], step: Sequence[float], units: float) -> float:
    """The common level of the lines ``start[i] + x[i]*step[i]`` when a divisible load fills them up."""
    rate = amount = 0.0
    level = INFINITY
    for s, w in sorted(zip(start, step, strict=True)):
        if s >= level:
            break
        rate += 1.0 / w
        amount += s / w
        level = (units + amount) / rate
    return level


def fill(start: list[float], step: list[float], limit: list[int],
         units: int) -> tuple[list[int], float] | None:
    """The ``units`` smallest of the numbers ``start[i] + k*step[i]``, k = 1..limit[i].

    Returns:
        How many were taken for each i and the largest of them, or None if there are too few.
    """
    counts = _bulk(start, step, limit, units) if units > BULK_GROUPS else [0] * len(start)
    following = [start[i] + (n + 1) * step[i] if n < limit[i] else INFINITY for i, n in enumerate(counts)]
    level = max((start[i] + n * step[i] for i, n in enumerate(counts) if n), default=0.0)
    for _ in range(units - sum(counts)):
        level = min(following)
        if level == INFINITY:
            return None
        i = following.index(level)
        counts[i] += 1
        following[i] = start[i] + (counts[i] + 1) * step[i] if counts[i] < limit[i] else INFINITY
    return counts, level


class Interface(NamedTuple):
    """A network interface that some positions of a stage share.

    ``of`` says of each position whether it does, ``held`` whether it has load that waits for the interface
    too, and ``wire`` is the time of one group at any of them.
    """

    of: list[bool]
    held: list[bool]
    wire: float


def interface_of(stage: Stage, row: Sequence[float], weight: float = 1) -> Interface | None:
    """The interface of a stage, None without one; ``row`` has the wire times of its workers."""
    if not stage.shared:
        return None
    ranks = [False] * len(stage.local)
    held = [remote.shared and wire >= 0.0 for remote, wire in zip(stage.remote, row, strict=True)]
    return Interface(ranks + [remote.shared for remote in stage.remote], ranks + held,
                     stage.shared_wire * weight)


def fill_shared(start: list[float], step: list[float], limit: list[int], units: int,
                interface: Interface | None) -> tuple[list[int], float] | None:
    """As :func:`fill`, where positions behind an interface also wait for all groups that pass it.

    With m groups behind the interface, the other positions have the ``units - m`` smallest numbers of theirs;
    those behind it have the m smallest of theirs, and m times the wire on top. The first level
    falls with m and the second rises, so the best m is found on the way to where they cross.
    """
    if interface is None:
        return fill(start, step, limit, units)
    behind, held, wire = interface
    own = [0 if through else n for through, n in zip(behind, limit, strict=True)]
    m = max(0, units - sum(own))
    rest = fill(start, step, own, units - m)
    sent = fill(start, step, [n if through else 0 for through, n in zip(behind, limit, strict=True)], m)
    if rest is None or sent is None:
        return None
    counts, level = [a + b for a, b in zip(rest[0], sent[0], strict=True)], rest[1]
    loaded = max([s for s, there in zip(start, held, strict=True) if there], default=0.0)
    inner = max(sent[1], loaded)
    best, chosen = max(level, inner + m * wire if m else 0.0), counts[:]
    following = [(start[i] + (n + 1) * step[i], i) for i, n in enumerate(counts)
                 if behind[i] and n < limit[i]]
    reached = [(start[i] + n * step[i], -i) for i, n in enumerate(counts) if n and not behind[i]]
    heapify(following)
    last = max(reached, default=None)
    while m < units and following and last is not None:
        end, i = following[0]
        inner, m = max(inner, end), m + 1
        if inner + m * wire >= level:
            break
        # The other positions give up the group that completes last, and one behind the interface takes it.
        counts[i] += 1
        if counts[i] < limit[i]:
            heapreplace(following, (start[i] + (counts[i] + 1) * step[i], i))
        else:
            heappop(following)
        reached.remove(last)
        i = -last[1]
        counts[i] -= 1
        if counts[i]:
            reached.append((start[i] + counts[i] * step[i], -i))
        last = max(reached, default=None)
        level = last[0] if last is not None else 0.0
        if max(level, inner + m * wire) < best:
            best, chosen = max(level, inner + m * wire), counts[:]
    return chosen, best


def _bulk(start: list[float], step: list[float], limit: list[int], units: int) -> list[int]:
    """Numbers that are certainly among the smallest: those below the level of a divisible load.

    Without limits and roundings the divisible load fills every position up to one level,
    which cannot be above the level in whole groups.
    """
    level = divisible_level(start, step, units)
    # One group less than the level allows, against rounding of the division.
    return [max(0, min(n, int((level - s) / w) - 1)) for s, w, n in zip(start, step, limit, strict=True)]
