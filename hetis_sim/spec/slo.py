"""Service-level objectives of a request."""

from __future__ import annotations

from dataclasses import dataclass

from hetis_sim.spec.errors import require_finite


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper limits on time to first token and on mean time per output token.

    A request attains the SLO when it holds both limits; a request of one token has no
    time per output token and is held to the first limit alone.
    """

    ttft_s: float = 5.0
    tpot_s: float = 0.2

    def __post_init__(self) -> None:
        require_finite("slo.ttft_s", self.ttft_s, 0.0, open_low=True)
        require_finite("slo.tpot_s", self.tpot_s, 0.0, open_low=True)
