"""What a policy sees: a read-only picture of an instance and its requests.

The oracle boundary runs here. Nothing in this module knows how many tokens a request
will generate; a policy that wants a length brings a predictor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hetis_sim.policies.plan import InstancePlan, MeshPlan, Placement
from hetis_sim.policies.ranges import AnyPlacement, group_blocks, token_split


@dataclass(frozen=True, slots=True)
class RequestView:
    """A request as a policy may know it.

    Attributes:
        request_id, arrival_s, prompt_tokens: as submitted.
        context_tokens: tokens whose cache must exist now: the prompt, plus what has been
            generated (a preempted request starts again with both).
        generated_tokens: tokens made so far.
        placement: groups at each position, None while it waits; with ranges those of the tail.
        preemptions: how often it lost its cache.
        movable: its heads may move now (it decodes and no move of its is under way).
        blocks: blocks in ranges at each position (:class:`TokenSplit`), empty without ranges.
    """

    request_id: int
    arrival_s: float
    prompt_tokens: int
    context_tokens: int
    generated_tokens: int = 0
    placement: Placement | None = None
    preemptions: int = 0
    movable: bool = False
    blocks: tuple[int, ...] = ()

    @property
    def placed(self) -> AnyPlacement | None:
        """Groups and ranges as a policy gives them, None while it waits."""
        return self.placement if self.placement is None else token_split(self.placement, self.blocks)


@dataclass(frozen=True, slots=True)
class PositionCost:
    """Durations of decode attention at one position, for one layer, in KV groups.

    ``a*h + b*g + c`` of the device with h and g counted in groups and group-tokens, and
    for a remote position the transfer ``gamma*d + beta`` with d in groups. ``wire_s_per_group``
    takes the load to be even over the ``wire_sharers`` attention workers behind the same
    network interface (0 where the wire is the position's own): each has that share of it.

    Of requests with token ranges, ``still_wire_s_per_group`` is the wire time of a group in a
    range, ``merge_wire_s_per_group`` what a group of a remote tail takes longer. A rank merges the
    partial outputs of its groups after the slowest has come: ``merge_s_per_group`` for each that
    it reads or writes, and ``c_s`` once.

    ``pack_fixed_s`` and ``pack_s_per_group`` are processor time of the rank itself for a remote position:
    the whole stage waits for it, and no choice of heads hides it.
    """

    a_s_per_group: float
    b_s_per_group_token: float
    c_s: float
    wire_s_per_group: float = 0.0
    wire_fixed_s: float = 0.0
    wire_sharers: int = 0
    still_wire_s_per_group: float = 0.0
    merge_wire_s_per_group: float = 0.0
    merge_s_per_group: float = 0.0
    pack_s_per_group: float = 0.0
    pack_fixed_s: float = 0.0

    def seconds(self, groups: float, group_tokens: float) -> float:
        """Completion time of the position's share; 0 when it has none."""
        if groups <= 0:
            return 0.0
        return ((self.a_s_per_group + self.wire_s_per_group) * groups
                + self.b_s_per_group_token * group_tokens + self.c_s + self.wire_fixed_s)


@dataclass(frozen=True, slots=True)
class InstanceLoad:
    """How much an instance has to do: what routing goes by. Fields as in :class:`InstanceView`.

    ``guests`` counts the running requests for which the instance does the other pool's work:
    prefilled where requests otherwise only decode, or the other way round.
    """

    index: int
    plan: InstancePlan
    capacity_units: dict[int, int]
    running: int
    waiting: int
    waiting_tokens: int
    context_tokens: int
    guests: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain types in a fixed order, hashed into the decision log."""
        return {"index": self.index, "running": self.running, "waiting": self.waiting,
                "waiting_tokens": self.waiting_tokens, "context_tokens": self.context_tokens,
                "guests": self.guests}


@dataclass(frozen=True, slots=True)
class InstanceView:
    """The state of one instance at one moment. Sequences are read-only.

    Memory is counted in units of (block_tokens x one KV group x one layer); a block of a
    group at a position takes ``layers`` units of that stage.

    Attributes:
        index: number of the instance in the plan.
        plan: its stages and attention workers.
        costs: one :class:`PositionCost` per position.
        groups, group_tokens: per position, over all requests that hold cache there: KV
            groups, and KV groups times the tokens of them that are there.
        lanes: micro-batches that share the load (equal to the number of stages).
        free_units, capacity_units: per device id.
        block_tokens: tokens of one block.
        running, waiting: numbers of requests.
        waiting_tokens: prompt tokens not yet prefilled.
        context_tokens: tokens in cache, summed over the running requests.
    """

    index: int
    plan: InstancePlan
    costs: Sequence[PositionCost]
    groups: Sequence[int]
    group_tokens: Sequence[int]
    lanes: int
    free_units: dict[int, int]
    capacity_units: dict[int, int]
    block_tokens: int
    running: int
    waiting: int
    waiting_tokens: int
    context_tokens: int

    def blocks(self, tokens: int) -> int:
        """Blocks that ``tokens`` positions of one group take."""
        return -(-tokens // self.block_tokens)

    def units_needed(self, placement: AnyPlacement, tokens: int) -> dict[int, int]:
        """Units per device id for ``tokens`` of cache under a placement."""
        need: dict[int, int] = {}
        held = group_blocks(self.plan, placement, self.blocks(tokens))
        for position, groups in zip(self.plan.positions, held, strict=True):
            if groups:
                need[position.device] = need.get(position.device, 0) + groups * position.layers
        return need

    def fits(self, placement: AnyPlacement, tokens: int) -> bool:
        """Whether every device has room for the placement."""
        free = self.free_units
        return all(units <= free[device] for device, units in self.units_needed(placement, tokens).items())

    def to_dict(self) -> dict[str, Any]:
        """Plain types in a fixed order, hashed into the decision log."""
        return {
            "index": self.index, "groups": list(self.groups), "group_tokens": list(self.group_tokens),
            "free_units": sorted(self.free_units.items()), "running": self.running,
            "waiting": self.waiting, "waiting_tokens": self.waiting_tokens,
        }


@dataclass(frozen=True, slots=True)
class MeshView:
    """The state of a mesh at one moment. Sequences are read-only.

    Cache of a node is counted in entries: one token in one layer, all KV groups. A request takes
    entries for the layers that it passes at the node.

    Attributes:
        plan: nodes and edges.
        capacity_entries, free_entries: per node.
        requests: per node, requests that hold cache there.
        request_layers: per node, the layers that they pass there, summed over them.
        prompt_entries: per node, the same times the tokens that each began with.
        queued_tokens: per node, tokens that wait there or are on their way to it.
        sent_tokens: per edge, tokens that have been sent over it, and prompts that will be.
        running, waiting: numbers of requests.
        block_tokens: tokens of one block.
    """

    plan: MeshPlan
    capacity_entries: Sequence[int]
    free_entries: Sequence[int]
    requests: Sequence[int]
    request_layers: Sequence[int]
    prompt_entries: Sequence[int]
    queued_tokens: Sequence[int]
    sent_tokens: Sequence[int]
    running: int
    waiting: int
    block_tokens: int
    index: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain types in a fixed order, hashed into the decision log."""
        return {"free_entries": list(self.free_entries), "requests": list(self.requests),
                "prompt_entries": list(self.prompt_entries), "queued_tokens": list(self.queued_tokens),
                "sent_tokens": list(self.sent_tokens), "running": self.running, "waiting": self.waiting}


@dataclass(frozen=True, slots=True)
class Move:
    """Give one running request a new placement; only the difference travels."""

    request_id: int
    placement: AnyPlacement
