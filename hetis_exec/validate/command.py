"""``python -m hetis_exec validate``: run, simulate, compare, write."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from rich.console import Console

from hetis_exec.config import ExecutionConfig
from hetis_exec.validate.compare import latency_errors, paired, part_errors, rate_errors
from hetis_exec.validate.profiles import check_profiles
from hetis_exec.validate.report import Compared, print_validation, write_validation
from hetis_exec.validate.runs import Outcome, Subject, capacity_rps, measure, simulate, subjects_of
from hetis_sim.study.runs import Load

Tick = Callable[[str], None]


def validate(config: ExecutionConfig, tick: Tick | None = None) -> list[Compared]:
    """Run everything.

    Raises:
        HetisError: a combination that cannot run, a run that fails, or a profile of another machine.
    """
    subjects = subjects_of(config)
    check_profiles(config, subjects[0].execution)
    found: list[Compared] = []
    for subject in subjects:
        _say(tick, f"{subject.label}: capacity")
        capacity = capacity_rps(subject, config.validate.capacity_requests, config.workload.seed)
        found += [compare(subject, share, capacity, config, tick) for share in config.validate.loads]
    return found


def compare(subject: Subject, share: float, capacity: float, config: ExecutionConfig,
            tick: Tick | None = None) -> Compared:
    """One policy at one share of its capacity, over all seeds."""
    given = config.validate
    rate = share * capacity
    count = int(min(given.requests_max, max(given.requests_min, rate * given.run_s)))
    real, sim, again = [], [], []
    seeds = [config.workload.seed + n for n in range(given.seeds)]
    for n, seed in enumerate(seeds):
        load = Load(rate, count, seed)
        _say(tick, f"{subject.label}: load {share:.0%}, seed {seed}")
        real.append(measure(subject, load))
        sim.append(simulate(subject, load))
        if n < given.noise_runs:
            again.append(measure(subject, load))
    pairs = paired(_pooled(real, seeds), _pooled(sim, seeds))
    noise = paired(_pooled(real[:len(again)], seeds), _pooled(again, seeds)) if again else None
    errors = latency_errors(pairs, noise, given.resamples, config.workload.seed)
    errors += rate_errors([one.rates for one in real], [one.rates for one in sim],
                          [one.rates for one in again], given.resamples, config.workload.seed)
    parts = part_errors(_steps(real), _steps(sim), _steps(again) if again else None)
    pairs = pairs.assign(policy=subject.label, load=share)
    return Compared(subject.label, share, capacity, rate, errors, parts, pairs)


def _say(tick: Tick | None, text: str) -> None:
    if tick is not None:
        tick(text)


def _pooled(outcomes: Sequence[Outcome], seeds: Sequence[int]) -> pd.DataFrame:
    pairs = zip(outcomes, seeds, strict=False)
    return pd.concat([outcome.requests.assign(seed=seed) for outcome, seed in pairs], ignore_index=True)


def _steps(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    return pd.concat([outcome.steps for outcome in outcomes], ignore_index=True)


def run_command(config: ExecutionConfig, folder: Path) -> None:
    """Validate, print and write."""
    with _progress(config) as tick:
        found = validate(config, tick)
    print_validation(found)
    print(f"written to {write_validation(folder, config, found)}")
    print(f"figures: python -m analysis validation {folder}")


@contextmanager
def _progress(config: ExecutionConfig) -> Iterator[Tick | None]:
    """Progress on standard error; nothing where that is not a terminal."""
    if not config.progress or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    given = config.validate
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  console=Console(stderr=True), transient=True) as progress:
        total = max(1, len(given.policies)) * (1 + len(given.loads) * given.seeds)
        bar = progress.add_task("validate", total=total, completed=-1)
        yield lambda text: progress.update(bar, description=text, advance=1)
