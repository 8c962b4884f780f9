"""A measured run, and the words by which it is simulated."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from hetis_sim.spec.errors import HetisError, require

METRICS: Mapping[str, str] = {
    "output_throughput": "output throughput, tokens/s",
    "mean_ttft_s": "TTFT mean", "p50_ttft_s": "TTFT p50", "p95_ttft_s": "TTFT p95", "p99_ttft_s": "TTFT p99",
    "mean_tpot_s": "TPOT mean", "p50_tpot_s": "TPOT p50", "p95_tpot_s": "TPOT p95", "p99_tpot_s": "TPOT p99",
    "mean_e2el_s": "E2EL mean", "p50_e2el_s": "E2EL p50", "p95_e2el_s": "E2EL p95", "p99_e2el_s": "E2EL p99"}
"""Metrics in the order of tables, named as ``vllm bench serve`` does, in seconds and tokens per second."""

Row = tuple[float, int, int]
"""Arrival in seconds, prompt tokens, output tokens."""


@dataclass(frozen=True)
class Case:
    """One measured run.

    Attributes:
        name: unique in its data set.
        words: of the configuration, without those of the workload's file and of profiles.
        rows: requests in the order in which they were asked.
        measured: values of some of ``METRICS``.
        samples: per metric (``ttft``, ``tpot``, ``e2el``) what was measured of single requests, sorted; for
            distributions.
        until_s: figures are of what had happened by then; None for whole runs.
        since_dispatch: TTFT counts from the dispatch of a request, not from its arrival.
        links: coefficients of links of the measured machine, by name: (seconds per byte, seconds).
        collectives: by card, another one whose measured all-reduces stand for its own.
        token_weighted: mean TPOT is over tokens, not over requests.
        token_share: throughput is that of the first so many of all tokens; less than 1 leaves out a tail.
        group: runs that are alike, in data sets with too many for a table of single ones.
    """

    name: str
    words: Sequence[str]
    rows: Sequence[Row]
    measured: Mapping[str, float]
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    until_s: float | None = None
    since_dispatch: bool = False
    links: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    collectives: Mapping[str, str] = field(default_factory=dict)
    token_weighted: bool = False
    token_share: float = 1.0
    group: str = ""

    def arguments(self) -> dict[str, Any]:
        """What the job needs, as plain types."""
        return {"words": list(self.words), "rows": [list(row) for row in self.rows], "until_s": self.until_s,
                "since_dispatch": self.since_dispatch, "token_weighted": self.token_weighted,
                "token_share": self.token_share, "collectives": dict(self.collectives),
                "links": {name: list(cost) for name, cost in self.links.items()}}


@dataclass(frozen=True)
class DataSet:
    """Runs of one engine.

    Attributes:
        key, title: for files and for people.
        about: what was measured by whom, and how it is simulated.
        settings: (setting, value, where it comes from) of the engine.
        cases: the runs.
        left_out: why some runs are not simulated.
        findings: explanations of what is off, for people.
    """

    key: str
    title: str
    about: str
    settings: Sequence[tuple[str, str, str]]
    cases: Sequence[Case]
    left_out: Sequence[str] = ()
    findings: Sequence[str] = ()


def require_folder(path: Path, key: str) -> None:
    """Refuse a folder that is not there.

    Raises:
        SpecError: with what is expected.
    """
    require(path.is_dir(), key, str(path), "a folder with the measured runs (shared/data/serving_e2e)")


def open_text(path: Path) -> TextIO:
    """A text file, gzip or not.

    Raises:
        HetisError: it is not there.
    """
    if not path.is_file():
        raise HetisError(f"{path}: no such file among the measured runs")
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8")
    return path.open(encoding="utf-8")


def csv_rows(path: Path, *columns: str, delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a table that has at least these columns.

    Raises:
        HetisError: it is not there, or lacks a column.
    """
    with open_text(path) as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise HetisError(f"{path}: no column {', '.join(missing)}")
        return list(reader)


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one JSON object a line.

    Raises:
        HetisError: it is not there, or a line is no object.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise HetisError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise HetisError(f"{path}:{number}: not an object")
            yield row


def number(row: Mapping[str, Any], key: str, path: Path) -> float:
    """A finite number of a row.

    Raises:
        HetisError: it is missing, or no finite number.
    """
    try:
        value = float(row[key])
    except (KeyError, TypeError, ValueError) as error:
        raise HetisError(f"{path}: {key}={row.get(key)!r} is no number") from error
    if value - value != 0.0:
        raise HetisError(f"{path}: {key}={row[key]!r} is not finite")
    return value
