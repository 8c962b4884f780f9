"""How long the stages of a step take, as sums of named parts.

Decode attention at a position is a line in the number of iterations issued, since each
adds one token to every member; a stage waits for the slowest of its positions. So the time
of a stage is a fixed part plus the upper envelope of a few lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hetis_sim.control.lane import Lane
from hetis_sim.control.step import Chunk, Step
from hetis_sim.cost.model import CostModel
from hetis_sim.policies.costs import position_costs
from hetis_sim.policies.plan import InstancePlan
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.model import ModelSpec

Line = tuple[float, float]
"""(seconds at iteration 0, seconds more per iteration)."""

StageLines = tuple[tuple[tuple[Line, ...], tuple[Line, ...]], ...]
"""Per stage: the lines of its ranks, and those of its attention workers."""


class FixedParts(NamedTuple):
    """Parts of one stage that depend on the number of tokens alone, in seconds."""

    host_s: float
    dense_s: float
    collective_s: float
    hop_s: float

    @property
    def busy_s(self) -> float:
        """Time the stage is occupied; the hop to the next stage is on the link."""
        return self.host_s + self.dense_s + self.collective_s


@dataclass(frozen=True, slots=True, eq=False)
class StageTiming:
    """One stage of a step. ``attention_s`` is prefill attention; the lines are decode attention."""

    fixed: FixedParts
    busy_s: float
    attention_s: float = 0.0
    local: tuple[Line, ...] = ()
    remote: tuple[Line, ...] = ()


class InstanceTimer:
    """Durations of the steps of one instance.

    Attention workers are shared by the stages of the instance. A job of one stage waits, in
    this model, for one average job of every other stage that uses the worker: an upper
    bound of first-in first-out service, so that sharing is never taken to be free (ours).
    """

    def __init__(self, cluster: ClusterSpec, model: ModelSpec, cost: CostModel, plan: InstancePlan) -> None:
        self.plan = plan
        self.costs = position_costs(cluster, model, cost, plan)
        self._cluster = cluster
        self._model = model
        self._cost = cost
        self._fixed: dict[tuple[int, int], tuple[FixedParts, ...]] = {}
        self._workers = self._worker_positions()
        heads = model.heads_per_group
        output = heads * model.head_dim * model.activation_bytes
        self.wire_bytes_per_group = (model.remote_bytes_per_token(heads) - output, output)
        self._lines: dict[int, tuple[int, StageLines]] = {}

    def _worker_positions(self) -> list[list[int]]:
        """For each attention worker, its position in every stage."""
        return [[p.index for p in self.plan.positions if p.device == device]
                for device in self.plan.attention_workers]

    def _contention(self, lanes: Sequence[Lane]) -> dict[int, float]:
        """Per position, the average jobs of the other stages that use the same attention worker."""
        waits: dict[int, float] = {}
        for positions in self._workers:
            jobs = [self._average_job(p, lanes) for p in positions]
            total = sum(jobs)
            for p, job in zip(positions, jobs, strict=True):
                waits[p] = total - job
        return waits

    def _average_job(self, p: int, lanes: Sequence[Lane]) -> float:
        groups = tokens = 0
        for lane in lanes:
            g = lane.groups[p]
            if g:
                groups += g
                tokens += lane.base[p] + g * lane.issued
        if not groups:
            return 0.0
        cost = self.costs[p]
        return (cost.a_s_per_group * groups + cost.b_s_per_group_token * tokens) / len(lanes) + cost.c_s

    def fixed_parts(self, tokens: int, sequences: int) -> tuple[FixedParts, ...]:
        """Per stage: host, dense, collectives and hop for ``tokens``, of which ``sequences`` are sampled."""
        key = (tokens, sequences)
        found = self._fixed.get(key)
        if found is None:
            found = tuple(self._stage_parts(s, tokens, sequences) for s in range(len(self.plan.stages)))
            self._fixed[key] = found
        return found

    def _stage_parts(self, s: int, tokens: int, sequences: int) -> FixedParts:
        stage, model, cost = self.plan.stages[s], self._model, self._cost
        gpu = self._cluster.devices[stage.devices[0]].gpu
        dense = stage.layers * cost.dense_layer_s(gpu, model, tokens, stage.tp)
        message = tokens * model.hidden * model.activation_bytes
        collective = 0.0
        link = self._cluster.slowest_link(stage.devices)
        if link is not None:
            collective = 2 * stage.layers * cost.all_reduce_s(gpu, link, message, stage.tp)
        hop = 0.0
        if s + 1 < len(self.plan.stages):
            after = self.plan.stages[s + 1].devices[0]
            hop = cost.transfer(self._cluster.link(stage.devices[-1], after)).seconds(message)
        else:
            dense += cost.head_s(gpu, model, sequences, stage.tp)
        return FixedParts(cost.host_overhead_s(sequences) if s == 0 else 0.0, dense, collective, hop)

    def prefill(self, step: Step, lanes: Sequence[Lane]) -> tuple[StageTiming, ...]:
        """Stages of a step that prefills, with or without the lane's decode batch."""
        decoding = step.decoding
        sampled = decoding + sum(chunk.last for chunk in step.chunks)
        parts = self.fixed_parts(step.prefill_tokens + decoding, max(1, sampled))
        lines = self.lines(step.lane, lanes) if decoding else (((), ()),) * len(parts)
        return tuple(StageTiming(fixed, fixed.busy_s, self._prefill_attention_s(s, step.chunks), *lines[s])
                     for s, fixed in enumerate(parts))

    def decode(self, lane: int, lanes: Sequence[Lane]) -> tuple[StageTiming, ...]:
        """Stages of an iteration of a lane's decode batch."""
        batch = len(lanes[lane].members)
        parts = self.fixed_parts(batch, batch)
        lines = self.lines(lane, lanes)
        return tuple(StageTiming(fixed, fixed.busy_s, 0.0, *lines[s]) for s, fixed in enumerate(parts))

    def _prefill_attention_s(self, s: int, chunks: Sequence[Chunk]) -> float:
        stage, model = self.plan.stages[s], self._model
        slowest = 0.0
        for groups, device in {(g, self._cluster.devices[d].gpu.name): d
                               for g, d in zip(stage.owned_groups, stage.devices, strict=True)}.items():
            gpu = self._cluster.devices[device].gpu
            heads = groups[0] * model.heads_per_group
            rank = sum(self._cost.prefill_attention_layer_s(gpu, model, heads, chunk.new_tokens,
                                                            chunk.context_tokens) for chunk in chunks)
            slowest = max(slowest, rank)
        return stage.layers * slowest

    def lines(self, index: int, lanes: Sequence[Lane]) -> StageLines:
        """Decode-attention lines of a lane's stages; worked out anew when its membership has changed."""
        lane = lanes[index]
        version, lines = self._lines.get(index, (-1, ()))
        if version != lane.version:
            remote = self._workers and any(lane.groups[p] for positions in self._workers for p in positions)
            waits = self._contention(lanes) if remote and len(self.plan.stages) > 1 else {}
            lines = tuple(self._stage_lines(s, lane, waits) for s in range(len(self.plan.stages)))
            self._lines[index] = (lane.version, lines)
        return lines

    def _stage_lines(self, s: int, lane: Lane,
                     waits: dict[int, float]) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
        """Lines of the ranks and of the attention workers of one stage, equal ones once."""
        local: dict[Line, None] = {}
        remote: dict[Line, None] = {}
        groups, base, positions = lane.groups, lane.base, self.plan.positions
        for p in self.plan.stage_positions[s]:
            g = groups[p]
            if not g:
                continue
            cost = self.costs[p]
            layers = positions[p].layers
            own = cost.a_s_per_group * g + cost.b_s_per_group_token * (base[p] + g) + cost.c_s
            start = own + cost.wire_s_per_group * g + cost.wire_fixed_s + waits.get(p, 0.0)
            line = (layers * start, layers * cost.b_s_per_group_token * g)
            (remote if positions[p].remote else local)[line] = None
        return tuple(local), tuple(remote)


def envelope(lines: Sequence[Line], n: int) -> float:
    """Largest of the lines at iteration ``n``, 0 for none."""
    best = 0.0
    for start, slope in lines:
        value = start + slope * n
        if value > best:
            best = value
    return best


def envelope_sum(lines: Sequence[Line], first: int, count: int) -> float:
    """Sum of the envelope over iterations ``first .. first + count - 1``, in closed form.

    The line that is largest at both ends is largest throughout; otherwise the range is
    halved until it is, which takes about log2(count) steps for every change of the leader.
    """
    if count <= 0 or not lines:
        return 0.0
    if len(lines) == 1:
        start, slope = lines[0]
        return count * (start + slope * (first + (count - 1) / 2.0))
    last = first + count - 1
    left = max(lines, key=lambda line: (line[0] + line[1] * first, line[1]))
    right = max(lines, key=lambda line: (line[0] + line[1] * last, -line[1]))
    if left[0] + left[1] * last >= right[0] + right[1] * last or count == 1:
        return count * (left[0] + left[1] * (first + last) / 2.0)
    if right[0] + right[1] * first >= left[0] + left[1] * first:
        return count * (right[0] + right[1] * (first + last) / 2.0)
    half = count // 2
    return envelope_sum(lines, first, half) + envelope_sum(lines, first + half, count - half)
