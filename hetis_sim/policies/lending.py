"""Estimates for instances that lend tokens: what their own cache cannot hold is read at creditors."""

from __future__ import annotations

from collections.abc import Sequence

from hetis_sim.policies.offload import OffloadEstimator
from hetis_sim.policies.phases import ranks
from hetis_sim.policies.shape import InstanceShape, StageShape


class LendingEstimator(OffloadEstimator):
    """Estimates of instances whose workers hold the oldest tokens, as far as home is short.

    The tokens that are away are taken to be whole prompts, each at one creditor (ours): so many requests
    have their queries sent and their outputs merged.
    """

    def _attention(self, shape: InstanceShape, layers: Sequence[int], requests: int) -> list[float] | None:
        """Seconds of one layer, by stage; None where the tokens do not fit, or home has room for none."""
        away = [self._away_share(stage, n, requests) for stage, n in zip(shape.stages, layers, strict=True)]
        layer_bytes = self.group_bytes * self.problem.model.kv_heads * requests
        lent_bytes = sum(n * layer_bytes * share for n, share in zip(layers, away, strict=True))
        if min(away) < 0.0 or lent_bytes > shape.worker_bytes:
            return None
        lane = requests / len(shape.stages)
        shares = list(zip(shape.stages, away, strict=True))
        jobs = sum(self._lent_s(stage, share, lane) for stage, share in shares)
        return [self._stage_s(stage, share, lane, jobs) for stage, share in shares]

    def _away_share(self, stage: StageShape, layers: int, requests: int) -> float:
        """Share of a stage's tokens that home cannot hold; -1 where it must hold some and can hold none."""
        least = min((room - layers * weights) / (layers * self.group_bytes * owned * requests)
                    for room, weights, owned in ranks(stage))
        # The output stays where it is made, and a token of the prompt.
        if least * self.context < self.context - self.prompt + 1:
            return -1.0
        return max(0.0, 1.0 - least)

    def _lent(self, share: float, requests: float) -> float:
        """Requests of a lane that have tokens away."""
        return requests * min(1.0, share * self.context / self.prompt)

    def _lent_s(self, stage: StageShape, share: float, requests: float) -> float:
        """Time of the workers for one layer of a stage, evenly loaded."""
        if share <= 0.0:
            return 0.0
        kv_heads = self.problem.model.kv_heads
        heads, tokens = kv_heads * self._lent(share, requests), kv_heads * requests * share * self.context
        rate = sum(n / (cost.a_s_per_group * heads + cost.b_s_per_group_token * tokens)
                   for n, cost in stage.away)
        return max(cost.c_s for _, cost in stage.away) + 1.0 / rate

    def _stage_s(self, stage: StageShape, share: float, requests: float, jobs: float) -> float:
        """Time of one layer of a stage: the slower of home and creditors, and merging."""
        owned = max(stage.owned)
        home = stage.home.seconds(owned * requests, owned * requests * self.context * (1.0 - share))
        if share <= 0.0:
            return home
        lent = self._lent(share, requests)
        each = self.problem.model.kv_heads * lent / sum(n for n, _ in stage.away)
        wire = max(cost.wire_fixed_s + cost.still_wire_s_per_group * each for _, cost in stage.away)
        merging = 3 * owned * lent * stage.home.merge_s_per_group + stage.home.c_s
        return max(home, wire + jobs) + merging
