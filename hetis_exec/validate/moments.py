"""The pace of the machine while a run goes on: a glance between steps, again and again.

Cores of a machine that others use as well change their speed from one second to the next by more than a
validation wants to tell, so a pace from before and after a run is not that of the run.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from hetis_exec.calibrate.pace import Seconds
from hetis_sim.cost.paced import Slowdown

SHARE = 0.5
"""Of the time of a run, glances take so much more."""

APART_S = 0.3
"""There is that much time between them at least."""

ENOUGH = 3
"""So many glances tell the pace of a run; with fewer it is that of before and after."""

NEAR = 5
"""The pace at a moment is the mean of so many glances about it."""


@dataclass
class Moments:
    """Takes glances when there is time for one.

    Attributes:
        glance: measures; see :meth:`hetis_exec.calibrate.pace.PaceKeeper.seconds`.
        begin_s: of the run; none is taken earlier.
        found: time of the run, and what was measured.
    """

    glance: Callable[[], Seconds]
    begin_s: float = 0.0
    found: list[tuple[float, Seconds]] = field(default_factory=list)
    _next_s: float = 0.0

    def __call__(self, now_s: float) -> None:
        """Take one, if it is time to; ``now_s`` stands still meanwhile."""
        if now_s < max(self.begin_s, self._next_s):
            return
        begun_s = time.perf_counter()
        self.found.append((now_s, self.glance()))
        self._next_s = now_s + max(APART_S, (time.perf_counter() - begun_s) / SHARE)

    @property
    def enough(self) -> bool:
        """Whether they tell the pace of the run."""
        return len(self.found) >= ENOUGH


Moment = dict[str, Any]
"""``at_s`` and ``slowdown`` by type of device and part."""


def scaled_steps(steps: pd.DataFrame, moments: Sequence[Moment], kinds: Sequence[str]) -> pd.DataFrame:
    """Modelled steps, with the times of computing of a first stage's rank at the pace of their moment.

    Args:
        steps: as a recorder has them.
        moments: in order of time; at least one.
        kinds: type of device of each instance's first rank.
    """
    at_s = [moment["at_s"] for moment in moments]
    near: dict[tuple[int, str], Slowdown] = {}
    dense, attention = [], []
    columns = (steps[name].tolist() for name in ("start_s", "instance", "requests", "prefill_tokens"))
    for start_s, instance, requests, new_tokens in zip(*columns, strict=True):
        place, kind = bisect_left(at_s, start_s), kinds[instance]
        if (place, kind) not in near:
            near[place, kind] = _mean_about(moments, place, kind)
        pace = near[place, kind]
        dense.append(pace.of_tokens(requests + new_tokens))
        attention.append(pace.of_prompt_attention if new_tokens else pace.attention)
    return steps.assign(dense_s=steps["dense_s"] * np.array(dense),
                        attention_s=steps["attention_s"] * np.array(attention))


def _mean_about(moments: Sequence[Moment], place: int, kind: str) -> Slowdown:
    begin = max(0, min(place - NEAR // 2, len(moments) - NEAR))
    rows = [moment["slowdown"][kind] for moment in moments[begin:begin + NEAR]]
    return Slowdown(**{part: sum(row[part] for row in rows) / len(rows) for part in rows[0]})


def plain(found: Sequence[tuple[float, Seconds]], slowdowns: Callable[[Sequence[Seconds]], Any]
          ) -> list[Moment]:
    """What was found, as shares of what the calibration has taken."""
    return [{"at_s": now_s, "slowdown": slowdowns([seconds])} for now_s, seconds in found]
