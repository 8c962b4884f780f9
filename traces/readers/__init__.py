"""Readers of public trace formats and of plain tables of lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hetis_sim.spec.errors import SpecError
from traces.readers import azure, burstgpt, generic, mooncake, prompts, run
from traces.readers.columns import column_names, read_columns
from traces.readers.convert import Column, arrival_seconds, prefix_blocks, session_ids, shorten, token_counts
from traces.readers.files import CONTAINERS, TraceFile, open_trace
from traces.readers.layout import Layout
from traces.readers.options import BYTES_MAX, FORMATS, ReadOptions
from traces.readers.sharegpt import read_conversations
from traces.table import FloatArray, TraceTable

__all__ = ["FORMATS", "ReadOptions", "has_texts", "read_trace"]


def read_trace(path: str | Path, format: str = "auto", **options: Any) -> TraceTable:  # noqa: A002
    """Read a trace of requests, gzip or not.

    Args:
        path: the file.
        format: one of :data:`FORMATS`; ``auto`` looks at the content.
        options: the other fields of :class:`ReadOptions`.

    Returns:
        Rows in order of time where the trace has times, in file order otherwise. Rows
        without prompt or without output are left out and counted in ``rows_dropped``.

    Raises:
        SpecError: for anything wrong with the file, naming it, the row and the column.
    """
    for name, value in options.items():
        if name not in ReadOptions.__dataclass_fields__:
            raise SpecError(name, value, f"one of {', '.join(ReadOptions.__dataclass_fields__)}")
    return read_with(path, ReadOptions(format=format, **options))


def has_texts(path: str | Path, options: ReadOptions) -> bool:
    """Whether a file is one of prompts (:mod:`traces.readers.prompts`).

    Raises:
        SpecError: it cannot be opened.
    """
    if options.format != "auto" or options.columns:
        return options.format == "prompts"
    return prompts.recognise(column_names(open_trace(run.file_of(path), BYTES_MAX)))


def read_with(path: str | Path, options: ReadOptions) -> TraceTable:
    """:func:`read_trace` with its options already checked."""
    file = open_trace(run.file_of(path), BYTES_MAX)
    alike = file.container in ("json", "jsonl") and options.format in ("json", "jsonl")
    if options.format in CONTAINERS and options.format != file.container and not alike:
        raise SpecError("format", options.format, f"{file.container}, as {file.label} looks like")
    names = column_names(file)
    talks = any(name in names for name in ("conversations", "conversation"))
    if options.format == "sharegpt" or (options.format in ("auto", "json", "jsonl") and talks):
        if file.container not in ("json", "jsonl"):
            raise SpecError("format", "sharegpt", f"another for the {file.container} file {file.label}")
        table = read_conversations(file, options)
    elif has_texts(path, options):
        table = _timed(prompts.read_prompts(file, options), options)
    else:
        layout = _layout(file, names, options)
        if layout.format == "run":
            options = run.finished_only(options)
        table = _read_table(file, layout, options)
    return _without_empty_rows(table)


def _layout(file: TraceFile, names: Sequence[str], options: ReadOptions) -> Layout:
    if options.columns or options.format in CONTAINERS:
        return generic.infer(names, options.columns, file.container, file.label)
    if options.format == "auto":
        known = (azure.recognise(names) or burstgpt.recognise(names) or mooncake.recognise(names)
                 or run.recognise(names))
        return known or generic.infer(names, {}, file.container, file.label)
    named, wanted = {
        "azure": (azure.recognise(names), azure.WANTED),
        "burstgpt": (burstgpt.recognise(names), burstgpt.WANTED),
        "mooncake": (mooncake.recognise(names, exact=False), mooncake.WANTED),
        "run": (run.recognise(names), run.WANTED | run.MARKS),
    }[options.format]
    if named is None:
        raise SpecError(f"{file.label}: columns", shorten(list(names)),
                        f"those of format={options.format}: {', '.join(wanted.values())}")
    return named


def _read_table(file: TraceFile, layout: Layout, options: ReadOptions) -> TraceTable:
    columns = read_columns(file, layout.columns, options)
    prompt, output = token_counts(columns[layout.prompt]), token_counts(columns[layout.output])
    unit = layout.time_unit if options.time_unit == "auto" else options.time_unit
    arrival = arrival_seconds(columns[layout.arrival], unit, layout.keep_origin) if layout.arrival else None
    table = TraceTable(
        prompt, output, arrival,
        session=session_ids(columns[layout.session]) if layout.session else None,
        prefix=prefix_blocks(columns[layout.prefix], layout.block_tokens) if layout.prefix else None,
        source=file.label, format=layout.format, rows_read=len(prompt))
    return table if arrival is None else _in_order(table, arrival, columns[layout.arrival], options)


def _in_order(table: TraceTable, arrival: FloatArray, column: Column, options: ReadOptions) -> TraceTable:
    back = np.diff(arrival) < 0
    if not back.any():
        return table
    if options.unsorted == "error":
        raise column.error(int(back.argmax()) + 1, "no earlier than the row before it (or set unsorted=sort)")
    table = table.take(np.argsort(arrival, kind="stable"))
    return replace(table, notes=(*table.notes, f"sorted by time: {int(back.sum())} rows came too late"))


def _timed(table: TraceTable, options: ReadOptions) -> TraceTable:
    """A table with its rows in order of time, where it has times."""
    if table.arrival_s is None:
        return table
    return _in_order(table, table.arrival_s, Column(table.source, prompts.ARRIVAL, table.arrival_s.tolist()),
                     options)


def _without_empty_rows(table: TraceTable) -> TraceTable:
    keep = (table.prompt_tokens > 0) & (table.output_tokens > 0)
    dropped = int(len(keep) - keep.sum())
    if dropped:
        table = table.take(np.flatnonzero(keep))
    total = table.rows_dropped + dropped
    if not len(table):
        raise SpecError(f"{table.source}: rows", 0,
                        f"at least one row with prompt and output ({total} have none)")
    if not total:
        return table
    note = f"{total} of {table.rows_read} rows dropped: no prompt or no output"
    return replace(table, rows_dropped=total, notes=(*table.notes, note))
