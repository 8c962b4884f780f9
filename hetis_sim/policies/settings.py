"""Settings that several policies have."""

from __future__ import annotations

from dataclasses import dataclass

from hetis_sim.policies.base import PreemptionMode
from hetis_sim.spec.errors import require, require_finite
from hetis_sim.spec.lookup import require_int

PREEMPTION: tuple[PreemptionMode, ...] = ("recompute", "swap")


@dataclass(frozen=True, kw_only=True)
class AdmissionSettings:
    """What a user may change of any policy that keeps a reserve.

    Attributes:
        reserve_fraction: share of each device's cache that admission leaves free for growth (ours, as
            for Hetis; vLLM leaves 0.01).
        preemption: ``recompute`` or ``swap``: what becomes of the cache of a preempted request.
    """

    reserve_fraction: float = 0.05
    preemption: str = "recompute"

    def __post_init__(self) -> None:
        require_finite("policy.reserve_fraction", self.reserve_fraction, 0.0, 0.9)
        require(self.preemption in PREEMPTION, "policy.preemption", self.preemption,
                f"one of {', '.join(PREEMPTION)}")

    @property
    def preemption_mode(self) -> PreemptionMode:
        """The checked mode."""
        return "swap" if self.preemption == "swap" else "recompute"


@dataclass(frozen=True, kw_only=True)
class SearchSettings(AdmissionSettings):
    """The same, of policies that search how to divide the cluster.

    Attributes:
        evaluations: divisions of the cluster that the search looks at, at most.
        seed: of the search.
    """

    evaluations: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("policy.evaluations", self.evaluations, 1, 1 << 30)
        require_int("policy.seed", self.seed, 0, 1 << 63)
