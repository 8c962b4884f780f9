"""The figures of one run; ``docs/metrics.md`` defines each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetis_sim.metrics.columns import STATUSES, Table
from hetis_sim.metrics.distribution import Distribution, distribution, itl_distribution
from hetis_sim.metrics.intervals import METHOD, Interval, share_interval
from hetis_sim.metrics.itl import Segments
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.metrics.records import Records
from hetis_sim.metrics.saturation import Saturation, saturation
from hetis_sim.metrics.usage import (
    DeviceUse,
    IterationUse,
    TransferUse,
    WireUse,
    cluster_kv_use,
    device_use,
    iteration_use,
    transfer_use,
    wire_use,
)
from hetis_sim.metrics.window import Trim, Window, left_s, measured_window
from hetis_sim.spec.errors import require
from hetis_sim.spec.slo import Slo

FINISHED = STATUSES.index("finished")


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the requests of the whole run.

    Attributes:
        submitted: finished, rejected and unfinished together.
        finished: made all their output tokens.
        rejected: turned away.
        rejected_by_reason: the same by reason.
        unfinished: still there when the run was stopped.
        measured: in the measured window, by arrival.
    """

    submitted: int
    finished: int
    rejected: int
    rejected_by_reason: dict[str, int]
    unfinished: int
    measured: int


@dataclass(frozen=True, slots=True)
class Throughput:
    """Rates over one stretch of time, per second.

    Attributes:
        duration_s: the stretch.
        request_throughput: requests that finished in it.
        output_throughput: output tokens made in it.
        total_token_throughput: the same, and prompt tokens whose prompt was completed in it.
        request_goodput: requests that finished in it and hold the SLO.
    """

    duration_s: float
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    request_goodput: float


@dataclass(frozen=True, slots=True)
class SloResult:
    """Share of the measured requests, rejected ones included, that hold the SLO."""

    ttft_s: float
    tpot_s: float
    attainment: float
    attainment_interval: Interval


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in figures.

    Attributes:
        label: ``simulated`` or ``measured``.
        requests: counts of the whole run.
        window: what is measured.
        ttft_s, tpot_s, itl_s, e2el_s, queue_s: latencies of the measured requests that finished
            (gaps between tokens: of those recorded in the window).
        throughput: rates over the measured window.
        whole_run: rates from the first arrival to the last end.
        slo: attainment.
        preemptions, moves: over all requests of the run.
        transfers: by kind.
        wires: use of every direction of a link over the whole run, the busiest first.
        kv_used_mean, kv_used_max: share of the cluster's cache, as in :class:`DeviceUse`.
        devices: use of each.
        iterations: where time went, over all steps and by kind.
        saturation: whether the number in the system grows; if it does, ttft, e2el and queueing
            have no intervals.
        counters: as counted by the driver.
        intervals: how the intervals were made.
        incomplete: why the run was stopped before its end; empty for a whole run. Figures of an
            incomplete run are of what had ended by then, which favours the short.
        outside_ranges: predictions outside what the cost model was fitted on: ``module``, ``device``,
            ``quantity``, the range (``low``, ``high``), the extremes outside (``least``, ``most``), and in
            how many ``iterations`` out of how many (``of_iterations``).
    """

    label: str
    requests: Counts
    window: Window
    ttft_s: Distribution
    tpot_s: Distribution
    itl_s: Distribution
    e2el_s: Distribution
    queue_s: Distribution
    throughput: Throughput
    whole_run: Throughput
    slo: SloResult
    preemptions: int
    moves: int
    transfers: dict[str, TransferUse]
    kv_used_mean: float
    kv_used_max: float
    devices: tuple[DeviceUse, ...]
    iterations: dict[str, IterationUse]
    saturation: Saturation
    counters: dict[str, float]
    intervals: str = METHOD
    incomplete: str = ""
    outside_ranges: tuple[dict[str, Any], ...] = ()
    wires: tuple[WireUse, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for ``summary.json``; intervals become pairs."""
        return asdict(self)


def summarize(source: Recorder | Records, *, slo: Slo, trim: Trim | None = None, roles: Sequence[str] = (),
              label: str = "simulated", submitted: int | None = None,
              horizon_s: float | None = None, incomplete: str = "",
              outside_ranges: Sequence[Mapping[str, Any]] = ()) -> Summary:
    """Work out all figures of a run.

    Args:
        source: what was recorded, or what a run folder holds.
        slo: limits for goodput.
        trim: requests to leave out at either end; by default none.
        roles: of each device, for the reader.
        label: ``simulated`` or ``measured``.
        submitted: requests that entered, where some had not ended when the run was stopped.
        horizon_s: when it was stopped.
        incomplete: why it was stopped before its end, if it was.
        outside_ranges: predictions outside what the cost model was fitted on.

    Raises:
        SpecError: fewer requests submitted than ended, or roles for another number of devices.
    """
    records = source.records() if isinstance(source, Recorder) else source
    require(not roles or len(roles) == len(records.devices), "roles", list(roles),
            f"one for each of {len(records.devices)} devices")
    window = measured_window(records.requests, trim or Trim(), horizon_s)
    whole = measured_window(records.requests, Trim(), horizon_s)
    measured = records.requests.rows(np.arange(window.first, window.last))
    holds = holds_slo(records.requests, slo)
    kv_used_mean, kv_used_max = cluster_kv_use(records, window)
    growth = saturation(measured["arrival_s"], left_s(measured), measured["first_scheduled_s"])
    steady = growth.verdict != "saturated"
    return Summary(
        label=label,
        requests=_counts(records.requests, len(measured), submitted),
        window=window,
        ttft_s=distribution(measured["ttft_s"], steady=steady),
        tpot_s=distribution(measured["tpot_s"]),
        itl_s=itl_distribution(_gaps_in(records.itl, window)),
        e2el_s=distribution(measured["e2el_s"], steady=steady),
        queue_s=distribution(measured["queue_s"][measured["status"] == FINISHED], steady=steady),
        throughput=throughput(records.requests, holds, window),
        whole_run=throughput(records.requests, holds, whole),
        slo=_slo_result(slo, holds[window.first:window.last]),
        preemptions=int(records.requests["preemptions"].sum()),
        moves=int(records.requests["moves"].sum()),
        transfers=transfer_use(records.transfers, window),
        kv_used_mean=kv_used_mean, kv_used_max=kv_used_max,
        devices=device_use(records, roles, window, whole),
        iterations=iteration_use(records.steps, window),
        saturation=growth,
        counters=dict(sorted(records.counters.items())),
        incomplete=incomplete,
        outside_ranges=tuple(dict(mark) for mark in outside_ranges),
        wires=wire_use(records.wires, whole),
    )


def _gaps_in(gaps: Segments, window: Window) -> Segments:
    return gaps.rows(window.covers(gaps.recorded_s)) if window.trimmed else gaps


def holds_slo(requests: Table, slo: Slo) -> NDArray[np.bool_]:
    """Which requests finished within both limits; a single token is held to the first alone."""
    within = (requests["ttft_s"] <= slo.ttft_s) & ~(requests["tpot_s"] > slo.tpot_s)
    result: NDArray[np.bool_] = within & (requests["status"] == FINISHED)
    return result


def _counts(requests: Table, measured: int, submitted: int | None) -> Counts:
    finished = int((requests["status"] == FINISHED).sum())
    rejected = len(requests) - finished
    names = requests.categories["reason"]
    codes, numbers = np.unique(requests["reason"][requests["status"] != FINISHED], return_counts=True)
    by_reason = {names[code] or "unnamed": int(number) for code, number in zip(codes, numbers, strict=True)}
    total = len(requests) if submitted is None else submitted
    require(total >= len(requests), "submitted", total, f">= {len(requests)}, the requests that ended")
    return Counts(total, finished, rejected, by_reason, total - len(requests), measured)


def throughput(requests: Table, holds: NDArray[np.bool_], window: Window) -> Throughput:
    """Rates over a window. A request's tokens after the first are spread evenly until its finish."""
    done = requests["status"] == FINISHED
    ended = window.covers(requests["finish_s"])
    first = window.covers(requests["first_token_s"]) & done
    tokens = float(first.sum()) + _later_tokens(requests.rows(done), window)
    prompts = float(requests["prompt_tokens"][first].sum())
    duration = window.duration_s

    def rate(amount: float) -> float:
        return amount / duration if duration > 0 else math.nan

    return Throughput(duration, rate(float((ended & done).sum())), rate(tokens), rate(tokens + prompts),
                      rate(float((ended & holds).sum())))


def _later_tokens(requests: Table, window: Window) -> float:
    """Output tokens after the first that fall in the window."""
    later = requests["output_tokens"] - 1
    start, stop = requests["first_token_s"], requests["finish_s"]
    overlap = np.minimum(stop, window.to_s) - np.maximum(start, window.from_s)
    length = np.where(stop > start, stop - start, 1.0)
    share = np.where(stop > start, np.clip(overlap / length, 0.0, 1.0), window.covers(stop))
    return float((later * share).sum())


def _slo_result(slo: Slo, holds: NDArray[np.bool_]) -> SloResult:
    share = float(holds.mean()) if len(holds) else math.nan
    return SloResult(slo.ttft_s, slo.tpot_s, share, share_interval(holds))
