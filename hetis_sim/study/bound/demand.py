"""What a workload asks for, per mean request: tokens, and the contexts at which they are decoded.

A request of P prompt and O output tokens gets its first token from its prefill. The m-th
of the other O - 1 is decoded over P + m cached tokens. Contexts are sorted into
bins; a figure that must not be overstated is taken at the near edge of its bin.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hetis_sim.spec.errors import require

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

CONTEXT_BINS = 16
OUTPUT_GROUPS = 4
PROMPT_BINS = 24


@dataclass(frozen=True, slots=True)
class DecodeBin:
    """Decoded tokens whose contexts lie in [``low``, ``high``]; ``tokens`` of a mean request."""

    tokens: float
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class DecodeCell:
    """Decoded tokens of one bin of contexts, of requests whose outputs are of similar length.

    Attributes:
        bin: index of the bin of contexts.
        tokens: of a mean request.
        low, high: contexts.
        context_tokens: sum of the contexts of those tokens.
        generated_tokens: the part of that sum that the request has generated itself.
        decoded_most: most tokens that any of the requests decodes.
    """

    bin: int
    tokens: float
    low: int
    high: int
    context_tokens: float
    generated_tokens: float
    decoded_most: int


@dataclass(frozen=True, slots=True)
class Demand:
    """The work of a mean request.

    Attributes:
        prompt_tokens, output_tokens: means.
        longest_tokens: prompt and output of the longest request.
        bins: decoded tokens by context.
        cells: the same by context and length of the output.
        prompts: (share of the requests, shortest prompt) of bins of prompts.
    """

    prompt_tokens: float
    output_tokens: float
    longest_tokens: int
    bins: tuple[DecodeBin, ...]
    cells: tuple[DecodeCell, ...]
    prompts: tuple[tuple[float, int], ...]

    @property
    def decoded_tokens(self) -> float:
        """Output tokens that decode iterations make."""
        return sum(b.tokens for b in self.bins)


def demand_of(prompt_tokens: Ints, output_tokens: Ints) -> Demand:
    """The demand of requests of these lengths.

    Raises:
        SpecError: no requests, or lengths below 1.
    """
    prompts, outputs = np.asarray(prompt_tokens, np.int64), np.asarray(output_tokens, np.int64)
    require(len(prompts) > 0 and len(prompts) == len(outputs), "requests", len(prompts), "at least one")
    fewest = int(min(prompts.min(), outputs.min()))
    require(fewest >= 1, "tokens", fewest, ">= 1")
    cells = _cells(prompts, outputs, _context_edges(prompts, outputs))
    bins: list[DecodeBin] = []
    for number in range(cells[-1].bin + 1 if cells else 0):
        mine = [cell for cell in cells if cell.bin == number]
        tokens = sum(cell.tokens for cell in mine)
        bins.append(DecodeBin(tokens, min(cell.low for cell in mine), max(cell.high for cell in mine)))
    return Demand(float(prompts.mean()), float(outputs.mean()), int((prompts + outputs).max()), tuple(bins),
                  tuple(cells), _prompt_bins(prompts))


def _context_edges(prompts: Ints, outputs: Ints) -> Ints:
    """Edges e of bins (e_k, e_k+1] of contexts, each with about as much cache to read."""
    steps = np.zeros(int((prompts + outputs).max()) + 1, np.int64)
    np.add.at(steps, prompts + 1, 1)
    np.add.at(steps, prompts + outputs, -1)
    mass = np.cumsum(np.cumsum(steps) * np.arange(len(steps)))
    if not mass[-1]:
        return np.zeros(1, np.int64)
    inner = np.searchsorted(mass, mass[-1] * np.arange(1, CONTEXT_BINS) / CONTEXT_BINS)
    first = int(prompts[outputs > 1].min())
    return np.unique(np.concatenate(([first], inner[inner > first], [len(steps) - 1]))).astype(np.int64)


def _cells(prompts: Ints, outputs: Ints, edges: Ints) -> list[DecodeCell]:
    cells: list[DecodeCell] = []
    many = outputs > 1
    if not many.any():
        return cells
    limits = np.unique(np.quantile(outputs[many], np.arange(1, OUTPUT_GROUPS) / OUTPUT_GROUPS))
    group = np.searchsorted(limits, outputs, side="left")
    number = 0
    for low, high in pairwise(edges.tolist()):
        begin, end = np.maximum(prompts, low), np.minimum(prompts + outputs - 1, high)
        for g in range(len(limits) + 1):
            mine = many & (group == g) & (end > begin)
            if mine.any():
                longest = int(outputs[mine].max()) - 1
                cells.append(_cell(number, prompts[mine], begin[mine], end[mine], longest, len(prompts)))
        number += bool(cells and cells[-1].bin == number)
    return cells


def _cell(number: int, prompts: Ints, begin: Ints, end: Ints, decoded_most: int, requests: int) -> DecodeCell:
    """Contexts begin + 1 .. end of each of some requests, over all ``requests``."""
    tokens = end - begin
    contexts = float((tokens * (begin + 1 + end) / 2).sum())
    own = contexts - float((tokens * prompts).sum())
    return DecodeCell(number, float(tokens.sum()) / requests, int(begin.min()) + 1, int(end.max()),
                      contexts / requests, own / requests, decoded_most)


def _prompt_bins(prompts: Ints) -> tuple[tuple[float, int], ...]:
    """Bins with about as much attention to compute each, and the shortest prompt of each."""
    ascending = np.sort(prompts)
    mass = np.cumsum(ascending.astype(np.float64) ** 2)
    starts = np.searchsorted(mass, mass[-1] * np.arange(PROMPT_BINS) / PROMPT_BINS)
    # A bin begins where its length first occurs, so that equal prompts share one.
    starts = np.unique(np.searchsorted(ascending, ascending[starts]))
    counts = np.diff(np.append(starts, len(ascending)))
    return tuple((float(count) / len(ascending), int(ascending[start]))
                 for start, count in zip(starts, counts, strict=True))
