"""Writing a run to disk so that a reader finds all of it or knows that it is not whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hetis_sim.metrics.columns import Table
from hetis_sim.metrics.itl import Segments
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.metrics.records import Records
from hetis_sim.metrics.strictjson import dump_page
from hetis_sim.metrics.summary import Summary

MANIFEST, PLAN, CONFIG, SUMMARY = "manifest.json", "plan.json", "config.json", "summary.json"
REQUESTS, STEPS, TRANSFERS = "requests.parquet", "steps.parquet", "transfers.parquet"
SAMPLES, ITL, DECISIONS = "samples.parquet", "itl.parquet", "decisions.jsonl"

ITL_ROWS_MAX = 100_000
"""More segments than these are joined before they are written."""

ROWS_IN_GROUP = 1 << 15

Writer = Callable[[Path], None]


def write_run(path: str | Path, *, recorder: Recorder | Records, summary: Summary,
              manifest: Mapping[str, Any], plan: Mapping[str, Any], config: Mapping[str, Any] | None = None,
              decisions: Iterable[str] | None = None) -> Path:
    """Write a run folder; equal arguments give equal bytes.

    Every file is written under a temporary name first. When all of them are there, they are
    renamed, ``summary.json`` last: a folder with a summary holds a whole run, and one whose
    writing failed holds none. Files of an earlier run are replaced; other files stay.

    Args:
        path: the folder; made where missing.
        recorder: what happened.
        summary: the figures.
        manifest: see :func:`hetis_sim.metrics.manifest.build_manifest`.
        plan: the placement.
        config: the resolved configuration, where nothing else keeps it.
        decisions: lines of the decision log, without newlines.

    Returns:
        The folder.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    records = recorder.records() if isinstance(recorder, Recorder) else recorder
    writers = _table_writers(records) | {MANIFEST: _page(manifest), PLAN: _page(plan)}
    if config is not None:
        writers[CONFIG] = _page(config)
    if decisions is not None:
        writers[DECISIONS] = _lines(decisions)
    writers[SUMMARY] = _page(summary)
    with ExitStack() as cleanup:
        staged = {folder / name: folder / f".{name}.partial" for name in writers}
        for target, partial in staged.items():
            cleanup.callback(partial.unlink, missing_ok=True)
            writers[target.name](partial)
        for name in (SUMMARY, CONFIG, DECISIONS):
            (folder / name).unlink(missing_ok=True)
        for target, partial in staged.items():
            partial.replace(target)
    return folder


def _table_writers(records: Records) -> dict[str, Writer]:
    tables = {REQUESTS: records.requests, STEPS: records.steps, TRANSFERS: records.transfers,
              SAMPLES: records.samples, ITL: itl_table(records.itl.compacted(ITL_ROWS_MAX))}
    return {name: _parquet(table) for name, table in tables.items()}


def itl_table(gaps: Segments) -> Table:
    """Gaps between tokens as a table: ``count`` from ``low_s`` to ``high_s``, each ``weight`` times."""
    names = ("low_s", "high_s", "count", "weight", "recorded_s")
    return Table({name: getattr(gaps, name) for name in names})


def _parquet(table: Table) -> Writer:
    def write(path: Path) -> None:
        import pyarrow.parquet as pq

        # Small groups without dictionaries of floats take a fifth of the memory, and less space.
        pq.write_table(table.to_arrow(), path, compression="zstd", row_group_size=ROWS_IN_GROUP,
                       use_dictionary=list(table.categories))

    return write


def _page(value: Any) -> Writer:
    def write(path: Path) -> None:
        path.write_text(dump_page(value), encoding="utf-8")

    return write


def _lines(lines: Iterable[str]) -> Writer:
    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)

    return write
