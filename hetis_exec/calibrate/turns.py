"""How often everything is measured: slow devices take fewer turns, so that a calibration ends in minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

TURNS_MIN = 2
QUICK_SHARE = 0.15


def turns(most: int, enough_s: float, quick: bool,
          clock: Callable[[], float] = time.monotonic) -> Iterator[int]:
    """Numbers of turns through all sizes: two at least, then more until all have taken long enough.

    Args:
        enough_s: no further turn begins after that; a share of it if ``quick``.
    """
    begun_s, limit_s = clock(), enough_s * (QUICK_SHARE if quick else 1.0)
    for turn in range(most):
        if turn >= TURNS_MIN and clock() - begun_s > limit_s:
            return
        yield turn
