"""The decode-attention time that an instance could have with the load that it carries."""

from __future__ import annotations

from hetis_sim.policies.hetis.attention import AttentionContext
from hetis_sim.policies.hetis.filling import divisible_level
from hetis_sim.policies.hetis.placing import spread_many
from hetis_sim.policies.view import InstanceView


def attention_bound(context: AttentionContext, view: InstanceView) -> float:
    """A lower bound on F for the load of a view: every stage alone with all workers, heads divisible.

    Heads that find no cache at the ranks of their stage are at the workers in any case, and
    their jobs delay each other. Seconds times micro-batches.
    """
    forced_jobs = 0.0
    forced: list[bool] = []
    levels: list[float] = []
    for stage in context.stages:
        here = range(stage.first, stage.last)
        groups = sum(view.groups[p] for p in here)
        if not groups:
            return 0.0
        tokens = sum(view.group_tokens[p] for p in here) / groups
        unit = stage.layers * tokens / view.block_tokens
        limits = [min(rank.owned * groups / context.kv_heads, view.capacity_units[rank.device] / unit)
                  for rank in stage.local]
        away = groups - sum(limits)
        forced.append(away > 1e-9 * groups)
        forced_jobs += max(0.0, away) * min((r.a + r.b * tokens for r in stage.remote), default=0.0)
        start = [rank.fixed for rank in stage.local]
        step = [rank.a + rank.b * tokens for rank in stage.local]
        own = [remote for remote in stage.remote if not remote.shared]
        start += [remote.fixed + remote.wire_fixed for remote in own]
        step += [remote.a + remote.b * tokens + remote.wire for remote in own]
        if stage.shared:
            # Together no faster than one worker with the speed of all behind the interface.
            through = [stage.remote[w] for w in stage.shared]
            start.append(min(remote.fixed + remote.wire_fixed for remote in through))
            speed = sum(1.0 / (remote.a + remote.b * tokens) for remote in through)
            step.append(stage.shared_wire + 1.0 / speed)
        levels.append(_limited_level(start, step, limits, groups))
    job = forced_jobs / max(1, len(context.workers))
    return sum(stage.layers * (max(level, job) if away else level)
               for stage, level, away in zip(context.stages, levels, forced, strict=True))


def _limited_level(start: list[float], step: list[float], limits: list[float], units: float) -> float:
    """Level of a divisible load when the first positions have limits."""
    level = divisible_level(start, step, units)
    full = [i for i, limit in enumerate(limits) if start[i] + limit * step[i] < level]
    over = units - sum(limits[i] for i in full)
    rest = [i for i in range(len(start)) if i not in full]
    if not full or not rest or over <= 1e-9 * units:
        return level
    return divisible_level([start[i] for i in rest], [step[i] for i in rest], over)


def attention_exceeds(context: AttentionContext, view: InstanceView, now: float, factor: float) -> bool:
    """Whether the present time is more than ``factor`` times the ideal; solves the program in doubt only."""
    if now <= factor * attention_bound(context, view):
        return False
    mean = mean_request(context, view)
    if mean is None:
        return False
    fresh = spread_many(context, *mean, view.capacity_units)
    if fresh is not None and now > factor * context.total_time(fresh, [n * mean[1] for n in fresh]):
        return True
    return now > factor * ideal_time(context, view)


def mean_request(context: AttentionContext, view: InstanceView) -> tuple[float, float, float] | None:
    """Number of requests that a view's load makes up, their mean context and blocks; None for no load."""
    first = context.stages[0]
    groups = sum(view.groups[first.first:first.last])
    if not groups:
        return None
    tokens = sum(view.group_tokens[first.first:first.last]) / groups
    return groups / context.kv_heads, tokens, tokens / view.block_tokens + 0.5


def ideal_time(context: AttentionContext, view: InstanceView) -> float:
    """F when all the load of a view is spread afresh as if heads were divisible (the re-solved time).

    The linear program over the attention workers that a fresh placement uses; seconds times
    micro-batches. Never more than the present time.
    """
    from hetis_sim.policies.hetis.lp import Item, solve

    now = context.total_time(view.groups, view.group_tokens)
    mean = mean_request(context, view)
    if mean is None:
        return now
    count, tokens, blocks = mean
    fresh = spread_many(context, count, tokens, blocks, view.capacity_units) or view.groups
    pairs = {(stage.index, d) for stage in context.stages for d in range(len(context.workers))
             if fresh[stage.middle + d] > 0}
    nothing = [0] * context.positions
    spread = solve(context, [Item(tokens, blocks, count)], nothing, nothing, view.capacity_units, pairs)
    return now if spread is None else min(now, spread.time)
