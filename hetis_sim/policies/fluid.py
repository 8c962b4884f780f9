"""Decode attention in steady state, with heads as a divisible load.

A quick stand-in for the dispatcher while layouts are compared: it offloads what does not fit,
and more as long as all stages together gain by it.
"""

from __future__ import annotations

from collections.abc import Sequence

from hetis_sim.policies.shape import InstanceShape, StageShape
from hetis_sim.policies.view import PositionCost

LEVELS = 8


def attention_times(shape: InstanceShape, layers: Sequence[int], requests: int, context: float,
                    group_bytes: float) -> list[float] | None:
    """Seconds of decode attention of one layer, for each stage; None where the cache does not fit.

    Args:
        shape: the instance.
        layers: of each stage.
        requests: in flight, over all micro-batches (one for each stage).
        context: tokens of a request.
        group_bytes: cache of one KV group of one request in one layer.
    """
    lanes = len(shape.stages)
    limits, away = [], []
    for stage, n in zip(shape.stages, layers, strict=True):
        rooms = [max(0.0, room - n * weights) / (n * group_bytes)
                 for room, weights in zip(stage.room_bytes, stage.layer_bytes, strict=True)]
        limit = [min(float(owned * requests), room) for owned, room in zip(stage.owned, rooms, strict=True)]
        limits.append([x / lanes for x in limit])
        away.append(max(0.0, sum(stage.owned) * requests - sum(limit)) / lanes)
    needed = sum(y * lanes * n * group_bytes for y, n in zip(away, layers, strict=True))
    if needed > shape.worker_bytes * (1.0 + 1e-9):
        return None
    load = [sum(stage.owned) * requests / lanes for stage in shape.stages]
    best = _times(shape, load, away, limits, context)
    if not shape.workers:
        return best
    spare = (shape.worker_bytes - needed) / (lanes * group_bytes)
    worst = max(best)
    for step in range(1, LEVELS):
        level = worst * (1.0 - step / LEVELS)
        more = [max(y, g - _held(stage, limit, level, context))
                for stage, y, g, limit in zip(shape.stages, away, load, limits, strict=True)]
        if sum((m - y) * n for m, y, n in zip(more, away, layers, strict=True)) > spare:
            break
        times = _times(shape, load, more, limits, context)
        if _total(times, layers) < _total(best, layers):
            best = times
    return best


def _total(times: Sequence[float], layers: Sequence[int]) -> float:
    return sum(time * n for time, n in zip(times, layers, strict=True))


def _slope(cost: PositionCost, context: float) -> float:
    """Seconds of one KV group of one request, its wire left out."""
    return cost.a_s_per_group + cost.b_s_per_group_token * context


def _held(stage: StageShape, limits: Sequence[float], level: float, context: float) -> float:
    """Groups that the ranks of a stage finish by ``level``."""
    slope = _slope(stage.home, context)
    return sum(min(limit, max(0.0, level - stage.home.c_s) / slope) for limit in limits)


def _times(shape: InstanceShape, load: Sequence[float], away: Sequence[float],
           limits: Sequence[Sequence[float]], context: float) -> list[float]:
    """Attention time of each stage with ``away`` groups at the workers, which serve all in turn."""
    jobs = 0.0
    wires: list[float] = []
    for stage, y in zip(shape.stages, away, strict=True):
        wire = 0.0
        if y > 0:
            rate = sum(n / _slope(cost, context) for n, cost in stage.away)
            jobs += max(cost.c_s for _, cost in stage.away) + y / rate
            share = y / sum(n for n, _ in stage.away)
            wire = max(cost.wire_fixed_s + cost.wire_s_per_group * share for _, cost in stage.away)
        wires.append(wire)
    times: list[float] = []
    for stage, g, y, wire, limit in zip(shape.stages, load, away, wires, limits, strict=True):
        local = stage.home.c_s + _slope(stage.home, context) * _level(limit, g - y)
        times.append(max(local, wire + jobs) if y > 0 else local)
    return times


def _level(limits: Sequence[float], amount: float) -> float:
    """The height to which ``amount`` fills vessels with these limits."""
    height, left = 0.0, amount
    ordered = sorted(limits)
    for i, limit in enumerate(ordered):
        width = len(ordered) - i
        if (limit - height) * width >= left:
            return height + left / width
        left -= (limit - height) * width
        height = limit
    return height
