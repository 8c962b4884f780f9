"""Token ids of the requests of a run, and who listens as they grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hetis_exec.messages import Sample
from hetis_sim.control.state import RequestState


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request asks for; ``sample`` says how its tokens are chosen, None as the run's settings do."""

    tokens: Sequence[int]
    sample: Sample | None = None


@dataclass(slots=True)
class Text:
    """A request's prompt, then what it has generated.

    Attributes:
        tokens: all token ids.
        prompt_tokens: how many of them are the prompt.
        sample: see :class:`Prompt`.
    """

    tokens: list[int]
    prompt_tokens: int
    sample: Sample | None = None

    @classmethod
    def of(cls, prompt: Prompt) -> Text:
        """A text without any generated token."""
        return cls(list(prompt.tokens), len(prompt.tokens), prompt.sample)

    @property
    def generated(self) -> list[int]:
        """Tokens after the prompt."""
        return self.tokens[self.prompt_tokens:]


Texts = dict[int, Text]


class Listener(Protocol):
    """Is told of every token as it comes, by the thread of the driver: whatever it does holds up the run."""

    def began(self) -> None:
        """All workers are there."""

    def token(self, request_id: int, token: int) -> bool:
        """A request has a token; True if its text is complete with it."""

    def ended(self, state: RequestState) -> None:
        """A request has ended, whether it has all its tokens or not."""
