"""Steps that are replayed from graphs of kernels: which they are, and what they are rounded up to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hetis_sim.cost.parse import positive
from hetis_sim.spec.errors import require

TOKENS, PROMPTS = "graph_prompt_tokens", "graph_prompts"
SIZES = ("graph_prompt_sizes", "graph_batch_sizes")


@dataclass(frozen=True, slots=True)
class GraphSteps:
    """What an engine has recorded, where one device has the whole model and its cache.

    A graph always computes as many rows as it was recorded for; those that nobody asked for touch no cache.
    So dense modules take as long as for its size, attention does not.

    Attributes:
        prompt_tokens: of the largest step of prompts that is a graph; 0 for none.
        prompt_sizes: tokens of the recorded steps of prompts, rising; none where steps are not rounded.
        batch_sizes: requests of the recorded decode steps, likewise.
        prompts: a step of more prompts is no graph, and the LM head computes as many rows; 0 for any number.
    """

    prompt_tokens: int = 0
    prompt_sizes: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    prompts: int = 0

    def takes(self, tokens: int, prompts: int) -> bool:
        """Whether a step of so many prompts is a graph."""
        return tokens <= self.prompt_tokens and (not self.prompts or prompts <= self.prompts)

    def prompt_rows(self, tokens: int) -> int:
        """Rows that dense modules compute in a graph for so many tokens of prompts."""
        return rounded(tokens, self.prompt_sizes)

    def batch_rows(self, requests: int) -> int:
        """Rows that are computed in a decode step of so many requests."""
        return rounded(requests, self.batch_sizes)

    @classmethod
    def parse(cls, raw: dict[str, Any], key: str) -> GraphSteps:
        """Read coefficients, any of which may be missing; :class:`SpecError` names the faulty key."""
        tokens, prompts = (int(positive(raw.get(name, 0), f"{key}.{name}", zero=True))
                           for name in (TOKENS, PROMPTS))
        of_prompts, of_batches = (_sizes(raw.get(name, []), f"{key}.{name}") for name in SIZES)
        return cls(tokens, of_prompts, of_batches, prompts)

    def dump(self) -> dict[str, Any]:
        """The form for a profile file: what there is."""
        found = {TOKENS: self.prompt_tokens, SIZES[0]: list(self.prompt_sizes),
                 SIZES[1]: list(self.batch_sizes), PROMPTS: self.prompts}
        return {name: value for name, value in found.items() if value}


NO_GRAPHS = GraphSteps()


def rounded(number: int, sizes: Sequence[int]) -> int:
    """The first of rising sizes that is not smaller; the number itself beyond them."""
    at = bisect_left(sizes, number)
    return sizes[at] if at < len(sizes) else number


def _sizes(raw: Any, key: str) -> tuple[int, ...]:
    require(isinstance(raw, list), key, raw, "a list of rising numbers")
    sizes = tuple(int(positive(value, key)) for value in raw)
    require(all(a < b for a, b in pairwise(sizes)), key, raw, "a list of rising numbers")
    return sizes
