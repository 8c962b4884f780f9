"""Records turned into series: averages over stretches of time, amounts per second, busy shares."""

from __future__ import annotations

import numpy as np

from analysis.figures.charts import Floats

CELLS = 120
"""Stretches of time in maps and in series of averages."""


def edges_of(start: float, end: float, cells: int = CELLS) -> Floats:
    """Borders of equal stretches."""
    return np.linspace(start, max(end, np.nextafter(start, np.inf)), cells + 1)


def held_average(now_s: Floats, values: Floats, edges: Floats) -> Floats:
    """Average over each stretch of a quantity that keeps its value until the next sample.

    Before the first sample it is zero, after the last it stays.

    Args:
        now_s: ascending times of the samples.
        values: samples, or samples x series.
        edges: borders of the stretches.

    Returns:
        Averages: stretches, or stretches x series.
    """
    table = values if values.ndim == 2 else values[:, None]
    if not len(now_s):
        return np.zeros((len(edges) - 1, table.shape[1])) if values.ndim == 2 else np.zeros(len(edges) - 1)
    times = np.r_[now_s, max(float(edges[-1]), float(now_s[-1]))]
    area = np.vstack([np.zeros(table.shape[1]), np.cumsum(table * np.diff(times)[:, None], axis=0)])
    at_edges = np.stack([np.interp(edges, times, area[:, i]) for i in range(table.shape[1])], axis=1)
    average = np.diff(at_edges, axis=0) / np.diff(edges)[:, None]
    return average if values.ndim == 2 else average[:, 0]


def growth_rate(now_s: Floats, so_far: Floats, edges: Floats) -> Floats:
    """Growth per second of sums so far, over each stretch.

    Args:
        now_s: ascending times of the samples.
        so_far: samples x series, each growing.
        edges: borders of the stretches.
    """
    times, sums = np.r_[0.0, now_s], np.vstack([np.zeros(so_far.shape[1]), so_far])
    at_edges = [np.interp(edges, times, sums[:, i]) for i in range(so_far.shape[1])]
    if not at_edges:
        return np.zeros((len(edges) - 1, 0))
    return np.diff(np.stack(at_edges, axis=1), axis=0) / np.diff(edges)[:, None]


def paced(now_s: Floats, so_far: Floats) -> Floats:
    """Work done by each sample, where work is told when it begins and done one second a second.

    What a sample tells beyond what its time allows is backlog, which later time works off.

    Args:
        now_s: ascending times of the samples.
        so_far: samples x devices: seconds of work told so far.

    Returns:
        Samples x devices: seconds of work done, no faster than time goes by.
    """
    done = np.empty_like(so_far)
    before, backlog, last_s = np.zeros(so_far.shape[1]), np.zeros(so_far.shape[1]), 0.0
    for i, (at, told) in enumerate(zip(now_s, so_far, strict=True)):
        backlog = np.maximum(backlog - (at - last_s), 0.0) + (told - before)
        before, last_s = told, at
        done[i] = told - backlog
    return done


def spread_rate(start_s: Floats, end_s: Floats, amount: Floats, edges: Floats) -> Floats:
    """Amount per second over each stretch, each amount spread evenly from its start to its end."""
    length = np.maximum(end_s - start_s, 1e-12)
    upto = np.array([float((amount * np.clip((edge - start_s) / length, 0.0, 1.0)).sum()) for edge in edges])
    rate: Floats = np.diff(upto) / np.diff(edges)
    return rate


def covered_s(start_s: Floats, end_s: Floats, low: float, high: float) -> float:
    """Time between ``low`` and ``high`` that lies in at least one of the stretches."""
    start, end = np.clip(start_s, low, high), np.clip(end_s, low, high)
    order = np.argsort(start, kind="stable")
    start, end = start[order], end[order]
    reach = np.maximum.accumulate(np.r_[low, end])[:-1] if len(end) else np.zeros(0)
    return float(np.maximum(end - np.maximum(start, reach), 0.0).sum())


def middles(edges: Floats) -> Floats:
    """Middle of each stretch."""
    middle: Floats = (edges[:-1] + edges[1:]) / 2
    return middle


def held_line(edges: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Points of a stepped line through averages over stretches."""
    return edges, np.r_[values, values[-1:]]
