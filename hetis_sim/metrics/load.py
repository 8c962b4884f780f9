"""Reading a run folder back: ``load_run(path).requests`` is a data frame."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hetis_sim.metrics import runfolder
from hetis_sim.metrics.columns import Table
from hetis_sim.metrics.itl import Segments
from hetis_sim.metrics.manifest import FORMAT
from hetis_sim.metrics.records import Records, WireTraffic
from hetis_sim.spec.errors import SpecError

if TYPE_CHECKING:
    import pandas as pd


def load_run(path: str | Path) -> Run:
    """Open a run folder. Tables are read when they are first asked for.

    Raises:
        SpecError: not a run folder, one whose run did not end, or one of a later version.
    """
    folder = Path(path)
    allowed = "a run folder, as `run` writes it"
    if not folder.is_dir():
        raise SpecError("run", str(path), f"{allowed} (there is no such folder)")
    missing = [name for name in (runfolder.MANIFEST, runfolder.SUMMARY) if not (folder / name).is_file()]
    if missing:
        raise SpecError("run", str(path), f"{allowed} to the end ({' and '.join(missing)} missing)")
    run = Run(folder)
    if run.manifest.get("format") != FORMAT:
        raise SpecError("run", str(path), f"{allowed} in format {FORMAT}, not {run.manifest.get('format')}")
    return run


@dataclass(frozen=True)
class Run:
    """One run folder; see :func:`load_run`."""

    path: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Versions, revision, seeds, hashes."""
        return self._json(runfolder.MANIFEST)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """All figures, as :class:`hetis_sim.metrics.summary.Summary` in plain types; None for nan."""
        return self._json(runfolder.SUMMARY)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The placement."""
        return self._json(runfolder.PLAN)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The resolved configuration; None where the folder keeps none."""
        return self._json(runfolder.CONFIG) if (self.path / runfolder.CONFIG).is_file() else None

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per request."""
        return self._frame(runfolder.REQUESTS)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row per step."""
        return self._frame(runfolder.STEPS)

    @cached_property
    def transfers(self) -> pd.DataFrame:
        """One row per transfer of cache."""
        return self._frame(runfolder.TRANSFERS)

    @cached_property
    def samples(self) -> pd.DataFrame:
        """State of the system over time."""
        return self._frame(runfolder.SAMPLES)

    @cached_property
    def devices(self) -> pd.DataFrame:
        """One row per device: role, cache, busy time."""
        import pandas as pd

        return pd.DataFrame(self.summary["devices"])

    def itl_percentile(self, q: float) -> float:
        """The q-th percentile (0 to 100) of all gaps between tokens, in seconds.

        Exact for runs of up to 100,000 recorded segments; beyond, see
        :meth:`hetis_sim.metrics.itl.Segments.compacted`.
        """
        return self._gaps.percentile_s(q)

    def decisions(self) -> Iterator[dict[str, Any]]:
        """The decision log, entry by entry; empty where none was kept."""
        path = self.path / runfolder.DECISIONS
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                yield from (json.loads(line) for line in file)

    def records(self) -> Records:
        """The record, to summarise anew with another SLO or window."""
        devices = self.summary["devices"]

        def column(name: str) -> tuple[float, ...]:
            return tuple(math.nan if row[name] is None else row[name] for row in devices)

        return Records(requests=Table.from_pandas(self.requests), steps=Table.from_pandas(self.steps),
                       transfers=Table.from_pandas(self.transfers), samples=Table.from_pandas(self.samples),
                       itl=self._gaps, devices=tuple(row["label"] for row in devices),
                       capacity_bytes=column("capacity_bytes"), busy_s=column("busy_whole_run_s"),
                       peak_bytes=column("peak_bytes"), counters=self.summary["counters"],
                       # Folders of earlier versions hold none.
                       wires=tuple(WireTraffic(row["name"], row["bandwidth_bytes_per_s"], row["size_bytes"])
                                   for row in self.summary.get("wires", ())))

    @cached_property
    def _gaps(self) -> Segments:
        frame = self._frame(runfolder.ITL)
        return Segments(**{name: np.asarray(frame[name]) for name in frame.columns})

    def _json(self, name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        return loaded

    def _frame(self, name: str) -> pd.DataFrame:
        import pandas as pd

        return pd.read_parquet(self.path / name, engine="pyarrow")
