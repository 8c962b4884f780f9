"""The commands ``calibrate`` and ``validate``, which take Hydra's words."""

from __future__ import annotations

from pathlib import Path

from hetis_exec.config import MAIN, ExecutionConfig, register_execution
from hetis_sim.cli import with_hydra


def calibrate(words: list[str]) -> int:
    """Measure this machine; status 2 on bad input, 1 if a module is refused or could not be measured."""
    register_execution()
    bad: list[bool] = []

    def task(config: object) -> None:
        from hetis_exec.calibrate.command import run_command

        assert isinstance(config, ExecutionConfig)
        bad.append(run_command(config))

    words = ["calibrate.quick=true" if word == "--quick" else word for word in words]
    with_hydra(task, ["hydra.run.dir=.", "hydra.output_subdir=null", *words], MAIN, ExecutionConfig)
    return 1 if any(bad) else 0


def validate(words: list[str]) -> int:
    """Compare runs with their simulation; status 2 on bad input, 1 if a run has failed."""
    register_execution()
    fine: list[bool] = []

    def task(config: object) -> None:
        from hydra.core.hydra_config import HydraConfig

        from hetis_exec.validate.command import run_command

        assert isinstance(config, ExecutionConfig)
        fine.append(run_command(config, Path(HydraConfig.get().runtime.output_dir)))

    with_hydra(task, words, MAIN, ExecutionConfig)
    return 0 if all(fine) else 1
