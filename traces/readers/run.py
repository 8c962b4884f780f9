"""A run of this project as a workload: the arrivals of its requests and the lengths that came out.

A run folder holds ``requests.parquet``; requests that did not finish are left out, since nobody knows
how long they would have been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hetis_sim.spec.errors import SpecError
from traces.readers.layout import Layout, match_names
from traces.readers.options import ReadOptions

FILE = "requests.parquet"
WANTED = {"arrival": "arrival_s", "prompt": "prompt_tokens", "output": "output_tokens"}
MARKS = {"status": "status", "scheduled": "first_scheduled_s", "token": "first_token_s", "finish": "finish_s"}
"""Columns that only a run has."""


def file_of(path: str | Path) -> str | Path:
    """The file to read: of a run folder, that of its requests.

    Raises:
        SpecError: a folder without one.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    if not (folder / FILE).is_file():
        raise SpecError("path", str(path), f"a file, not a folder, unless it is that of a run ({FILE})")
    return Path(path) / FILE


def recognise(names: Sequence[str]) -> Layout | None:
    """The layout, when these are the columns of a run's requests."""
    found = match_names(WANTED, names)
    if found is None or match_names(MARKS, names) is None:
        return None
    return Layout.of("run", found, keep_origin=True)


def finished_only(options: ReadOptions) -> ReadOptions:
    """Options that leave out what has not finished; rows are in the order in which requests ended."""
    return replace(options, where={MARKS["status"]: "finished", **options.where}, unsorted="sort")
