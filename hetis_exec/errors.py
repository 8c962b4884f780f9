"""Errors of the executor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetis_sim.spec.errors import HetisError

if TYPE_CHECKING:
    from hetis_exec.driver import ExecutionResult


class ExecutorError(HetisError):
    """A run cannot go on. What had finished until then is in ``result``."""

    result: ExecutionResult | None = None


class WorkerError(ExecutorError):
    """A worker has raised, died or fallen silent; ``device`` says which."""

    def __init__(self, device: int, reason: str) -> None:
        super().__init__(f"worker of device {device} is lost: {reason}")
        self.device = device
        self.reason = reason


class CacheError(ExecutorError):
    """Physical cache and the ledger disagree: a defect of the program."""


class ReplayError(ExecutorError):
    """A replay has left the recorded run."""
