"""How long the stages of a step take, as sums of named parts.

Decode attention at a position is a line in the number of iterations issued, since each
adds one token to every member; a stage waits for the slowest of its positions. So the time
of a stage is a fixed part plus the upper envelope of a few lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hetis_sim.control.bends import Bend, bend_of, secant
from hetis_sim.control.envelope import Line
from hetis_sim.control.lane import Lane
from hetis_sim.control.loads import Loads
from hetis_sim.control.ranges import ranged_lines
from hetis_sim.control.step import Chunk, Step, Transfer
from hetis_sim.cost.model import CostModel, TransferCost
from hetis_sim.policies.costs import mixed_cost, position_cost, position_costs
from hetis_sim.policies.plan import InstancePlan, Position
from hetis_sim.policies.view import PositionCost
from hetis_sim.spec.cluster import ClusterSpec, LinkSpec
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec


class StageLines(NamedTuple):
    """Decode attention of one stage: lines of its ranks, of its attention workers, and all."""

    local: tuple[Line, ...]
    remote: tuple[Line, ...]
    both: tuple[Line, ...]


class DecodeLines(NamedTuple):
    """Decode attention of a lane: the stages' lines, and the work of each attention worker.

    Attributes:
        stages: see :class:`StageLines`.
        workers: empty where no worker holds a head of the lane.
        held: (position, groups, group-tokens before the first iteration) wherever the lane has any; empty
            beside token ranges.
        ranged: beside token ranges, (remote position, groups that grow, groups in ranges, groups of tails
            that are merged).
    """

    stages: tuple[StageLines, ...]
    workers: tuple[Line, ...]
    held: tuple[tuple[int, int, int], ...] = ()
    ranged: tuple[tuple[int, int, int, int], ...] = ()


NO_LINES = StageLines((), (), ())


class FixedParts(NamedTuple):
    """Parts of a step that depend on its tokens alone, in seconds.

    Attributes:
        busy_s, hop_s: per stage: time that it is occupied, and the way to the next one.
        least_s: per stage: what it takes at least beside ``host_s``, for the host is busy for so long.
        host_s, dense_s, collective_s, total_hop_s: sums over the stages.
    """

    busy_s: tuple[float, ...]
    hop_s: tuple[float, ...]
    least_s: tuple[float, ...]
    host_s: float
    dense_s: float
    collective_s: float
    total_hop_s: float


class StepTiming(NamedTuple):
    """A step of one iteration or, with lines, of any number.

    Attributes:
        fixed: what depends on the tokens alone.
        prefill_s: prefill attention, summed over the stages.
        lines: decode attention.
        stages: per stage: (seconds without decode attention, all lines, hop after it).
        sending_s: what ranks are busy with for cache that leaves layer by layer, summed over the stages.
    """

    fixed: FixedParts
    prefill_s: float
    lines: DecodeLines
    stages: tuple[tuple[float, tuple[Line, ...], float], ...]
    sending_s: float = 0.0

    @property
    def host_beside(self) -> bool:
        """Whether some of the host's time runs beside the devices."""
        return any(self.fixed.least_s)


class _StageFacts(NamedTuple):
    """What the duration of a stage depends on, besides its batch.

    ``ring`` joins the ranks, ``hop`` leads to the next stage; ``dense`` and ``ranks`` are the
    different (card, share of dense work) and (card, query heads) among them.
    """

    dense: tuple[tuple[GpuSpec, float], ...]
    tp: int
    layers: int
    ring: LinkSpec | None
    hop: TransferCost | None
    ranks: tuple[tuple[GpuSpec, int], ...]


def dense_share(model: ModelSpec, owned: int, tp: int) -> float:
    """Dense work of a rank over that of an equal share: it projects for the heads that it owns."""
    projections = model.projection_flops_per_token_per_layer / model.dense_flops_per_token_per_layer
    return 1.0 + projections * (owned * tp / model.kv_heads - 1.0)


_LineFacts = tuple[int, bool, int, float, float, float, float, float, bool, Bend | None]
"""Position, whether it is remote, layers, costs a, b and c of a group, those of its wire, and what attention
takes over its line."""

_WorkFacts = tuple[int, int, float, float, float, Bend | None]
"""Position of an attention worker, layers, its costs a, b and c of a group, and what is over its line."""


class InstanceTimer:
    """Durations of the steps of one instance.

    Attention workers are shared by the stages of the instance. A job of one stage waits, in
    this model, for one average job of every other stage that uses the worker: an upper
    bound of first-in first-out service, so that sharing is never taken to be free (ours).
    The average is taken whenever the membership of the lane in question changes.

    Args:
        believed: durations that the policy goes by where they are not those of ``cost``.
        joint: requests that decode in a mixed step share a kernel with its prompts.

    Attributes:
        plan: the instance.
        costs: decode-attention costs of its positions.
        believed_costs: those that its policy goes by.
        wire_bytes_per_group: bytes per token, layer and remote KV group: query, key and value
            on the way out, the output on the way back.
        still_bytes_per_group: the same of a group in a token range: the query, and a partial output.
        merged_bytes_per_group: what a group of a remote tail sends back more beside ranges.
    """

    def __init__(self, cluster: ClusterSpec, model: ModelSpec, cost: CostModel, plan: InstancePlan,
                 believed: CostModel | None = None, joint: bool = False) -> None:
        self.plan = plan
        self.costs = position_costs(cluster, model, cost, plan)
        self.believed_costs = self.costs
        if believed is not None:
            self.believed_costs = position_costs(cluster, model, believed, plan)
        self._cluster = cluster
        self._model = model
        self._cost = cost
        self._stages = tuple(self._stage_facts(s) for s in range(len(plan.stages)))
        self._fixed: dict[tuple[int, int, int, bool, int], FixedParts] = {}
        self._graphs = cost.graph_steps()
        self._alone = len(self._stages) == 1 and self._stages[0].tp == 1
        self._decodes: dict[int, tuple[int, StepTiming]] = {}
        self._lines: dict[int, tuple[int, DecodeLines]] = {}
        self._bends = [bend_of(cost, cluster.devices[p.device].gpu, model, p) for p in plan.positions]
        # Positions of each attention worker, and of each stage with what their lines depend on.
        self._worker_positions = [[p.index for p in plan.positions if p.device == device]
                                  for device in plan.attention_workers]
        self._remote_positions = [p.index for p in plan.positions if p.remote]
        self._worker_facts = [[self._work_facts(plan.positions[p]) for p in worker]
                              for worker in self._worker_positions]
        self._stage_positions = [[self._line_facts(plan.positions[p], self.costs[p], self._bends[p])
                                  for p in indices] for indices in plan.stage_positions]
        lone = [position_cost(cluster, model, cost, plan, p, lone=True) for p in plan.positions]
        bends = [bend if own == usual else None
                 for bend, own, usual in zip(self._bends, lone, self.costs, strict=True)]
        self._lone_positions = None if tuple(lone) == self.costs else [
            [self._line_facts(plan.positions[p], lone[p], bends[p]) for p in indices]
            for indices in plan.stage_positions]
        self._mixed_positions = [
            [self._line_facts(plan.positions[p], self._mixed_cost(plan.positions[p]),
                              self._bends[p] if plan.positions[p].remote else None) for p in indices]
            for indices in plan.stage_positions] if joint else None
        self._packers = {device: (s, stage.layers, cost.cache_packing(cluster.devices[device].gpu))
                         for s, stage in enumerate(plan.stages) for device in stage.devices}
        self._no_waits = [0.0] * len(self.costs)
        heads = model.heads_per_group
        output = heads * model.head_dim * model.activation_bytes
        self.wire_bytes_per_group = (model.remote_bytes_per_token(heads) - output, output)
        partial = model.partial_bytes_per_token(heads)
        self.still_bytes_per_group = (output, partial)
        self.merged_bytes_per_group = (0, partial - output)

    def _mixed_cost(self, p: Position) -> PositionCost:
        cost = self.costs[p.index]
        return cost if p.remote else mixed_cost(self._cluster, self._model, self._cost, p, cost)

    @staticmethod
    def _line_facts(p: Position, cost: PositionCost, bend: Bend | None = None) -> _LineFacts:
        return (p.index, p.remote, p.layers, cost.a_s_per_group, cost.b_s_per_group_token, cost.c_s,
                cost.wire_s_per_group / max(1, cost.wire_sharers), cost.wire_fixed_s, cost.wire_sharers > 0,
                bend)

    def _work_facts(self, p: Position) -> _WorkFacts:
        cost = self.costs[p.index]
        return (p.index, p.layers, cost.a_s_per_group, cost.b_s_per_group_token, cost.c_s,
                self._bends[p.index])

    def fixed_parts(self, tokens: int, sequences: int, prompts: int = 0, eager: bool = False,
                    sampled: int = 0) -> FixedParts:
        """Host, dense, collectives and hops for ``tokens``, of which ``sequences`` are sampled.

        ``prompts`` and ``eager``: see :meth:`CostModel.host_beside_s`. The LM head computes ``sampled`` rows
        if those are more.
        """
        key = (tokens, sequences, prompts, eager, sampled)
        found = self._fixed.get(key)
        if found is None:
            parts = [self._stage_parts(s, tokens, sequences, prompts, max(sampled, sequences))
                     for s in range(len(self.plan.stages))]
            host, dense, collective, hop = (tuple(column) for column in zip(*parts, strict=True))
            busy = tuple(sum(part[:3]) for part in parts)
            least = tuple(self._cost.host_beside_s(sequences, stage.layers, s == 0, prompts, eager)
                          for s, stage in enumerate(self._stages))
            found = FixedParts(busy, hop, least, sum(host), sum(dense), sum(collective), sum(hop))
            self._fixed[key] = found
        return found

    def _stage_parts(self, s: int, tokens: int, sequences: int,
                     prompts: int, sampled: int) -> tuple[float, float, float, float]:
        """Host, dense, collective and hop seconds of one stage."""
        stage, cost, model = self._stages[s], self._cost, self._model
        message = tokens * model.hidden * model.activation_bytes
        dense = stage.layers * max([share * cost.dense_layer_s(gpu, model, tokens, stage.tp)
                                    for gpu, share in stage.dense])
        collective = 0.0
        if stage.ring is not None:
            collective = 2 * stage.layers * max([
                cost.all_reduce_s(gpu, stage.ring, message, stage.tp) for gpu, _ in stage.dense])
        if stage.hop is None:
            dense += max([cost.head_s(gpu, model, sampled, stage.tp) for gpu, _ in stage.dense])
        return (cost.host_overhead_s(sequences, prompts) if s == 0 else 0.0, dense, collective,
                stage.hop.seconds(message) if stage.hop is not None else 0.0)

    def _stage_facts(self, s: int) -> _StageFacts:
        stage, cluster = self.plan.stages[s], self._cluster
        gpus = [cluster.devices[device].gpu for device in stage.devices]
        hop = None
        if s + 1 < len(self.plan.stages):
            hop = self._cost.hop(cluster.link(stage.devices[-1], self.plan.stages[s + 1].devices[0]))
        heads = self._model.heads_per_group
        ranks = {(gpu.name, owned): (gpu, owned * heads)
                 for gpu, owned in zip(gpus, stage.owned_groups, strict=True)}
        dense = {(gpu.name, owned): (gpu, dense_share(self._model, owned, stage.tp))
                 for gpu, owned in zip(gpus, stage.owned_groups, strict=True)}
        return _StageFacts(tuple(dense.values()), stage.tp, stage.layers,
                           cluster.slowest_link(stage.devices), hop, tuple(ranks.values()))

    def prefill(self, step: Step, lane: Lane, loads: Loads) -> StepTiming:
        """A step that prefills, with or without the lane's decode batch."""
        sampled = step.decoding + sum([chunk.last for chunk in step.chunks])
        tokens = step.prefill_tokens + step.decoding
        # Groups that go elsewhere leave layer by layer.
        whole = (self._alone and not step.decoding and not step.transfers
                 and self._graphs.takes(tokens, len(step.chunks)))
        prompts = len(step.chunks)
        if whole:
            rows, head_rows = self._graphs.prompt_rows(tokens), self._graphs.prompts
            fixed = self.fixed_parts(rows, max(1, sampled), prompts, False, head_rows)
        else:
            fixed = self.fixed_parts(tokens, max(1, sampled), prompts, True)
        attention = [self._prefill_attention_s(stage, step.chunks) for stage in self._stages]
        idle = DecodeLines((NO_LINES,) * len(attention), ())
        lines = self._mixed_lines(lane, loads) if step.decoding else idle
        sending = self._sending_s(step.transfers) if step.transfers else [0.0] * len(attention)
        stages = tuple([(busy + own + sent, stage.both, hop) for busy, own, sent, stage, hop
                        in zip(fixed.busy_s, attention, sending, lines.stages, fixed.hop_s, strict=True)])
        return self._held(StepTiming(fixed, sum(attention), lines, stages, sum(sending)))

    def _sending_s(self, transfers: Sequence[Transfer]) -> list[float]:
        """Per stage, what the slowest rank is busy with for cache of prompts that will live elsewhere."""
        busy: dict[int, float] = {}
        for flow in [flow for transfer in transfers for flow in transfer.flows]:
            if flow.source in self._packers:
                _, layers, cost = self._packers[flow.source]
                busy[flow.source] = (busy.get(flow.source, 0.0) + layers * cost.beta_s
                                     + cost.gamma_s_per_byte * flow.size_bytes)
        found = [0.0] * len(self._stages)
        for device, seconds in busy.items():
            s, *_ = self._packers[device]
            found[s] = max(found[s], seconds)
        return found

    def decode(self, lane: Lane, loads: Loads) -> StepTiming:
        """Iterations of the lane's decode batch, until its membership changes."""
        version, timing = self._decodes.get(lane.index, (-1, None))
        if timing is None or version != lane.version:
            batch = len(lane.members)
            lines = self.lines(lane, loads)
            whole = self._alone and not lines.workers
            rows = self._graphs.batch_rows(batch) if whole else batch
            fixed = self.fixed_parts(rows, batch, 0, not whole, rows)
            stages = tuple([(busy, stage.both, hop) for busy, stage, hop
                            in zip(fixed.busy_s, lines.stages, fixed.hop_s, strict=True)])
            timing = self._held(StepTiming(fixed, 0.0, lines, stages))
            self._decodes[lane.index] = (lane.version, timing)
        return timing

    @staticmethod
    def _held(timing: StepTiming) -> StepTiming:
        """A step none of whose stages is shorter than what its host does beside it."""
        if not timing.host_beside:
            return timing
        fixed, stages = timing.fixed, []
        for s, (busy, lines, hop) in enumerate(timing.stages):
            host = fixed.host_s if s == 0 else 0.0
            more = fixed.least_s[s] - (busy - host)
            stages.append((busy, (*lines, (more, 0.0)) if more > 0.0 else lines, hop))
        return timing._replace(stages=tuple(stages))

    def _prefill_attention_s(self, stage: _StageFacts, chunks: Sequence[Chunk]) -> float:
        """Seconds of the slowest rank; equal ranks are asked for once."""
        attention_s, model = self._cost.prefill_attention_layer_s, self._model
        return stage.layers * max([
            sum([attention_s(gpu, model, heads, chunk.new_tokens, chunk.context_tokens) for chunk in chunks])
            for gpu, heads in stage.ranks])

    def _mixed_lines(self, lane: Lane, loads: Loads) -> DecodeLines:
        """Decode-attention lines of an iteration that computes prompts as well."""
        if self._mixed_positions is None or lane.ranged:
            # Ranges of tokens have kernels of their own everywhere.
            return self.lines(lane, loads)
        return self._make_lines(lane, loads, self._mixed_positions)

    def lines(self, lane: Lane, loads: Loads) -> DecodeLines:
        """Decode-attention lines of a lane; worked out anew when its membership has changed."""
        version, lines = self._lines.get(lane.index, (-1, None))
        if lines is None or version != lane.version:
            lines = self._make_lines(lane, loads) if not lane.ranged else self._ranged_lines(lane, loads)
            self._lines[lane.index] = (lane.version, lines)
        return lines

    def _make_lines(self, lane: Lane, loads: Loads,
                    positions: Sequence[Sequence[_LineFacts]] | None = None) -> DecodeLines:
        # Plain loops: at a few dozen positions, arrays cost more than they save.
        groups, base, issued = lane.groups.tolist(), lane.base.tolist(), max(1, lane.issued)
        remote = any(map(groups.__getitem__, self._remote_positions))
        waits = self._waits(loads) if remote and len(self.plan.stages) > 1 else self._no_waits
        stages: list[StageLines] = []
        for stage in positions or self._positions(lane, groups):
            lines: tuple[dict[Line, None], dict[Line, None]] = ({}, {})
            # What leaves through the stage's network interface, for whichever worker.
            sent = sum([groups[p] for p, *_, shared, _ in stage if shared]) if remote else 0
            packing = self._packing_s(stage, groups) if remote else 0.0
            for p, is_remote, layers, a, b, c, wire, wire_fixed, shared, bend in stage:
                g = groups[p]
                if g:
                    own, slope = secant(bend, (a * g, b, c), g, base[p] + g, base[p] + issued * g)
                    start = own + wire * (sent if shared else g) + wire_fixed + waits[p]
                    lines[is_remote][layers * start, layers * slope] = None  # equal ones count once
            local, others = tuple(lines[0]), tuple(lines[1])
            both = local + others
            if packing:
                # The rank sends before it computes its own heads, and gathers afterwards.
                both = tuple([(start + packing, slope) for start, slope in both])
            stages.append(StageLines(local, others, both))
        work = [_work(worker, groups, base, issued) for worker in self._worker_facts] if remote else []
        held = tuple([(p, g, base[p]) for p, g in enumerate(groups) if g])
        return DecodeLines(tuple(stages), tuple(work), held)

    def _positions(self, lane: Lane, groups: Sequence[int]) -> Sequence[Sequence[_LineFacts]]:
        """What each stage's lines depend on; positions with heads of one request have costs of their own."""
        if self._lone_positions is None:
            return self._stage_positions
        if len(lane.members) == 1:
            return self._lone_positions
        lone = {p for p, g in enumerate(groups)
                if 0 < g <= self._model.kv_heads and _holds_one(lane, p)}
        if not lone:
            return self._stage_positions
        return [[alone if facts[0] in lone else facts for facts, alone in zip(*pair, strict=True)]
                for pair in zip(self._stage_positions, self._lone_positions, strict=True)]

    def _packing_s(self, stage: Sequence[_LineFacts], groups: Sequence[int]) -> float:
        """What the ranks of a stage spend on addressing attention workers, over its layers."""
        total, ranks = 0.0, sum([not facts[1] for facts in stage])
        for p, is_remote, layers, *_ in stage:
            if is_remote and groups[p]:
                cost = self.costs[p]
                total += layers * (cost.pack_fixed_s + cost.pack_s_per_group * groups[p] / ranks)
        return total

    def _ranged_lines(self, lane: Lane, loads: Loads) -> DecodeLines:
        """The same with token ranges; see :mod:`.ranges`."""
        waits = self._waits(loads) if len(self.plan.stages) > 1 else self._no_waits
        stages, workers = ranged_lines(self.plan, self.costs, lane.index, loads, waits)
        rows = [held[lane.index].tolist() for held in (loads.groups, loads.still, loads.merged)]
        ranged = tuple([(p, rows[0][p], rows[1][p], rows[2][p]) for p in self._remote_positions])
        return DecodeLines(tuple([StageLines(*lines) for lines in stages]), workers, (), ranged)

    def _waits(self, loads: Loads) -> list[float]:
        """Per position, the average jobs of the other stages on the same attention worker."""
        held, cached = loads.decoding()
        groups, tokens, lanes = held.tolist(), cached.tolist(), len(loads.issued)
        waits = [0.0] * len(self.costs)
        for worker in self._worker_positions:
            jobs = [0.0] * len(worker)
            for n, p in enumerate(worker):
                if groups[p]:
                    cost = self.costs[p]
                    busy = cost.a_s_per_group * groups[p] + cost.b_s_per_group_token * tokens[p]
                    jobs[n] = busy / lanes + cost.c_s
            total = sum(jobs)
            for p, job in zip(worker, jobs, strict=True):
                waits[p] = total - job
        return waits


def _holds_one(lane: Lane, p: int) -> bool:
    """Whether a single member has heads at a position."""
    found = 0
    for state in lane.members.values():
        assert state.shape is not None
        found += bool(state.shape.vector[p])
        if found > 1:
            return False
    return found == 1


def _work(worker: Sequence[_WorkFacts], groups: Sequence[int], base: Sequence[int], issued: int) -> Line:
    """Line of the seconds that an attention worker computes in an iteration, over all stages."""
    start = slope = 0.0
    for p, layers, a, b, c, bend in worker:
        g = groups[p]
        if g:
            own, each = secant(bend, (a * g, b, c), g, base[p] + g, base[p] + issued * g)
            start += layers * own
            slope += layers * each
    return start, slope
