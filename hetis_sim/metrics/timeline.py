"""A run as a timeline for Perfetto or chrome://tracing.

One process per instance with a track per lane; one process for the links, where transfers
that overlap lie on tracks of their own; counters from the samples. Slices of one track never
overlap, which is what the viewers require.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetis_sim.metrics.columns import PARTS

if TYPE_CHECKING:
    import pandas as pd

LINKS_PID = 1_000_000
SYSTEM_PID = 1_000_001

Event = dict[str, Any]


def write_timeline(path: str | Path, steps: pd.DataFrame, transfers: pd.DataFrame,
                   samples: pd.DataFrame | None = None, *, from_s: float = 0.0,
                   to_s: float = math.inf) -> Path:
    """Write a timeline in the JSON Trace Event Format (times in microseconds there).

    Args:
        path: the file, replaced in one go.
        steps: as a recorder or a run folder gives them.
        transfers: likewise.
        samples: likewise, for the counters.
        from_s: leave out what begins before; a run of 200,000 steps makes some 60 MB.
        to_s: leave out what begins then or later.

    Returns:
        The path.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
            separator = ""
            for event in _events(_between(steps, "start_s", from_s, to_s),
                                 _between(transfers, "start_s", from_s, to_s),
                                 None if samples is None else _between(samples, "now_s", from_s, to_s)):
                file.write(separator + json.dumps(event, allow_nan=False, separators=(",", ":")))
                separator = ",\n"
            file.write("\n]}\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _between(frame: pd.DataFrame, column: str, from_s: float, to_s: float) -> pd.DataFrame:
    kept: pd.DataFrame = frame[(frame[column] >= from_s) & (frame[column] < to_s)]
    return kept


def _events(steps: pd.DataFrame, transfers: pd.DataFrame, samples: pd.DataFrame | None) -> Iterator[Event]:
    for instance in sorted(steps["instance"].unique()):
        yield _name("process_name", int(instance), 0, f"instance {instance}")
    for instance, lane in sorted(set(zip(steps["instance"], steps["lane"], strict=True))):
        yield _name("thread_name", int(instance), int(lane), f"lane {lane}")
    yield from _step_slices(steps)
    if len(transfers):
        yield _name("process_name", LINKS_PID, 0, "links")
        yield from _transfer_slices(transfers)
    if samples is not None and len(samples):
        yield _name("process_name", SYSTEM_PID, 0, "system")
        yield from _counters(samples)


def _name(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _slice(name: str, pid: int, tid: int, start_s: float, end_s: float, details: Event) -> Event:
    # Both ends are rounded to the nanosecond before the length is taken, so that slices which
    # touch still touch and never overlap.
    start_ns, end_ns = round(start_s * 1e9), round(end_s * 1e9)
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": start_ns / 1e3,
            "dur": (end_ns - start_ns) / 1e3, "args": details}


def _step_slices(steps: pd.DataFrame) -> Iterator[Event]:
    names = ["iterations", "requests", "prefill_tokens", "decode_tokens", *(f"{part}_s" for part in PARTS)]
    places = zip(*_lists(steps, ["kind", "instance", "lane", "start_s", "end_s"]), strict=True)
    for (kind, instance, lane, start_s, end_s), *details in zip(places, *_lists(steps, names), strict=True):
        yield _slice(kind, instance, lane, start_s, end_s, dict(zip(names, details, strict=True)))


def _lists(frame: pd.DataFrame, names: Sequence[str]) -> list[list[Any]]:
    """Columns as Python values, which are many times faster to walk than rows of a frame."""
    return [frame[name].tolist() for name in names]


def _transfer_slices(transfers: pd.DataFrame) -> Iterator[Event]:
    """Each transfer on the first track of its link that is free by then."""
    free: dict[tuple[int, int], list[tuple[int, int]]] = {}
    tracks = 0
    ordered = transfers.sort_values(["start_s", "end_s"], kind="stable")
    names = ["kind", "request_id", "start_s", "end_s", "size_bytes", "source", "target"]
    for kind, request_id, start_s, end_s, size_bytes, *link in zip(*_lists(ordered, names), strict=True):
        waiting = free.setdefault((link[0], link[1]), [])
        if waiting and waiting[0][0] <= round(start_s * 1e9):
            track = heapq.heappop(waiting)[1]
        else:
            track = tracks
            tracks += 1
            yield _name("thread_name", LINKS_PID, track, f"{_place(link[0])} to {_place(link[1])}")
        heapq.heappush(waiting, (round(end_s * 1e9), track))
        yield _slice(f"{kind} {request_id}", LINKS_PID, track, start_s, end_s,
                     {"request_id": request_id, "size_bytes": size_bytes})


def _place(place: int) -> str:
    return f"device {place}" if place >= 0 else f"host {-1 - place} memory"


def _counters(samples: pd.DataFrame) -> Iterator[Event]:
    caches = [str(name) for name in samples.columns if str(name).startswith("used_bytes_")]
    for row in samples.to_dict("records"):
        ts = round(row["now_s"] * 1e9) / 1e3
        yield {"ph": "C", "name": "requests", "pid": SYSTEM_PID, "ts": ts,
               "args": {"running": row["running"], "waiting": row["waiting"]}}
        for name in caches:
            yield {"ph": "C", "name": f"KV of device {name.rpartition('_')[2]}", "pid": SYSTEM_PID, "ts": ts,
                   "args": {"used_bytes": row[name]}}
