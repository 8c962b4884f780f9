"""Keeps what was measured of a validation, so that one that was cut short goes on there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from hetis_exec.calibrate.machine import machine_at
from hetis_exec.config import ExecutionConfig
from hetis_exec.places import CPU
from hetis_exec.validate.moments import Moment
from hetis_exec.validate.profiles import hashes_of
from hetis_exec.validate.runs import Outcome
from hetis_sim.metrics.manifest import value_sha256
from hetis_sim.spec.errors import HetisError

INDEX = "runs.jsonl"
KEY_LENGTH = 16
FORM = 1
"""Of the runs: counts up whenever the same settings serve in another way."""

FREE = ("loads", "seeds", "noise_runs", "repeats", "resamples", "budget_s", "out", "pace", "policies",
        "rates", "recalibrate")
"""Settings of a validation that change which runs there are, not what a run is."""


@dataclass(frozen=True)
class Kept:
    """A real run that is over.

    Attributes:
        rate_rps, count: of its requests.
        took_s: with all that belongs to it.
        pace: slowdown by type of device and part: the mean of the run's moments or, where there are too few,
            of before and after; empty where not measured.
        capacity_rps: of an overloaded run; else 0.
        outcome: None for an overloaded run.
        moments: the pace at moments of the run.
    """

    name: str
    rate_rps: float
    count: int
    took_s: float
    pace: dict[str, dict[str, float]] = field(default_factory=dict)
    capacity_rps: float = 0.0
    outcome: Outcome | None = None
    moments: list[Moment] = field(default_factory=list)


def key_of(config: ExecutionConfig, place: str = CPU) -> str:
    """Names the runs that a validation of these settings, with these profiles, may use."""
    raw = asdict(config)
    given = {key: value for key, value in raw.pop("validate").items() if key not in FREE}
    for name in ("calibrate", "serve", "study", "output", "progress", "cost", "policy"):
        raw.pop(name, None)
    return str(value_sha256({**raw, "form": FORM, "validate": given, "profiles": hashes_of(config),
                             "machine": machine_at(place).to_dict()}))[:KEY_LENGTH]


class Shelf:
    """Runs in a folder: a line for each, with its rows beside in Parquet.

    Raises:
        HetisError: the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[str, Kept] = {}
        self.settings: dict[str, Any] = {}
        index = folder / INDEX
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = index.read_text(encoding="utf-8").splitlines() if index.exists() else []
        except OSError as error:
            raise HetisError(f"validate.out: {folder} cannot be used: {error}") from error
        for line in lines:
            self._take(line)

    def _take(self, line: str) -> None:
        """One run; a line that was cut short is left out, and its run done again."""
        try:
            raw: dict[str, Any] = json.loads(line)
            if "settings" in raw:
                self.settings |= raw["settings"]
                return
            files = raw.pop("files")
            rates = raw.pop("rates")
            outcome = None
            if files is not None:
                requests, steps = (pd.read_parquet(self._folder / f"{files}.{what}.parquet")
                                   for what in ("requests", "steps"))
                same = self._folder / f"{files}.same.parquet"
                outcome = Outcome(requests, steps, rates, pd.read_parquet(same) if same.exists() else None)
            self._kept[raw["name"]] = Kept(**raw, outcome=outcome)
        except (OSError, ValueError, KeyError, TypeError):
            return

    def find(self, name: str) -> Kept | None:
        """A run, if it has been done."""
        return self._kept.get(name)

    def add(self, kept: Kept) -> None:
        """Keep a run; its line is written last."""
        files = None
        if kept.outcome is not None:
            files = f"{len(self._kept):04d}"
            kept.outcome.requests.to_parquet(self._folder / f"{files}.requests.parquet", index=False)
            kept.outcome.steps.to_parquet(self._folder / f"{files}.steps.parquet", index=False)
            if kept.outcome.same is not None:
                kept.outcome.same.to_parquet(self._folder / f"{files}.same.parquet", index=False)
        line = {"name": kept.name, "rate_rps": kept.rate_rps, "count": kept.count, "took_s": kept.took_s,
                "pace": kept.pace, "moments": kept.moments, "capacity_rps": kept.capacity_rps, "files": files,
                "rates": kept.outcome.rates if kept.outcome is not None else None}
        self._write(line)
        self._kept[kept.name] = kept

    def set(self, **settings: Any) -> None:
        """Keep what was decided on the way."""
        self._write({"settings": settings})
        self.settings |= settings

    def _write(self, line: dict[str, Any]) -> None:
        with (self._folder / INDEX).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
