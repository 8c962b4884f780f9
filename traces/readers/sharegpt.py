"""Conversations as ShareGPT stores them, turned into lengths.

Every record has ``conversations``, a list of turns ``{"from": "human" | "gpt" | ...,
"value": text}``. A turn that has a whole number under ``tokens``, ``token_count`` or
``num_tokens`` is counted by it. Other texts are counted by a tokenizer file, or else
estimated as UTF-8 bytes over ``bytes_per_token``. The default of 4 is the usual rule for
English; with Llama 2's tokenizer the reference answers of LongBench have 4.25 bytes per
token in English, 3.3 in code and 2.0 in Chinese, so code and Chinese are underestimated.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hetis_sim.spec.errors import SpecError
from traces.readers.columns import Record, matches, records
from traces.readers.convert import TOKENS_ALLOWED, TOKENS_MAX
from traces.readers.files import TraceFile
from traces.readers.options import ReadOptions
from traces.table import TraceTable

USERS = ("human", "user")
MODELS = ("gpt", "assistant", "chatgpt", "bing", "bard", "model")
COUNT_KEYS = ("tokens", "token_count", "num_tokens")
Counter = Callable[[str], int]


@dataclass(slots=True)
class _Exchanges:
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    session: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    without: int = 0
    estimated: bool = False


def read_conversations(file: TraceFile, options: ReadOptions) -> TraceTable:
    """Lengths of the exchanges; the session is the number of the conversation.

    ``start`` and ``limit`` count conversations. Conversations without a reply to a user
    are dropped and counted.
    """
    count, how = text_counter(options)
    found = _Exchanges()
    kept = (item for item in records(file) if matches(item[1], options))
    read = 0
    for row, record in itertools.islice(kept, options.start, options.rows_wanted):
        read += 1
        before = len(found.prompt)
        _add(found, file.label, row, record, count)
        if options.turns == "first":
            del found.prompt[before + 1 :], found.output[before + 1 :], found.session[before + 1 :]
        found.without += len(found.prompt) == before
    options.check_rows(read, file.label)
    notes = (f"tokens counted by {how}",) if found.estimated else ()
    return TraceTable(
        np.array(found.prompt, dtype=np.int64), np.array(found.output, dtype=np.int64),
        session=np.array(found.session, dtype=np.int64), source=file.label, format="sharegpt",
        rows_read=len(found.prompt) + found.without, rows_dropped=found.without, notes=notes)


def _add(found: _Exchanges, label: str, row: int, record: Record, count: Counter) -> None:
    """Append every user turn that is answered at once, with all turns before it as context."""
    context, previous = 0, ""
    for speaker, turn in _turns(label, row, record):
        tokens = _tokens(found, f"{label}: row {row}", turn, count)
        if speaker in MODELS and previous in USERS:
            found.prompt.append(context)
            found.output.append(tokens)
            found.session.append(row - 1)
        context += tokens
        previous = speaker


def _turns(label: str, row: int, record: Record) -> Iterator[tuple[str, Record]]:
    turns = record.get("conversations", record.get("conversation"))
    if not isinstance(turns, list):
        raise SpecError(f"{label}: row {row}, column 'conversations'", turns, "a list of turns")
    for turn in turns:
        if not isinstance(turn, dict):
            raise SpecError(f"{label}: row {row}, column 'conversations'", turn, "turns that are objects")
        yield str(turn.get("from", turn.get("role", ""))).lower(), turn


def _tokens(found: _Exchanges, where: str, turn: Record, count: Counter) -> int:
    for key in COUNT_KEYS:
        if key in turn:
            value = turn[key]
            if type(value) is not int or not 0 <= value <= TOKENS_MAX:
                raise SpecError(f"{where}, turn {key!r}", value, TOKENS_ALLOWED)
            return value
    text = turn.get("value", turn.get("content"))
    if not isinstance(text, str):
        raise SpecError(f"{where}, turn 'value'", text, f"a text, or a count under {', '.join(COUNT_KEYS)}")
    found.estimated = True
    return count(text)


def text_counter(options: ReadOptions) -> tuple[Counter, str]:
    """What counts the tokens of a text, and how it is called."""
    if options.tokenizer is None:
        size = options.bytes_per_token
        return (lambda text: math.ceil(len(text.encode("utf-8", "replace")) / size),
                f"UTF-8 bytes / {size:g} (an estimate)")
    try:
        tokenizers: Any = importlib.import_module("tokenizers")
    except ImportError:
        raise SpecError("tokenizer", options.tokenizer,
                        "unset without the optional package 'tokenizers' (pip install tokenizers)") from None
    try:
        encoder = tokenizers.Tokenizer.from_file(options.tokenizer)
    except Exception as error:  # noqa: BLE001 (the package raises plain Exception)
        raise SpecError("tokenizer", options.tokenizer, f"a readable tokenizer.json ({error})") from None
    return (lambda text: len(encoder.encode(text, add_special_tokens=False).ids),
            f"tokenizer {options.tokenizer}")
