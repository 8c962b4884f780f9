"""``python -m hetis_exec replay``: real models on worker processes, from words to run folders."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from exec_commands import SOON_S, alive, children, command, wait_for, words, workers

from hetis_exec.cli import main
from hetis_exec.config import ExecModelConfig, ExecutionConfig, ExecutorConfig
from hetis_exec.records import RunRecord
from hetis_exec.replay import replay
from hetis_exec.run import prepare_execution
from hetis_sim.metrics import load_run
from hetis_sim.spec.errors import SpecError


def test_a_run_leaves_the_simulator_s_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Labelled measured, with parts of every step, decisions, and a record that the simulator repeats."""
    asked = words("output=table", "executor.record=true", "sim.log_decisions=true", run=tmp_path)
    assert main(asked) == 0
    printed = capfd.readouterr().out
    assert "measured: hetis serving" in printed
    assert "6 submitted, 6 finished" in printed
    assert "byte for byte" in printed
    run = load_run(tmp_path)
    assert run.manifest["label"] == "measured"
    assert run.manifest["executor"]["checked_decisions"] == len(
        (tmp_path / "decisions.jsonl").read_text().splitlines())
    assert set(run.requests["status"]) == {"finished"}
    steps = run.steps
    assert (steps["dense_s"] > 0).all()
    assert (steps["attention_s"] > 0).all()
    config = json.loads((tmp_path / "config.json").read_text())
    given = prepare_execution(config_of(config)).given
    assert len(replay(given, RunRecord.read(tmp_path / "record.json")).controller.log.lines) > 0


def config_of(values: dict[str, object]) -> ExecutionConfig:
    """What the run of a folder was given."""
    from omegaconf import OmegaConf

    made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ExecutionConfig), values))
    assert isinstance(made, ExecutionConfig)
    return made


@pytest.mark.parametrize(("more", "message"), [
    (["model.path=/nowhere"], "model.path='/nowhere'"),
    (["executor.workers=fibres"], "executor.workers='fibres'"),
    (["executor.dtype=int8"], "executor.dtype='int8'.*bfloat16"),
    (["executor.devices=gpu"], "executor.devices='gpu'"),
    (["executor.devices=[cpu,cpu]"], r"executor.devices=\['cpu', 'cpu'\].*4 torch devices"),
    (["executor.devices=[cpu,cpu,cpu,tpu:0]"], r"executor.devices\[3\]='tpu:0'"),
    (["executor.timeout_s=0"], "executor.timeout_s=0.0"),
    (["executor.timeot_s=1"], "did you mean timeout_s"),
    (["executor.temperature=-1"], "executor.temperature=-1.0"),
    (["workload=closed", "workload.rate=null"], "workload.arrivals='closed'"),
    (["policy=hetsi"], "hetsi"),
    (["cluster=single-a100", "scheduler.memory_utilization=0.99"], "this host has .* GiB free"),
    (["cluster.gpu_types.cpu-core.memory_gib=0.5", "cluster.gpu_types.weak-core.memory_gib=0.5"],
     "memory|fit"),
])
def test_bad_input_ends_with_status_2(more: list[str], message: str, tmp_path: Path,
                                      capfd: pytest.CaptureFixture[str]) -> None:
    """One line on standard error, and no folder."""
    with pytest.raises(SystemExit) as ended:
        main(words(*more, run=tmp_path / "run"))
    assert ended.value.code == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert re.search(message, printed.err), printed.err
    assert not (tmp_path / "run").exists()


def test_a_killed_worker_ends_the_run_in_seconds(tmp_path: Path) -> None:
    """Exit status 1, the error on standard error, what had finished in the folder, and no orphans."""
    process = command("rate=0.5", "requests=50", run=tmp_path)
    wait_for(lambda: len(workers(process.pid)) == 4, "workers start")
    below = children(process.pid) + workers(process.pid)
    time.sleep(1.0)
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=SOON_S)
    assert process.returncode == 1, said
    assert "is lost: its process has ended with exit code -9" in said
    wait_for(lambda: not any(alive(pid) for pid in below), "workers end")


def test_workers_end_with_the_driver(tmp_path: Path) -> None:
    """A driver that is killed leaves nothing behind."""
    process = command("rate=0.5", "requests=50", run=tmp_path)
    wait_for(lambda: len(workers(process.pid)) == 4, "workers start")
    below = children(process.pid) + workers(process.pid)
    process.kill()
    process.communicate(timeout=SOON_S)
    wait_for(lambda: not any(alive(pid) for pid in below), "workers end")


def test_settings_of_the_control_plane_are_those_of_the_backend() -> None:
    """Whatever the group of the model says, weights and cache are counted in float32."""
    config = ExecutionConfig(model=ExecModelConfig(path="~/x", weight_bytes=2))
    seen = config.for_control().model
    assert (seen.weight_bytes, seen.kv_bytes) == (4, 4)
    assert seen.config == str(Path("~/x").expanduser())
    with pytest.raises(SpecError, match=r"executor\.threads=0"):
        ExecutorConfig(threads=0)
