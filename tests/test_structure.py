"""The shape of the code: who imports whom, and how long things get."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = ("hetis_sim", "hetis_exec", "traces", "conf", "analysis")
FILE_LINES_MAX = 450
FUNCTION_LINES_MAX = 70

# Forbidden imports, at least one for each contract: (module that imports, module imported).
PLANTED = (
    ("hetis_sim.spec.planted", "hetis_sim.cost"),
    ("hetis_sim.cost.planted", "hetis_sim.policies"),
    ("hetis_sim.policies.planted", "hetis_sim.control"),
    ("hetis_sim.control.planted", "hetis_sim.sim"),
    ("hetis_sim.sim.planted", "hetis_exec"),
    ("hetis_sim.spec.workload", "traces"),
    ("hetis_sim.metrics.planted", "hetis_sim.control"),
    ("hetis_sim.control.recorded", "hetis_sim.metrics"),
    ("hetis_sim.control.clocked", "simpy"),
    ("hetis_sim.cost.tensors", "torch"),
    ("traces.planted", "hetis_sim.cost"),
)

# Imports every module below the given packages while the named modules cannot be imported.
IMPORT_ALL = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise AssertionError(f"{name} was imported")

packages, refused = (argument.split(",") for argument in sys.argv[1:])
sys.meta_path.insert(0, Refuse())
for package in packages:
    module = importlib.import_module(package)
    for found in pkgutil.walk_packages(module.__path__, package + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
            print(found.name)
"""


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in ``cwd`` and return what it printed."""
    return subprocess.run([sys.executable, *arguments], cwd=cwd, text=True, capture_output=True, check=False)


def lint_imports(cwd: Path) -> subprocess.CompletedProcess[str]:
    """Check the import contracts of the packages in ``cwd``."""
    call = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"
    return python("-c", call, cwd=cwd)


def source_files(root: Path) -> list[Path]:
    """Python files of the project, tests included."""
    folders = (*PACKAGES, "tests", "benchmarks")
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def test_import_contracts_hold(project_root: Path) -> None:
    """The rooms import downwards only, SimPy stays in sim and torch in hetis_exec."""
    result = lint_imports(project_root)
    assert result.returncode == 0, result.stdout + result.stderr


def test_forbidden_imports_are_caught(project_root: Path, tmp_path: Path) -> None:
    """The contracts name each import that points the wrong way."""
    for package in PACKAGES:
        shutil.copytree(project_root / package, tmp_path / package)
    shutil.copy(project_root / "pyproject.toml", tmp_path)
    for importer, imported in PLANTED:
        (tmp_path / Path(*importer.split("."))).with_suffix(".py").write_text(f"import {imported}\n")
    result = lint_imports(tmp_path)
    assert result.returncode != 0
    report = result.stdout
    missed = [pair for pair in PLANTED if not re.search(rf"{pair[0]} ->\s+{pair[1]}\b", report)]
    assert missed == []


def test_the_simulator_never_imports_torch(project_root: Path) -> None:
    """Every module of the simulator loads where torch and the executor cannot be imported."""
    result = python("-c", IMPORT_ALL, "hetis_sim,traces,conf", "torch,hetis_exec", cwd=project_root)
    assert result.returncode == 0, result.stderr
    assert "hetis_sim.spec.model" in result.stdout


def test_the_rooms_below_sim_load_without_simpy(project_root: Path) -> None:
    """What the executor shares with the simulator loads where SimPy cannot be imported."""
    rooms = ",".join(f"hetis_sim.{room}" for room in ("control", "policies", "cost", "spec"))
    result = python("-c", IMPORT_ALL, rooms, "simpy", cwd=project_root)
    assert result.returncode == 0, result.stderr


def test_files_and_functions_stay_short(project_root: Path) -> None:
    """A file does one job and a function fits on a page."""
    long_ones = []
    for path in source_files(project_root):
        text = path.read_text()
        if text.count("\n") > FILE_LINES_MAX:
            long_ones.append(f"{path.relative_to(project_root)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    long_ones.append(f"{path.relative_to(project_root)}: {node.name}: {lines} lines")
    assert long_ones == []
