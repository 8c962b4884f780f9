"""Where the time of a step goes: laps of a clock, or of a device that works on its own."""

from __future__ import annotations

import time
from typing import Protocol


class Stopwatch(Protocol):
    """Laps follow each other without gaps; each belongs to a part of the work."""

    def start(self) -> None:
        """Begin anew."""

    def lap(self, part: str) -> None:
        """What has been done since the last lap belongs to this part."""

    def read(self) -> dict[str, float]:
        """Seconds of each part since the start; waits until they are over."""


class HostStopwatch:
    """Of work that is over when its call returns."""

    def __init__(self) -> None:
        self._at_s = time.perf_counter()
        self._parts: dict[str, float] = {}

    def start(self) -> None:
        self._parts = {}
        self._at_s = time.perf_counter()

    def lap(self, part: str) -> None:
        now_s = time.perf_counter()
        self._parts[part] = self._parts.get(part, 0.0) + now_s - self._at_s
        self._at_s = now_s

    def read(self) -> dict[str, float]:
        return self._parts
