"""What decode attention at a position takes over the line that policies go by."""

from __future__ import annotations

from typing import NamedTuple

from hetis_sim.cost.model import AttentionCost, CostModel
from hetis_sim.policies.plan import Position
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec


class Bend(NamedTuple):
    """A factor on the line of a batch.

    It is taken anew whenever the batch changes, and stays until then: contexts grow by little meanwhile, and
    iterations of a batch are a line in their number however many are counted at once.

    Attributes:
        cost: of the position's device, in query heads and bytes.
        heads_per_group, bytes_per_token: of a KV group, in one layer.
    """

    cost: AttentionCost
    heads_per_group: int
    bytes_per_token: int

    def at(self, groups: int, group_tokens: int) -> float:
        """Of ``groups`` KV groups with ``group_tokens`` tokens in all."""
        return self.cost.over_line(groups * self.heads_per_group, group_tokens * self.bytes_per_token)


def bend_of(cost: CostModel, gpu: GpuSpec, model: ModelSpec, position: Position) -> Bend | None:
    """That of a position; None where the line is all that is known."""
    attention = (cost.remote_attention if position.remote else cost.decode_attention)(gpu, model)
    if attention.correction is None:
        return None
    return Bend(attention, model.heads_per_group, model.kv_bytes_per_token_per_layer_per_group)
