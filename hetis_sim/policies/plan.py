"""What a policy decides once, before the first request: who computes what.

Heads are placed in KV groups (one KV head with its query heads). The cache of one
instance lives at *positions*: a position is one device in its role for one pipeline
stage. The tensor-parallel ranks of a stage are positions of that stage only; an
attention worker is a position of every stage of its instance.
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


@dataclass(frozen=True)
class Plan:
    """The placement of a whole cluster.

    Attributes:
        instances: the replicas.
        reasons: for every device id, one sentence on its role.
        search: figures of the search that found the plan (seconds, candidates, costs).
    """

    instances: tuple[InstancePlan, ...]
    reasons: dict[int, str] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(len(self.instances) >= 1, "plan.instances", self.instances, "at least one instance")
        used = [d for instance in self.instances for d in instance.devices]
        require(len(used) == len(set(used)), "plan.devices", used, "each device in one instance only")

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for ``plan.json``; without the seconds of the search, which differ every time."""
        plain = asdict(self)
        plain["search"].pop("seconds", None)
        return plain


def even_groups(kv_heads: int, tp: int) -> tuple[int, ...]:
    """Split the KV groups over ``tp`` ranks as evenly as whole groups allow.

    Raises:
        SpecError: more ranks than KV heads.
    """
    require(1 <= tp <= kv_heads, "tp", tp, f"between 1 and kv_heads={kv_heads}")
    base, extra = divmod(kv_heads, tp)
    return tuple(base + (rank < extra) for rank in range(tp))
