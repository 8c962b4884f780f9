"""Columns of CSV, JSONL, JSON and parquet files, bounded in rows and bytes."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from hetis_sim.spec.errors import SpecError
from traces.readers.convert import Column, shorten
from traces.readers.files import TraceFile, reading
from traces.readers.options import JSON_BYTES_MAX, ReadOptions

LINE_BYTES_MAX = 64 * 2**20
BLOCK_BYTES = 1 << 22
Record = dict[str, Any]


def column_names(file: TraceFile) -> list[str]:
    """Names of the columns, or of the fields of the first record."""
    if file.container == "parquet":
        with reading(file.label):
            return list(pq.ParquetFile(file.path).schema_arrow.names)
    if file.container == "csv":
        return _header(file)
    _, first = next(records(file))
    return list(first)


def read_columns(file: TraceFile, names: Sequence[str], options: ReadOptions) -> dict[str, Column]:
    """The named columns, after ``where``, ``start``, ``limit`` and the row limit.

    Raises:
        SpecError: for a missing column, a broken row, too many rows, or none.
    """
    wanted = list(dict.fromkeys([*names, *options.where]))
    have = column_names(file)
    for name in wanted:
        if name not in have:
            raise SpecError(f"{file.label}: column", name, f"one of {', '.join(have)}")
    if file.container in ("json", "jsonl"):
        return _columns_of_records(file, names, options)
    rows, table = _arrow_table(file, wanted, options)
    options.check_rows(table.num_rows, file.label)
    return {name: Column(file.label, name, table[name].combine_chunks(), rows) for name in names}


def records(file: TraceFile) -> Iterator[tuple[int, Record]]:
    """Number (from 1) and fields of every record of a JSON or JSONL file."""
    with file.open() as stream:
        if file.container == "jsonl":
            yield from _json_lines(stream, file.label)
            return
        text = stream.read(JSON_BYTES_MAX + 1)
        if len(text) > JSON_BYTES_MAX:
            raise SpecError(file.label, f"> {JSON_BYTES_MAX} bytes of one JSON document",
                            "smaller, or JSONL, which is read line by line")
        yield from _records_of(_loads(text, file.label), file.label)


def _json_lines(stream: BinaryIO, label: str) -> Iterator[tuple[int, Record]]:
    row = 0
    for line, text in enumerate(_byte_lines(stream, label), start=1):
        if not text.strip():
            continue
        row += 1
        record = _loads(text, f"{label}: line {line}")
        if not isinstance(record, dict):
            raise SpecError(f"{label}: line {line}", type(record).__name__, "a JSON object")
        yield row, record


def _records_of(document: Any, label: str) -> Iterator[tuple[int, Record]]:
    if isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list)]
        document = lists[0] if len(lists) == 1 else document
    if not isinstance(document, list):
        raise SpecError(label, type(document).__name__, "a list of objects, or an object that holds one list")
    if not document:
        raise SpecError(f"{label}: rows", 0, "at least one row")
    for row, record in enumerate(document, start=1):
        if not isinstance(record, dict):
            raise SpecError(f"{label}: row {row}", type(record).__name__, "a JSON object")
        yield row, record


def _loads(text: bytes, label: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise SpecError(label, error.msg, f"valid JSON (line {error.lineno}, column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise SpecError(label, text[error.start : error.start + 1], "UTF-8 text") from None


def _columns_of_records(file: TraceFile, names: Sequence[str], options: ReadOptions) -> dict[str, Column]:
    kept = ((row, record) for row, record in records(file) if matches(record, options))
    values: dict[str, list[Any]] = {name: [] for name in names}
    rows: list[int] = []
    for row, record in itertools.islice(kept, options.start, options.rows_wanted):
        rows.append(row)
        for name in names:
            if name not in record:
                where = f"{file.label}: row {row}, column {name!r}"
                raise SpecError(where, "missing", "present in every row")
            values[name].append(record[name])
    options.check_rows(len(rows), file.label)
    return {name: Column(file.label, name, values[name], rows) for name in names}


def matches(record: Record, options: ReadOptions) -> bool:
    """Whether a record has the values that ``where`` asks for."""
    return all(str(record.get(name)) == str(value) for name, value in options.where.items())


def _header(file: TraceFile) -> list[str]:
    """Names in the first line that is not blank."""
    line = file.head.lstrip().partition(b"\n")[0]
    with reading(file.label):
        names = next(csv.reader([line.decode("utf-8").rstrip("\r")], delimiter=_delimiter(file)))
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        allowed = f"without repeats ({', '.join(sorted(repeated))})"
        raise SpecError(f"{file.label}: columns", shorten(names), allowed)
    return names


def _delimiter(file: TraceFile) -> str:
    line = file.head.lstrip().partition(b"\n")[0]
    return next((d for d in (",", "\t", ";") if d.encode() in line), ",")


def _arrow_table(
    file: TraceFile, wanted: list[str], options: ReadOptions,
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], pa.Table]:
    """The wanted columns and the number in the file of each row."""
    with file.open() as stream:
        batches = _parquet_batches(file, wanted) if file.container == "parquet" else _csv_batches(
            file, stream, wanted)
        return _collect(batches, options)


def _collect(
    batches: Iterable[pa.RecordBatch], options: ReadOptions,
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], pa.Table]:
    first, taken = 1, 0
    kept: list[pa.Table] = []
    numbers = [np.zeros(0, dtype=np.int64)]
    for batch in batches:
        table = pa.table(batch) if isinstance(batch, pa.Table) else pa.Table.from_batches([batch])
        rows = np.arange(first, first + table.num_rows, dtype=np.int64)
        first += table.num_rows
        for name, value in options.where.items():
            mask = pc.fill_null(pc.equal(pc.cast(table[name], pa.string()), str(value)), False)
            table, rows = table.filter(mask), rows[mask.to_numpy()]
        skip = max(0, options.start - taken)
        stop = options.rows_wanted - taken
        taken += table.num_rows
        kept.append(table.slice(skip, max(0, stop - skip)))
        numbers.append(rows[skip:stop])
        if taken >= options.rows_wanted:
            break
    return np.concatenate(numbers), pa.concat_tables(kept) if kept else pa.table({})


def _parquet_batches(file: TraceFile, wanted: list[str]) -> Iterator[pa.RecordBatch]:
    yield from pq.ParquetFile(file.path).iter_batches(batch_size=1 << 16, columns=wanted)


def _csv_batches(file: TraceFile, stream: BinaryIO, wanted: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches of text columns: kinds are decided later, over all rows, not by the first block."""
    try:
        yield from pa_csv.open_csv(
            pa.PythonFile(stream, mode="r"),
            read_options=pa_csv.ReadOptions(block_size=BLOCK_BYTES),
            parse_options=pa_csv.ParseOptions(delimiter=_delimiter(file)),
            convert_options=pa_csv.ConvertOptions(
                column_types={name: pa.string() for name in wanted}, include_columns=wanted),
        )
    except pa.ArrowInvalid as error:
        raise _broken_row(file, str(error)) from None


def _broken_row(file: TraceFile, reason: str) -> SpecError:
    """Find the row that Arrow would not parse, which it does not number."""
    width = len(_header(file))
    row = 0
    with file.open() as stream:
        lines = (text for text in _lines(stream, file.label) if text.strip())
        try:
            for cells in itertools.islice(csv.reader(lines, delimiter=_delimiter(file)), 1, None):
                row += 1
                if len(cells) != width:
                    return SpecError(f"{file.label}: row {row}", shorten(cells), f"{width} columns")
                if any("\udc80" <= letter <= "\udcff" for cell in cells for letter in cell):
                    return SpecError(f"{file.label}: row {row}", shorten(cells), "UTF-8 text")
        except csv.Error as error:
            return SpecError(f"{file.label}: row {row + 1}", str(error), "valid CSV")
    return SpecError(file.label, reason, "valid CSV")


def _lines(stream: BinaryIO, label: str) -> Iterator[str]:
    """Lines of text; bytes that are not UTF-8 become surrogates."""
    for line, text in enumerate(_byte_lines(stream, label)):
        yield text.decode("utf-8" if line else "utf-8-sig", errors="surrogateescape")


def _byte_lines(stream: BinaryIO, label: str) -> Iterator[bytes]:
    for line in itertools.count(1):
        text = stream.readline(LINE_BYTES_MAX + 1)
        if not text:
            return
        if len(text) > LINE_BYTES_MAX:
            raise SpecError(f"{label}: line {line}", f"> {LINE_BYTES_MAX} bytes", "shorter")
        yield text
