"""The command line: ``run``, ``plan``, ``validate`` and the studies, configured by Hydra."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hetis_sim.spec.errors import HetisError

if TYPE_CHECKING:
    from hetis_sim.config import RunConfig

USAGE = """usage: hetis-sim COMMAND [hydra options] [key=value ...]

commands:
  run        simulate and print the result; writes a run folder under runs/
  plan       print where the model is placed, and why
  validate   say whether a combination can run, without running it
  capacity   find the highest rate at which the SLO holds, over several seeds
  compare    run policies on identical arrivals; paired differences and one sentence

examples:
  hetis-sim run                                  Hetis, Llama-2-70B, the paper's cluster, ShareGPT
  hetis-sim run policy=vllm rate=2 requests=500
  hetis-sim run -m policy=hetis,vllm rate=1,2,4  a sweep
  hetis-sim run workload=trace workload.path=conv.csv.gz model=llama3-8b cluster=helix24
  hetis-sim plan cluster=helix24
  hetis-sim capacity policy=hetis slo.ttft_s=2
  hetis-sim compare policies=[hetis,vllm] rate=2 study.capacity=true
  hetis-sim run --help                           groups and keys
  hetis-sim run -sc install=bash                 how to get tab completion
"""

EXIT_BAD_INPUT = 2


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with status 2 on bad input."""
    words = sys.argv[1:] if arguments is None else arguments
    words = _completion_words(words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        sys.exit(0)
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        if "=" not in command and not command.startswith("-"):
            print(f"error: command={command!r} is not allowed: must be one of {', '.join(COMMANDS)}\n",
                  file=sys.stderr)
            print(USAGE, end="", file=sys.stderr)
            sys.exit(EXIT_BAD_INPUT)
        command, rest = "run", words
    if command != "run":
        rest = ["hydra.run.dir=.", "hydra.output_subdir=null", *rest]
    with_hydra(COMMANDS[command], rest)


def _completion_words(words: list[str]) -> list[str]:
    """Let Hydra complete ``hetis-sim COMMAND key=...``: it knows nothing of commands."""
    if not words or words[0] not in ("-sc", "--shell-completion"):
        return words
    line = os.environ.get("COMP_LINE", "")
    for command in COMMANDS:
        head, sign, tail = line.partition(f" {command} ")
        if sign and "=" not in head:
            os.environ["COMP_LINE"] = f"{head} {tail}"
            point = int(os.environ.get("COMP_POINT", str(len(line))))
            os.environ["COMP_POINT"] = str(max(0, point - len(command) - 1))
    return ["run", *words]


def with_hydra(task: Callable[..., None], overrides: list[str], main: str = "config",
               schema: type[RunConfig] | None = None) -> None:
    """Have Hydra make a configuration of the words, and run a task on it.

    Args:
        main: the main configuration in ``conf/``.
        schema: its type, registered by the caller; by default that of the simulator's commands.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from hetis_sim.config import RunConfig, check_keys, normalise, register, typed

    register()
    overrides = normalise(overrides)
    try:
        check_keys(overrides, schema or RunConfig)
    except HetisError as error:
        _refuse(error)

    failures: list[HetisError] = []
    begun: list[DictConfig] = []

    def call(config: DictConfig) -> None:
        begun.append(config)
        try:
            task(typed(config))
        except HetisError as error:
            _forget_run()
            # The other jobs of a sweep go on; its own words tell which one failed.
            job = HydraConfig.get()
            words = f" (job {' '.join(job.overrides.task)})" if job.mode == RunMode.MULTIRUN else ""
            print(f"error: {error}{words}", file=sys.stderr)
            failures.append(error)
        except BrokenPipeError:
            # Whoever read our output has seen enough; keep the interpreter from trying again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    call.__name__ = call.__qualname__ = "hetis_sim"
    sys.argv = [sys.argv[0], *overrides]
    try:
        hydra.main(version_base="1.3", config_path="pkg://conf", config_name=main)(call)()
    except SystemExit as end:
        # Before anything has begun, Hydra ends for words that it cannot use, and has said so.
        sys.exit(EXIT_BAD_INPUT if end.code == 1 and not begun else end.code)
    if failures:
        sys.exit(EXIT_BAD_INPUT)


def _refuse(error: HetisError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def _forget_run() -> None:
    """Remove the folder that Hydra has made for a run that never began."""
    from hydra.core.hydra_config import HydraConfig

    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    if settings.output_subdir is None or (folder / "summary.json").exists():
        return
    for path in sorted((folder / settings.output_subdir).glob("*")):
        path.unlink()
    for path in (folder / settings.output_subdir, folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _run(config: object) -> None:
    from hydra.core.hydra_config import HydraConfig

    from hetis_sim.config import RunConfig
    from hetis_sim.report import print_result, progress_bar
    from hetis_sim.run import IncompleteRunError, prepare, run_prepared, write_result

    assert isinstance(config, RunConfig)
    prepared = prepare(config)
    output = Path(HydraConfig.get().runtime.output_dir)
    try:
        with progress_bar(config, prepared) as progress:
            result = run_prepared(prepared, progress)
    except IncompleteRunError as error:
        print_result(error.result, write_result(error.result, output))
        raise
    print_result(result, write_result(result, output))


def _plan(config: object) -> None:
    from hetis_sim.config import RunConfig
    from hetis_sim.report import print_plan
    from hetis_sim.run import prepare
    from hetis_sim.study.bound import bound_of
    from hetis_sim.study.tables import print_bound

    assert isinstance(config, RunConfig)
    prepared = prepare(config)
    print_plan(prepared)
    print_bound(bound_of(prepared))


def _validate(config: object) -> None:
    from hetis_sim.config import RunConfig
    from hetis_sim.report import print_validation
    from hetis_sim.run import prepare

    assert isinstance(config, RunConfig)
    print_validation(prepare(config))


def _capacity(config: object) -> None:
    from hetis_sim.config import RunConfig
    from hetis_sim.study.capacity import capacity
    from hetis_sim.study.tables import print_capacity, study_progress

    assert isinstance(config, RunConfig)
    with study_progress(config, "capacity") as done:
        found = capacity(config, done)
    print_capacity(config, found)


def _compare(config: object) -> None:
    from hetis_sim.config import RunConfig
    from hetis_sim.study.compare import compare
    from hetis_sim.study.tables import print_comparison, study_progress

    assert isinstance(config, RunConfig)
    with study_progress(config, "compare") as done:
        found = compare(config, done)
    print_comparison(config, found)


COMMANDS: dict[str, Callable[..., None]] = {"run": _run, "plan": _plan, "validate": _validate,
                                            "capacity": _capacity, "compare": _compare}
