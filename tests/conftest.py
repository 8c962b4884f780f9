"""Settings and fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")
# Without a CUDA device Triton interprets its kernels. It looks at this once, when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Examples are the same in every CI run; elsewhere they differ, and failures are remembered.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def project_root() -> Path:
    """Folder that holds pyproject.toml."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data(project_root: Path) -> Path:
    """Folder of public measurements and traces; tests that ask for it skip where it is absent."""
    folder = project_root.parent / "shared" / "data"
    if not (folder / "manifest.json").is_file():
        pytest.skip("the optional folder ../shared/data is not here")
    return folder
