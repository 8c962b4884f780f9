"""How a trace is to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hetis_sim.spec.errors import SpecError, require, require_finite
from traces.readers.layout import ROLES, TIME_UNITS

FORMATS = ("auto", "azure", "burstgpt", "mooncake", "sharegpt", "prompts", "run", "csv", "jsonl", "json",
           "parquet")
ROWS_MAX = 10_000_000
BYTES_MAX = 16 * 2**30
JSON_BYTES_MAX = 2 * 2**30


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Settings of :func:`traces.read_trace`.

    Attributes:
        format: ``auto`` looks at the content.
        columns: role (prompt, output, arrival, session, prefix) to column name, for
            tables with other names than the known ones.
        where: column to value; only rows with these values are read.
        time_unit: unit of numeric times: s, ms, us, ns; ``auto`` takes the format's, or
            what the name of the column ends in, or seconds.
        unsorted: ``error``, or ``sort`` (stable: rows of equal time keep their order).
        start: rows to skip, counted after ``where``.
        limit: most rows to take, ``None`` for all.
        max_rows: more rows than this without a ``limit`` are an error.
        tokenizer: path of a Hugging Face ``tokenizer.json`` for texts without counts.
        bytes_per_token: UTF-8 bytes per token for texts without counts or tokenizer.
        turns: of a conversation, the ``first`` exchange or ``all`` (each reply a request
            whose prompt is everything before it).
    """

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=dict)
    time_unit: str = "auto"
    unsorted: str = "error"
    start: int = 0
    limit: int | None = None
    max_rows: int = ROWS_MAX
    tokenizer: str | None = None
    bytes_per_token: float = 4.0
    turns: str = "first"

    def __post_init__(self) -> None:
        require_one("format", self.format, FORMATS)
        require_one("time_unit", self.time_unit, ("auto", *TIME_UNITS))
        require_one("unsorted", self.unsorted, ("error", "sort"))
        require_one("turns", self.turns, ("first", "all"))
        for role in self.columns:
            require_one("columns", role, ROLES)
        require_int("start", self.start, 0)
        if self.limit is not None:
            require_int("limit", self.limit, 1)
        require_int("max_rows", self.max_rows, 1)
        require_finite("bytes_per_token", self.bytes_per_token, 0.1, 100.0)

    @property
    def rows_wanted(self) -> int:
        """Rows to read before stopping: one beyond ``max_rows`` shows that there are more."""
        return self.start + self.limit if self.limit is not None else self.start + self.max_rows + 1

    def check_rows(self, rows: int, label: str) -> None:
        """Raise :class:`SpecError` when too many rows came, or none."""
        if rows <= 0:
            skipped = f" (start={self.start}, where={dict(self.where)})" if self.start or self.where else ""
            raise SpecError(f"{label}: rows", 0, f"at least one row{skipped}")
        if self.limit is None and rows > self.max_rows:
            raise SpecError(f"{label}: rows", f"> {self.max_rows}",
                            "at most max_rows; raise it, or take part of the trace with limit")


def require_one(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise :class:`SpecError` unless ``value`` is one of ``allowed``."""
    require(value in allowed, key, value, f"one of {', '.join(allowed)}")


def require_int(key: str, value: object, low: int) -> None:
    """Raise :class:`SpecError` unless ``value`` is a whole number >= ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise SpecError(key, value, f"a whole number >= {low}")
