"""Settings of studies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hetis_sim.spec.errors import SpecError, require, require_finite
from hetis_sim.spec.lookup import require_int

SEEDS_MAX = 1000


@dataclass
class StudyConfig:
    """How ``capacity`` and ``compare`` sample; ``docs/capacity.md`` has the definitions.

    Attributes:
        policies: what ``compare`` compares, the first with the others: names, or mappings of
            ``name`` and settings.
        capacity: ``compare`` also finds the capacity of each policy.
        seeds: runs of each kind, with seeds from ``workload.seed`` on.
        requests: of each run; null derives the number from the length that a run must have.
        requests_max: most requests of a run where the number is derived.
        attainment: share of the requests that must hold the SLO.
        tolerance: relative width of the bracket at which the search ends.
        runs_max: most runs of one search.
        warmup_fraction, drop_tail_fraction: shares of the requests that are not measured.
        workers: processes; null for one per core. The results do not depend on it.
        keep: folder for the run folders of the final points; null keeps none.
    """

    policies: list[Any] = field(default_factory=lambda: ["hetis", "vllm"])
    capacity: bool = False
    seeds: int = 5
    requests: int | None = None
    requests_max: int = 20_000
    attainment: float = 0.9
    tolerance: float = 0.02
    runs_max: int = 40
    warmup_fraction: float = 0.2
    drop_tail_fraction: float = 0.05
    workers: int | None = None
    keep: str | None = None

    def __post_init__(self) -> None:
        require(len(self.policies) >= 1, "study.policies", list(self.policies), "at least one policy")
        require_int("study.seeds", self.seeds, 1, SEEDS_MAX)
        if self.requests is not None:
            require_int("study.requests", self.requests, 50, 10_000_000)
        require_int("study.requests_max", self.requests_max, 50, 10_000_000)
        require_finite("study.attainment", self.attainment, 0.0, 1.0, open_low=True)
        require_finite("study.tolerance", self.tolerance, 1e-4, 0.5)
        require_int("study.runs_max", self.runs_max, 4, 10_000)
        for key in ("warmup_fraction", "drop_tail_fraction"):
            require_finite(f"study.{key}", getattr(self, key), 0.0, 0.9)
        if self.warmup_fraction + self.drop_tail_fraction > 0.9:
            raise SpecError("study.drop_tail_fraction", self.drop_tail_fraction,
                            f"such that it and warmup_fraction={self.warmup_fraction} leave 10 % to measure")
        if self.workers is not None:
            require_int("study.workers", self.workers, 1, 1024)
