"""Settings of calibrations and validations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hetis_sim.spec.errors import require, require_finite
from hetis_sim.spec.lookup import require_int, require_mapping

PIECES = ("device", "shape", "heads", "hops", "sums", "host")
"""What a calibration consists of."""

RATES = ("own", "common")

LIMITS = {"dense_layer": 0.10, "head": 0.15, "prefill_attention": 0.15, "decode_attention": 0.15,
          "remote_attention": 0.20, "head_packing": 0.30, "cache_packing": 0.30, "host_copy": 0.30,
          "transfer": 0.30, "hop": 0.30, "all_reduce": 0.30, "host_overhead": 0.30}
"""Largest median error on held-out samples with which a module is written."""


@dataclass
class CalibrateConfig:
    """How ``python -m hetis_exec calibrate`` measures.

    Attributes:
        quick: fewer sizes and repetitions.
        out: folder of the profiles and of their samples. Samples that it has are not taken again.
        seed: of activations, cache and mixed lengths.
        repeats: of every sample, as far as time allows; null for 5, or 3 if quick.
        step_limit_s: no size is measured of which one repetition would take longer.
        tokens_max: largest number of tokens of a step; null for the scheduler's.
        context_max: longest context; null for the model's limit, 2048 at most.
        pool_mib: cache that decode attention is measured on, larger than what processors keep of it; null for
            512, or 8192 on cards.
        tp: tensor-parallel degrees of the dense modules; null for those of the cluster's hosts.
        models: shapes by name, whose single layers are measured besides, with random weights.
        only: kinds of pieces to measure (``device``, ``shape``, ``heads``, ``hops``, ``sums``, ``host``), or
            with what they are of: ``heads/a100`` are pieces with that rank; null for all.
        limits: by module, the largest median error on held-out samples with which it is written.
    """

    quick: bool = False
    out: str = "calibration"
    seed: int = 0
    repeats: int | None = None
    step_limit_s: float = 1.5
    tokens_max: int | None = None
    context_max: int | None = None
    pool_mib: float | None = None
    tp: list[int] | None = None
    models: list[str] = field(default_factory=list)
    only: list[str] | None = None
    limits: Any = None

    def __post_init__(self) -> None:
        require(bool(self.out), "calibrate.out", self.out, "a folder")
        require_int("calibrate.seed", self.seed, 0, 1 << 62)
        for key, most in (("repeats", 1000), ("tokens_max", 1 << 20), ("context_max", 1 << 24)):
            value = getattr(self, key)
            require(value is None or 1 <= value <= most, f"calibrate.{key}", value, f"null or 1 to {most}")
        require_finite("calibrate.step_limit_s", self.step_limit_s, 0.0, open_low=True)
        if self.pool_mib is not None:
            require_finite("calibrate.pool_mib", self.pool_mib, 0.0, open_low=True)
        for degree in self.tp or []:
            require_int("calibrate.tp", degree, 1, 64)
        for piece in self.only or []:
            require(piece.partition("/")[0] in PIECES, "calibrate.only", piece,
                    f"one of {', '.join(PIECES)}, and what of it after a slash")
        for name, limit in require_mapping("calibrate.limits", self.limits or {}).items():
            require(name in LIMITS, "calibrate.limits", name, f"a module: {', '.join(LIMITS)}")
            require_finite(f"calibrate.limits.{name}", limit, 0.0)

    @property
    def repetitions(self) -> int:
        """Repetitions of every sample."""
        return self.repeats or (3 if self.quick else 5)

    def limit(self, module: str) -> float:
        """Largest median error with which a module is written."""
        return float((self.limits or {}).get(module, LIMITS[module]))


@dataclass
class ValidateConfig:
    """How ``python -m hetis_exec validate`` compares runs with their simulation.

    Attributes:
        policies: names, or mappings of ``name`` and settings; none stands for the policy of the run.
        loads: shares of the measured capacity at which requests arrive.
        seeds: of arrivals and lengths at each load, from ``workload.seed`` on.
        noise_runs: of these, so many are run for real again: what differs then is noise.
        repeats: how often those are run again.
        run_s: about how long requests arrive in a run.
        requests_min, requests_max: of a run.
        capacity_requests: of the overloaded run that measures capacity.
        warmup_s: before anything counts; null for 4 s, or 15 s where cards compute, or twice what it takes in
            the simulator if that is more; 0 for none.
        resamples: of the bootstrap.
        rates: shares are of each policy's ``own`` capacity, or of the least of all policies (``common``), so
            that all get the same requests at the same times.
        budget_s: no run begins of which this time would not see the end; null for no limit.
        out: folder for what is written; null for the folder of the run. Runs that it has are not run again.
        pace: measure the speed of the machine before and after every run; see
            :mod:`hetis_exec.calibrate.reference`.
        recalibrate: calibrate first, as the keys of ``calibrate`` say, and use that in place of ``profile``.
    """

    policies: list[Any] = field(default_factory=list)
    loads: list[float] = field(default_factory=lambda: [0.3, 0.6, 0.85, 0.95])
    seeds: int = 2
    noise_runs: int = 1
    repeats: int = 1
    run_s: float = 10.0
    requests_min: int = 20
    requests_max: int = 400
    capacity_requests: int = 40
    warmup_s: float | None = None
    resamples: int = 1000
    rates: str = "own"
    budget_s: float | None = None
    out: str | None = None
    pace: bool = True
    recalibrate: bool = False

    def __post_init__(self) -> None:
        require(len(self.loads) >= 1, "validate.loads", list(self.loads), "at least one load")
        for load in self.loads:
            require_finite("validate.loads", load, 0.0, 10.0, open_low=True)
        for key, low, high in (("seeds", 1, 1000), ("requests_min", 2, 100_000), ("requests_max", 2, 100_000),
                               ("capacity_requests", 4, 100_000), ("resamples", 10, 1_000_000)):
            require_int(f"validate.{key}", getattr(self, key), low, high)
        require_int("validate.noise_runs", self.noise_runs, 0, self.seeds)
        require_int("validate.repeats", self.repeats, 1, 1000)
        require(self.rates in RATES, "validate.rates", self.rates, f"one of {', '.join(RATES)}")
        if self.budget_s is not None:
            require_finite("validate.budget_s", self.budget_s, 0.0, open_low=True)
        require_finite("validate.run_s", self.run_s, 0.0, open_low=True)
        require(self.warmup_s is None or 0 <= self.warmup_s <= 3600, "validate.warmup_s", self.warmup_s,
                "null or 0 to 3600")
