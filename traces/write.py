"""The project's own schema of traces, written from requests."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.request import Request

SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")


def write_trace(path: str | Path, requests: Iterable[Request]) -> int:
    """Write requests so that :func:`traces.read_trace` gives back the same numbers.

    Columns are ``arrival_s, prompt_tokens, output_tokens`` and, where any request has one,
    ``session`` and ``prefix_hashes``. Rows are in order of arrival, then id. Times keep
    every bit. The file appears whole or not at all; equal requests give equal bytes.

    Args:
        path: ends in .csv, .jsonl (either with .gz) or .parquet; its folder must exist.
        requests: in any order.

    Returns:
        The number of rows.

    Raises:
        SpecError: for another suffix, a missing folder, or no requests.
    """
    target = Path(path)
    suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if target.name.endswith(s)), None)
    if suffix is None:
        raise SpecError("path", str(path), f"a name that ends in {', '.join(SUFFIXES)}")
    if not target.parent.is_dir():
        raise SpecError("path", str(path), "in a folder that exists")
    ordered = sorted(requests, key=lambda r: (r.arrival_s, r.request_id))
    if not ordered:
        raise SpecError("requests", 0, "at least one request")
    columns = _columns(ordered)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        if suffix == ".parquet":
            pq.write_table(pa.table(columns), partial)
        else:
            text = _jsonl(columns) if "jsonl" in suffix else _csv(columns)
            _write_text(partial, text, gzipped=suffix.endswith(".gz"))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return len(ordered)


def _columns(requests: Sequence[Request]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        "arrival_s": [float(r.arrival_s) for r in requests],
        "prompt_tokens": [int(r.prompt_tokens) for r in requests],
        "output_tokens": [int(r.output_tokens) for r in requests],
    }
    if any(r.session != -1 for r in requests):
        columns["session"] = [int(r.session) for r in requests]
    if any(r.prefix_hashes for r in requests):
        columns["prefix_hashes"] = [[int(i) for i in r.prefix_hashes] for r in requests]
    return columns


def _rows(columns: dict[str, list[Any]]) -> Iterator[tuple[Any, ...]]:
    return zip(*columns.values(), strict=True)


def _jsonl(columns: dict[str, list[Any]]) -> Iterator[str]:
    for row in _rows(columns):
        yield json.dumps(dict(zip(columns, row, strict=True))) + "\n"


def _csv(columns: dict[str, list[Any]]) -> Iterator[str]:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in _rows(columns):
        writer.writerow([" ".join(map(str, cell)) if isinstance(cell, list) else repr(cell) for cell in row])
    yield text.getvalue()


def _write_text(path: Path, parts: Iterable[str], *, gzipped: bool) -> None:
    with path.open("wb") as raw:
        if not gzipped:
            raw.writelines(part.encode() for part in parts)
            return
        # No name and no time in the header: equal requests give equal bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
            packed.writelines(part.encode() for part in parts)
