"""Hetis: serving large language models on mixed GPUs, simulated.

    from hetis_sim import simulate, load_run
    result = simulate("policy=hetis", "rate=4")
    result.summary.ttft_s.p95, result.requests
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetis_sim.config import RunConfig, compose
    from hetis_sim.metrics.load import Run, load_run
    from hetis_sim.run import Result, prepare, simulate

__all__ = ["Result", "Run", "RunConfig", "compose", "load_run", "prepare", "simulate"]

_HOMES = {"RunConfig": "hetis_sim.config", "compose": "hetis_sim.config", "Run": "hetis_sim.metrics.load",
          "load_run": "hetis_sim.metrics.load", "Result": "hetis_sim.run", "prepare": "hetis_sim.run",
          "simulate": "hetis_sim.run"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that a room can be imported without the rest."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'hetis_sim' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
