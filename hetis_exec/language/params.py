"""What a client may ask of the text that is generated for it."""

from __future__ import annotations

from dataclasses import dataclass

from hetis_exec.messages import Sample
from hetis_sim.spec.errors import SpecError, require, require_finite
from hetis_sim.spec.lookup import require_int

STOPS_MAX = 16
STOP_CHARACTERS_MAX = 256
TEMPERATURE_MAX = 100.0
TOKENS_MAX = 1 << 24
SEED_MAX = 1 << 62


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """How a text is to go on and when it is to end.

    Attributes:
        max_tokens: tokens at most; None for as many as the context allows.
        temperature, top_p, top_k, seed: of sampling, see :class:`hetis_exec.messages.Sample`; where the
            temperature is None, tokens are chosen as the run's settings say.
        stop: a text ends before the first of these strings.
        stop_token_ids: and with one of these tokens.
        ignore_eos: an end-of-text token does not end it.

    Raises:
        SpecError: a value that is not allowed; the text names the field.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            require_int("max_tokens", self.max_tokens, 1, TOKENS_MAX)
        if self.temperature is not None:
            require_finite("temperature", self.temperature, 0.0, TEMPERATURE_MAX)
        require_finite("top_p", self.top_p, 0.0, 1.0, open_low=True)
        require_int("top_k", self.top_k, 0, TOKENS_MAX)
        if self.seed is not None:
            require_int("seed", self.seed, 0, SEED_MAX)
        require(len(self.stop) <= STOPS_MAX, "stop", f"{len(self.stop)} strings", f"at most {STOPS_MAX}")
        for text in self.stop:
            _check_stop(text)
        require(len(self.stop_token_ids) <= STOPS_MAX, "stop_token_ids", f"{len(self.stop_token_ids)} tokens",
                f"at most {STOPS_MAX}")
        for token in self.stop_token_ids:
            require_int("stop_token_ids", token, 0, TOKENS_MAX)

    @property
    def sample(self) -> Sample | None:
        """The part that workers need to know."""
        if self.temperature is None:
            return None
        return Sample(float(self.temperature), float(self.top_p), self.top_k, self.seed)


def _check_stop(text: object) -> None:
    if not isinstance(text, str) or not 0 < len(text) <= STOP_CHARACTERS_MAX:
        raise SpecError("stop", text, f"strings of 1 to {STOP_CHARACTERS_MAX} characters")
