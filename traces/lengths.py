"""Where the lengths of requests come from: quantile tables, traces, fixed values."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetis_sim.spec.errors import SpecError
from traces.rng import RngStreams
from traces.table import FloatArray, IntArray

SCHEMA = 1


class Lengths(NamedTuple):
    """Prompt and output tokens of requests, and the row of the trace they come from."""

    prompt_tokens: IntArray
    output_tokens: IntArray
    rows: IntArray | None = None


class LengthFacts(NamedTuple):
    """What an operator knows of the lengths of requests.

    Attributes:
        prompt_tokens, output_tokens: means.
        prompt_parts: mean prompts of equal parts of the requests, sorted by prompt.
        context_tokens: mean context of the requests that decode at a time: each has its prompt, and half its
            output on average, and stays for as long as its output.
    """

    prompt_tokens: float
    output_tokens: float
    prompt_parts: tuple[float, ...]
    context_tokens: float


def length_facts(lengths: Lengths, context_limit_tokens: int | None = None, parts: int = 8) -> LengthFacts:
    """Facts of the requests that fit into the model's context, of all where none does."""
    prompts, outputs = lengths.prompt_tokens, lengths.output_tokens
    fits = prompts + outputs <= (context_limit_tokens or np.inf)
    if fits.any():
        prompts, outputs = prompts[fits], outputs[fits]
    split = np.array_split(np.sort(prompts), min(parts, len(prompts)))
    context = float((outputs * (prompts + outputs / 2)).sum() / outputs.sum())
    return LengthFacts(float(prompts.mean()), float(outputs.mean()),
                       tuple(float(part.mean()) for part in split), context)


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a table: quantiles of the prompt, and of the output given the prompt.

    Attributes:
        weight: share of the rows of the data.
        prompt_probabilities, prompt_tokens: the inverse distribution of the prompt.
        output_probabilities: grid that all rows of ``output_tokens`` share.
        output_tokens: shape (bins, grid); row b is the inverse distribution of the output
            of prompts whose rank lies in [b / bins, (b + 1) / bins).
    """

    name: str
    weight: float
    prompt_probabilities: FloatArray
    prompt_tokens: FloatArray
    output_probabilities: FloatArray
    output_tokens: FloatArray

    def draw(self, prompt_rank: FloatArray, output_rank: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Lengths at ranks in [0, 1), not yet rounded."""
        prompt = np.interp(prompt_rank, self.prompt_probabilities, self.prompt_tokens)
        bins, grid = self.output_tokens.shape
        which = np.minimum((prompt_rank * bins).astype(np.int64), bins - 1)
        left = np.searchsorted(self.output_probabilities, output_rank, side="right") - 1
        left = np.clip(left, 0, grid - 2)
        low, high = self.output_probabilities[left], self.output_probabilities[left + 1]
        share = (output_rank - low) / (high - low)
        before, after = self.output_tokens[which, left], self.output_tokens[which, left + 1]
        return prompt, before + share * (after - before)


@dataclass(frozen=True, slots=True)
class LengthTable:
    """A joint distribution of prompt and output tokens, fitted to a public data set.

    Attributes:
        components: parts, such as the tasks of a benchmark; most tables have one.
        total_tokens_max: largest prompt plus output in the data; draws keep to it.
        provenance: source, licence, rows, notes and goodness of fit, as in the file.
    """

    name: str
    components: tuple[Component, ...]
    total_tokens_max: int
    provenance: Mapping[str, Any]

    def part(self, names: Sequence[str]) -> LengthTable:
        """Only the named components, in the proportions they have in the data.

        Raises:
            SpecError: for a name that is not one of the table's components.
        """
        have = [component.name for component in self.components]
        for name in names:
            if name not in have:
                raise SpecError("subset", name, f"components of {self.name}: {', '.join(have)}")
        kept = tuple(c for c in self.components if c.name in names)
        return LengthTable(self.name, kept, self.total_tokens_max, self.provenance)

    def draw(self, rng: np.random.Generator, count: int) -> Lengths:
        """``count`` pairs of lengths; three random numbers each, whatever the table."""
        ranks = rng.random((count, 3))
        prompt, output = np.empty(count), np.empty(count)
        edges = np.cumsum([component.weight for component in self.components])
        which = np.searchsorted(edges / edges[-1], ranks[:, 0], side="right")
        for index, component in enumerate(self.components):
            mine = which == index
            prompt[mine], output[mine] = component.draw(ranks[mine, 1], ranks[mine, 2])
        prompt_tokens = np.maximum(np.rint(prompt).astype(np.int64), 1)
        room = np.maximum(self.total_tokens_max - prompt_tokens, 1)
        return Lengths(prompt_tokens, np.clip(np.rint(output).astype(np.int64), 1, room))


def table_names() -> list[str]:
    """Names of the tables that come with the project."""
    files = resources.files("traces").joinpath("tables").iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


@lru_cache(maxsize=32)
def load_table(name: str) -> LengthTable:
    """A table by name.

    Raises:
        SpecError: when there is none of that name.
    """
    if name not in table_names():
        raise SpecError("table", name, f"one of {', '.join(table_names())}, fixed")
    text = resources.files("traces").joinpath("tables", f"{name}.json").read_text("utf-8")
    return table_from_json(json.loads(text))


def table_from_json(document: Mapping[str, Any]) -> LengthTable:
    """The table that a file of schema 1 describes."""
    if document.get("schema") != SCHEMA:
        raise SpecError("schema", document.get("schema"), f"{SCHEMA}")
    components = tuple(
        Component(
            part["name"], float(part["weight"]),
            *(np.array(part[key], dtype=np.float64) for key in (
                "prompt_probabilities", "prompt_tokens", "output_probabilities", "output_tokens")))
        for part in document["components"])
    provenance = {key: value for key, value in document.items() if key != "components"}
    return LengthTable(document["name"], components, int(document["total_tokens_max"]), provenance)


class LengthSource(ABC):
    """An endless or finite row of lengths, in blocks that go on where the last one ended."""

    @abstractmethod
    def next_block(self, count: int) -> Lengths:
        """The next ``count`` pairs; fewer, or none, when the source has ended."""


class TableSource(LengthSource):
    """Draws from a quantile table, without end."""

    def __init__(self, table: LengthTable, streams: RngStreams) -> None:
        self.table = table
        self._rng = streams.stream("lengths")

    def next_block(self, count: int) -> Lengths:
        return self.table.draw(self._rng, count)


class FixedSource(LengthSource):
    """The same lengths for every request, without end."""

    def __init__(self, prompt_tokens: int, output_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens

    def next_block(self, count: int) -> Lengths:
        return Lengths(np.full(count, self.prompt_tokens, dtype=np.int64),
                       np.full(count, self.output_tokens, dtype=np.int64))


class RowSource(LengthSource):
    """Rows of a trace: in order and once, in order and round again, or drawn with return."""

    def __init__(self, prompt_tokens: IntArray, output_tokens: IntArray, order: str,
                 streams: RngStreams) -> None:
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.order = order
        self._rng = streams.stream("lengths")
        self._next = 0

    def next_block(self, count: int) -> Lengths:
        rows = self._rows(count)
        return Lengths(self.prompt_tokens[rows], self.output_tokens[rows], rows)

    def _rows(self, count: int) -> NDArray[np.int64]:
        size = len(self.prompt_tokens)
        if self.order == "bootstrap":
            # One uniform a row, so that the first rows do not depend on the count.
            return np.minimum((self._rng.random(count) * size).astype(np.int64), size - 1)
        rows = np.arange(self._next, self._next + count, dtype=np.int64)
        self._next += count
        return rows % size if self.order == "cycle" else rows[rows < size]
