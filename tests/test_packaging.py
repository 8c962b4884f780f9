"""What is installed, and what the pages point to."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement


def settings_of(root: Path) -> dict[str, Any]:
    """What pyproject.toml says."""
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_every_dependency_is_pinned_within_its_range(project_root: Path) -> None:
    """constraints.txt pins each direct dependency to a version that pyproject.toml allows."""
    lines = (project_root / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line and not line.startswith("#"))
    project = settings_of(project_root)["project"]
    listed = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        listed += extra
    wanted = [Requirement(text) for text in listed if not text.startswith("hetis-sim[")]
    assert len(wanted) >= 10
    wrong = [str(need) for need in wanted if not need.specifier.contains(pins.get(need.name, "0"))]
    assert wrong == []


def test_the_wheel_carries_every_file(project_root: Path, tmp_path: Path) -> None:
    """Configurations, profiles and tables are installed along with the code."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    result = subprocess.run(command, cwd=project_root, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    packed = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    packages = settings_of(project_root)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    files = [path for package in packages for path in (project_root / package).rglob("*") if path.is_file()]
    wanted = {path.relative_to(project_root).as_posix() for path in files}
    wanted = {name for name in wanted if "__pycache__" not in name and "/." not in name}
    assert any(name.endswith(".yaml") for name in wanted)
    assert wanted - packed == set()


def pages(root: Path) -> list[Path]:
    """The project's own Markdown pages."""
    return [root / "README.md", root / "CHANGELOG.md", *sorted((root / "docs").glob("*.md"))]


def test_links_of_the_pages_lead_somewhere(project_root: Path) -> None:
    """Every relative link in the README and the docs names a file that exists."""
    links = [
        (page, target)
        for page in pages(project_root)
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if "://" not in target
    ]
    assert len(links) >= 3
    assert [f"{page.name}: {target}" for page, target in links if not (page.parent / target).exists()] == []
