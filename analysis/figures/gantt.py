"""Some requests one by one: when each waited, was computed, and moved."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.figures.charts import Axis, Mark, Span, SpanChart
from analysis.figures.runs import ReportRun
from hetis_sim.metrics.rows import size_text

if TYPE_CHECKING:
    import pandas as pd

REQUESTS = 24
WAIT, PREFILL, DECODE = range(3)
KINDS = ("waiting", "prompt", "output")
MARK_KINDS = ("cache pushed", "heads moved", "swapped out", "swapped in", "handed off")
MARKED = ("push", "move", "swap_out", "swap_in", "handoff")


def gantt_chart(run: ReportRun, window_s: tuple[float, float] | None = None) -> SpanChart | None:
    """A few requests over time.

    Args:
        run: the run.
        window_s: show the first requests that arrive from then to then. By default those
            consecutive ones whose heads moved most, or, where none did, those in the middle.

    Returns:
        The chart; None where no request falls into the window.
    """
    requests = run.run.requests
    chosen = _chosen(requests, window_s)
    if not len(chosen):
        return None
    rows, spans = _spans(chosen)
    marks = _marks(run, chosen)
    used = sorted({mark.kind for mark in marks})
    marks = [Mark(mark.row, mark.at, used.index(mark.kind)) for mark in marks]
    start = float(chosen["arrival_s"].min())
    end = max([span.end for span in spans], default=start)
    if window_s is not None:
        where = f"that arrive from {window_s[0]:g} s to {window_s[1]:g} s"
    else:
        where = "around the most moved ones" if _events(requests).any() else "in the middle of the run"
    return SpanChart(key="requests", title="Requests one by one",
                     caption=f"{len(chosen)} consecutive requests {where}: waiting until the first part of "
                             "the prompt "
                             "is computed, prompt until the first token, output until the last. Marks: end "
                             "of a transfer "
                             "of the request's cache.",
                     origin=run.origin, x=Axis("time (s)", low=start, high=max(end, start + 1e-9)), rows=rows,
                     row_label="request", kinds=KINDS, spans=spans,
                     mark_kinds=[MARK_KINDS[kind] for kind in used],
                     marks=marks, notes=[_note(row) for row in chosen.to_dict("records")])


def _events(requests: pd.DataFrame) -> Any:
    return np.asarray(requests["moves"] + requests["preemptions"])


def _chosen(requests: pd.DataFrame, window_s: tuple[float, float] | None) -> pd.DataFrame:
    if window_s is not None:
        inside = (requests["arrival_s"] >= window_s[0]) & (requests["arrival_s"] <= window_s[1])
        return requests[inside].iloc[:REQUESTS]
    last = max(len(requests) - REQUESTS, 0)
    sums = np.r_[0, np.cumsum(_events(requests))]
    starts = np.arange(last + 1)
    score = sums[np.minimum(starts + REQUESTS, len(requests))] - sums[starts]
    # Of equally eventful places the one nearest to the middle.
    best = starts[np.lexsort((np.abs(starts - last / 2), -score))[0]]
    return requests.iloc[best:best + REQUESTS]


def _spans(chosen: pd.DataFrame) -> tuple[list[str], list[Span]]:
    rows, spans = [], []
    names = ["request_id", "arrival_s", "first_scheduled_s", "first_token_s", "finish_s"]
    for row, (request_id, *times) in enumerate(zip(*(chosen[name].tolist() for name in names), strict=True)):
        rows.append(str(request_id))
        for kind, (start, end) in enumerate(pairwise(times)):
            if np.isfinite(start) and np.isfinite(end) and end > start:
                spans.append(Span(row, float(start), float(end), kind))
    return rows, spans


def _marks(run: ReportRun, chosen: pd.DataFrame) -> list[Mark]:
    """The end of every transfer of the chosen requests, flows that end together once."""
    row_of = {request_id: row for row, request_id in enumerate(chosen["request_id"].tolist())}
    own = run.run.transfers[run.run.transfers["request_id"].isin(list(row_of))]
    ends = {(row_of[request_id], float(end_s), MARKED.index(kind))
            for request_id, end_s, kind in zip(own["request_id"].tolist(), own["end_s"].tolist(),
                                               own["kind"].tolist(), strict=True)}
    return [Mark(row, at, kind) for row, at, kind in sorted(ends)]


def _note(row: Mapping[Any, Any]) -> str:
    text = f"{row['prompt_tokens']} prompt and {row['output_tokens']} output tokens, {row['status']}"
    if row["reason"]:
        text += f" ({row['reason']})"
    if np.isfinite(row["ttft_s"]):
        text += f", ttft {row['ttft_s']:.3g} s, e2el {row['e2el_s']:.3g} s"
    if row["preemptions"]:
        text += f", {row['preemptions']} preemptions"
    if row["moves"]:
        text += f", {row['moves']} moves of {size_text(row['moved_bytes'])}"
    return text + (f", {row['remote_share']:.0%} of its heads remote" if row["remote_share"] > 0 else "")
