"""Opening runs for a report: what is refused, and how runs are named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from metrics_fakes import DEVICES, PLAN, add_rejected
from support_report import edited, simulate_to, write_fake

from analysis.figures.naming import names_of
from analysis.figures.runs import open_runs
from analysis.report.build import in_detail
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.spec.errors import SpecError


def config(policy: str = "hetis", rate: float = 1.0, seed: int = 0, **policy_keys: Any) -> dict[str, Any]:
    """A small configuration."""
    return {"policy": {"name": policy, **policy_keys}, "workload": {"name": "sharegpt", "rate": rate,
                                                                    "seed": seed},
            "cluster": {"name": "paper", "hosts": [{"gpus": {"a100": 4}}]}, "output": "table"}


def names(*configs: dict[str, Any]) -> list[tuple[str, str]]:
    """Names of simulated runs in folders a, b, ..."""
    return names_of(configs, [chr(97 + i) for i in range(len(configs))], ["simulated"] * len(configs))


# -- what is refused ----------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    """The message names the folder and what is missing."""
    with pytest.raises(SpecError, match=r"run='.*' is not allowed: must be a run folder"):
        open_runs([tmp_path])
    with pytest.raises(SpecError, match="no such folder"):
        open_runs([tmp_path / "nowhere"])
    with pytest.raises(SpecError, match="at least one"):
        open_runs([])


@pytest.mark.parametrize("name", ["requests.parquet", "plan.json", "itl.parquet"])
def test_a_run_folder_with_a_file_missing_is_refused(measured: Path, tmp_path: Path, name: str) -> None:
    """Half a run makes no report."""
    shutil.copytree(measured, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    with pytest.raises(SpecError, match=f"{name} missing"):
        open_runs([tmp_path / "run"])


def test_a_damaged_table_is_refused(measured: Path, tmp_path: Path) -> None:
    """A file that cannot be read is an error of input that names the run."""
    shutil.copytree(measured, tmp_path / "run")
    (tmp_path / "run" / "steps.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(SpecError, match="a readable run folder"):
        open_runs([tmp_path / "run"])


def test_a_run_without_a_finished_request_is_refused(tmp_path: Path) -> None:
    """An empty run, and one that rejected everybody, have nothing to show; reasons are named."""
    recorder = Recorder(devices=DEVICES, capacity_bytes=(1000.0, 500.0))
    with pytest.raises(SpecError, match="0 submitted"):
        open_runs([write_fake(tmp_path / "empty", recorder)])
    add_rejected(recorder, 0, 1.0, "context_limit")
    with pytest.raises(SpecError, match="context_limit: 1"):
        open_runs([write_fake(tmp_path / "rejected", recorder)])


def test_runs_of_different_models_are_refused(loaded: Path, sweep: Path) -> None:
    """Their latencies have nothing to do with each other; the models are named."""
    with pytest.raises(SpecError, match=r"llama-13b.*llama2-70b.*one model"):
        open_runs([loaded, sweep / "vllm-1"])


def test_models_that_are_not_named_are_told_apart_by_their_layers(measured: Path, tmp_path: Path) -> None:
    """A measured run may keep no configuration, but its plan says how many layers there are."""
    plan = {"instances": [{**PLAN["instances"][0], "stages": [{"devices": [0], "layers": 5,
                                                               "owned_groups": [8]}]}]}
    with pytest.raises(SpecError, match="one model"):
        open_runs([measured, write_fake(tmp_path / "other", plan=plan)])


def test_the_same_run_twice_is_refused(measured: Path) -> None:
    """Two lines over each other would say nothing."""
    with pytest.raises(SpecError, match="named once"):
        open_runs([measured, measured / ".." / measured.name])


# -- sweeps and names ---------------------------------------------------------------------


def test_the_folder_of_a_sweep_stands_for_its_runs(sweep: Path) -> None:
    """Runs come by policy and load, whatever their folders are called."""
    runs = open_runs([sweep])
    assert [run.run.path.name for run in runs] == ["hetis-1", "hetis-4", "vllm-1", "vllm-4"]
    assert [run.name for run in runs] == ["hetis, rate 1", "hetis, rate 4", "vllm, rate 1", "vllm, rate 4"]
    assert [run.group for run in runs] == ["hetis", "hetis", "vllm", "vllm"]
    assert [run.load.value for run in runs] == [1.0, 4.0, 1.0, 4.0]


def test_a_single_run_is_called_by_its_policy() -> None:
    """What cannot be confused needs no more."""
    assert names(config()) == [("hetis", "hetis")]


def test_settings_in_which_runs_differ_are_in_their_names() -> None:
    """Load and seed are in the name, not in the group; settings of the policy in both."""
    found = names(config(theta=0.5), config(theta=0.25, rate=2.0, seed=1))
    assert found == [("hetis, theta 0.5, rate 1, seed 0", "hetis, theta 0.5"),
                     ("hetis, theta 0.25, rate 2, seed 1", "hetis, theta 0.25")]


def test_settings_that_go_with_the_name_of_a_policy_are_left_out() -> None:
    """Only one of two policies has a theta, and its name already tells them apart."""
    assert names(config(theta=0.5), config("vllm")) == [("hetis", "hetis"), ("vllm", "vllm")]


def test_equal_settings_fall_back_on_the_folder() -> None:
    """Two runs that differ in nothing still have different names."""
    assert [name for name, _ in names(config(), config())] == ["hetis (a)", "hetis (b)"]


def test_simulated_and_measured_runs_are_told_apart() -> None:
    """The label is part of the name where both kinds meet."""
    found = names_of([config(), config()], ["a", "b"], ["simulated", "measured"])
    assert [name for name, _ in found] == ["hetis, simulated", "hetis, measured"]


settings_of_runs = st.builds(config, st.sampled_from(["hetis", "vllm"]), st.sampled_from([1.0, 2.0]),
                             st.integers(0, 1), theta=st.sampled_from([0.25, 0.5]))


@given(st.lists(settings_of_runs, min_size=1, max_size=8))
def test_names_are_unique_and_groups_are_the_settings_without_load_and_seed(found: list[dict[str,
                                                                                             Any]]) -> None:
    """Whatever the runs are, no two share a name, and two share a group just if nothing else differs."""
    made = names(*found)
    assert len({name for name, _ in made}) == len(found)
    for one, (_, group) in zip(found, made, strict=True):
        for other, (_, group_of_other) in zip(found, made, strict=True):
            same = one["policy"] == other["policy"]
            assert (group == group_of_other) == same


def test_few_runs_are_all_shown_and_of_many_one_a_group(sweep: Path) -> None:
    """Of many runs, each group shows the highest load that all of them had."""
    runs = open_runs([sweep])
    assert in_detail(runs, 4) == runs
    assert [run.name for run in in_detail(runs, 3)] == ["hetis, rate 4", "vllm, rate 4"]
    assert [run.name for run in in_detail(runs, 1)] == ["hetis, rate 4"]


def test_a_replayed_trace_takes_the_rate_of_its_arrivals(loaded: Path, tmp_path: Path) -> None:
    """Without a configured rate the arrivals themselves say how hard the run was driven."""
    folder = edited(loaded, tmp_path / "run", "config.json",
                    lambda value: value["workload"].update(rate=None))
    (run,) = open_runs([folder])
    assert run.load.value == pytest.approx(run.arrival_rate, rel=5e-3)
    assert run.load.unit == "requests/s"


def test_a_closed_loop_is_driven_by_its_users(tmp_path: Path) -> None:
    """Its load is a number of users."""
    folder = simulate_to(tmp_path / "run", "workload=closed", "workload.users=5", "requests=12",
                         "policy=vllm",
                         "model=llama-13b")
    assert tuple(open_runs([folder])[0].load) == (5.0, "users")


def test_reports_need_neither_simulator_nor_control_plane(project_root: Path) -> None:
    """They read run folders: SimPy, the simulation, what decides, and the configuration stay outside."""
    code = """
import sys
refused = ("hetis_sim.sim", "hetis_sim.control", "hetis_sim.policies", "hetis_sim.cost", "simpy", "torch",
           "hydra")
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(refused):
            raise AssertionError(name)
sys.meta_path.insert(0, Refuse())
import importlib, pkgutil
for package in ("analysis.figures", "analysis.report"):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(found.name)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=project_root, capture_output=True, text=True,
                            check=False)
    assert result.returncode == 0, result.stderr
