"""Decode-attention lines of a lane some of whose requests have token ranges.

Three sums at every position tell its share: KV groups that grow with every token, groups in
ranges, which do not, and group-tokens that are read. All heads of a range compute, so the
query of a request goes to every holder; its new key and value go to the tail alone. The ranks
merge partial outputs once the slowest has come (ours: after it, not while others compute).
"""

from __future__ import annotations

from collections.abc import Sequence

from hetis_sim.control.envelope import Line
from hetis_sim.control.loads import Loads
from hetis_sim.policies.plan import InstancePlan
from hetis_sim.policies.view import PositionCost

Lines = tuple[Line, ...]


def ranged_lines(plan: InstancePlan, costs: Sequence[PositionCost], lane: int, loads: Loads,
                 waits: Sequence[float]) -> tuple[list[tuple[Lines, Lines, Lines]], Lines]:
    """For every stage the lines of its ranks, of its attention workers and of all; and the workers' work.

    Args:
        plan, costs: the instance.
        lane: which of its lanes.
        loads: the loads of all lanes.
        waits: per position, the jobs that one there waits for.
    """
    grow, base = loads.groups[lane].tolist(), loads.base[lane].tolist()
    still, merged = loads.still[lane].tolist(), loads.merged[lane].tolist()
    stages: list[tuple[Lines, Lines, Lines]] = []
    busy: dict[int, list[float]] = {device: [0.0, 0.0] for device in plan.attention_workers}
    for indices in plan.stage_positions:
        lines: tuple[dict[Line, None], dict[Line, None]] = ({}, {})
        shared = [p for p in indices if costs[p].wire_sharers]
        sent = [sum([row[p] for p in shared]) for row in (grow, still, merged)]
        merging = _merging_s(plan, costs, indices, still, merged)
        for p in indices:
            cost, layers, device = costs[p], plan.positions[p].layers, plan.positions[p].device
            if not grow[p] and not still[p]:
                continue
            slope = cost.b_s_per_group_token * grow[p]
            own = cost.a_s_per_group * (grow[p] + still[p]) + cost.c_s
            own += cost.b_s_per_group_token * (base[p] + grow[p])
            # Through a shared interface goes what leaves for all of its workers.
            g, s, m = sent if cost.wire_sharers else (grow[p], still[p], merged[p])
            wire = cost.wire_s_per_group * g + cost.still_wire_s_per_group * s
            wire += cost.merge_wire_s_per_group * m
            start = own + wire / max(1, cost.wire_sharers) + cost.wire_fixed_s + waits[p] + merging
            lines[plan.positions[p].remote][layers * start, layers * slope] = None
            if device in busy:
                busy[device][0] += layers * own
                busy[device][1] += layers * slope
        local, remote = tuple(lines[0]), tuple(lines[1])
        stages.append((local, remote, local + remote))
    return stages, tuple([(start, slope) for start, slope in busy.values()])


def _merging_s(plan: InstancePlan, costs: Sequence[PositionCost], indices: range,
               still: Sequence[int], merged: Sequence[int]) -> float:
    """Time of the slowest rank to merge the partial outputs of its groups, for one layer.

    It reads every partial output and writes as many outputs as there are tails.
    """
    away = sum([2 * merged[p] + still[p] for p in indices if plan.positions[p].remote])
    kv_heads = sum([plan.positions[p].owned_groups for p in indices])
    slowest = 0.0
    for p in indices:
        owned = plan.positions[p].owned_groups
        amount = away * owned / kv_heads + 2 * merged[p] + still[p]
        if owned and amount:
            slowest = max(slowest, costs[p].merge_s_per_group * amount + costs[p].c_s)
    return slowest
