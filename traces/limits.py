"""What happens to lengths that are too small, too large, or too long for the model."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hetis_sim.spec.errors import SpecError
from traces.config import WorkloadConfig
from traces.lengths import Lengths, LengthSource
from traces.table import IntArray

HOPELESS_DRAWS = 10_000
OVER_CONTEXT = {
    "reject": "over_context_to_reject", "clamp": "over_context_clamped", "drop": "over_context_dropped",
}


@dataclass(slots=True)
class Limits:
    """Scaling, range and context policies of a workload, and how often each one acted.

    Attributes:
        config: the workload's settings.
        context_limit_tokens: longest prompt plus output of the model; ``None`` for any.
        counts: requests clamped, dropped, or over the context, by name.
    """

    config: WorkloadConfig
    context_limit_tokens: int | None
    counts: dict[str, int] = field(default_factory=dict)

    def apply(self, lengths: Lengths) -> tuple[Lengths, IntArray]:
        """The lengths that stay, and their places among those given.

        Raises:
            SpecError: for a length out of range where the policy says so.
        """
        config = self.config
        prompt = _scaled(lengths.prompt_tokens, config.prompt_scale)
        output = _scaled(lengths.output_tokens, config.output_scale)
        keep = np.ones(len(prompt), dtype=bool)
        prompt = self._range("prompt_tokens", prompt, keep)
        output = self._range("output_tokens", output, keep)
        prompt, output = self._context(prompt, output, keep)
        places = np.flatnonzero(keep)
        rows = None if lengths.rows is None else lengths.rows[places]
        return Lengths(prompt[places], output[places], rows), places

    def _range(self, what: str, tokens: IntArray, keep: NDArray[np.bool_]) -> IntArray:
        low, high = getattr(self.config, f"{what}_min"), getattr(self.config, f"{what}_max")
        outside = tokens < low if high is None else (tokens < low) | (tokens > high)
        if not outside.any():
            return tokens
        policy = self.config.out_of_range
        if policy == "error":
            first = int(outside.argmax())
            raise SpecError(f"{self.config.name}: request {first}, {what}", int(tokens[first]),
                            f"in [{low}, {'inf' if high is None else high}] (out_of_range=error)")
        if policy == "drop":
            self._count(f"{what}_dropped", outside & keep)
            keep &= ~outside
            return tokens
        self._count(f"{what}_clamped", outside)
        return np.clip(tokens, low, high)

    def _context(
        self, prompt: IntArray, output: IntArray, keep: NDArray[np.bool_],
    ) -> tuple[IntArray, IntArray]:
        limit = self.context_limit_tokens
        if limit is None:
            return prompt, output
        over = (prompt + output > limit) & keep
        if not over.any():
            return prompt, output
        policy = self.config.over_context
        if policy == "error":
            first = int(over.argmax())
            raise SpecError(f"{self.config.name}: request {first}, prompt + output",
                            int(prompt[first] + output[first]),
                            f"at most the model's context of {limit} tokens (over_context=error)")
        self._count(OVER_CONTEXT[policy], over)
        if policy == "drop":
            keep &= ~over
        elif policy == "clamp":
            output = np.where(over, np.minimum(output, limit - 1), output)
            prompt = np.where(over, np.minimum(prompt, limit - output), prompt)
        return prompt, output

    def _count(self, name: str, mask: NDArray[np.bool_]) -> None:
        self.counts[name] = self.counts.get(name, 0) + int(mask.sum())


def _scaled(tokens: IntArray, factor: float) -> IntArray:
    if factor == 1.0:
        return tokens
    scaled: IntArray = np.maximum(np.rint(tokens * factor).astype(np.int64), 1)
    return scaled


def collect(source: LengthSource, limits: Limits, count: int) -> Lengths:
    """Lengths from ``source`` until ``count`` have stayed, or the source has ended.

    The first lengths do not depend on ``count``.

    Raises:
        SpecError: when policies drop practically everything that is drawn.
    """
    parts: list[Lengths] = []
    have = drawn = 0
    while have < count:
        block = source.next_block(count - have)
        if not len(block.prompt_tokens):
            break
        drawn += len(block.prompt_tokens)
        kept, _ = limits.apply(block)
        parts.append(kept)
        have += len(kept.prompt_tokens)
        if drawn > HOPELESS_DRAWS and have * 1000 < drawn:
            raise SpecError(f"{limits.config.name}: lengths kept", f"{have} of {drawn}",
                            "more than 1 in 1000; widen the range or do not drop")
    if not have:
        raise SpecError(f"{limits.config.name}: requests", 0, f"at least one (counts: {limits.counts})")
    return joined(*parts)


def joined(*parts: Lengths) -> Lengths:
    """Lengths one after another; all of them have rows, or none has."""
    rows = [part.rows for part in parts if part.rows is not None]
    return Lengths(np.concatenate([part.prompt_tokens for part in parts]),
                   np.concatenate([part.output_tokens for part in parts]),
                   np.concatenate(rows) if rows else None)
