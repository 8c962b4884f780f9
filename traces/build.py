"""From settings to a workload."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np

from hetis_sim.spec.errors import SpecError, require
from traces.arrivals import (
    ArrivalProcess,
    Constant,
    Gamma,
    OnOff,
    Poisson,
    first_times,
    rescaled,
    times_until,
)
from traces.closed import ClosedLoopWorkload, Pool
from traces.config import WorkloadConfig
from traces.lengths import FixedSource, Lengths, LengthSource, RowSource, TableSource, load_table
from traces.limits import Limits, collect
from traces.readers import read_with
from traces.rng import RngStreams
from traces.table import FloatArray, TraceTable
from traces.workload import OpenWorkload, Workload

FIELDS = tuple(item.name for item in fields(WorkloadConfig))


def build_workload(
    config: WorkloadConfig | Mapping[str, Any], context_limit_tokens: int | None = None,
) -> Workload:
    """The workload that the settings describe.

    Args:
        config: settings, as the dataclass or as a mapping with its keys.
        context_limit_tokens: longest prompt plus output of the model, ``None`` for any.

    Returns:
        An :class:`OpenWorkload`, or a :class:`ClosedLoopWorkload` for ``arrivals=closed``.

    Raises:
        SpecError: for a setting or a file that cannot be used.
    """
    settings = config if isinstance(config, WorkloadConfig) else from_mapping(config)
    require(context_limit_tokens is None or context_limit_tokens >= 2, "context_limit_tokens",
            context_limit_tokens, ">= 2")
    with under_workload():
        trace = None if settings.path is None else read_with(settings.path, settings.read_options())
        limits = Limits(settings, context_limit_tokens)
        if settings.arrivals == "closed":
            return _closed(settings, trace, limits)
        if settings.arrivals == "replay":
            assert trace is not None  # settings refuse a replay without a path
            return _replay(settings, trace, limits)
        return _open(settings, trace, limits)


def from_mapping(config: Mapping[str, Any]) -> WorkloadConfig:
    """Settings from a mapping; unknown keys are errors."""
    for key in config:
        if key not in FIELDS:
            raise SpecError(f"workload.{key}", config[key], f"one of the keys {', '.join(FIELDS)}")
    return WorkloadConfig(**dict(config))


@contextmanager
def under_workload() -> Iterator[None]:
    """Name settings in errors as the user wrote them: ``workload.rate``, not ``rate``."""
    try:
        yield
    except SpecError as error:
        if error.key.split(".")[0] in FIELDS:
            raise SpecError(f"workload.{error.key}", error.value, error.allowed) from None
        raise


def _source(config: WorkloadConfig, trace: TraceTable | None, streams: RngStreams) -> LengthSource:
    if trace is not None:
        order = "cycle" if config.arrivals == "closed" and config.order == "trace" else config.order
        return RowSource(trace.prompt_tokens, trace.output_tokens, order, streams)
    if config.prompt_tokens is not None and config.output_tokens is not None:
        return FixedSource(config.prompt_tokens, config.output_tokens)
    assert config.table is not None  # settings refuse neither table nor path
    table = load_table(config.table)
    return TableSource(table.part(config.subset) if config.subset else table, streams)


def _process(config: WorkloadConfig, rate: float, streams: RngStreams) -> ArrivalProcess:
    if config.arrivals == "gamma":
        return Gamma(rate, config.cv, streams)
    if config.arrivals == "constant":
        return Constant(rate)
    if config.arrivals == "onoff":
        return OnOff(rate, config.on_s, config.off_s, config.off_share, streams)
    return Poisson(rate, streams)


def _open(config: WorkloadConfig, trace: TraceTable | None, limits: Limits) -> OpenWorkload:
    streams = RngStreams(config.seed)
    rate = config.rate
    if rate is None:
        rate = None if trace is None else trace.rate_rps
        if rate is None:
            raise SpecError("rate", None, "a rate in req/s: the trace has no times that span one")
    rows = len(trace) if trace is not None and config.order == "trace" else None
    times = _times(config, _process(config, rate, streams), rows)
    lengths = collect(_source(config, trace, streams), limits, len(times))
    have = len(lengths.prompt_tokens)
    _check_rows_suffice(config, have, len(times))
    used_up = rows is not None and (have < len(times) or have == rows)
    notes = _ended(config, float(times[have - 1])) if used_up else []
    return _workload(config, times[:have], lengths, trace, limits, notes)


def _times(config: WorkloadConfig, process: ArrivalProcess, rows: int | None) -> FloatArray:
    """Times before the duration, at most as many as asked for or as the trace has rows."""
    count = config.requests if config.requests is not None else rows
    if count is not None:
        times = first_times(process, count)
        times = times if config.duration_s is None else times[times < config.duration_s]
    else:
        assert config.duration_s is not None  # settings ask for a count, a duration or a trace
        times = times_until(process, config.duration_s)
    if not len(times):
        raise SpecError("duration_s", config.duration_s, "long enough for one arrival")
    return times


def _check_rows_suffice(config: WorkloadConfig, have: int, wanted: int) -> None:
    if have < wanted and config.requests is not None and config.duration_s is None:
        raise SpecError("requests", config.requests,
                        f"at most the {have} usable rows of the trace, or null for all, or order=bootstrap")


def _replay(config: WorkloadConfig, trace: TraceTable, limits: Limits) -> OpenWorkload:
    if trace.arrival_s is None:
        raise SpecError("arrivals", config.arrivals, f"another for {trace.source}, which has no times")
    rows = np.arange(len(trace), dtype=np.int64)
    _, places = limits.apply(Lengths(trace.prompt_tokens, trace.output_tokens, rows))
    if not len(places):
        raise SpecError(f"{trace.source}: usable rows", 0, f"at least one (counts: {limits.counts})")
    _check_rows_suffice(config, len(places), config.requests or 0)
    times = trace.arrival_s[places]
    if config.start:
        times = times - trace.arrival_s[0]
    if config.rate is not None:
        times = rescaled(times, config.rate)
    end = len(times) if config.duration_s is None else int(np.searchsorted(times, config.duration_s))
    if not end:
        raise SpecError("duration_s", config.duration_s, f"> {float(times[0]):.6g} s, the first arrival")
    end = min(end, config.requests or end)
    limits.counts.clear()  # from here only what arrives counts
    stop = int(places[end - 1]) + 1 if end < len(places) else len(rows)
    lengths, _ = limits.apply(Lengths(trace.prompt_tokens[:stop], trace.output_tokens[:stop], rows[:stop]))
    notes = _ended(config, float(times[-1])) if end == len(times) else []
    return _workload(config, times[:end], lengths, trace, limits, notes)


def _ended(config: WorkloadConfig, last_s: float) -> list[str]:
    """What to say when a trace has no rows left at the end of the duration."""
    if config.duration_s is None:
        return []
    return [f"the trace ended at {last_s:.6g} s, before duration_s={config.duration_s:g}"]


def _workload(config: WorkloadConfig, times: FloatArray, lengths: Lengths, trace: TraceTable | None,
              limits: Limits, notes: list[str]) -> OpenWorkload:
    return OpenWorkload(
        config.name, config.path or str(config.table), config.seed, arrival_s=times, lengths=lengths,
        trace=trace, counts=dict(limits.counts), notes=(*_notes(trace), *notes))


def _closed(config: WorkloadConfig, trace: TraceTable | None, limits: Limits) -> ClosedLoopWorkload:
    streams = RngStreams(config.seed)
    pool = Pool(_source(config, trace, streams), limits, config.think_time_s, config.think, streams)
    pool.reach(config.users)
    return ClosedLoopWorkload(
        config.name, config.path or str(config.table), config.seed, users=config.users,
        request_limit=config.requests, duration_s=config.duration_s, pool=pool, trace=trace,
        stagger_s=config.stagger_s, common_queue=config.common_queue,
        counts=limits.counts, notes=_notes(trace))


def _notes(trace: TraceTable | None) -> tuple[str, ...]:
    return () if trace is None else trace.notes
