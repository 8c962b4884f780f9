"""What an instance can do in steady state: the figures by which layouts are compared.

The model (ours; the paper does not give its cost function): requests of P prompt and O output tokens on
average keep the S micro-batches of an instance full with b requests each. Let D_s be the time that stage s
is busy with an iteration of b requests: dense modules, two all-reduces a layer, decode attention split over
ranks and attention workers, the LM head, the host's overhead. Passes of micro-batches through the pipeline
follow each other every t seconds (:mod:`hetis_sim.policies.passes`), which is ``max(max_s D_s,
sum_s (D_s + hop_s) / S)`` where all of them only decode, and more with prefills:

- Where whole prompts go first, a share q of the passes computes the prompts that wait, and no tokens
  meanwhile. A request has a token every ``T = S * t / (1 - q)`` seconds.
- With chunked prefill, a share q of the passes carries pieces of prompts beside the decoding. ``T = S * t``.

Prompts of different lengths count as they are (``prompt_parts`` of the problem): a short one takes no less
than the weights take to be read, so that the mean of the times is not the time of the mean.
``ideal_pipeline`` leaves out what prefills do to other micro-batches, as if they passed without
holding anybody up: ``T = S * max_s (D_s + q / (1 - q) * P_s)`` with P_s for the prompts of a pass at stage s.

A request takes O*T, and the instance serves S*b / (O*T) requests a second. b is the largest batch
that the cache holds at the mean context of the requests under way, that the engine allows and that keeps T,
the time per output token, within its SLO.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.fluid import attention_times
from hetis_sim.policies.layers import StageLoad, split_layers
from hetis_sim.policies.memory import unit_bytes
from hetis_sim.policies.passes import Array, arrivals_per_pass, mean_pass_s
from hetis_sim.policies.shape import InstanceShape, StageShape

BATCH_STEPS = 12
SMALLER = 0.85


@dataclass(frozen=True, slots=True)
class Estimate:
    """Figures of one instance in steady state.

    Attributes:
        layers: of each stage.
        requests_per_s: throughput.
        requests: in flight.
        tpot_s: time per output token, prefills of others included.
        prefill_s: a mean prompt's way through the idle pipeline.
        penalty: how far the SLO is missed, as a factor; 1 where it is held.
    """

    layers: tuple[int, ...]
    requests_per_s: float
    requests: int
    tpot_s: float
    prefill_s: float
    penalty: float

    @property
    def value(self) -> float:
        """Requests per second, marked down by the square of the factor by which the SLO is missed.

        The square outweighs what the larger batch behind the miss brings in throughput.
        """
        return self.requests_per_s / self.penalty**2


def _better(found: Estimate | None, best: Estimate | None) -> Estimate | None:
    """Of two estimates the one that holds the SLO, or else that of higher value."""
    if found is None or best is None:
        return found or best
    ahead = (found.penalty <= 1.0, found.value) > (best.penalty <= 1.0, best.value)
    return found if ahead else best


class Pieces(NamedTuple):
    """Kinds of pieces of prompts that go along with a decode batch.

    Attributes:
        tokens, before: of each kind, and tokens of the prompt that come before it.
        shares: of the passes that carry each kind.
        excess: prompt tokens that arrive over those that can be computed, where that is more than 1.
    """

    tokens: Array
    before: Array
    shares: Array
    excess: float


class Estimator:
    """Estimates for one planning problem; remembers what it has worked out.

    Args:
        problem: cluster, model, costs and workload.
        reserve_fraction: share of the cache that admission leaves free.
        ideal_pipeline: leave out the bubbles that prefills make.
    """

    def __init__(self, problem: PlanningProblem, reserve_fraction: float = 0.0, *,
                 ideal_pipeline: bool = False) -> None:
        self.problem = problem
        self.ideal_pipeline = ideal_pipeline
        self.prompt = max(1, round(problem.prompt_tokens))
        self.output = max(1.0, problem.output_tokens)
        self.parts = [max(1, round(part)) for part in problem.prompt_parts] or [self.prompt]
        self.context = problem.context_tokens or self.prompt + self.output / 2
        blocks = self.context / problem.limits.block_tokens + 0.5
        # Bytes of one KV group of one request in one layer, with its share of the reserve.
        self.group_bytes = blocks * unit_bytes(problem.model, problem.limits) / (1.0 - reserve_fraction)
        self._decode: dict[tuple[str, int, str, int], float] = {}
        self._prefill: dict[tuple[str, int, str], float] = {}
        self._passes: dict[tuple[str, int, str, float], Array] = {}
        self._cut: dict[int, Pieces] = {}

    def best(self, shape: InstanceShape, layers: Sequence[int] | None = None) -> Estimate | None:
        """The estimate at the best batch, with the best layers unless they are given; None if nothing fits.

        Batches are tried from the largest that memory could hold downwards, until one fits and holds the SLO;
        then between it and the last that does not, to within a tenth; then downwards again, as long as the
        estimate gets better.
        """
        batch, above = self.largest_batch(shape), 0
        best: Estimate | None = None
        for _ in range(BATCH_STEPS):
            found = self._with_requests(shape, batch, layers)
            best = _better(found, best)
            if batch <= 1 or (found is not None and found.penalty <= 1.0):
                break
            above = batch
            shrink = SMALLER if found is None else min(0.95, max(0.3, 1.0 / found.penalty))
            batch = max(1, min(batch - 1, int(batch * shrink)))
        if best is None or best.penalty > 1.0:
            return best
        while above > 1.1 * batch + 1.0:
            middle = round(math.sqrt(batch * above))
            found = self._with_requests(shape, middle, layers)
            if found is not None and found.penalty <= 1.0:
                batch, best = middle, max(best, found, key=lambda estimate: estimate.value)
            else:
                above = middle
        return self._downwards(shape, layers, best)

    def _downwards(self, shape: InstanceShape, layers: Sequence[int] | None, best: Estimate) -> Estimate:
        """A better estimate with a smaller batch, if there is one."""
        while best.requests > 1:
            found = self._with_requests(shape, int(best.requests * SMALLER), layers)
            if found is None or found.value <= best.value:
                break
            best = found
        return best

    def _with_requests(self, shape: InstanceShape, batch: int,
                       layers: Sequence[int] | None) -> Estimate | None:
        lane = max(1, batch // len(shape.stages))
        return self.at(shape, lane, min(batch, lane * len(shape.stages)), layers)

    def largest_batch(self, shape: InstanceShape) -> int:
        """Requests that memory could hold if it could be split at will, within the engine's limit."""
        room = sum(sum(stage.room_bytes) for stage in shape.stages) + shape.worker_bytes
        model = self.problem.model
        weights = sum(shape.stages[0].layer_bytes) * model.layers
        request = self.group_bytes * model.kv_heads * model.layers
        most = len(shape.stages) * self.problem.limits.max_batch_requests
        return max(1, min(most, int((room - weights) / request)))

    def at(self, shape: InstanceShape, lane_batch: int, requests: int,
           layers: Sequence[int] | None = None) -> Estimate | None:
        """The estimate for ``requests`` in flight, ``lane_batch`` a micro-batch; None if they do not fit."""
        loads = [self._stage_load(shape, s, lane_batch, requests) for s in range(len(shape.stages))]
        if layers is None:
            layers = split_layers(loads, self.problem.model.layers, shape.worker_bytes)
        if layers is None:
            return None
        attention = attention_times(shape, layers, requests, self.context, self.group_bytes)
        if attention is None:
            return None
        return self._estimate(shape, tuple(layers), attention, lane_batch, requests)

    def _stage_load(self, shape: InstanceShape, s: int, batch: int, requests: int) -> StageLoad:
        """Time and memory of one more layer of a stage, all heads at home."""
        stage = shape.stages[s]
        home = stage.home.seconds(max(stage.owned) * batch, max(stage.owned) * batch * self.context)
        layer = self.decode_layer_s(stage, batch) + home
        passing = 0.0
        if self.ideal_pipeline:
            layer += self._whole_layer_s(stage, batch)
        else:
            passing = self._passing_layer_s(stage, batch, len(shape.stages))
        cache = [self.group_bytes * owned * requests for owned in stage.owned]
        local = min(room / (weights + held) for room, weights, held
                    in zip(stage.room_bytes, stage.layer_bytes, cache, strict=True))
        hard = min(room / weights for room, weights in zip(stage.room_bytes, stage.layer_bytes, strict=True))
        return StageLoad(self._stage_fixed_s(shape, s, batch), layer, passing, local, hard,
                         sum(stage.layer_bytes) + sum(cache))

    def _passing_layer_s(self, stage: StageShape, batch: int, stages: int) -> float:
        """What a layer's part in prefills adds to the time between passes, if prefills hold up everybody."""
        if self.problem.chunk_tokens:
            pieces = self._pieces(batch)
            share = float(pieces.shares.sum())
            added = pieces.shares @ self.pieces_layer_s(stage, batch, pieces)
            return float(added) / (1.0 + share * (stages - 1))
        return self._whole_layer_s(stage, batch)

    def _whole_layer_s(self, stage: StageShape, batch: int) -> float:
        """One layer of the passes that prefill whole prompts, for each pass that decodes."""
        together, share = self._prompts_together(batch)
        return share / (1.0 - share) * float(self.prompts_layer_s(stage, together).mean())

    def _stage_fixed_s(self, shape: InstanceShape, s: int, batch: int, prompts: int = 0) -> float:
        """Time of a stage in an iteration that does not depend on its layers: the host's, and the LM head."""
        cost, model, stage = self.problem.cost, self.problem.model, shape.stages[s]
        fixed = cost.host_overhead_s(batch, prompts) if s == 0 else 0.0
        if s == len(shape.stages) - 1:
            fixed += cost.head_s(stage.gpu, model, batch, stage.tp)
        return fixed

    def _estimate(self, shape: InstanceShape, layers: tuple[int, ...], attention: Sequence[float],
                  batch: int, requests: int) -> Estimate:
        decode: list[float] = []
        hops = prefill = 0.0
        for s, stage in enumerate(shape.stages):
            busy = layers[s] * (self.decode_layer_s(stage, batch) + attention[s])
            prompt = layers[s] * self.prefill_layer_s(stage) + self._stage_fixed_s(shape, s, 1, 1)
            decode.append(busy + self._stage_fixed_s(shape, s, batch))
            if self.ideal_pipeline:
                together, share = self._prompts_together(batch)
                fixed = self._stage_fixed_s(shape, s, round(together), round(together))
                decode[s] += layers[s] * self._whole_layer_s(stage, batch) + share / (1.0 - share) * fixed
            hops += self._hop_s(stage, batch)
            prefill += prompt + self._hop_s(stage, self.prompt)
        if self.ideal_pipeline:
            turn = max(len(decode) * max(decode), sum(decode) + hops)
        else:
            turn = self._turn_s(shape, layers, decode, hops, batch)
        slo = self.problem.slo
        penalty = max(1.0, turn / slo.tpot_s, prefill / slo.ttft_s)
        return Estimate(layers, requests / (self.output * turn), requests, turn, prefill, penalty)

    def _turn_s(self, shape: InstanceShape, layers: Sequence[int], decode_s: list[float], hops_s: float,
                batch: int) -> float:
        """Mean time from one token of a request to the next, given those of passes that only decode."""
        if self.problem.chunk_tokens:
            return self._mixed_turn_s(shape, layers, decode_s, hops_s, batch)
        together, share = self._prompts_together(batch)
        number = round(together)
        prompts = [n * self.prompts_layer_s(stage, together) + self._stage_fixed_s(shape, s, number, number)
                   for s, (stage, n) in enumerate(zip(shape.stages, layers, strict=True))]
        hops = sum(self._hop_s(stage, round(together * self.prompt)) for stage in shape.stages)
        shares = np.full(len(self.parts), share / len(self.parts))
        return len(decode_s) * mean_pass_s(decode_s, hops_s, prompts, hops, shares) / (1.0 - share)

    def _mixed_turn_s(self, shape: InstanceShape, layers: Sequence[int], decode_s: list[float], hops_s: float,
                      batch: int) -> float:
        pieces = self._pieces(batch)
        mixed = [own + n * self.pieces_layer_s(stage, batch, pieces)
                 for own, n, stage in zip(decode_s, layers, shape.stages, strict=True)]
        token_s = sum(self._hop_s(stage, 1) - self._hop_s(stage, 0) for stage in shape.stages)
        hops = hops_s + token_s * pieces.tokens
        return len(decode_s) * mean_pass_s(decode_s, hops_s, mixed, hops, pieces.shares) * pieces.excess

    def _prompts_together(self, batch: int) -> tuple[float, float]:
        """How many prompts a pass computes that computes any, and the share of these passes.

        All that wait are taken, up to the token budget.
        """
        most = max(1.0, self.problem.limits.max_batch_tokens / self.prompt)
        arrivals = arrivals_per_pass(batch / self.output)
        share = -math.expm1(-arrivals)
        if arrivals <= most * share:
            return arrivals / share, share
        return most, batch / (batch + most * self.output)

    def _pieces(self, batch: int) -> Pieces:
        """The pieces into which prompts are cut beside ``batch`` decoding requests."""
        found = self._cut.get(batch)
        if found is not None:
            return found
        budget, prompts = max(1, self.problem.chunk_tokens - batch), batch / self.output
        parts = np.array(self.parts)
        full, rest = np.divmod(parts, budget)
        excess = max(1.0, prompts * float(parts.mean()) / budget)
        filled = min(1.0, prompts * float(full.mean()))
        # Rests of several prompts go together where they arrive within one pass.
        some = float((rest > 0).mean())
        share = -math.expm1(-prompts * some) * (1.0 - filled)
        joined = 1.0 if share <= 0.0 else min(budget / max(1.0, float(rest.max())), prompts * some / share)
        tokens = np.maximum(1.0, np.append(np.minimum(rest * max(1.0, joined), budget), budget)).round()
        before = np.append(full * budget, max(0.0, float((full * (full - 1)).sum()) / 2.0 * budget
                                              / max(1.0, float(full.sum()))))
        shares = np.append(share * (rest > 0) / max(1.0, float((rest > 0).sum())), filled)
        found = self._cut[batch] = Pieces(tokens, before, shares, excess)
        return found

    def turn_layer_s(self, stage: StageShape, batch: int) -> float:
        """One layer's part of the slowest step, all heads at home; for rankings."""
        home = stage.home.seconds(max(stage.owned) * batch, max(stage.owned) * batch * self.context)
        layer = self.decode_layer_s(stage, batch) + home
        return layer + self._whole_layer_s(stage, batch) if self.ideal_pipeline else layer

    def passing_layer_s(self, stage: StageShape) -> float:
        """One layer's part of what a prompt adds to a turn; for rankings."""
        if self.ideal_pipeline:
            return 0.0
        if not self.problem.chunk_tokens:
            return float(self.prompts_layer_s(stage, 1.0).mean())
        batch = min(64, self.problem.limits.max_batch_requests)
        pieces = self._pieces(batch)
        added = float(pieces.shares @ self.pieces_layer_s(stage, batch, pieces))
        return added * self.output / batch

    def decode_layer_s(self, stage: StageShape, batch: int) -> float:
        """Dense work and collectives of one layer for an iteration of ``batch`` requests."""
        key = (stage.gpu.name, stage.tp, stage.link.name if stage.link else "", batch)
        found = self._decode.get(key)
        if found is None:
            found = self._decode[key] = self._tokens_layer_s(stage, batch)
        return found

    def prefill_layer_s(self, stage: StageShape) -> float:
        """One layer of a mean prompt's prefill."""
        key = (stage.gpu.name, stage.tp, stage.link.name if stage.link else "")
        found = self._prefill.get(key)
        if found is None:
            found = self._long_step_s(stage, self.prompt) + self._prompt_attention_s(stage, self.prompt)
            self._prefill[key] = found
        return found

    def prompts_layer_s(self, stage: StageShape, together: float) -> Array:
        """One layer of a pass that computes ``together`` prompts: one of each part, the others mean.

        Between quarters of a prompt it is interpolated.
        """
        below = math.floor(4.0 * together) / 4.0
        if below == together:
            return self._prompts_layer_s(stage, together)
        upper = 4.0 * (together - below)
        return ((1.0 - upper) * self._prompts_layer_s(stage, below)
                + upper * self._prompts_layer_s(stage, below + 0.25))

    def _prompts_layer_s(self, stage: StageShape, together: float) -> Array:
        key = (stage.gpu.name, stage.tp, stage.link.name if stage.link else "", together)
        found = self._passes.get(key)
        if found is None:
            others = (together - 1.0) * self.prompt
            alone = [self._prompt_attention_s(stage, part) for part in self.parts]
            more = (together - 1.0) * sum(alone) / len(alone)
            dense = [self._long_step_s(stage, part + others) for part in self.parts]
            found = self._passes[key] = np.array(dense) + np.array(alone) + more
        return found

    def pieces_layer_s(self, stage: StageShape, batch: int, pieces: Pieces) -> Array:
        """What pieces of prompts add to one layer of an iteration of ``batch`` requests."""
        heads, model = max(stage.owned) * self.problem.model.heads_per_group, self.problem.model
        plain = self.decode_layer_s(stage, batch)
        return np.array([
            self.decode_layer_s(stage, batch + int(tokens)) - plain
            + self.problem.cost.prefill_attention_layer_s(stage.gpu, model, heads, int(tokens), int(before))
            for tokens, before in zip(pieces.tokens, pieces.before, strict=True)])

    def _prompt_attention_s(self, stage: StageShape, tokens: int) -> float:
        heads = max(stage.owned) * self.problem.model.heads_per_group
        return self.problem.cost.prefill_attention_layer_s(stage.gpu, self.problem.model, heads, tokens, 0)

    def _long_step_s(self, stage: StageShape, tokens: float) -> float:
        """Dense work of one layer; beyond the token budget of a step, as of so many full steps."""
        step = max(1, min(round(tokens), self.problem.limits.max_batch_tokens))
        return self._tokens_layer_s(stage, step) * max(1.0, tokens) / step

    def _tokens_layer_s(self, stage: StageShape, tokens: int) -> float:
        cost, model = self.problem.cost, self.problem.model
        seconds = cost.dense_layer_s(stage.gpu, model, tokens, stage.tp)
        if stage.link is not None:
            size = tokens * model.hidden * model.activation_bytes
            seconds += 2 * cost.all_reduce_s(stage.gpu, stage.link, size, stage.tp)
        return seconds

    def _hop_s(self, stage: StageShape, tokens: int) -> float:
        if stage.hop is None:
            return 0.0
        model = self.problem.model
        return self.problem.cost.transfer(stage.hop).seconds(tokens * model.hidden * model.activation_bytes)
