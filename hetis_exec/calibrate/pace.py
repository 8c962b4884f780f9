"""How fast the machine is just now.

Devices do the reference work of :mod:`.reference` one after the other, each in a process of its own on the
core of its worker, while nothing else is measured: what it gives may be held against samples of a calibration
(:mod:`.glances`) and steps of a run (:mod:`hetis_exec.validate.moments`).
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from hetis_exec.calibrate.reference import Pace, ReferenceSpec
from hetis_exec.calibrate.samples import clipped
from hetis_exec.calibrate.tasks import core_of, reference_of
from hetis_exec.errors import ExecutorError
from hetis_exec.run import Execution
from hetis_sim.cost.paced import Slowdown

Seconds = dict[str, dict[str, float]]
"""By type of device and part."""

START_S, MEASURE_S = 180.0, 120.0


class _Child:
    """A process that measures when it is told to."""

    def __init__(self, spec: ReferenceSpec, core: int | None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hetis_exec.processes", "hetis_exec.torch_backend"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_life, args=(spec, core, theirs), name="pace", daemon=True)
        self._process.start()
        theirs.close()
        self._spec = spec
        self._hear(START_S)

    def long(self) -> dict[str, float]:
        return self._ask(True)

    def glance(self) -> dict[str, float]:
        return self._ask(False)

    def _ask(self, long: bool) -> dict[str, float]:
        self._pipe.send(long)
        return self._hear(MEASURE_S)

    def _hear(self, within_s: float) -> dict[str, float]:
        try:
            if not self._pipe.poll(within_s):
                raise ExecutorError(f"the pace of {self._spec.kind}: no answer within {within_s:g} s")
            kind, content = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ExecutorError(f"the pace of {self._spec.kind}: its process has ended") from error
        if kind == "failed":
            raise ExecutorError(f"the pace of {self._spec.kind} cannot be measured: {content}")
        found: dict[str, float] = content
        return found

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.join()


def _life(spec: ReferenceSpec, core: int | None, pipe: Connection) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        measure = spec.made()
        pipe.send(("ready", {}))
        while True:
            long = pipe.recv()
            pipe.send(("measured", measure.long() if long else measure.glance()))
    except EOFError:
        return
    except Exception:  # noqa: BLE001 - the parent is told, and raises
        pipe.send(("failed", traceback.format_exc(limit=-2)))


class PaceKeeper:
    """Measures devices that come into play, and keeps what that takes ready.

    Args:
        layers: that the work is done on, by type of device (0 for all of the model's); types without are not
            measured.
        apart: in processes of their own.
    """

    def __init__(self, layers: Mapping[str, int], apart: bool) -> None:
        self._layers = layers
        self._apart = apart
        self._made: dict[int, Pace] = {}

    def __enter__(self) -> PaceKeeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for measure in self._made.values():
            if isinstance(measure, _Child):
                measure.end()

    def seconds(self, execution: Execution, devices: Iterable[int], glance: bool = False) -> Seconds:
        """The reference work of some devices, now; several of one type are averaged.

        For a while or, at a ``glance``, a few steps of it.

        Raises:
            ExecutorError: it cannot be done.
        """
        found: dict[str, list[dict[str, float]]] = {}
        for device in devices:
            kind = execution.prepared.cluster.devices[device].gpu.name
            if kind in self._layers:
                found.setdefault(kind, []).append(self._measured(execution, device, glance))
        return {kind: _mean(rows) for kind, rows in found.items()}

    def _measured(self, execution: Execution, device: int, glance: bool) -> dict[str, float]:
        pace = self._pace(execution, device)
        try:
            return pace.glance() if glance else pace.long()
        except ExecutorError:
            # Whoever asks again gets another process.
            self._made.pop(device)
            if isinstance(pace, _Child):
                pace.end()
            raise

    def _pace(self, execution: Execution, device: int) -> Pace:
        if device not in self._made:
            kind = execution.prepared.cluster.devices[device].gpu.name
            spec = reference_of(execution, device, self._layers[kind])
            self._made[device] = _Child(spec, core_of(execution, device)) if self._apart else spec.made()
        return self._made[device]


def slowdowns(measured: Sequence[Mapping[str, Mapping[str, float]]],
              references: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """By type of device and part, mean seconds over those of the calibration."""
    return {kind: {part: float(clipped([one[kind][part] for one in measured]).mean()) / reference
                   for part, reference in references[kind].items() if part in measured[0][kind]}
            for kind in (measured[0] if measured else ())}


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {part: sum(row[part] for row in rows) / len(rows) for part in rows[0]}


def slowdown_of(raw: Mapping[str, Any]) -> dict[str, Slowdown]:
    """What :func:`slowdowns` gives, for a cost model."""
    return {kind: Slowdown(**parts) for kind, parts in raw.items()}
