"""A relaxed cost of many layouts at once: fractional groups, divisible layers.

Every candidate is a number of instances and a tensor-parallel degree for each type of GPU.
The relaxation treats all instances as equal, gives each its share of every type's groups even
if that is no whole number, and splits the layers as a continuum; costs per layer are those of the
estimator. It only ranks candidates, the estimator decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.estimate import Estimator
from hetis_sim.policies.layout import GpuType
from hetis_sim.policies.shape import instance_shape, worker_bytes

Array = np.ndarray[Any, np.dtype[np.float64]]

BATCH_SHARES = (1.0, 0.85, 0.7, 0.57, 0.46, 0.36, 0.28, 0.2, 0.13, 0.07, 0.03)
SLACK = (1.0, 1.2, 1.6)
NEWTON_STEPS = 8


class Relaxation:
    """Ranks candidates; tables of costs per layer are kept between calls."""

    def __init__(self, problem: PlanningProblem, estimator: Estimator) -> None:
        self._problem = problem
        self._estimator = estimator
        self._tables: dict[tuple[str, int], tuple[Array, float, float]] = {}
        batches = range(problem.limits.max_batch_requests + 1)
        self._fixed_s = np.array([problem.cost.host_overhead_s(batch) for batch in batches])

    def ranked(self, primaries: Sequence[GpuType], workers: Sequence[GpuType],
               options: Sequence[Sequence[int]], counts: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
        """(instances, degree of each type) by falling relaxed throughput, infeasible ones left out."""
        most = self._problem.limits.max_batch_requests
        # Rows (type, option, batch) of seconds per layer; groups and their room by (type, option).
        width = max(len(option) for option in options)
        layer_s = np.full((len(primaries), width, most + 1), np.inf)
        groups, room, prompt_s = (np.zeros((len(primaries), width)) for _ in range(3))
        for t, (kind, option) in enumerate(zip(primaries, options, strict=True)):
            for o, tp in enumerate(option):
                layer_s[t, o], prompt_s[t, o], room[t, o] = self._table(kind, tp)
                groups[t, o] = len(kind.devices) / tp
        chosen = np.array(list(product(*(range(len(option)) for option in options))))
        spare = worker_bytes(self._problem, [d for kind in workers for d in kind.devices])
        scored: list[tuple[float, int, tuple[int, ...]]] = []
        for count in counts:
            tables = (layer_s, prompt_s, groups / count, room)
            values = self._throughputs(count, chosen, tables, spare / count)
            for row in np.flatnonzero(values > 0.0):
                degrees = tuple(option[o] for option, o in zip(options, chosen[row], strict=True))
                scored.append((-float(values[row]), count, degrees))
        scored.sort()
        return [(count, degrees) for _, count, degrees in scored]

    def _table(self, kind: GpuType, tp: int) -> tuple[Array, float, float]:
        """Of one group: seconds of one layer by batch and for a prompt, and bytes for layers and cache."""
        key = (kind.name, tp)
        if key not in self._tables:
            group = next(host[:tp] for host in kind.hosts if len(host) >= tp)
            stage = instance_shape(self._problem, [group]).stages[0]
            batches = _grid(self._problem.limits.max_batch_requests)
            seconds = [self._estimator.turn_layer_s(stage, batch) for batch in batches]
            table = np.interp(np.arange(self._problem.limits.max_batch_requests + 1), batches, seconds)
            self._tables[key] = (table, self._estimator.passing_layer_s(stage), float(sum(stage.room_bytes)))
        return self._tables[key]

    def _throughputs(self, count: int, chosen: Any, tables: tuple[Array, Array, Array, Array],
                     spare: float) -> Array:
        """Requests per second of each row of ``chosen`` with ``count`` instances; 0 where infeasible."""
        model, estimator = self._problem.model, self._estimator
        layer_s, prompt_s, groups, room = tables
        types = np.arange(chosen.shape[1])
        share = groups[types, chosen]
        stages = share.sum(axis=1)
        each = room[types, chosen]
        weights, request = model.layer_bytes, estimator.group_bytes * model.kv_heads
        held = ((share * each).sum(axis=1) + spare - model.layers * weights) / (model.layers * request)
        best = np.zeros(len(chosen))
        for fraction in BATCH_SHARES:
            requests = np.maximum(held * fraction, 0.0)
            lane = np.clip(requests / stages, 1.0, self._problem.limits.max_batch_requests)
            requests = np.minimum(requests, lane * stages)
            speed = 1.0 / layer_s[types, chosen, lane.astype(int)[:, None]]
            layer = weights + requests * request
            level = _fill(share, speed, each / layer[:, None], each / weights, model.layers, spare / layer)
            # A stage has one layer at least.
            level = np.maximum(level, (1.0 / speed).max(axis=1, where=share > 0.0, initial=0.0))
            for slack in SLACK:
                path = _path(share, slack * level[:, None] * speed, prompt_s[types, chosen], model.layers)
                cycle = np.maximum(stages, 1.0) * slack * level + self._fixed_s[lane.astype(int)]
                cycle = self._with_prefills(cycle, path, np.maximum(stages, 1.0), lane / estimator.output)
                penalty = np.maximum(1.0, cycle / self._problem.slo.tpot_s)
                value = np.where((requests >= 1.0) & np.isfinite(cycle),
                                 count * requests / (estimator.output * cycle * penalty**2), 0.0)
                best = np.maximum(best, value)
        return best


    def _with_prefills(self, turn_s: Array, path_s: Array, stages: Array, prompts: Array) -> Array:
        """Time per token where ``prompts`` a pass take ``path_s``; a coarse form of the estimator's turn."""
        if self._estimator.ideal_pipeline:
            return turn_s
        if self._problem.chunk_tokens:
            share = np.minimum(prompts, 1.0)
            return turn_s + stages * share * path_s / (1.0 + share * (stages - 1.0))
        share = prompts / (1.0 + prompts)
        longer = stages * share * np.maximum(path_s - turn_s, 0.0) / (1.0 + share * (stages - 1.0))
        return (turn_s + longer) / (1.0 - share)


def _path(share: Array, most: Array, prompt_s: Array, layers: int) -> Array:
    """Time of a prompt's way when types, the fastest first, take up to ``most`` layers a group."""
    left = np.full(len(share), float(layers))
    total = np.zeros(len(share))
    for t in range(share.shape[1]):
        taken = np.minimum(left, share[:, t] * most[:, t])
        total += taken * prompt_s[:, t]
        left = left - taken
    return total


def _grid(most: int) -> list[int]:
    """Batches at which costs are asked for: all small ones, then every eighth."""
    return sorted({*range(1, min(most, 16) + 1), *range(16, most + 1, 8), most})


def _fill(share: Array, speed: Array, local: Array, hard: Array, layers: int, spare: Array) -> Array:
    """Time of the slowest stage for divisible layers; infinite where they do not fit.

    Rows are candidates, columns types: ``share`` groups of ``speed`` layers a second, ``local``
    layers fit a group with their cache, ``hard`` without; ``spare`` layers more on attention workers.
    """
    level = layers / (share * speed).sum(axis=1)
    for _ in range(NEWTON_STEPS):
        wanted = level[:, None] * speed
        inside = (share * np.minimum(wanted, local)).sum(axis=1)
        beyond = (share * np.minimum(wanted, hard)).sum(axis=1) - inside
        missing = layers - inside - np.minimum(beyond, spare)
        rate = (share * speed * (wanted < local)).sum(axis=1)
        stretch = (share * speed * ((wanted >= local) & (wanted < hard))).sum(axis=1)
        rate += np.where(beyond < spare, stretch, 0.0)
        open_ = (missing > 1e-6 * layers) & (rate > 0.0)
        if not open_.any():
            break
        level = level + np.divide(missing, rate, out=np.zeros(len(level)), where=open_)
    return np.where(missing <= 1e-3 * layers, level, np.inf)
