"""Slows workers down by software, so that workers of one host are unequal for real.

A throttled section takes a fixed multiple of the time that its computing took: the worker does
nothing for the rest. Sleeping leaves the core to others; the last bit is spun away, since a sleep
ends some tens of microseconds late. A worker that has a core for itself spins for longer: what it computes
after a sleep takes a few per cent more, which a device that is slow by nature would not know of.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hetis_exec.stopwatch import Stopwatch
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.errors import require, require_finite
from hetis_sim.spec.lookup import require_known_keys, require_mapping

KEY = "executor.throttle"
FACTOR_MAX = 1000.0
SPIN_S, OWN_CORE_SPIN_S = 2e-4, 4e-3
"""Time at the end of a wait that is spun away, and that of a worker with a core for itself."""


@dataclass(frozen=True, slots=True)
class Throttle:
    """Factors on the time that sections of a worker take.

    Attributes:
        dense: on products, the LM head and sampling.
        attention: on prefill and decode attention.
        spin_s: time at the end of a wait in which the core is kept.
    """

    dense: float = 1.0
    attention: float = 1.0
    spin_s: float = field(default=SPIN_S, compare=False)

    @property
    def with_core(self) -> Throttle:
        """That of a worker which has a core for itself."""
        return replace(self, spin_s=OWN_CORE_SPIN_S)

    def of(self, part: str) -> float:
        """The factor on a part of a step's time; 1 on what is not computing."""
        return float(getattr(self, part, 1.0))

    def after_dense(self, begun_s: float, synchronize: Callable[[], None]) -> None:
        """A dense section that began at ``begun_s`` (:func:`time.perf_counter`) has been computed."""
        if self.dense > 1.0:
            synchronize()
            _wait(begun_s, self.dense, self.spin_s)

    def after_attention(self, begun_s: float, synchronize: Callable[[], None]) -> None:
        """Attention that began at ``begun_s`` has been computed."""
        if self.attention > 1.0:
            synchronize()
            _wait(begun_s, self.attention, self.spin_s)


NONE = Throttle()


class ThrottledStopwatch:
    """A stopwatch whose laps of computing are drawn out before they end."""

    def __init__(self, stopwatch: Stopwatch, throttle: Throttle, synchronize: Callable[[], None]) -> None:
        self._stopwatch = stopwatch
        self._throttle = throttle
        self._synchronize = synchronize
        self._at_s = time.perf_counter()

    def start(self) -> None:
        """Begin anew."""
        self._stopwatch.start()
        self._at_s = time.perf_counter()

    def lap(self, part: str) -> None:
        """The end of a lap, which lasts longer for what it belongs to."""
        factor = self._throttle.of(part)
        if factor > 1.0:
            self._synchronize()
            _wait(self._at_s, factor, self._throttle.spin_s)
        self._stopwatch.lap(part)
        self._at_s = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Seconds of each part since the start."""
        return self._stopwatch.read()


def throttled(stopwatch: Stopwatch, throttle: Throttle, synchronize: Callable[[], None]) -> Stopwatch:
    """A stopwatch that slows a worker down, if it is to be."""
    return stopwatch if throttle == NONE else ThrottledStopwatch(stopwatch, throttle, synchronize)


def _wait(begun_s: float, factor: float, spin_s: float) -> None:
    now_s = time.perf_counter()
    until_s = begun_s + factor * (now_s - begun_s)
    if until_s - now_s > spin_s + SPIN_S:
        time.sleep(until_s - now_s - spin_s)
    while time.perf_counter() < until_s:
        pass


def read_throttles(raw: Any, cluster: ClusterSpec) -> dict[str, Throttle]:
    """Throttles by type of device: a number for all work, or ``dense`` and ``attention``.

    Raises:
        SpecError: a type that the cluster does not have, or a factor below 1.
    """
    found = {}
    for name, value in require_mapping(KEY, raw or {}).items():
        key = f"{KEY}.{name}"
        require(name in cluster.gpu_counts, KEY, name,
                f"a type of the cluster: {', '.join(cluster.gpu_counts)}")
        parts = value if isinstance(value, Mapping) else {"dense": value, "attention": value}
        require_known_keys(key, dict(parts), ["dense", "attention"])
        for part, factor in parts.items():
            require_finite(f"{key}.{part}", factor, 1.0, FACTOR_MAX)
        found[str(name)] = Throttle(**{str(part): float(factor) for part, factor in parts.items()})
    return found


def by_device(throttles: Mapping[str, Throttle], cluster: ClusterSpec) -> dict[int, Throttle]:
    """The throttle of every device that has one."""
    return {device.device_id: throttles[device.gpu.name] for device in cluster.devices
            if device.gpu.name in throttles}


def described(throttles: Mapping[str, Throttle]) -> dict[str, dict[str, float]]:
    """Plain types, for a manifest."""
    return {name: {"dense": throttle.dense, "attention": throttle.attention}
            for name, throttle in throttles.items()}


def cores(pin: str | Sequence[int], devices: Sequence[int], host_cores: Sequence[int]) -> dict[int, int]:
    """The core of each worker: one after the other where ``pin`` is ``auto``, none for ``none``.

    A list gives a core for each device of the cluster.

    Raises:
        SpecError: another word, a list of another length, or a core that this process may not use.
    """
    if pin == "none":
        return {}
    if pin == "auto":
        return {device: host_cores[n % len(host_cores)] for n, device in enumerate(devices)}
    require(not isinstance(pin, str), "executor.pin", pin, "none, auto or a list of cores")
    given: list[Any] = list(pin)
    require(len(given) > max(devices, default=-1), "executor.pin", given,
            "a core for each device of the cluster")
    allowed = f"one of the cores {', '.join(map(str, host_cores))}"
    for core in given:
        require(core in host_cores, "executor.pin", core, allowed)
    return {device: int(given[device]) for device in devices}


def have_cores(workers: int, given: Collection[int | None]) -> bool:
    """Whether each of so many workers has a core: the one that it was given alone, or one of those here."""
    different = {core for core in given if core is not None}
    return workers <= (len(different) or len(os.sched_getaffinity(0)))
