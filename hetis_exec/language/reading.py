"""Text out of tokens, piece by piece, and where it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

from hetis_exec.language.params import GenerationParams

FinishReason = Literal["stop", "length", "abort", "error"]
"""Why a text has ended: it is complete, has all its tokens, was given up, or the run has failed."""

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoders make of bytes that are not a whole character yet."""

CONTEXT_TOKENS = 6

UNFINISHED_TOKENS_MAX = 8
"""A character has no more tokens than this: what has more is no character."""


class Decoder:
    """Turns tokens into text as they come; pieces add up to the text of all of them.

    How a token reads depends on those before it, so a few of them are always decoded again; ``context`` are
    the last ones before the first.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._tokens = list(context[-CONTEXT_TOKENS:])
        self._shown = len(self._tokens)

    def add(self, token: int) -> str:
        """What a token adds; nothing while it may be part of a character."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        before = self._decode(self._tokens[:self._shown]) if self._shown else ""
        if text == before:
            # A special token: it must not become all the context there is.
            self._tokens.pop()
            return ""
        if text.endswith(UNFINISHED) and len(self._tokens) - self._shown < UNFINISHED_TOKENS_MAX:
            return ""
        # The tokens of the last piece stay, as context of the next.
        self._tokens = self._tokens[self._shown:]
        self._shown = len(self._tokens)
        return text[len(before):]

    def rest(self) -> str:
        """What is left at the end of all tokens, whether it is a character or not."""
        text = self._decode(self._tokens)
        before = self._decode(self._tokens[:self._shown]) if self._shown else ""
        self._tokens, self._shown = [], 0
        return text[len(before):]


class Reader:
    """Reads a text as it is generated.

    Attributes:
        complete: whether a stop condition has been met.
        tokens: tokens so far.
    """

    def __init__(self, params: GenerationParams, eos: Collection[int] = (),
                 decode: Callable[[Sequence[int]], str] | None = None, prompt: Sequence[int] = ()) -> None:
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos))
        self._stops = params.stop
        self._decoder = None if decode is None else Decoder(decode, prompt)
        self._held = ""
        self.complete = False
        self.tokens = 0

    def add(self, token: int) -> str:
        """Take in a token; returns the text that is certain by now.

        What may be the beginning of a stop string is held back.
        """
        self.tokens += 1
        if token in self._ends:
            self.complete = True
            return self.rest()
        if self._decoder is None:
            return ""
        self._held += self._decoder.add(token)
        return self._certain()

    def _certain(self) -> str:
        ends = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if ends:
            text, self._held, self.complete = self._held[:min(ends)], "", True
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def rest(self) -> str:
        """What has been held back; there will be no more tokens."""
        if self._decoder is None:
            return ""
        self._held += self._decoder.rest()
        text = self._certain() + self._held
        self._held = ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop string may begin."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
