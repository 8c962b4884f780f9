"""Run folders that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_report import LOADED, simulate_to, write_fake


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Hetis that pushes and moves heads, with a trimmed window and a rejected request."""
    return simulate_to(tmp_path_factory.mktemp("loaded") / "run", *LOADED)


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of two policies at two rates, of identical arrivals at each rate."""
    folder = tmp_path_factory.mktemp("sweep")
    for policy in ("hetis", "vllm"):
        for rate in (1, 4):
            simulate_to(folder / f"{policy}-{rate}", f"policy={policy}", f"rate={rate}", "requests=40",
                        "seed=3")
    return folder


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a measured run leaves it: another label, and no configuration."""
    return write_fake(tmp_path_factory.mktemp("measured") / "run", label="measured")
