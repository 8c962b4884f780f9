"""Placements that split a request's cache by sequence as well as by head.

Infinite-LLM (Lin et al., arXiv 2401.02669) and attention nodes that hold token ranges divide the
attention of one request over its tokens: whoever holds a range computes all heads over it and
sends back a partial output with its softmax statistics, which the primaries merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetis_sim.policies.plan import InstancePlan, Placement


@dataclass(frozen=True, slots=True)
class TokenSplit:
    """A placement with token ranges.

    A range is a number of whole blocks of the oldest tokens and does not grow. In a stage it is
    held by one attention worker, with all KV groups, or by the ranks together, each with the
    groups that it owns. All other tokens, the newest included, are the tail; in a stage with
    ranges one holder has the whole tail, and no range besides.

    Attributes:
        tail: KV groups of the tail at each position, as in a placement without ranges.
        blocks: blocks of the range at each position, 0 for none; equal at the ranks of a stage.
    """

    tail: Placement
    blocks: tuple[int, ...]


AnyPlacement = Placement | TokenSplit
"""What a policy may decide for a request: split by head alone, or with token ranges."""


def token_split(tail: Placement, blocks: Sequence[int]) -> AnyPlacement:
    """A placement with these ranges; the plain one where there are none."""
    return TokenSplit(tail, tuple(blocks)) if any(blocks) else tail


def full_groups(plan: InstancePlan) -> tuple[int, ...]:
    """KV groups that a range has at each position: all at a worker, those that it owns at a rank."""
    kv_heads = sum(plan.stages[0].owned_groups)
    return tuple([kv_heads if p.remote else p.owned_groups for p in plan.positions])


def range_blocks(plan: InstancePlan, blocks: Sequence[int]) -> list[int]:
    """Blocks in ranges, for every stage."""
    found: list[int] = []
    for stage, indices in zip(plan.stages, plan.stage_positions, strict=True):
        found.append(sum([blocks[p] for p in indices[stage.tp:]]) + blocks[indices.start])
    return found


def group_blocks(plan: InstancePlan, placement: AnyPlacement, blocks: int) -> list[int]:
    """Blocks of one KV group at every position, when the cache takes ``blocks`` of every group.

    Negative where the ranges hold more than that.
    """
    return group_tokens(plan, placement, blocks, 1)


def computed_groups(plan: InstancePlan, placement: AnyPlacement) -> list[int]:
    """KV groups computed at every position, in a range or in the tail."""
    if not isinstance(placement, TokenSplit):
        return list(placement)
    return [groups or (full if held else 0) for groups, full, held
            in zip(placement.tail, full_groups(plan), placement.blocks, strict=True)]


def group_tokens(plan: InstancePlan, placement: AnyPlacement, tokens: int, block_tokens: int) -> list[int]:
    """At every position, the sum over its KV groups of the tokens that are there."""
    if not isinstance(placement, TokenSplit):
        return [groups * tokens for groups in placement]
    ranges = range_blocks(plan, placement.blocks)
    return [groups * (tokens - ranges[p.stage] * block_tokens) + full * held * block_tokens
            for p, groups, full, held
            in zip(plan.positions, placement.tail, full_groups(plan), placement.blocks, strict=True)]


def split_fault(plan: InstancePlan, placement: TokenSplit) -> str:
    """Which rule of :class:`TokenSplit` the ranges break; empty for none."""
    if len(placement.blocks) != len(plan.positions) or len(placement.tail) != len(plan.positions):
        return f"has {len(placement.blocks)} ranges for {len(plan.positions)} positions"
    if any(type(n) is not int or n < 0 for n in placement.blocks) or not any(placement.blocks):
        return "needs whole numbers of blocks >= 0, and one > 0"
    full = full_groups(plan)
    for s, (stage, indices) in enumerate(zip(plan.stages, plan.stage_positions, strict=True)):
        home, away = indices[:stage.tp], indices[stage.tp:]
        if len({placement.blocks[p] for p in home}) > 1:
            return f"has unequal ranges at the ranks of stage {s}"
        if not any(placement.blocks[p] for p in indices):
            continue
        holders = [p for p in indices if placement.tail[p]]
        if holders != list(home) and (len(holders) != 1 or holders[0] not in away):
            return f"divides the tail of stage {s} between {len(holders)} positions"
        if any(placement.tail[p] != full[p] for p in holders):
            return f"has a tail in stage {s} that lacks heads"
        if any(placement.blocks[p] for p in holders):
            return f"gives the holder of the tail of stage {s} a range besides"
    return ""
