"""What a policy decides once, before the first request: who computes what.

Heads are placed in KV groups (one KV head with its query heads). The cache of one
instance lives at *positions*: a position is one device in its role for one pipeline
stage. The tensor-parallel ranks of a stage are positions of that stage only; an
attention worker is a position of every stage of its instance.

Instead of instances a plan may have a *mesh*: nodes that hold ranges of layers, and edges along which
each request takes a way of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from hetis_sim.spec.errors import require

Role = Literal["both", "prefill", "decode"]

Placement = tuple[int, ...]
"""KV groups of one request at each position of its instance.

Over the positions of every stage the groups sum to the model's KV heads.
"""


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage: ``layers`` consecutive layers on tensor-parallel ``devices``.

    ``owned_groups[i]`` is the number of KV groups whose QKV weights rank i holds. A rank
    keeps at most those; the others of its groups may be computed by attention workers.
    """

    devices: tuple[int, ...]
    layers: int
    owned_groups: tuple[int, ...]

    def __post_init__(self) -> None:
        require(len(self.devices) >= 1, "stage.devices", self.devices, "at least one device")
        require(self.layers >= 1, "stage.layers", self.layers, ">= 1")
        require(len(self.owned_groups) == len(self.devices), "stage.owned_groups", self.owned_groups,
                f"one number for each of {len(self.devices)} devices")
        require(min(self.owned_groups) >= 1, "stage.owned_groups", self.owned_groups, "at least 1 a rank")

    @property
    def tp(self) -> int:
        """Tensor-parallel degree."""
        return len(self.devices)


@dataclass(frozen=True, slots=True)
class Position:
    """A device in its role for one stage of an instance."""

    index: int
    stage: int
    device: int
    remote: bool
    owned_groups: int
    layers: int


@dataclass(frozen=True)
class InstancePlan:
    """One data-parallel replica: a pipeline of stages and the attention workers that serve it."""

    stages: tuple[StagePlan, ...]
    attention_workers: tuple[int, ...] = ()
    role: Role = "both"

    def __post_init__(self) -> None:
        require(len(self.stages) >= 1, "instance.stages", self.stages, "at least one stage")
        used = [d for stage in self.stages for d in stage.devices] + list(self.attention_workers)
        require(len(used) == len(set(used)), "instance.devices", used, "each device in one role only")
        require(self.role != "prefill" or not self.attention_workers, "instance.attention_workers",
                self.attention_workers, "empty where an instance only prefills")

    @cached_property
    def positions(self) -> tuple[Position, ...]:
        """All positions, stage by stage, ranks before attention workers."""
        return tuple(self._make_positions())

    def _make_positions(self) -> Iterator[Position]:
        index = 0
        for s, stage in enumerate(self.stages):
            for device, owned in zip(stage.devices, stage.owned_groups, strict=True):
                yield Position(index, s, device, False, owned, stage.layers)
                index += 1
            for device in self.attention_workers:
                yield Position(index, s, device, True, 0, stage.layers)
                index += 1

    @cached_property
    def stage_positions(self) -> tuple[range, ...]:
        """Indices of the positions of each stage."""
        width = len(self.attention_workers)
        ranges: list[range] = []
        start = 0
        for stage in self.stages:
            ranges.append(range(start, start + stage.tp + width))
            start += stage.tp + width
        return tuple(ranges)

    @cached_property
    def devices(self) -> tuple[int, ...]:
        """Every device of the instance, primaries first."""
        return tuple(d for stage in self.stages for d in stage.devices) + self.attention_workers

    @property
    def layers(self) -> int:
        """Layers over all stages."""
        return sum(stage.layers for stage in self.stages)

    @cached_property
    def local_placement(self) -> Placement:
        """Every group at the rank that holds its QKV weights: plain tensor parallelism."""
        return tuple(position.owned_groups for position in self.positions)


SOURCE, SINK = -1, -2
"""Where edges of a mesh begin and end that lead from and to whoever hands requests out."""


@dataclass(frozen=True)
class MeshNode(StagePlan):
    """A tensor-parallel group that holds ``layers`` layers from ``first_layer`` on.

    ``tokens_per_s`` is the rate of tokens, prompts included, at which the policy rates it.
    """

    first_layer: int = 0
    tokens_per_s: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.first_layer >= 0, "node.first_layer", self.first_layer, ">= 0")

    @property
    def end_layer(self) -> int:
        """One past its last layer."""
        return self.first_layer + self.layers


@dataclass(frozen=True)
class MeshEdge:
    """A way from node ``source`` (or ``SOURCE``) to node ``target`` (or ``SINK``).

    ``tokens_per_s`` is its flow in the plan: the weight by which it is chosen.
    """

    source: int
    target: int
    tokens_per_s: float


@dataclass(frozen=True)
class MeshPlan:
    """Nodes and the ways between them. A request goes from ``SOURCE`` to ``SINK``.

    At every node it passes the layers that it has not passed yet: those from the end of the node
    before on. So an edge leads to a node that holds the layer after the last one of its source.

    Attributes:
        nodes, edges: numbered by their places here.
        mean_output_tokens: what the operator expects a request to generate.
    """

    nodes: tuple[MeshNode, ...]
    edges: tuple[MeshEdge, ...]
    mean_output_tokens: float = 0.0

    def __post_init__(self) -> None:
        require(len(self.nodes) >= 1, "mesh.nodes", self.nodes, "at least one node")
        used = [d for node in self.nodes for d in node.devices]
        require(len(used) == len(set(used)), "mesh.devices", used, "each device in one node only")
        pairs = [(edge.source, edge.target) for edge in self.edges]
        require(len(pairs) == len(set(pairs)), "mesh.edges", pairs, "each pair of ends once")
        for edge in self.edges:
            self._check(edge)

    def _check(self, edge: MeshEdge) -> None:
        known = range(len(self.nodes))
        ends = (edge.source, edge.target)
        require(edge.source in (SOURCE, *known) and edge.target in (SINK, *known) and ends != (SOURCE, SINK),
                "mesh.edge", ends, f"from {SOURCE} or a node 0..{len(known) - 1}, to a node or {SINK}")
        require(0.0 < edge.tokens_per_s < float("inf"), "mesh.edge.tokens_per_s", edge.tokens_per_s,
                "positive and finite")
        passed = self.nodes[edge.source].end_layer if edge.source >= 0 else 0
        if edge.target == SINK:
            require(passed == self.layers, "mesh.edge", ends, f"from a node that ends at {self.layers}")
        else:
            node = self.nodes[edge.target]
            require(node.first_layer <= passed < node.end_layer, "mesh.edge", ends,
                    f"to a node that holds layer {passed}, not {node.first_layer}..{node.end_layer - 1}")

    @property
    def layers(self) -> int:
        """Layers of the whole model."""
        return max(node.end_layer for node in self.nodes)

    @cached_property
    def devices(self) -> tuple[int, ...]:
        """Every device, node by node."""
        return tuple(d for node in self.nodes for d in node.devices)

    @cached_property
    def outgoing(self) -> dict[int, tuple[int, ...]]:
        """Numbers of the edges that leave ``SOURCE`` and each node."""
        found: dict[int, list[int]] = {at: [] for at in (SOURCE, *range(len(self.nodes)))}
        for number, edge in enumerate(self.edges):
            found[edge.source].append(number)
        return {at: tuple(edges) for at, edges in found.items()}

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The nodes from the front of the model to its end: edges only lead onwards in it."""
        return tuple(sorted(range(len(self.nodes)), key=lambda n: (self.nodes[n].end_layer, n)))


@dataclass(frozen=True)
class Plan:
    """The placement of a whole cluster: instances, or a mesh.

    Attributes:
        instances: the replicas; none beside a mesh.
        reasons: for every device id, one sentence on its role.
        search: figures of the search that found the plan (seconds, candidates, costs).
        mesh: nodes and edges, None beside instances.
    """

    instances: tuple[InstancePlan, ...]
    reasons: dict[int, str] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    mesh: MeshPlan | None = None

    def __post_init__(self) -> None:
        require((len(self.instances) >= 1) != (self.mesh is not None), "plan.instances", self.instances,
                "at least one instance, or none beside a mesh")
        used = [d for instance in self.instances for d in instance.devices]
        require(len(used) == len(set(used)), "plan.devices", used, "each device in one instance only")

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for ``plan.json``; without the seconds of the search, which differ every time."""
        plain = asdict(self)
        plain["search"].pop("seconds", None)
        if self.mesh is None:
            del plain["mesh"]
        return plain


def even_groups(kv_heads: int, tp: int) -> tuple[int, ...]:
    """Split the KV groups over ``tp`` ranks as evenly as whole groups allow.

    Raises:
        SpecError: more ranks than KV heads.
    """
    require(1 <= tp <= kv_heads, "tp", tp, f"between 1 and kv_heads={kv_heads}")
    base, extra = divmod(kv_heads, tp)
    return tuple(base + (rank < extra) for rank in range(tp))
