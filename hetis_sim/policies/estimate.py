"""What an instance can do in steady state: the figures by which layouts are compared.

The model (ours; the paper does not give its cost function): requests of the workload's mean
lengths, P prompt and O output tokens, keep the S micro-batches of an instance full with b
requests each. In every turn of the pipeline each of the S*b requests gets one token, and
n = S*b/O new ones are prefilled. Let D_s be the time that stage s is busy with an iteration of b
requests: dense modules, two all-reduces a layer, decode attention split over ranks and attention
workers, the LM head, the host's overhead. Micro-batches cannot overtake each other, so a turn
takes S times its longest step:

    T = max(S * max_s D_s, sum_s (D_s + hop_s)) + E

where the second entry is the way of a lone micro-batch, and E is what prefills add. Where whole
prompts go first, a prompt costs its whole way through the pipeline, while the others queue up
behind it: E = n * sum_s (P_s + hop_s). With chunked prefill, c = min(1, n*P / chunk) of the turns
have a step that carries ``chunk`` prompt tokens beside the decoding, which makes it longer:
E = S * c * max_s X_s. ``ideal_pipeline`` leaves these bubbles out, as if prefills passed without
holding anybody up: E = 0, with b/O * P_s added to D_s.

A request takes O*T, and the instance serves S*b / (O*T) requests a second. b is the largest batch
that the cache holds at the mean context P + O/2, that the engine allows and that keeps T, the
time per output token, within its SLO.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.fluid import attention_times
from hetis_sim.policies.layers import StageLoad, split_layers
from hetis_sim.policies.memory import unit_bytes
from hetis_sim.policies.shape import InstanceShape, StageShape

BATCH_STEPS = 12


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
        self.context = self.prompt + self.output / 2
        blocks = self.context / problem.limits.block_tokens + 0.5
        # Bytes of one KV group of one request in one layer, with its share of the reserve.
        self.group_bytes = blocks * unit_bytes(problem.model, problem.limits) / (1.0 - reserve_fraction)
        self._decode: dict[tuple[str, int, str, int], float] = {}
        self._prefill: dict[tuple[str, int, str], float] = {}

    def best(self, shape: InstanceShape, layers: Sequence[int] | None = None) -> Estimate | None:
        """The estimate at the best batch, with the best layers unless they are given; None if nothing fits.

        Batches are tried from the largest that memory could hold downwards: until the SLO is
        held, and on as long as the estimate gets better.
        """
        best: Estimate | None = None
        batch, stages = self.largest_batch(shape), len(shape.stages)
        for _ in range(BATCH_STEPS):
            lane = max(1, batch // stages)
            found = self.at(shape, lane, min(batch, lane * stages), layers)
            shrink = 0.85
            if found is not None:
                if best is not None and best.penalty <= 1.0 and found.value <= best.value:
                    break
                if best is None or found.value > best.value or found.penalty <= 1.0 < best.penalty:
                    best = found
                if found.penalty > 1.0:
                    shrink = min(0.95, max(0.3, 1.0 / found.penalty))
            if batch <= 1:
                break
            batch = max(1, min(batch - 1, int(batch * shrink)))
        return best

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
        prefills = requests / self.output
        layer = self.decode_layer_s(stage, batch) + home
        passing = 0.0
        if self.ideal_pipeline:
            layer += prefills / len(shape.stages) * self.prefill_layer_s(stage)
        elif self.problem.chunk_tokens:
            layer += self._chunk_share(batch, prefills) * self.chunk_layer_s(stage, batch, prefills)
        else:
            passing = prefills * self.prefill_layer_s(stage) / len(shape.stages)
        cache = [self.group_bytes * owned * requests for owned in stage.owned]
        local = min(room / (weights + held) for room, weights, held
                    in zip(stage.room_bytes, stage.layer_bytes, cache, strict=True))
        hard = min(room / weights for room, weights in zip(stage.room_bytes, stage.layer_bytes, strict=True))
        return StageLoad(self._stage_fixed_s(shape, s, batch), layer, passing, local, hard,
                         sum(stage.layer_bytes) + sum(cache))

    def _stage_fixed_s(self, shape: InstanceShape, s: int, batch: int) -> float:
        """Time of a stage in an iteration that does not depend on its layers: the host's, and the LM head."""
        cost, model, stage = self.problem.cost, self.problem.model, shape.stages[s]
        fixed = cost.host_overhead_s(batch) if s == 0 else 0.0
        if s == len(shape.stages) - 1:
            fixed += cost.head_s(stage.gpu, model, batch, stage.tp)
        return fixed

    def _estimate(self, shape: InstanceShape, layers: tuple[int, ...], attention: Sequence[float],
                  batch: int, requests: int) -> Estimate:
        stages, prefills = shape.stages, requests / self.output
        slowest = path = prefill = longer = 0.0
        for s, stage in enumerate(stages):
            busy = layers[s] * (self.decode_layer_s(stage, batch) + attention[s])
            busy += self._stage_fixed_s(shape, s, batch)
            prompt = layers[s] * self.prefill_layer_s(stage) + self._stage_fixed_s(shape, s, 1)
            if self.ideal_pipeline:
                busy += prefills / len(stages) * prompt
            elif self.problem.chunk_tokens:
                longer = max(longer, layers[s] * self.chunk_layer_s(stage, batch, prefills))
            slowest = max(slowest, busy)
            path += busy + self._hop_s(stage, batch)
            prefill += prompt + self._hop_s(stage, self.prompt)
        cycle = max(len(stages) * slowest, path)
        if not self.ideal_pipeline:
            cycle = self._with_bubbles(cycle, len(stages), batch, prefills, prefill, longer)
        slo = self.problem.slo
        penalty = max(1.0, cycle / slo.tpot_s, prefill / slo.ttft_s)
        return Estimate(layers, requests / (self.output * cycle), requests, cycle, prefill, penalty)

    def _with_bubbles(self, cycle: float, stages: int, batch: int, prefills: float, prefill_s: float,
                      longer_s: float) -> float:
        """A turn with the time that prefills add: each its way, or the longest chunk in every stage."""
        if not self.problem.chunk_tokens:
            return cycle + prefills * prefill_s
        cycle += stages * self._chunk_share(batch, prefills) * longer_s
        return cycle * max(1.0, prefills * self.prompt / (stages * self._chunk(batch, math.inf)))

    def turn_layer_s(self, stage: StageShape, batch: int) -> float:
        """One layer's part of the slowest step, all heads at home; for rankings."""
        home = stage.home.seconds(max(stage.owned) * batch, max(stage.owned) * batch * self.context)
        layer = self.decode_layer_s(stage, batch) + home
        return layer + batch / self.output * self.prefill_layer_s(stage) if self.ideal_pipeline else layer

    def passing_layer_s(self, stage: StageShape) -> float:
        """One layer's part of what a prompt adds to a turn; for rankings."""
        if self.ideal_pipeline:
            return 0.0
        if not self.problem.chunk_tokens:
            return self.prefill_layer_s(stage)
        batch = min(64, self.problem.limits.max_batch_requests)
        return self.chunk_layer_s(stage, batch, 1.0) * self.prompt / self._chunk(batch, 1.0)

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
            model, limit = self.problem.model, self.problem.limits.max_batch_tokens
            # A prompt longer than the token budget counts as so many full steps.
            tokens = min(self.prompt, limit)
            heads = max(stage.owned) * model.heads_per_group
            found = self._tokens_layer_s(stage, tokens) * self.prompt / tokens
            found += self.problem.cost.prefill_attention_layer_s(stage.gpu, model, heads, self.prompt, 0)
            self._prefill[key] = found
        return found

    def chunk_layer_s(self, stage: StageShape, batch: int, prefills: float) -> float:
        """What a chunk of prompts adds to one layer of an iteration of ``batch`` requests."""
        tokens = self._chunk(batch, prefills)
        heads = max(stage.owned) * self.problem.model.heads_per_group
        attention = self.problem.cost.prefill_attention_layer_s(
            stage.gpu, self.problem.model, heads, tokens, max(0, (self.prompt - tokens) // 2))
        return self.decode_layer_s(stage, batch + tokens) - self.decode_layer_s(stage, batch) + attention

    def _chunk(self, batch: int, prefills: float) -> int:
        """Prompt tokens of a step: a mean prompt or all that arrive in a turn, within the budget."""
        budget = max(1, self.problem.chunk_tokens - batch)
        return int(min(budget, max(1.0, prefills) * self.prompt))

    def _chunk_share(self, batch: int, prefills: float) -> float:
        """Share of the turns in which some micro-batch carries a chunk."""
        return min(1.0, prefills * self.prompt / self._chunk(batch, prefills))

    def _tokens_layer_s(self, stage: StageShape, tokens: int) -> float:
        cost, model = self.problem.cost, self.problem.model
        seconds = cost.dense_layer_s(stage.gpu, model, tokens, stage.tp)
        if stage.link is not None:
            size = tokens * model.hidden * model.weight_bytes
            seconds += 2 * cost.all_reduce_s(stage.gpu, stage.link, size, stage.tp)
        return seconds

    def _hop_s(self, stage: StageShape, tokens: int) -> float:
        if stage.hop is None:
            return 0.0
        model = self.problem.model
        return self.problem.cost.transfer(stage.hop).seconds(tokens * model.hidden * model.weight_bytes)
