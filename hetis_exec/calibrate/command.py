"""``python -m hetis_exec calibrate``: measure, fit, judge, write."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hetis_exec.calibrate.fit import LINK_MODULES, Fits, fit_all
from hetis_exec.calibrate.glances import Glances, at_mean_pace
from hetis_exec.calibrate.machine import Machine, machine_at
from hetis_exec.calibrate.pace import PaceKeeper
from hetis_exec.calibrate.reference import layers_of, reference_samples
from hetis_exec.calibrate.regression import Fitted
from hetis_exec.calibrate.samples import Samples, Store, frame_of, references_of
from hetis_exec.calibrate.tasks import Plan, Work, plan_of
from hetis_exec.calibrate.write import Written, profile_of, subjects_of, write_profile
from hetis_exec.config import ExecutionConfig
from hetis_exec.models.architecture import ELEMENT_TYPES
from hetis_exec.places import CPU
from hetis_exec.run import Execution, prepare_execution
from hetis_exec.throttle import described, read_throttles
from hetis_exec.torch_backend import TorchBackend
from hetis_sim.cost.calibration import Calibration
from hetis_sim.metrics.manifest import value_sha256
from hetis_sim.spec.errors import HetisError

KEY_LENGTH = 16
FORM = 4
"""Of the samples: counts up whenever the same settings measure something else."""

Tick = Callable[[str, int, int], None]
"""Told the name of the piece under way, and how many of how many are done."""


@dataclass(frozen=True)
class Calibrated:
    """What a calibration gives back.

    Attributes:
        fits: what was fitted, and what was refused.
        failed: pieces that could not be measured, and why.
        written: by device.
        measured, known: pieces measured now, and those that were known from before.
    """

    fits: Fits
    failed: dict[str, str]
    written: dict[str, Written]
    measured: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether everything was measured and written."""
        return not self.failed and not self.fits.refused


def calibrate(config: ExecutionConfig, tick: Tick | None = None) -> Calibrated:
    """Measure the machine for a configuration, and write its profiles.

    Raises:
        HetisError: the combination cannot run, or the folder cannot be written to.
    """
    execution = prepare_execution(config)
    folder = Path(config.calibrate.out).expanduser()
    plan, machines = plan_of(execution), _machines(execution)
    store = Store(folder / "samples" / f"{key_of(execution, machines)}.jsonl")
    known = [work.name for work in plan.work if store.known(work.name)]
    apart = config.executor.workers != "threads"
    with PaceKeeper(_paced_layers(execution), apart) as keeper:
        failed = _measure(plan, store, execution, keeper, tick)
    names = [work.name for work in plan.work if work.name not in failed]
    samples = frame_of(store.samples(names))
    fits = fit_all(at_mean_pace(samples), plan.shapes, config.calibrate.limit) if len(samples) else Fits()
    written, layers = {}, layers_of(execution.prepared.model)
    for device, modules in subjects_of(fits.found).items():
        about = replace(_calibration(execution, plan, machines, device, store.took_s(names)),
                        reference=references_of(samples, device), reference_layers=layers)
        subjects = samples["subject"]
        own = subjects == device
        if device == "links":
            own = samples["module"].isin(LINK_MODULES)
        written[device] = write_profile(folder, device, profile_of(device, modules, about), samples[own])
    return Calibrated(fits, failed, written, [name for name in names if name not in known], known)


def _paced_layers(execution: Execution) -> dict[str, int]:
    """Types of devices whose pace is looked at between samples: those that share the host's processor."""
    backend = execution.given.backend
    assert isinstance(backend, TorchBackend)
    return {device.gpu.name: layers_of(execution.prepared.model)
            for device in execution.prepared.cluster.devices
            if backend.place(device.device_id) == CPU}


def _measure(plan: Plan, store: Store, execution: Execution, keeper: PaceKeeper,
             tick: Tick | None) -> dict[str, str]:
    """Measure what is not known yet; returns what could not be."""
    model, apart = execution.prepared.model.name, execution.config.executor.workers != "threads"

    def look(work: Work) -> Samples:
        return reference_samples(keeper.seconds(execution, work.devices, glance=True), model, time.time())

    failed: dict[str, str] = {}
    for number, work in enumerate(plan.work):
        if tick is not None:
            tick(work.name, number, len(plan.work))
        if store.known(work.name):
            continue
        glances = Glances(partial(look, work))
        try:
            look(work)  # what that takes to start is nothing that glances take
            begun_s = time.monotonic()
            samples = work.run(apart, _pulse(tick, work, number, plan, glances))
        except HetisError as error:
            failed[work.name] = str(error)
        else:
            store.add(work.name, [*samples, *glances.samples], time.monotonic() - begun_s)
    return failed


def _pulse(tick: Tick | None, work: Work, number: int, plan: Plan, glances: Glances) -> Callable[[], None]:
    """What is done between the samples of a piece."""
    def pulse() -> None:
        if tick is not None:
            tick(work.name, number, len(plan.work))
        if work.devices:
            glances()
    return pulse


def _machines(execution: Execution) -> dict[str, Machine]:
    """The machine behind each type of device."""
    backend = execution.given.backend
    assert isinstance(backend, TorchBackend)
    found: dict[str, Machine] = {}
    for device in execution.prepared.cluster.devices:
        found.setdefault(device.gpu.name, machine_at(backend.place(device.device_id)))
    return found


def key_of(execution: Execution, machines: dict[str, Machine]) -> str:
    """Names the samples that a run of these settings on these machines may use."""
    return str(value_sha256({
        "form": FORM, "reference_layers": layers_of(execution.prepared.model),
        "machines": {kind: machine.to_dict() for kind, machine in machines.items()},
        "model": asdict(execution.prepared.model), **_settings(execution)}))[:KEY_LENGTH]


def _settings(execution: Execution) -> dict[str, Any]:
    """What else decides how long things take."""
    config, cluster = execution.config, execution.prepared.cluster
    measured = {key: value for key, value in asdict(config.calibrate).items()
                if key not in ("out", "limits", "tp", "models", "only")}
    backend = execution.given.backend
    assert isinstance(backend, TorchBackend)
    executor = {key: getattr(config.executor, key) for key in ("workers", "threads", "pin")}
    return {"calibrate": measured, "executor": {**executor, "dtype": backend.dtype,
                                                "places": list(backend.places)},
            "throttle": described(read_throttles(config.executor.throttle, cluster)),
            "scheduler": {key: getattr(config.scheduler, key) for key in (
                "block_tokens", "max_batch_requests", "max_batch_tokens")},
            "cluster": {"kinds": [device.gpu.name for device in cluster.devices],
                        "links": [host.link.name for host in cluster.hosts] + [cluster.network.name]}}


def _calibration(execution: Execution, plan: Plan, machines: dict[str, Machine], device: str,
                 seconds: float) -> Calibration:
    machine = machines.get(device) or next(iter(machines.values()))
    settings = _settings(execution)
    backend = execution.given.backend
    assert isinstance(backend, TorchBackend)
    throttle = settings.pop("throttle").get(device, {})
    return Calibration(machine.hardware, machine.driver, machine.torch, machine.python,
                       datetime.now(UTC).isoformat(timespec="seconds"), backend.dtype,
                       ELEMENT_TYPES[backend.dtype], tuple(plan.shapes), throttle,
                       {**settings, "cores": machine.cores}, f"{device}.parquet", round(seconds, 1))


# -- for people ------------------------------------------------------------------------------------------


def run_command(config: ExecutionConfig) -> bool:
    """Calibrate and print; whether something could not be measured or was refused."""
    with _progress(config) as tick:
        done = calibrate(config, tick)
    print_calibration(done, config)
    return not done.complete


@contextmanager
def _progress(config: ExecutionConfig) -> Iterator[Tick | None]:
    """Progress on standard error; nothing where that is not a terminal."""
    if not config.progress or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("calibrate")
        yield lambda name, done, total: progress.update(bar, description=name, completed=done, total=total)


def print_calibration(done: Calibrated, config: ExecutionConfig) -> None:
    """The table of modules, what was refused, and what was written."""
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for header in ("module", "of", "points", "samples", "median error", "p95", "limit", ""):
        table.add_column(header, justify="left" if header in ("module", "of", "") else "right")
    for made in done.fits.found:
        table.add_row(*_row(made, config))
    console.print(table)
    for module, subject, reason in done.fits.refused:
        console.print(f"refused: {module} of {subject}: {reason}", style="bold yellow", soft_wrap=True)
    for name, why in done.failed.items():
        console.print(f"not measured: {name}: {why}", style="bold yellow", soft_wrap=True)
    if done.known:
        number = len(done.known) + len(done.measured)
        console.print(f"note: {len(done.known)} of {number} pieces were known from before", style="dim",
                      soft_wrap=True)
    for written in done.written.values():
        console.print(f"written to {written.profile}", soft_wrap=True)


def _row(made: Fitted, config: ExecutionConfig) -> tuple[str, ...]:
    return (made.module, made.subject, str(made.points), str(made.samples), f"{100 * made.median:.1f}%",
            f"{100 * made.p95:.1f}%", f"{100 * config.calibrate.limit(made.module):.0f}%", "written")
