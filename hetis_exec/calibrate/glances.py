"""Samples held against the pace that the machine had when they were taken.

Cores of a machine that others use as well run at two or more speeds, seconds or minutes at a time: a size
that was measured during a slow spell would look slow beside its neighbours. So the reference work is done
again and again between samples, and what a sample took is divided by what the reference work took about then,
over its mean. The profile is of that mean.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable

import numpy as np
import pandas as pd

from hetis_exec.calibrate.samples import EXCESS_MAX, PREFIX, Samples
from hetis_sim.cost.paced import Slowdown

APART_S = 0.4
"""There is that much time between two glances at least."""

SHARE = 0.33
"""Of the time of what is measured, glances take so much more at most."""

SIDE = 2
"""The pace of a moment is the mean of so many glances on either side: one alone is a noisy thing."""

NEAR_S = 20.0
"""A glance further away says nothing."""


class Glances:
    """Looks at the pace of devices when there is time for it.

    Args:
        look: does the reference work of the devices, as samples.

    Attributes:
        samples: of all glances so far.
    """

    def __init__(self, look: Callable[[], Samples], clock: Callable[[], float] = time.monotonic) -> None:
        self._look = look
        self._clock = clock
        self._next_s = 0.0
        self.samples: Samples = []

    def __call__(self) -> None:
        """Take one, if it is time to."""
        begun_s = self._clock()
        if begun_s < self._next_s:
            return
        self.samples += self._look()
        ended_s = self._clock()
        self._next_s = ended_s + max(APART_S, (ended_s - begun_s) / SHARE)


class _Course:
    """How a device's pace has changed."""

    def __init__(self, reference: pd.DataFrame) -> None:
        """Rows of the reference work of one device, of all parts."""
        names = reference["module"].str.removeprefix(PREFIX)
        table = reference.assign(part=names).pivot_table("seconds", "at_s", "part").dropna().sort_index()
        self._times: list[float] = table.index.tolist()
        self._parts = [str(part) for part in table.columns]
        even = table.clip(upper=EXCESS_MAX * table.median(), axis=1)
        self._rows: list[list[float]] = (even / even.mean()).to_numpy().tolist()

    def about(self, at_s: float) -> Slowdown:
        """What work took at a moment over what it took on average."""
        place = bisect_right(self._times, at_s)
        near = [self._rows[n] for n in range(max(0, place - SIDE), min(place + SIDE, len(self._times)))
                if abs(self._times[n] - at_s) <= NEAR_S]
        if not near:
            return Slowdown()
        return Slowdown(**{part: sum(values) / len(near)
                           for part, *values in zip(self._parts, *near, strict=True)})


def at_mean_pace(samples: pd.DataFrame) -> pd.DataFrame:
    """Samples as they would have been at the mean pace of their device; see :func:`frame_of`.

    Those of links, of cards and of what the reference work says nothing about stay as they are.
    """
    reference = samples["module"].str.startswith(PREFIX) & (samples["at_s"] > 0.0)
    courses = {str(subject): _Course(rows) for subject, rows in samples[reference].groupby("subject")}
    factors = []
    columns = (samples[name].tolist() for name in ("module", "subject", "tokens", "at_s"))
    for module, subject, tokens, at_s in zip(*columns, strict=True):
        course = courses.get(subject)
        factors.append(1.0 if course is None else _factor(module, tokens, course.about(at_s)))
    return samples.assign(seconds=samples["seconds"] / np.array(factors))


def _factor(module: str, tokens: int, pace: Slowdown) -> float:
    """Of a module, as :class:`hetis_sim.cost.paced.PacedCost` has it."""
    if module in ("dense_layer", "head"):
        return pace.of_tokens(tokens)
    if module in ("decode_attention", "remote_attention"):
        return pace.attention
    if module == "prefill_attention":
        return pace.of_prompt_attention
    return 1.0
