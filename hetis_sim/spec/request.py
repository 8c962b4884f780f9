"""One inference request, as it arrives."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hetis_sim.spec.errors import SpecError, require


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of known length and the number of tokens it will generate.

    ``output_tokens`` is the truth of the workload. It is visible to the drivers,
    which must know when a request ends, and hidden from policies, which see a
    :class:`hetis_sim.policies.view.RequestView`.

    Attributes:
        request_id: unique within a run; also the tie-breaker of every ordering.
        arrival_s: seconds since the start of the run.
        prompt_tokens: tokens to prefill, at least 1.
        output_tokens: tokens to generate, at least 1.
        prefix_hashes: ids of shared prompt blocks, empty where a trace has none.
        session: user or conversation, -1 where a trace has none.
    """

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    session: int = -1

    def __post_init__(self) -> None:
        require(self.request_id >= 0, "request_id", self.request_id, ">= 0")
        if not (math.isfinite(self.arrival_s) and self.arrival_s >= 0):
            raise SpecError("arrival_s", self.arrival_s, "finite and >= 0 seconds")
        require(self.prompt_tokens >= 1, "prompt_tokens", self.prompt_tokens, ">= 1")
        require(self.output_tokens >= 1, "output_tokens", self.output_tokens, ">= 1")

    @property
    def total_tokens(self) -> int:
        """Prompt and output together: the cache positions needed at the end."""
        return self.prompt_tokens + self.output_tokens
