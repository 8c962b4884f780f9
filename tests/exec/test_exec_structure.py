"""The executor decides nothing: no policy of its own, no copy of the control plane."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

import hetis_exec
from hetis_exec.toy import ToyTrace, toy_input
from hetis_sim.control.controller import Controller
from hetis_sim.control.engine import Engine
from hetis_sim.policies.base import Policy
from hetis_sim.policies.registry import BUILTIN, make_policy

DECIDES = {"dispatch", "rebalance", "relieve", "victim", "route", "handoff"}
"""What a policy decides; the executor has no method of these names."""

SMALL_STATEMENTS = 3


def modules() -> list[str]:
    """Every module of the executor."""
    names = [found.name for found in pkgutil.walk_packages(hetis_exec.__path__, "hetis_exec.")]
    assert "hetis_exec.driver" in names
    return [name for name in names if not name.endswith("__main__")]


def loaded(name: str) -> ModuleType | None:
    """A module, or None where it needs an extra that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "safetensors", "fastapi", "uvicorn"):
            raise
        return None


def functions(folder: Path) -> dict[str, str]:
    """Body of every function worth the name, as code without names of arguments, docstrings or layout."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if sum(isinstance(part, ast.stmt) for statement in body
                       for part in ast.walk(statement)) > SMALL_STATEMENTS:
                    found["\n".join(ast.dump(statement) for statement in body)] = f"{path.name}:{node.name}"
    return found


def test_the_executor_has_no_policy_of_its_own() -> None:
    """No class of its modules is a policy, a scheduler or a controller."""
    for name in modules():
        for _, kind in inspect.getmembers(loaded(name), inspect.isclass):
            if kind.__module__.startswith("hetis_exec"):
                assert not issubclass(kind, Policy | Engine | Controller), kind
                assert not DECIDES & set(vars(kind)), kind


def test_no_function_of_the_control_plane_is_copied(project_root: Path) -> None:
    """What policies, scheduler and cost models compute is imported, not written down again."""
    ours = functions(project_root / "hetis_exec")
    theirs = {code: where for room in ("control", "policies", "cost")
              for code, where in functions(project_root / "hetis_sim" / room).items()}
    assert len(ours) > 50
    assert len(theirs) > 100
    assert [(ours[code], theirs[code]) for code in ours.keys() & theirs.keys()] == []


def test_no_policy_is_known_by_name(project_root: Path) -> None:
    """Nothing but the demonstration's default names a policy."""
    for path in (project_root / "hetis_exec").rglob("*.py"):
        strings = {node.value for node in ast.walk(ast.parse(path.read_text()))
                   if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert path.name == "cli.py" or not strings & set(BUILTIN), path.name


def test_the_policy_that_runs_is_the_simulator_s() -> None:
    """Its class comes from the simulator's registry."""
    policy = toy_input("hetis", ToyTrace(1)).policy
    assert type(policy) is type(make_policy("hetis"))
    assert type(policy).__module__.startswith("hetis_sim.policies.")
