"""``python -m hetis_exec validate``: run, simulate, compare, write as it goes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from hetis_exec.calibrate.command import calibrate
from hetis_exec.calibrate.pace import PaceKeeper
from hetis_exec.config import ExecutionConfig
from hetis_exec.places import CPU
from hetis_exec.validate.case import Validation, found_so_far
from hetis_exec.validate.keep import Shelf, key_of
from hetis_exec.validate.profiles import check_profiles, reference_layers_of, references_of
from hetis_exec.validate.report import print_validation, write_validation
from hetis_exec.validate.runs import Subject, subjects_of
from hetis_exec.validate.schedule import Watch, runs_of
from hetis_exec.validate.work import MachinePace, Tick, Worker
from hetis_sim.spec.errors import HetisError

CALIBRATION = "calibration"


def validate(config: ExecutionConfig, folder: Path, tick: Tick | None = None,
             after: Callable[[Validation], None] | None = None) -> Validation:
    """Do all runs that are not known yet and that the budget allows.

    Args:
        config: with the profiles that are to be judged; see :func:`recalibrated`.
        folder: what is measured is kept below it.
        after: told what there is after each run.

    Raises:
        HetisError: a combination that cannot run, or a profile of another machine.
    """
    given = config.validate
    watch = Watch(given.budget_s)
    subjects = subjects_of(config)
    check_profiles(config, subjects[0].execution)
    watch.warmup_s = max(subject.begin_s for subject in subjects)
    shelf = Shelf(folder / "runs" / key_of(config, _place(subjects[0])))
    runs = runs_of([subject.label for subject in subjects], given, config.workload.seed)
    references = references_of(config) if given.pace else {}
    apart = config.executor.workers != "threads"
    layers = {kind: number for kind, number in reference_layers_of(config).items() if kind in references}
    with PaceKeeper(layers, apart) as keeper:
        worker = Worker(config, subjects, shelf, MachinePace(keeper, references), watch)
        for number, run in enumerate(runs):
            if shelf.find(run.name) is not None:
                continue
            if tick is not None:
                tick(run.name, number, len(runs), worker.remaining_s(runs[number:]))
            if worker.do(run, runs) and after is not None:
                after(found_so_far(worker, runs))
        return found_so_far(worker, runs)


def _place(subject: Subject) -> str:
    """Where the first worker of a plan computes."""
    places = getattr(subject.execution.given.backend, "places", ()) or (CPU,)
    return str(places[0])


def recalibrated(config: ExecutionConfig, folder: Path) -> ExecutionConfig:
    """The same with profiles measured now, in the folder; those that it has from before are taken.

    What that takes counts against the budget.

    Raises:
        HetisError: nothing could be fitted.
    """
    out = folder / CALIBRATION
    used_s = 0.0
    if not list(out.glob("*.json")):
        watch = Watch(1e9)
        done = calibrate(replace(config, calibrate=replace(config.calibrate, out=str(out)),
                                 cost=replace(config.cost, profiles=[])))
        used_s = 1e9 - (watch.left_s() or 0.0)
        if not done.written:
            raise HetisError(f"nothing could be calibrated: {done.fits.refused or done.failed}")
    budget_s = config.validate.budget_s
    given = replace(config.validate, budget_s=None if budget_s is None else max(1.0, budget_s - used_s))
    return replace(config, validate=given, cost=replace(config.cost, profiles=[str(out)]))


def run_command(config: ExecutionConfig, folder: Path) -> bool:
    """Validate, print and write; whether all runs have been done or left out for want of time."""
    folder = folder if config.validate.out is None else Path(config.validate.out).expanduser()
    with _progress(config) as tick:
        if config.validate.recalibrate:
            tick("calibration", 0, 1, config.validate.budget_s)
            config = recalibrated(config, folder)
        found = validate(config, folder, tick, lambda so_far: _write(folder, config, so_far))
    if found.cases:
        print_validation(found)
        print(f"written to {write_validation(folder, config, found)}")
        print(f"figures: python -m analysis validation {folder}")
    for name, why in found.failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    if found.left_out:
        print(f"no time for {len(found.left_out)} runs: {', '.join(found.left_out)}; the same command with "
              f"validate.out={folder} goes on there", file=sys.stderr)
    return not found.failed


def _write(folder: Path, config: ExecutionConfig, found: Validation) -> None:
    if found.cases:
        write_validation(folder, config, found)


@contextmanager
def _progress(config: ExecutionConfig) -> Iterator[Tick]:
    """Progress on standard error; nothing where that is not a terminal."""
    if not config.progress or not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  TextColumn("{task.fields[left]}"), console=Console(stderr=True),
                  transient=True) as progress:
        bar = progress.add_task("validate", left="")
        yield lambda name, done, total, left_s: progress.update(
            bar, description=name, completed=done, total=total, left=_left(left_s))


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"about {seconds:.0f} s left"
