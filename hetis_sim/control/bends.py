"""What decode attention at a position takes over the line that policies go by."""

from __future__ import annotations

import math
from typing import NamedTuple

from hetis_sim.cost.model import AttentionCost, CostModel
from hetis_sim.policies.plan import Position
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec

GROWTH = 1.25
"""A line goes through what a batch takes now and what it takes when its cache has grown by that much."""


class Bend(NamedTuple):
    """A factor on the line of a batch.

    Attributes:
        cost: of the position's device, in query heads and bytes.
        heads_per_group, bytes_per_token: of a KV group, in one layer.
        least: the least that it is for any batch.
    """

    cost: AttentionCost
    heads_per_group: int
    bytes_per_token: int
    least: float

    def at(self, groups: int, group_tokens: float) -> float:
        """Of ``groups`` KV groups with ``group_tokens`` tokens in all."""
        return self.cost.over_line(groups * self.heads_per_group, group_tokens * self.bytes_per_token)


def secant(bend: Bend | None, line: tuple[float, float, float], groups: int, first: int, now: int
           ) -> tuple[float, float]:
    """Attention of a batch by its iterations, as a line: so however many are counted at once is the same.

    It is taken anew whenever the batch changes, and goes through two points of the curve from there on, but
    rises at least as the least line does: what no batch is faster than stays a bound, however far it goes.

    Args:
        line: seconds of the batch's heads, of each token of a group, and fixed ones.
        groups: of the batch; each gains a token in an iteration.
        first: tokens of its groups in iteration 0.
        now: in the iteration from which on the batch is as it is.

    Returns:
        Seconds in iteration 0, and what each iteration adds.
    """
    heads_s, token_s, fixed_s = line
    if bend is None:
        return heads_s + token_s * first + fixed_s, token_s * groups
    later = GROWTH * now
    now_s, later_s = (bend.at(groups, tokens) * (heads_s + token_s * tokens + fixed_s)
                      for tokens in (now, later))
    slope = max(bend.least * token_s, (later_s - now_s) / (later - now))
    return now_s - slope * (now - first), slope * groups


def bend_of(cost: CostModel, gpu: GpuSpec, model: ModelSpec, position: Position) -> Bend | None:
    """That of a position; None where the line is all that is known."""
    attention = (cost.remote_attention if position.remote else cost.decode_attention)(gpu, model)
    if attention.correction is None:
        return None
    return Bend(attention, model.heads_per_group, model.kv_bytes_per_token_per_layer_per_group,
                math.exp(min(attention.correction.values)))
