"""How long the steps of a mesh's nodes take, as sums of named parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hetis_sim.control.mesh.walk import NodeStep, Walk
from hetis_sim.control.step import StepKind
from hetis_sim.control.timing import dense_share
from hetis_sim.cost.model import CostModel
from hetis_sim.policies.plan import MeshNode, MeshPlan
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.model import ModelSpec


class NodeParts(NamedTuple):
    """Seconds of a step by part."""

    host: float
    dense: float
    collective: float
    attention: float


class Segment(NamedTuple):
    """Layers that the same requests pass: how many, requests, their tokens, their contexts summed up."""

    layers: int
    walks: Sequence[Walk]
    tokens: int
    context_tokens: int


class NodeTimer:
    """Durations of the steps of one node.

    Every node is an engine of its own, so that each of its steps has the host's overhead.
    """

    def __init__(self, cluster: ClusterSpec, model: ModelSpec, cost: CostModel, plan: MeshPlan,
                 number: int) -> None:
        self.node: MeshNode = plan.nodes[number]
        self._number = number
        self._model = model
        self._cost = cost
        self._last = self.node.end_layer == model.layers
        self._ring = cluster.slowest_link(self.node.devices)
        gpus = [cluster.devices[device].gpu for device in self.node.devices]
        owned = self.node.owned_groups
        self._dense_ranks = {(gpu.name, n): (gpu, dense_share(model, n, self.node.tp))
                             for gpu, n in zip(gpus, owned, strict=True)}
        self._ranks = {(gpu.name, n): (gpu, n * model.heads_per_group, cost.decode_attention(gpu, model))
                       for gpu, n in zip(gpus, owned, strict=True)}
        # Requests that join in the middle of the node can only come where an edge leads there.
        ends = {plan.nodes[edge.source].end_layer for edge in plan.edges
                if edge.target == number and edge.source >= 0}
        self._partial = any(end > self.node.first_layer for end in ends)
        self._layer: dict[int, tuple[float, float]] = {}
        self._head: dict[int, float] = {}

    def parts(self, step: NodeStep) -> NodeParts:
        """Seconds of a step."""
        prefill = step.kind == StepKind.PREFILL
        dense = collective = attention = 0.0
        for segment in self._segments(step):
            layer_dense, layer_collective = self._layer_s(segment.tokens)
            dense += segment.layers * layer_dense
            collective += segment.layers * layer_collective
            attention += segment.layers * (self._prefill_s(segment.walks) if prefill else
                                           self._decode_s(segment.tokens, segment.context_tokens))
        if self._last:
            dense += self._head_s(len(step.walks))
        prompts = len(step.walks) if prefill else 0
        host = self._cost.host_overhead_s(len(step.walks), prompts)
        beside = self._cost.host_beside_s(len(step.walks), self.node.layers, True, prompts)
        return NodeParts(host + max(0.0, beside - dense - collective - attention), dense, collective,
                         attention)

    def token_layers(self, step: NodeStep) -> int:
        """Tokens times the layers of this node that they pass."""
        return sum(segment.layers * segment.tokens for segment in self._segments(step))

    def _segments(self, step: NodeStep) -> Iterable[Segment]:
        if not self._partial:
            contexts = sum([walk.context for walk in step.walks])
            return (Segment(self.node.layers, step.walks, step.tokens, contexts),)
        return self._join_in_turn(step)

    def _join_in_turn(self, step: NodeStep) -> Iterable[Segment]:
        """Layer by layer: whoever has passed the first layers elsewhere joins where it comes in."""
        ordered = sorted(step.walks, key=lambda walk: walk.path.first_layers[self._number])
        firsts = [walk.path.first_layers[self._number] for walk in ordered]
        for count in range(1, len(ordered) + 1):
            until = firsts[count] if count < len(ordered) else self.node.end_layer
            if until > firsts[count - 1]:
                present = ordered[:count]
                yield Segment(until - firsts[count - 1], present, sum([walk.tokens for walk in present]),
                              sum([walk.context for walk in present]))

    def _layer_s(self, tokens: int) -> tuple[float, float]:
        """Dense work and collectives of one layer."""
        found = self._layer.get(tokens)
        if found is None:
            model, cost, tp = self._model, self._cost, self.node.tp
            dense = max([share * cost.dense_layer_s(gpu, model, tokens, tp)
                         for gpu, share in self._dense_ranks.values()])
            collective, ring = 0.0, self._ring
            if ring is not None:
                size = tokens * model.hidden * model.activation_bytes
                collective = 2 * max([cost.all_reduce_s(gpu, ring, size, tp)
                                      for gpu, _ in self._dense_ranks.values()])
            found = self._layer[tokens] = (dense, collective)
        return found

    def _head_s(self, sequences: int) -> float:
        found = self._head.get(sequences)
        if found is None:
            found = self._head[sequences] = max([
                self._cost.head_s(gpu, self._model, sequences, self.node.tp)
                for gpu, _ in self._dense_ranks.values()])
        return found

    def _prefill_s(self, walks: Sequence[Walk]) -> float:
        """Attention of one layer over whole prompts, at the slowest rank."""
        attention_s, model = self._cost.prefill_attention_layer_s, self._model
        return max([sum([attention_s(gpu, model, heads, walk.tokens, 0) for walk in walks])
                    for gpu, heads, _ in self._ranks.values()])

    def _decode_s(self, sequences: int, context_tokens: int) -> float:
        """Attention of one layer for one token each, at the slowest rank."""
        model = self._model
        size = model.kv_bytes_per_token_per_layer_per_group * context_tokens
        return max([cost.seconds(heads * sequences, heads // model.heads_per_group * size)
                    for _, heads, cost in self._ranks.values()])


class MeshTimer:
    """The timers of all nodes of a mesh.

    Attributes:
        plan: the mesh.
        nodes: their timers.
    """

    def __init__(self, cluster: ClusterSpec, model: ModelSpec, cost: CostModel, plan: MeshPlan) -> None:
        self.plan = plan
        self.nodes = [NodeTimer(cluster, model, cost, plan, n) for n in range(len(plan.nodes))]
