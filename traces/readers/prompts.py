r"""Files of prompts: JSON or JSONL with a text in every record, or a table with a column of texts.

``{"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0.7, "stop": ["\n"]}``, or
``messages`` in place of ``prompt``, as chat clients send them. ``arrival_s`` gives times. Texts are counted
as those of conversations are (:mod:`traces.readers.sharegpt`); whoever computes them counts again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hetis_sim.spec.errors import SpecError
from traces.readers.columns import column_names, matches, read_columns, records
from traces.readers.convert import Column, arrival_seconds, token_counts
from traces.readers.files import TraceFile
from traces.readers.layout import normalise
from traces.readers.options import ReadOptions
from traces.readers.sharegpt import text_counter
from traces.table import TraceTable

TEXTS = ("prompt", "messages")
OUTPUTS = ("max_tokens", "max_completion_tokens", "output_tokens")
COUNTS = ("prompt_tokens", "input_tokens", "context_tokens")
OTHERS = ("temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "ignore_eos")
ARRIVAL = "arrival_s"
FIELDS = (*TEXTS, *OUTPUTS, *OTHERS, ARRIVAL)

OUTPUT_TOKENS = 128
"""Of a record that does not say how many it wants."""

TEXT_CHARACTERS_MAX = 1 << 24


def recognise(names: Sequence[str]) -> bool:
    """Whether these are the columns of a file of prompts: texts, and no counts of them."""
    return any(name in names for name in TEXTS) and not any(normalise(name) in COUNTS for name in names)


def read_prompts(file: TraceFile, options: ReadOptions) -> TraceTable:
    """Texts, their lengths, and how many tokens each may have.

    Raises:
        SpecError: a record without a text, or with a field that is not what it must be.
    """
    rows, found = zip(*_records(file, options), strict=True)
    count, how = text_counter(options)
    counts = [count(_text(file.label, row, record)) for row, record in zip(rows, found, strict=True)]
    wanted = [next((record[key] for key in OUTPUTS if record.get(key) is not None), None) for record in found]
    outputs = token_counts(Column(file.label, OUTPUTS[0],
                                  [OUTPUT_TOKENS if number is None else number for number in wanted], rows))
    notes = [f"prompts counted by {how}"]
    if None in wanted:
        notes.append(f"{wanted.count(None)} prompts do not say how many tokens they want: {OUTPUT_TOKENS} "
                     "are assumed")
    # An empty prompt is one token: models begin texts with one.
    return TraceTable(np.maximum(np.array(counts, dtype=np.int64), 1), outputs,
                      _arrivals(file.label, rows, found), texts=found, source=file.label, format="prompts",
                      rows_read=len(found), notes=tuple(notes))


def _records(file: TraceFile, options: ReadOptions) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Row numbers and what is known of each record."""
    if file.container in ("json", "jsonl"):
        kept = ((row, record) for row, record in records(file) if matches(record, options))
        taken = list(itertools.islice(kept, options.start, options.rows_wanted))
    else:
        names = [name for name in column_names(file) if name in FIELDS]
        columns = read_columns(file, names, options)
        any_column = columns[names[0]]
        rows = range(1, len(any_column) + 1) if any_column.rows is None else any_column.rows
        taken = [(int(row), {name: _value(file, name, columns[name].at(n)) for name in names})
                 for n, row in enumerate(rows)]
    options.check_rows(len(taken), file.label)
    for row, record in taken:
        yield row, {key: record[key] for key in FIELDS if record.get(key) is not None}


def _value(file: TraceFile, name: str, value: Any) -> Any:
    """A cell of a table; those of CSV are all texts, also where a number is meant."""
    if file.container != "csv" or name in (*TEXTS, "stop"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value or None


def _text(label: str, row: int, record: Mapping[str, Any]) -> str:
    """The text of a record, or those of all its messages."""
    where = f"{label}: row {row}"
    given = [key for key in TEXTS if key in record]
    if len(given) != 1:
        raise SpecError(where, given or "no text", "prompt or messages, one of them")
    value = record[given[0]]
    if given == ["messages"]:
        if not isinstance(value, list) or not value or not all(
                isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in value):
            raise SpecError(f"{where}, column 'messages'", type(value).__name__,
                            "a list of objects with role and content")
        value = "\n".join(turn["content"] for turn in value)
    if not isinstance(value, str) or len(value) > TEXT_CHARACTERS_MAX:
        raise SpecError(f"{where}, column {given[0]!r}", type(value).__name__,
                        f"a text of at most {TEXT_CHARACTERS_MAX} characters")
    return value


def _arrivals(label: str, rows: Sequence[int], found: Sequence[Mapping[str, Any]]) -> Any:
    times = [record.get(ARRIVAL) for record in found]
    if all(time is None for time in times):
        return None
    return arrival_seconds(Column(label, ARRIVAL, times, rows), "s", True)
