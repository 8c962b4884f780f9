"""What an instance can do that serves one phase only: prompts, or decoding.

Both estimates are made of the same parts as :mod:`hetis_sim.policies.estimate`.

Decoding: no prefill holds anybody up, so a turn of the pipeline takes
``max(S * max_s D_s, sum_s (D_s + hop_s))``.

Prefill: batches of k prompts follow one another through the S stages, each stage with one batch at a time
and no more than S under way. As prompts differ in length, so do batches, and a new one enters when the
largest of S is done with its stage. That takes ``f * max_s P_s(k)`` seconds on average, with
``f = 1 + v / sqrt(k) * (1/2 + ... + 1/S)`` where v is the standard deviation of the prompts' lengths over
their mean (exact for equal and for exponential lengths), so at most ``mu = max_k k / (f * max_s P_s(k))``
are served. Arrivals queue up as at an M/G/1 server that serves single prompts at up to this rate: at
utilisation u, one in ten waits longer than ``max_s P_s(1) * (1 + v**2) / 2 * ln(10) / (1 - u)``. The rate is
``u * mu`` with the largest u at which nine in ten keep the SLO. All of this is ours; DistServe (Zhong et al.,
OSDI '24, section 3.1) has an M/D/1 server for equal prompts, and simulates the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, pstdev

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.estimate import Estimate, Estimator
from hetis_sim.policies.layers import StageLoad, split_layers
from hetis_sim.policies.memory import unit_bytes
from hetis_sim.policies.shape import InstanceShape, StageShape

LEAST_BUSY = 0.5
"""Utilisation of an instance that cannot keep the SLO; its rate is marked down for that."""


class DecodeEstimator(Estimator):
    """Estimates of instances that only decode."""

    def __init__(self, problem: PlanningProblem, reserve_fraction: float = 0.0) -> None:
        super().__init__(replace(problem, chunk_tokens=0), reserve_fraction)

    def prefill_layer_s(self, stage: StageShape) -> float:
        """Prompts are computed elsewhere."""
        return 0.0

    def _passing_layer_s(self, stage: StageShape, batch: int, stages: int) -> float:
        return 0.0

    def _turn_s(self, shape: InstanceShape, layers: Sequence[int], decode_s: list[float], hops_s: float,
                batch: int) -> float:
        return max(len(decode_s) * max(decode_s), sum(decode_s) + hops_s)


class PrefillEstimator(Estimator):
    """Estimates of instances that only prefill; ``requests`` is the size of a batch of prompts."""

    def __init__(self, problem: PlanningProblem) -> None:
        super().__init__(problem)
        self._step_tokens = problem.chunk_tokens or problem.limits.max_batch_tokens
        blocks = self.prompt / problem.limits.block_tokens + 0.5
        self.group_bytes = blocks * unit_bytes(problem.model, problem.limits)
        self.variation = pstdev(self.parts) / fmean(self.parts)
        self._prompts: dict[tuple[str, int, str, int], float] = {}

    def best(self, shape: InstanceShape, layers: Sequence[int] | None = None) -> Estimate | None:
        """The estimate with the batch of the highest rate, or None if the model does not fit."""
        most = min(max(1, self._step_tokens // self.prompt), self.problem.limits.max_batch_requests)
        found = [self._at_batch(shape, batch, layers) for batch in _batches(most)]
        return max((e for e in found if e is not None), key=lambda e: (e.value, -e.requests), default=None)

    def _at_batch(self, shape: InstanceShape, batch: int, layers: Sequence[int] | None) -> Estimate | None:
        # Twice the batches under way: as many again wait for their caches to be sent.
        held = 2 * len(shape.stages) * batch
        if layers is None:
            loads = [self._batch_load(shape, s, batch, held) for s in range(len(shape.stages))]
            layers = split_layers(loads, self.problem.model.layers, 0.0)
        if layers is None or not self._fits(shape, layers, held):
            return None
        late = 1.0 + self.variation / math.sqrt(batch) * sum(1.0 / s for s in range(2, len(layers) + 1))
        most = batch / (late * max(self._stage_times(shape, batch, layers)))
        path, limit = self.path_s(shape, layers), self.problem.slo.ttft_s
        wait = max(self._stage_times(shape, 1, layers)) * (1.0 + self.variation**2) / 2.0 * math.log(10.0)
        busy = max(LEAST_BUSY, 1.0 - wait / (limit - path)) if path < limit else LEAST_BUSY
        penalty = max(1.0, (path + wait / (1.0 - busy)) / limit - 1e-9)
        return Estimate(tuple(layers), busy * most, batch, 0.0, path, penalty)

    def path_s(self, shape: InstanceShape, layers: Sequence[int], batch: int = 1) -> float:
        """Way of a batch of mean prompts through the idle pipeline."""
        hops = sum(self._hop_s(stage, batch * self.prompt) for stage in shape.stages)
        return hops + sum(self._stage_times(shape, batch, layers))

    def tokens_per_s(self, shape: InstanceShape, layers: Sequence[int]) -> float:
        """Prompt tokens that pass through the slowest stage, one mean prompt after the other."""
        return self.prompt / max(self._stage_times(shape, 1, layers))

    def _stage_times(self, shape: InstanceShape, batch: int, layers: Sequence[int]) -> list[float]:
        return [n * self._batch_layer_s(stage, batch) + self._stage_fixed_s(shape, s, batch, batch)
                for s, (stage, n) in enumerate(zip(shape.stages, layers, strict=True))]

    def _batch_load(self, shape: InstanceShape, s: int, batch: int, held: int) -> StageLoad:
        stage = shape.stages[s]
        cache = [self.group_bytes * owned * held for owned in stage.owned]
        rows = zip(ranks(stage), cache, strict=True)
        local = min(room / (weights + kept) for (room, weights, _), kept in rows)
        return StageLoad(self._stage_fixed_s(shape, s, batch, batch), self._batch_layer_s(stage, batch), 0.0,
                         local, local, sum(stage.layer_bytes) + sum(cache))

    def _fits(self, shape: InstanceShape, layers: Sequence[int], held: int) -> bool:
        return all(room >= n * (weights + self.group_bytes * owned * held)
                   for stage, n in zip(shape.stages, layers, strict=True)
                   for room, weights, owned in ranks(stage))

    def _batch_layer_s(self, stage: StageShape, batch: int) -> float:
        """One layer for a batch of mean prompts; beyond the token budget of a step, so many steps."""
        key = (stage.gpu.name, stage.tp, stage.link.name if stage.link else "", batch)
        found = self._prompts.get(key)
        if found is None:
            model, tokens = self.problem.model, batch * self.prompt
            step = min(tokens, self._step_tokens)
            heads = max(stage.owned) * model.heads_per_group
            attention = self.problem.cost.prefill_attention_layer_s(stage.gpu, model, heads, self.prompt, 0)
            found = self._prompts[key] = self._tokens_layer_s(stage, step) * tokens / step + batch * attention
        return found


def _batches(most: int) -> list[int]:
    """Powers of two up to ``most``, and itself."""
    return sorted({most, *(1 << n for n in range(most.bit_length()))})


def ranks(stage: StageShape) -> zip[tuple[int, int, int]]:
    """(bytes for layers and cache, weights of a layer, KV groups) of each rank of a stage."""
    return zip(stage.room_bytes, stage.layer_bytes, stage.owned, strict=True)
