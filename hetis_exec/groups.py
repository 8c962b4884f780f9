"""Which KV groups of a request live where.

The control plane counts groups at positions; tensors need to know which ones. A rank holds
none but its own groups (those whose weights it has), an attention worker any. The rules here
are deterministic: the same placements in the same order give the same map in every process.
"""

from __future__ import annotations

from hetis_exec.errors import CacheError
from hetis_sim.control.placement import match
from hetis_sim.policies.plan import InstancePlan, Placement

Groups = tuple[int, ...]

Holders = tuple[tuple[int, ...], ...]
"""For every stage, the position that holds each KV group."""


class GroupMap:
    """Turns counts of groups into sets of groups, for the requests of one instance."""

    def __init__(self, plan: InstancePlan) -> None:
        self._plan = plan
        self._owned: dict[int, range] = {}
        for indices in plan.stage_positions:
            first = 0
            for p in indices:
                owned = plan.positions[p].owned_groups
                self._owned[p] = range(first, first + owned)
                first += owned

    def owned(self, position: int) -> range:
        """Groups whose weights a rank holds; none for an attention worker."""
        return self._owned[position]

    def initial(self, placement: Placement) -> Holders:
        """Each rank keeps the first of its groups; attention workers take the others in order."""
        stages: list[tuple[int, ...]] = []
        for indices in self._plan.stage_positions:
            holders = [p for p in indices for _ in self._owned[p]]
            ranks = [p for p in indices if not self._plan.positions[p].remote]
            left = {p: list(self._owned[p])[placement[p]:] for p in ranks}
            give = [[p, len(left[p])] for p in ranks]
            take = [[p, placement[p]] for p in indices if self._plan.positions[p].remote]
            for source, target, amount in match(give, take):
                for _ in range(amount):
                    holders[left[source].pop(0)] = target
            stages.append(tuple(holders))
        return tuple(stages)

    def rearranged(self, holders: Holders, placement: Placement) -> Holders:
        """The map after a change of placement, with as few groups as possible on the way."""
        return tuple(self._rearrange(stage, list(now), placement) for stage, now in enumerate(holders))

    def _rearrange(self, stage: int, now: list[int], placement: Placement) -> tuple[int, ...]:
        indices = self._plan.stage_positions[stage]
        short = {p: placement[p] - now.count(p) for p in indices}
        # Ranks first: they can take none but their own groups.
        for p in sorted(indices, key=lambda p: (self._plan.positions[p].remote, p)):
            while short[p] > 0:
                group = self._taken(p, now, short)
                short[now[group]] += 1
                short[p] -= 1
                now[group] = p
        return tuple(now)

    def _taken(self, target: int, now: list[int], short: dict[int, int]) -> int:
        """The group that a position takes next: from one that has too many, if that one has any for it."""
        allowed = self._owned[target] or range(len(now))
        candidates = [g for g in allowed if now[g] != target]
        spare = [g for g in candidates if short[now[g]] < 0]
        if not spare:
            # Nobody who has too many holds one of this rank's groups; whoever does gets another for it.
            spare = [g for g in candidates if self._plan.positions[now[g]].remote]
        if not spare:
            raise CacheError(f"no KV group for position {target} among {now}")
        return min(spare, key=lambda g: (now[g], g))
