"""Workloads: requests that arrive by themselves, and the description of them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from hetis_sim.spec.request import Request
from traces.lengths import Lengths
from traces.table import FloatArray, IntArray, TraceTable


@dataclass(frozen=True, slots=True, eq=False)
class Workload(ABC):
    """What every workload tells about itself.

    Attributes:
        name: as in the configuration.
        source: table or path of the lengths.
        seed: of its random streams.
        counts: requests that were clamped, dropped or kept over the context, by name.
        notes: sentences for whoever reads the results.
    """

    closed: ClassVar[bool]

    name: str
    source: str
    seed: int
    counts: Mapping[str, int] = field(default_factory=dict, kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Numbers for a run's manifest, all of JSON types, with a sha256 of the workload."""

    @abstractmethod
    def known_lengths(self) -> Lengths:
        """Lengths of the requests; where these have no end, of the first ones."""

    def _describe(self, lengths: Lengths, times_s: FloatArray) -> dict[str, Any]:
        return {
            "name": self.name, "source": self.source, "seed": self.seed, "closed": self.closed,
            "prompt_tokens": token_summary(lengths.prompt_tokens),
            "output_tokens": token_summary(lengths.output_tokens),
            "sha256": digest(times_s, lengths.prompt_tokens, lengths.output_tokens),
            "counts": dict(self.counts), "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, eq=False)
class OpenWorkload(Workload):
    """Requests with their arrival times, fixed before the run.

    Attributes:
        arrival_s: seconds, non-decreasing; equal times are in the order of the rows.
        lengths: prompt and output tokens, and the rows of ``trace`` they come from.
        trace: the trace, where there is one; sessions and prefix blocks come from it.
    """

    closed: ClassVar[bool] = False

    arrival_s: FloatArray = field(kw_only=True)
    lengths: Lengths = field(kw_only=True)
    trace: TraceTable | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.arrival_s)

    def requests(self) -> list[Request]:
        """New requests with ids 0 to n - 1, in the order of arrival."""
        times, prompts, outputs = (a.tolist() for a in (
            self.arrival_s, self.lengths.prompt_tokens, self.lengths.output_tokens))
        if self.trace is None or self.lengths.rows is None:
            return [Request(i, *item) for i, item in enumerate(zip(times, prompts, outputs, strict=True))]
        rows = self.lengths.rows.tolist()
        return [
            Request(i, time, prompt, output, prefix_of(self.trace, row, prompt), session_of(self.trace, row))
            for i, (time, prompt, output, row) in enumerate(zip(times, prompts, outputs, rows, strict=True))]

    @property
    def rate_rps(self) -> float | None:
        """Mean arrivals per second from the first to the last; ``None`` without a span."""
        span_s = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self) - 1) / span_s if span_s > 0 else None

    def known_lengths(self) -> Lengths:
        return self.lengths

    def describe(self) -> dict[str, Any]:
        gaps = np.diff(self.arrival_s)
        mean_s = float(gaps.mean()) if len(gaps) else 0.0
        return {
            "n": len(self), "rate_rps": self.rate_rps,
            "gap_cv": float(gaps.std(ddof=1)) / mean_s if len(gaps) > 1 and mean_s > 0 else None,
            "first_s": float(self.arrival_s[0]), "last_s": float(self.arrival_s[-1]),
            **self._describe(self.lengths, self.arrival_s),
        }


def prefix_of(trace: TraceTable, row: int, prompt_tokens: int) -> tuple[int, ...]:
    """Prefix blocks of a row, as many as a prompt of this length reaches into."""
    if trace.prefix is None:
        return ()
    blocks = trace.prefix.of(row)
    whole = int(trace.prompt_tokens[row])
    if prompt_tokens >= whole:
        return blocks
    size = trace.prefix.block_tokens
    return blocks[: -(-prompt_tokens // size) if size else len(blocks) * prompt_tokens // whole]


def session_of(trace: TraceTable, row: int) -> int:
    """Session of a row, -1 for none."""
    return -1 if trace.session is None else int(trace.session[row])


def token_summary(tokens: IntArray) -> dict[str, float]:
    """Mean, median, 95th percentile and largest."""
    return {"mean": float(tokens.mean()), "p50": float(np.quantile(tokens, 0.5)),
            "p95": float(np.quantile(tokens, 0.95)), "max": float(tokens.max())}


def digest(times_s: FloatArray, prompt_tokens: IntArray, output_tokens: IntArray) -> str:
    """SHA-256 of the arrays as little-endian float64 and int64, equal on every machine."""
    sha = hashlib.sha256()
    for array, kind in ((times_s, "<f8"), (prompt_tokens, "<i8"), (output_tokens, "<i8")):
        sha.update(np.ascontiguousarray(array, dtype=kind).tobytes())
    return sha.hexdigest()
