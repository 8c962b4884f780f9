"""What must hold in every record, whatever made it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hetis_sim.metrics.columns import PARTS, STATUSES, Table
from hetis_sim.metrics.records import Records
from hetis_sim.metrics.window import left_s

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def number_in_system(requests: Table) -> tuple[Floats, Ints]:
    """Times at which N(t) changes and N just after each, from the request rows."""
    arrival_s, end_s = np.sort(requests["arrival_s"]), np.sort(left_s(requests))
    times = np.unique(np.concatenate([arrival_s, end_s]))
    number = np.searchsorted(arrival_s, times, side="right") - np.searchsorted(end_s, times, side="right")
    return times, number


def little_residual(requests: Table, times_s: Floats | None = None, number: Ints | None = None) -> float:
    """How far the integral of N(t) is from the sum of sojourn times, relative to the latter.

    The two are equal for a system that starts and ends empty (the identity behind Little's
    law); the result is rounding alone, about 1e-15 times the number of requests at worst.

    Args:
        requests: every request of the run.
        times_s: when N changes, as observed by a driver; from the rows where left out.
        number: N from each of these times to the next.
    """
    if times_s is None or number is None:
        times_s, number = number_in_system(requests)
    area = float((number[:-1] * np.diff(times_s)).sum())
    sojourns = float((left_s(requests) - requests["arrival_s"]).sum())
    return abs(area - sojourns) / sojourns if sojourns > 0 else abs(area)


def record_violations(records: Records, tolerance: float = 1e-9) -> list[str]:
    """Sentences on what is wrong with a record; empty for a sound one.

    Checks that ids are unique, that the times of a request and of a step are in order, that
    steps of one lane do not overlap, that the parts of a step make its duration and none is
    negative, that cache in use stays within capacity, and that the samples' numbers in the
    system are those of the request rows. ``tolerance`` is relative to the length of the run,
    or to the capacity.
    """
    slack_s = tolerance * max(1.0, float(left_s(records.requests).max(initial=0.0)))
    found = [*_request_violations(records.requests, slack_s), *_step_violations(records.steps, slack_s),
             *_sample_violations(records, tolerance)]
    late = records.transfers["end_s"] < records.transfers["start_s"] - slack_s
    return found + _counted(late, "transfers end before they start")


def _counted(wrong: NDArray[np.bool_], what: str) -> list[str]:
    if not wrong.any():
        return []
    return [f"{int(wrong.sum())} {what}, first in row {int(wrong.argmax())}"]


def _request_violations(requests: Table, slack_s: float) -> list[str]:
    ids = requests["request_id"]
    found = [] if len(np.unique(ids)) == len(ids) else ["a request id occurs twice"]
    finished = requests["status"] == STATUSES.index("finished")
    stations = ("arrival_s", "first_scheduled_s", "first_token_s", "finish_s")
    for before, after in pairwise(stations):
        # Written so that a time which is missing counts as out of order.
        ordered = requests[before] <= requests[after] + slack_s
        found += _counted(finished & ~ordered, f"finished requests without {before} <= {after}")
    named = requests["reason"] != requests.categories["reason"].index("")
    return found + _counted(~finished & ~named, "rejected requests without a reason")


def _step_violations(steps: Table, slack_s: float) -> list[str]:
    duration = steps["end_s"] - steps["start_s"]
    parts = np.sum([steps[f"{part}_s"] for part in PARTS], axis=0)
    found = _counted(duration < -slack_s, "steps end before they start")
    found += _counted(np.abs(duration - parts) > slack_s, "steps whose parts do not make their duration")
    least = np.min([steps[f"{part}_s"] for part in PARTS], axis=0)
    found += _counted(least < -slack_s, "steps with a part of negative length")
    order = np.lexsort((steps["end_s"], steps["start_s"], steps["lane"], steps["instance"]))
    lanes = steps.rows(order)
    same = (np.diff(lanes["lane"]) == 0) & (np.diff(lanes["instance"]) == 0)
    overlap = same & (lanes["start_s"][1:] < lanes["end_s"][:-1] - slack_s)
    return found + _counted(overlap, "steps overlap on their lane")


def _sample_violations(records: Records, tolerance: float) -> list[str]:
    samples, requests = records.samples, records.requests
    found = _counted(np.diff(samples["now_s"]) <= 0, "samples out of order")
    for device, capacity in enumerate(records.capacity_bytes):
        over = samples[f"used_bytes_{device}"] > capacity * (1 + tolerance)
        found += _counted(over, f"samples with more cache than device {device} holds")
    arrival_s, end_s = np.sort(requests["arrival_s"]), np.sort(left_s(requests))
    # A look at the very instant of an event may come before or after it.
    most = (np.searchsorted(arrival_s, samples["now_s"], side="right")
            - np.searchsorted(end_s, samples["now_s"], side="left"))
    least = (np.searchsorted(arrival_s, samples["now_s"], side="left")
             - np.searchsorted(end_s, samples["now_s"], side="right"))
    seen = samples["running"] + samples["waiting"]
    return found + _counted((seen < least) | (seen > most),
                            "samples with another number in the system than the request rows")
