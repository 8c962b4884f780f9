"""What a report says first: sentences worked out from the figures, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.figures.charts import Floats
from analysis.figures.loads import Point, load_points, load_unit
from analysis.figures.runs import ReportRun, model_name, origin_of, section_name
from hetis_sim.metrics.intervals import mean_interval

ATTAINED = 0.9
"""Share of the requests that must hold the SLO for a load to count as served."""

PAIRS_MAX = 4
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
    found = []
    for run in runs:
        start = f"{run.name}: " if len(runs) > 1 else ""
        if run.saturated:
            found.append(start + run.summary["saturation"]["sentence"])
        counts = run.summary["requests"]
        if counts["rejected"]:
            reasons = ", ".join(f"{name} {number:,}" for name, number in counts["rejected_by_reason"].items())
            found.append(f"{start}{counts['rejected']:,} of {counts['submitted']:,} requests were rejected "
                         f"({reasons})")
        if counts["unfinished"]:
            found.append(f"{start}{counts['unfinished']:,} requests had not ended when the run was stopped")
        found += [start + warning for warning in run.run.manifest.get("cost_warnings", ())]
    return found


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
    """Differences of latency, request by request, between runs of identical arrivals.

    Of the sets of runs with the same arrivals, the one with the highest load at which no queue
    grew is used; its fastest run is compared with every other one.
    """
    sets: dict[str, list[ReportRun]] = {}
    for run in runs:
        if run.workload_hash is not None:
            sets.setdefault(run.workload_hash, []).append(run)
    steady = [own for own in sets.values() if len(own) > 1 and not any(run.saturated for run in own)]
    if not steady:
        return []
    chosen = max(steady, key=lambda own: (len(own), own[0].load.value, -own[0].number))
    best = min(chosen, key=lambda run: (run.summary["e2el_s"]["mean"], run.number))
    others = [run for run in chosen if run is not best]
    parts = [part for run in others[:PAIRS_MAX] if (part := _pair(best, run))]
    return parts


def _pair(best: ReportRun, other: ReportRun) -> str:
    """One sentence; rows come in order of arrival, as the interval wants them."""
    names = ["request_id", "e2el_s", "ttft_s"]
    both = best.measured[names].merge(other.measured[names], on="request_id", suffixes=("",
                                                                                        "_other")).dropna()
    if not len(both):
        return ""
    texts: list[str] = []
    for metric, name in (("e2el_s", "from arrival to end"), ("ttft_s", "to its first token")):
        difference = np.asarray(both[f"{metric}_other"] - both[metric], dtype=np.float64)
        texts.append(f"{_difference_text(difference, float(both[metric].mean()))} {name}")
    return (f"On the same {len(both):,} arrivals, a request takes on average {' and '.join(texts)} with "
            f"{best.name} {'as' if all(t.startswith('exactly') for t in texts) else 'than'} with "
            f"{other.name} ({origin_of([best, other])}).")


def _difference_text(difference: Floats, typical: float) -> str:
    """Mean of paired differences, positive for less."""
    if np.abs(difference).max() <= ROUNDING * typical:
        return "exactly as long"
    mean, interval = float(difference.mean()), mean_interval(difference)
    low, high = (None if math.isnan(limit) else limit for limit in interval)
    if mean < 0:
        low, high = (None if limit is None else -limit for limit in (high, low))
    certain = low is None or high is None or low > 0
    return (f"{with_interval(abs(mean), (low, high), seconds)} {'less' if mean >= 0 else 'more'}"
            f"{'' if certain else ' (no clear difference)'}")
