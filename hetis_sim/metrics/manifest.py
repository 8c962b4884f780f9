"""What a run was made from: versions, revision, seeds and hashes."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hetis_sim.metrics.strictjson import dump_line, plain
from hetis_sim.spec.errors import require

FORMAT = 1
"""Number of the run folder's layout; it rises when a reader of the old one would err."""

LABELS = ("simulated", "measured")
PACKAGES = ("hetis-sim", "numpy", "scipy", "pandas", "pyarrow", "simpy", "highspy", "hydra-core")


def build_manifest(*, label: str, seeds: Mapping[str, int], hashes: Mapping[str, str],
                   provenance: Sequence[Any] = (), extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything needed to make the run again, without times of day or names of people and hosts.

    Args:
        label: ``simulated`` or ``measured``.
        seeds: by stream.
        hashes: of traces, profiles and configuration, by name.
        provenance: rows on where each duration comes from.
        extra: more to keep (for a measured run: cards and drivers).

    Raises:
        SpecError: another label.
    """
    require(label in LABELS, "label", label, f"one of {', '.join(LABELS)}")
    return {
        "format": FORMAT,
        "label": label,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git": git_revision(),
        "platform": {"system": platform.system(), "machine": platform.machine()},
        "seeds": dict(seeds),
        "hashes": dict(hashes),
        "provenance": plain(provenance),
        **plain(extra or {}),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision(root: Path | None = None) -> dict[str, Any] | None:
    """Commit of the checkout that holds this package, and whether its files differ from it.

    None outside a checkout and where git is not to be had.

    Args:
        root: top of the checkout; by default the folder that holds the package.
    """
    root = root or Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        revision = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "modified": bool(changed)}


def _git(root: Path, *arguments: str) -> str:
    # A hook's GIT_DIR would point elsewhere.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=10)
    return result.stdout.strip()


def file_sha256(path: str | Path) -> str:
    """Hash of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def value_sha256(value: Any) -> str:
    """Hash of a configuration or any other value that JSON can hold."""
    return hashlib.sha256(dump_line(value).encode()).hexdigest()
