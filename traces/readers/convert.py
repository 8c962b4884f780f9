"""From columns as they were read to checked arrays; errors name file, row and column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hetis_sim.spec.errors import SpecError
from traces.readers.layout import TIME_UNITS
from traces.table import FloatArray, IntArray, PrefixBlocks

TOKENS_MAX = 10_000_000
TOKENS_ALLOWED = f"a whole number of tokens in [0, {TOKENS_MAX}]"
INT64_MAX = 2**63 - 1
SHOWN_MAX = 80


@dataclass(frozen=True, slots=True)
class Column:
    """One column with what its error messages need.

    Attributes:
        values: an Arrow array (CSV, parquet) or a list of Python values (JSON).
        rows: number in the file of every value, from 1; ``None`` when they are 1 to n.
    """

    label: str
    name: str
    values: pa.Array | list[Any]
    rows: Sequence[int] | IntArray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def at(self, index: int) -> Any:
        """The value as Python holds it."""
        value = self.values[index]
        return value if isinstance(self.values, list) else value.as_py()

    def error(self, index: int, allowed: str, value: Any = ...) -> SpecError:
        """The error for one value of this column."""
        row = index + 1 if self.rows is None else int(self.rows[index])
        shown = self.at(index) if value is ... else value
        return SpecError(f"{self.label}: row {row}, column {self.name!r}", shorten(shown), allowed)


def shorten(value: Any) -> Any:
    """The value, or the start of its text where that is too long for a message."""
    text = repr(value)
    return value if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}..."


def token_counts(column: Column) -> IntArray:
    """Whole numbers of tokens from 0 to 10 million; anything else is an error."""
    numbers = _numbers(column, TOKENS_ALLOWED)
    with np.errstate(invalid="ignore"):
        bad = ~((numbers >= 0) & (numbers <= TOKENS_MAX) & (numbers == np.floor(numbers)))
    if bad.any():
        raise column.error(int(bad.argmax()), TOKENS_ALLOWED)
    return numbers.astype(np.int64)


def arrival_seconds(column: Column, unit: str, keep_origin: bool) -> FloatArray:
    """Times as seconds, in the order of the rows.

    Numbers are in ``unit``, texts are numbers or dates (ISO 8601, ``T`` or a blank between
    date and time, with or without an offset from UTC). Unless ``keep_origin``, the earliest
    time becomes 0: dates and epochs lose no precision, since the difference is taken first.
    """
    ticks, per_second, is_date = _ticks(column, TIME_UNITS[unit])
    allowed = f"a finite time in {unit}, >= 0, or a date"
    if not is_date:
        bad = ~(np.isfinite(ticks) & (ticks >= 0))
        if bad.any():
            raise column.error(int(bad.argmax()), allowed)
    if (not keep_origin or is_date) and len(ticks):
        ticks = ticks - ticks.min()
    return np.asarray(ticks / per_second, dtype=np.float64)


def session_ids(column: Column) -> IntArray:
    """Whole numbers as they are; other values numbered as they first appear; -1 for none."""
    values = column.values if isinstance(column.values, list) else column.values.to_pylist()
    given = [None if value is None or value == "" or value != value else value for value in values]
    try:
        whole = [-1 if value is None else _whole(value) for value in given]
    except ValueError:
        numbers: dict[str, int] = {}
        whole = [-1 if value is None else numbers.setdefault(str(value), len(numbers)) for value in given]
    return np.array(whole, dtype=np.int64)


def prefix_blocks(column: Column, block_tokens: int) -> PrefixBlocks:
    """Lists of block ids; in CSV they are whole numbers between blanks."""
    lists = column.values if isinstance(column.values, list) else column.values.to_pylist()
    allowed = f"a list of whole numbers in [0, {INT64_MAX}]"
    flat: list[int] = []
    counts = []
    for index, item in enumerate(lists):
        try:
            ids = _block_ids(item)
        except (TypeError, ValueError):
            raise column.error(index, allowed) from None
        flat += ids
        counts.append(len(ids))
    offsets = np.concatenate(([0], np.cumsum(np.array(counts, dtype=np.int64))))
    return PrefixBlocks(np.array(flat, dtype=np.int64), offsets, block_tokens)


def _block_ids(item: Any) -> list[int]:
    if item is None:
        return []
    ids = [int(word) for word in item.split()] if isinstance(item, str) else item
    if not isinstance(ids, list):
        raise TypeError(ids)
    if not all(type(i) is int and 0 <= i <= INT64_MAX for i in ids):
        raise ValueError(ids)
    return ids


def _whole(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    if not isinstance(value, (int, float, str)):
        raise ValueError(value)
    number = int(value)
    if not -1 <= number <= INT64_MAX:
        raise ValueError(value)
    return number


def _numbers(column: Column, allowed: str) -> FloatArray:
    """The values as floats (exact up to 2**53); nan stays for the caller to refuse."""
    if isinstance(column.values, list):
        return _numbers_of_list(column, column.values, allowed)
    values = column.values
    if values.null_count:
        raise column.error(int(np.asarray(pc.is_null(values)).argmax()), allowed, "missing")
    if pa.types.is_boolean(values.type):
        raise column.error(0, allowed)
    return np.asarray(_cast(column, pa.float64(), allowed).to_numpy(), dtype=np.float64)


def _numbers_of_list(column: Column, values: list[Any], allowed: str) -> FloatArray:
    if not set(map(type, values)) <= {int, float}:
        index = next(i for i, value in enumerate(values) if type(value) not in (int, float))
        raise column.error(index, allowed, "missing" if values[index] is None else values[index])
    try:
        return np.array(values, dtype=np.float64)
    except OverflowError:
        index = next(i for i, value in enumerate(values) if abs(value) > INT64_MAX)
        raise column.error(index, allowed, "an integer beyond 64 bits") from None


def _ticks(column: Column, per_second: int) -> tuple[Any, int, bool]:
    """Times as numbers, how many of them make a second, and whether they are dates."""
    allowed = "a number or a date"
    values = column.values
    if isinstance(values, list):
        if values and all(isinstance(value, str) for value in values):
            values = pa.array(values, pa.string())
        elif values and all(type(value) is int and abs(value) <= INT64_MAX for value in values):
            return np.array(values, dtype=np.int64), per_second, False
        else:
            return _numbers_of_list(column, values, allowed), per_second, False
    column = Column(column.label, column.name, values, column.rows)
    if values.null_count:
        raise column.error(int(np.asarray(pc.is_null(values)).argmax()), allowed, "missing")
    if pa.types.is_timestamp(values.type):
        return _nanoseconds(values), TIME_UNITS["ns"], True
    if not pa.types.is_string(values.type):
        whole = pa.types.is_integer(values.type)
        return _cast(column, pa.int64() if whole else pa.float64(), allowed).to_numpy(), per_second, False
    return _ticks_of_text(column, per_second)


def _ticks_of_text(column: Column, per_second: int) -> tuple[Any, int, bool]:
    text = pc.utf8_trim_whitespace(column.values)
    kinds = (pa.int64(), pa.float64(), pa.timestamp("ns"), pa.timestamp("ns", tz="UTC"))
    for kind in kinds:
        try:
            values = pc.cast(text, kind)
        except pa.ArrowInvalid:
            continue
        if pa.types.is_timestamp(kind):
            return _nanoseconds(values), TIME_UNITS["ns"], True
        return values.to_numpy(), per_second, False
    # No kind fits every row: the row to name is where the kind that got furthest stops.
    furthest = max(_first_failing(text, kind) for kind in kinds)
    raise column.error(furthest, "a number or a date, of one kind in all rows")


def _nanoseconds(values: pa.Array) -> IntArray:
    ticks = pc.cast(pc.cast(values, pa.timestamp("ns", tz=values.type.tz)), pa.int64())
    return np.asarray(ticks.to_numpy(), dtype=np.int64)


def _cast(column: Column, kind: pa.DataType, allowed: str) -> pa.Array:
    values: Any = column.values
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = pc.utf8_trim_whitespace(values)
    try:
        return pc.cast(values, kind)
    except pa.ArrowNotImplementedError:
        raise column.error(0, allowed) from None
    except pa.ArrowInvalid:
        raise column.error(_first_failing(values, kind), allowed) from None


def _first_failing(values: pa.Array, kind: pa.DataType) -> int:
    """Index of the first value that cannot be cast, by bisection."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        if _casts(values[low:middle], kind):
            low = middle
        else:
            high = middle
    return low


def _casts(values: pa.Array, kind: pa.DataType) -> bool:
    try:
        pc.cast(values, kind)
    except pa.ArrowInvalid:
        return False
    return True
