"""Places many requests at once: linear program, rounding to whole KV groups, repair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hetis_sim.policies.hetis.attention import AttentionContext, Stage
from hetis_sim.policies.hetis.lp import Item, Pair, solve
from hetis_sim.policies.hetis.placing import Load
from hetis_sim.policies.plan import Placement


def place_jointly(context: AttentionContext, load: Load, items: Sequence[tuple[int, int]],
                  placed: list[Placement]) -> list[Placement]:
    """The faster of two placements of some requests: one by one (given), or by the linear program.

    Rounding follows the requests from the longest context to the shortest and carries what it
    owes to each position along, so a position ends within two groups of the longest request of its
    share in the linear program; where cache is short, repair may take it further.

    Args:
        context: the instance.
        load: load and free units without these requests.
        items: (context tokens, blocks of a group) of each request.
        placed: placements found one by one, which fit.
    """
    pairs = _useful_pairs(context, load, items, placed)
    busy = any(any(load.groups[stage.middle:stage.last]) for stage in context.stages)
    if not pairs and not busy:
        return placed
    spread = solve(context, [Item(tokens, blocks) for tokens, blocks in items], load.groups, load.tokens,
                   load.free, pairs)
    if spread is None:
        return placed
    rounded = round_spread(context, spread.groups, items, load.free)
    if rounded is None or _time(context, load, items, rounded) >= _time(context, load, items, placed):
        return placed
    return rounded


def _time(context: AttentionContext, load: Load, items: Sequence[tuple[int, int]],
          placements: Sequence[Placement]) -> float:
    trial = load.copy()
    for (tokens, blocks), placement in zip(items, placements, strict=True):
        trial.add(context, placement, tokens, blocks)
    return context.total_time(trial.groups, trial.tokens)


def _useful_pairs(context: AttentionContext, load: Load, items: Sequence[tuple[int, int]],
                  placed: Sequence[Placement]) -> set[Pair]:
    """Attention workers by stage that the one-by-one placement uses, or that could help a single stage.

    A worker delays every stage that uses it, so the program must not be made to open one that
    brings nothing.
    """
    pairs: set[Pair] = set()
    for stage in context.stages:
        for d in range(len(context.workers)):
            if any(placement[stage.middle + d] for placement in placed):
                pairs.add((stage.index, d))
    if len(context.stages) == 1:
        trial = load.copy()
        for (tokens, blocks), placement in zip(items, placed, strict=True):
            trial.add(context, placement, tokens, blocks)
        time, longest = context.stage_times(trial.groups, trial.tokens)[0], max(tokens for tokens, _ in items)
        for d, remote in enumerate(context.stages[0].remote):
            first = remote.a + remote.b * longest + remote.fixed + remote.wire + remote.wire_fixed
            if first < time:
                pairs.add((0, d))
    return pairs


def round_spread(context: AttentionContext, groups: np.ndarray[Any, np.dtype[np.float64]],
                 items: Sequence[tuple[int, int]], free: dict[int, int]) -> list[Placement] | None:
    """Whole groups near a fractional solution, within the free units; None where repair fails."""
    whole = np.zeros(groups.shape, dtype=np.int64)
    order = sorted(range(len(items)), key=lambda j: (-items[j][0], j))
    for stage in context.stages:
        limits = list(stage.owned) + [context.kv_heads] * len(stage.remote)
        carry = [0.0] * len(limits)
        for j in order:
            share = [c + x for c, x in zip(carry, groups[j, stage.first:stage.last].tolist(), strict=True)]
            counts = round_row(share, limits, context.kv_heads)
            carry = [x - n for x, n in zip(share, counts, strict=True)]
            whole[j, stage.first:stage.last] = counts
    rows: list[list[int]] = whole.tolist()
    if not _repair(context, rows, items, free):
        return None
    return [tuple(row) for row in rows]


def round_row(shares: Sequence[float], limits: Sequence[int], units: int) -> list[int]:
    """Whole numbers near ``shares``, within 0 and ``limits``, that sum to ``units``.

    Each share is rounded down; units left over go to the largest remainders.
    """
    # A hair is added so that 1.9999999 from the solver is two.
    counts = [max(0, min(limit, int(share + 1e-6))) for share, limit in zip(shares, limits, strict=True)]
    missing = units - sum(counts)
    while missing > 0:
        i = max((i for i, n in enumerate(counts) if n < limits[i]), key=lambda i: (shares[i] - counts[i], -i))
        counts[i] += 1
        missing -= 1
    while missing < 0:
        i = min((i for i, n in enumerate(counts) if n), key=lambda i: (shares[i] - counts[i], i))
        counts[i] -= 1
        missing += 1
    return counts


def _repair(context: AttentionContext, rows: list[list[int]], items: Sequence[tuple[int, int]],
            free: dict[int, int]) -> bool:
    """Move groups off devices that rounding has overfilled; False if some stays overfull."""
    room = dict(free)
    for row, (_, blocks) in zip(rows, items, strict=True):
        for position in context.plan.positions:
            room[position.device] -= row[position.index] * position.layers * blocks
    for stage in context.stages:
        devices = [rank.device for rank in stage.local] + [remote.device for remote in stage.remote]
        for offset, device in enumerate(devices):
            if room[device] < 0 and not _relieve(context, stage, offset, devices, rows, items, room):
                return False
    return all(units >= 0 or free[device] < 0 for device, units in room.items())


def _relieve(context: AttentionContext, stage: Stage, offset: int, devices: Sequence[int],
             rows: list[list[int]], items: Sequence[tuple[int, int]], room: dict[int, int]) -> bool:
    """Move the smallest groups of one position elsewhere in its stage until its device fits."""
    limits = list(stage.owned) + [context.kv_heads] * len(stage.remote)
    p, device = stage.first + offset, devices[offset]
    for j in sorted(range(len(items)), key=lambda j: (items[j][1], j)):
        unit = stage.layers * items[j][1]
        while rows[j][p] and room[device] < 0:
            targets = [i for i, other in enumerate(devices) if other != device and room[other] >= unit
                       and rows[j][stage.first + i] < limits[i]]
            if not targets:
                break
            target = max(targets, key=lambda i: (room[devices[i]], -i))
            rows[j][p] -= 1
            rows[j][stage.first + target] += 1
            room[device] += unit
            room[devices[target]] -= unit
    return room[device] >= 0 or stage is not context.stages[-1]
