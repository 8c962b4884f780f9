"""What a trace holds once it is read: lengths, and arrival times where it has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class PrefixBlocks:
    """Ids of the shared prompt blocks of every row, in one flat array.

    Attributes:
        ids: block ids of all rows, one after another.
        offsets: row i owns ``ids[offsets[i]:offsets[i + 1]]``; one longer than the rows.
        block_tokens: tokens that one id stands for, 0 where the trace does not say.
    """

    ids: IntArray
    offsets: IntArray
    block_tokens: int = 0

    def of(self, row: int) -> tuple[int, ...]:
        """Block ids of one row."""
        return tuple(self.ids[self.offsets[row] : self.offsets[row + 1]].tolist())

    def take(self, rows: IntArray) -> PrefixBlocks:
        """The blocks of the given rows, in their order."""
        counts = self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate(([0], np.cumsum(counts)))
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
        ids = self.ids[np.repeat(self.offsets[rows], counts) + within]
        return PrefixBlocks(ids, offsets, self.block_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class TraceTable:
    """Rows of a trace, checked: every count is positive, times never go back.

    Attributes:
        prompt_tokens, output_tokens: tokens, both in [1, 10 million], shape (n,).
        arrival_s: seconds, non-decreasing, equal times allowed (the row breaks the tie);
            ``None`` where the trace has lengths only.
        session: id of the conversation or user, -1 for none; ``None`` without the column.
        prefix: shared prompt blocks; ``None`` without the column.
        texts: what each row asks for, where the trace has texts (:mod:`traces.readers.prompts`).
        source: path as the caller gave it.
        format: the format that was used to read it.
        rows_read: rows before the drop below (after ``where``, ``start`` and ``limit``).
        rows_dropped: rows without prompt or without output, which ask for no work.
        notes: what a reader of results must know, e.g. that tokens were estimated.
    """

    prompt_tokens: IntArray
    output_tokens: IntArray
    arrival_s: FloatArray | None = None
    session: IntArray | None = None
    prefix: PrefixBlocks | None = None
    texts: tuple[Mapping[str, Any], ...] | None = None
    source: str = ""
    format: str = ""
    rows_read: int = 0
    rows_dropped: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def take(self, rows: IntArray) -> TraceTable:
        """The given rows in the given order; counts and notes stay."""
        return replace(
            self,
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            arrival_s=None if self.arrival_s is None else self.arrival_s[rows],
            session=None if self.session is None else self.session[rows],
            prefix=None if self.prefix is None else self.prefix.take(rows),
            texts=None if self.texts is None else tuple(self.texts[row] for row in rows.tolist()),
        )

    @property
    def rate_rps(self) -> float | None:
        """Mean arrivals per second between first and last row; ``None`` without a span."""
        if self.arrival_s is None or len(self) < 2 or self.arrival_s[-1] <= self.arrival_s[0]:
            return None
        return float((len(self) - 1) / (self.arrival_s[-1] - self.arrival_s[0]))
