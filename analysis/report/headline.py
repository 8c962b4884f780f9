"""What a report says first: sentences worked out from the figures, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.figures.charts import Floats
from analysis.figures.loads import SEEDS_MIN, Point, load_points, load_unit, student
from analysis.figures.runs import ReportRun, model_name, origin_of, section_name
from hetis_sim.metrics.intervals import mean_interval

ATTAINED = 0.9
"""Share of the requests that must hold the SLO for a load to count as served."""

PAIRS_MAX = 4
GROWING_MAX = 2
ROUNDING = 1e-9
"""Relative difference below which two times are the same."""


def headline(runs: Sequence[ReportRun], bound: float | None = None) -> list[str]:
    """The sentences, the most telling first."""
    if len(runs) == 1:
        return [_one_run(runs[0], bound)]
    found = _served_loads(runs) + _best_goodput(runs, bound) + paired(runs)
    return found or [_one_run(run, bound) for run in runs[:PAIRS_MAX]]


def warnings(runs: Sequence[ReportRun]) -> list[str]:
    """What forbids taking figures at face value."""
    found = _growing(runs)
    for run in runs:
        start = f"{run.name}: " if len(runs) > 1 else ""
        counts = run.summary["requests"]
        if counts["rejected"]:
            reasons = ", ".join(f"{name} {number:,}" for name, number in counts["rejected_by_reason"].items())
            found.append(f"{start}{counts['rejected']:,} of {counts['submitted']:,} requests were rejected "
                         f"({reasons})")
        if counts["unfinished"]:
            found.append(f"{start}{counts['unfinished']:,} requests had not ended when the run was stopped")
        found += [start + warning for warning in run.run.manifest.get("cost_warnings", ())]
    return found


def _growing(runs: Sequence[ReportRun]) -> list[str]:
    """Runs whose queue grew, in one sentence where they are many."""
    growing = [run for run in runs if run.saturated]
    if len(growing) > GROWING_MAX:
        return [f"in {len(growing)} of {len(runs)} runs the queue grew for as long as the run lasted, so "
                "that latencies "
                f"depend on its length: {'; '.join(run.name for run in growing)}"]
    starts = [f"{run.name}: " if len(runs) > 1 else "" for run in growing]
    return [start + run.summary["saturation"]["sentence"] for start, run in zip(starts, growing, strict=True)]


# -- figures as text ----------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three significant figures."""
    if value is None or math.isnan(value):
        return "unknown"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def seconds(value: float | None) -> str:
    """A time in the unit that suits it."""
    if value is None or math.isnan(value):
        return "unknown"
    return f"{number(value * 1e3)} ms" if abs(value) < 1 else f"{number(value)} s"


def with_interval(value: float | None, interval: Sequence[float | None], show: Any = number) -> str:
    """A figure and its 95 % interval; a side that the data do not bound is a question mark."""
    low, high = interval
    if low is None and high is None:
        return str(show(value))
    limits = ["?" if limit is None else show(limit) for limit in (low, high)]
    return f"{show(value)} [{limits[0]}, {limits[1]}]"


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "unknown" if share is None else f"{100 * share:.1f} %"


# -- sentences ----------------------------------------------------------------------------


def _one_run(run: ReportRun, bound: float | None) -> str:
    rates, slo = run.summary["throughput"], run.summary["slo"]
    ttft, tpot = run.summary["ttft_s"], run.summary["tpot_s"]
    text = (f"{run.name if run.policy in run.name else run.policy} serving {model_name(run)} on "
            f"{section_name(run, 'cluster')} ({section_name(run, 'workload')}) finishes "
            f"{number(rates['request_throughput'])} requests/s")
    if run.load.unit == "users":
        text += f" with {number(run.load.value)} users"
    elif math.isfinite(run.arrival_rate):
        text += f" while {number(run.arrival_rate)} arrive"
    if bound is not None and rates["request_throughput"] is not None:
        text += f" ({percent(rates['request_throughput'] / bound)} of the bound)"
    text += (f", {number(rates['output_throughput'])} output tokens/s; p95 TTFT "
             f"{with_interval(ttft['p95'], ttft['p95_interval'], seconds)}, p95 TPOT "
             f"{with_interval(tpot['p95'], tpot['p95_interval'], seconds)}; "
             f"{with_interval(slo['attainment'], slo['attainment_interval'], percent)} of the requests hold "
             "the SLO "
             f"(ttft <= {slo['ttft_s']:g} s, tpot <= {slo['tpot_s']:g} s), a goodput of "
             f"{number(rates['request_goodput'])} requests/s")
    return f"{text} ({run.origin})."


def _served_loads(runs: Sequence[ReportRun]) -> list[str]:
    """Up to which of the loads tried each group holds the SLO."""
    unit = load_unit(runs)
    if unit is None:
        return []
    parts = [f"{group} {_served(points, unit)}" for group, points in load_points(runs, unit).items()]
    return [f"At least {ATTAINED:.0%} of the requests hold the SLO, of the loads tried: {'; '.join(parts)} "
            f"({origin_of(runs)})."]


def _served(points: Sequence[Point], unit: str) -> str:
    """The largest load up to which every load tried is served."""
    best: Point | None = None
    for point in points:
        if not point.figures(_attainment)[0] >= ATTAINED:
            over = f"not at {number(point.load)}"
            break
        best = point
    else:
        over = "the largest tried"
    if best is None:
        return f"at none (not at {number(points[0].load)} {unit})"
    share, low, high = best.figures(_attainment)
    limits = [None if math.isnan(limit) else min(limit, 1.0) for limit in (low, high)]
    return f"up to {number(best.load)} {unit} ({with_interval(share, limits, percent)} there; {over})"


def _attainment(summary: Mapping[str, Any]) -> tuple[float | None, Sequence[float | None]]:
    return summary["slo"]["attainment"], summary["slo"]["attainment_interval"]


def _goodput(summary: Mapping[str, Any]) -> tuple[float | None, Sequence[float | None]]:
    return summary["throughput"]["request_goodput"], (None, None)


def _best_goodput(runs: Sequence[ReportRun], bound: float | None) -> list[str]:
    """The largest goodput of every group."""
    unit = load_unit(runs)
    if unit is None:
        return []
    parts = []
    for group, points in load_points(runs, unit).items():
        figures = [point.figures(_goodput) for point in points]
        best = int(np.nanargmax([figure[0] for figure in figures]))
        value, low, high = figures[best]
        limits = [None if math.isnan(limit) else limit for limit in (low, high)]
        share = f", {percent(value / bound)} of the bound" if bound is not None else ""
        parts.append(f"{group} {with_interval(value, limits)} requests/s at {number(points[best].load)} "
                     f"{unit}{share}")
    return [f"Largest goodput: {'; '.join(parts)} ({origin_of(runs)})."]


def paired(runs: Sequence[ReportRun]) -> list[str]:
    """Differences of latency, request by request, between groups that had the same arrivals.

    Of the loads that several groups were run at, the highest is used at which no queue grew, with
    all seeds that every group has; the group with the shortest latency is compared with the others.
    """
    best: dict[str, list[ReportRun]] = {}
    for _, own in sorted(_by_load(runs).items()):
        sets = _common_seeds(own)
        if len(sets) > 1 and len(sets) >= len(best):
            best = sets
    if not best:
        return []
    fastest = min(best, key=lambda name: (_mean_e2el_s(best[name]), best[name][0].number))
    others = [name for name in best if name != fastest]
    found = [_pair(fastest, best[fastest], name, best[name]) for name in others[:PAIRS_MAX]]
    return [sentence for sentence in found if sentence]


ByGroup = dict[str, dict[str, ReportRun]]
"""Runs by group, and by what tells their arrivals apart."""


def _by_load(runs: Sequence[ReportRun]) -> dict[float, ByGroup]:
    found: dict[float, ByGroup] = {}
    for run in runs:
        if run.workload_hash is not None:
            groups = found.setdefault(run.load.value, {})
            # Two runs of one group and the same arrivals differ in something: each stands for itself.
            name = run.name if run.workload_hash in groups.get(run.group, ()) else run.group
            groups.setdefault(name, {})[run.workload_hash] = run
    return found


def _common_seeds(groups: ByGroup) -> dict[str, list[ReportRun]]:
    """Runs of each group with arrivals that every group had; none where some queue grew."""
    if any(run.saturated for own in groups.values() for run in own.values()):
        return {}
    first = next(iter(groups.values()))
    common = [key for key in first if all(key in own for own in groups.values())]
    return {name: [own[key] for key in common] for name, own in groups.items()} if common else {}


def _mean_e2el_s(runs: Sequence[ReportRun]) -> float:
    return float(np.mean([run.summary["e2el_s"]["mean"] for run in runs]))


def _pair(fast_name: str, fast: Sequence[ReportRun], other_name: str, other: Sequence[ReportRun]) -> str:
    """One sentence; runs pair up, and so do their requests."""
    names = ["request_id", "e2el_s", "ttft_s"]
    both = [one.measured[names].merge(two.measured[names], on="request_id", suffixes=("", "_other")).dropna()
            for one, two in zip(fast, other, strict=True)]
    if not all(len(frame) for frame in both):
        return ""
    texts = []
    for metric, name in (("e2el_s", "from arrival to end"), ("ttft_s", "to its first token")):
        differences = [np.asarray(own[f"{metric}_other"] - own[metric], dtype=np.float64) for own in both]
        typical = float(np.mean([frame[metric].mean() for frame in both]))
        texts.append(f"{_difference_text(differences, typical)} {name}")
    same = all(text.startswith("exactly") for text in texts)
    count = sum(len(frame) for frame in both)
    seeds = f" ({len(both)} seeds)" if len(both) > 1 else ""
    at = f" at {number(fast[0].load.value)} {fast[0].load.unit}"
    return (f"On the same {count:,} arrivals{at}{seeds}, a request takes on average {' and '.join(texts)} "
            f"with {fast_name} {'as' if same else 'than'} with {other_name} ({origin_of([*fast, *other])}).")


def _difference_text(differences: Sequence[Floats], typical: float) -> str:
    """Mean of paired differences, positive for less; the interval is across seeds where they are enough."""
    together = np.concatenate(differences)
    if np.abs(together).max(initial=0.0) <= ROUNDING * typical:
        return "exactly as long"
    if len(differences) >= SEEDS_MIN:
        mean, *interval = student([float(own.mean()) for own in differences])
    else:
        mean, interval = float(together.mean()), list(mean_interval(together))
    limits = sorted(math.copysign(1.0, mean) * limit for limit in interval)
    low, high = (None if math.isnan(limit) else limit for limit in limits)
    certain = low is None or high is None or low > 0
    return (f"{with_interval(abs(mean), (low, high), seconds)} {'less' if mean >= 0 else 'more'}"
            f"{'' if certain else ' (no clear difference)'}")
