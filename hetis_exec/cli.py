"""The command line of measured runs.

``replay`` serves a workload with a model on workers of this host, or of many where torchrun starts it, and
takes the words of ``python -m hetis_sim run`` (Hydra overrides); so do ``serve``, an HTTP server with the API
of OpenAI, ``generate``, which prints how a model goes on with a prompt, and ``calibrate`` and ``validate``,
which measure this machine for the simulator and how far that is off. ``toy`` runs a small trace on a toy
model.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hetis_exec.config import MAIN, ExecutionConfig, register_execution
from hetis_exec.crew import ThreadCrew
from hetis_exec.crews import report_failure, serve_rank
from hetis_exec.driver import ExecutionResult, Executor, ExecutorInput
from hetis_exec.launch import Launch, launched
from hetis_exec.places import devices_of
from hetis_exec.processes import ProcessCrew
from hetis_exec.replay import replay
from hetis_exec.run import Execution, Measured, execute, prepare_execution, write_measured
from hetis_exec.toy import ToyTrace, toy_input
from hetis_sim.metrics import print_summary, roles_of_plan, summarize
from hetis_sim.policies.registry import policy_names
from hetis_sim.report import print_figures, progress_bar
from hetis_sim.spec.errors import HetisError
from hetis_sim.spec.slo import Slo

SLO = Slo(0.5, 0.05)
NO_FOLDER = ("hydra.run.dir=.", "hydra.output_subdir=null")
SAME_DECISIONS = "replayed in the simulator with the measured times: the same {} decisions, byte for byte"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["replay"]:
        return _hydra(words[1:], _serve)
    if words[:1] == ["serve"]:
        return _hydra([*words[1:], *NO_FOLDER], _serve_http)
    if words[:1] in (["calibrate"], ["validate"]):
        return _measure(words[0], words[1:])
    if words[:1] == ["generate"] and not {"-h", "--help"} & set(words):
        return _generate(words[1:])
    options = _parser().parse_args(words)
    try:
        _toy(options)
    except HetisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    trace = ToyTrace()
    parser = argparse.ArgumentParser(prog="python -m hetis_exec", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("replay", help="a workload on a model: [hydra options] [key=value ...]")
    commands.add_parser("serve", help="an HTTP server with the API of OpenAI: model.path=folder "
                        "[key=value ...]")
    commands.add_parser("generate", help="a text that goes on: model.path=folder [key=value ...] \"prompt\"; "
                        "- reads the prompt from standard input")
    commands.add_parser("calibrate", help="measure this machine: [--quick] [key=value ...]")
    commands.add_parser("validate", help="real runs beside simulated ones: profile=FOLDER [key=value ...]")
    toy = commands.add_parser(
        "toy", help="a small trace on a toy model", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    toy.add_argument("--policy", default="hetis", help=f"one of {', '.join(policy_names())}")
    toy.add_argument("--requests", type=int, default=trace.requests, help="length of the trace")
    toy.add_argument("--rate", type=float, default=trace.rate_per_s, help="mean arrivals per second")
    toy.add_argument("--seed", type=int, default=trace.seed, help="of the trace, the prompts and the weights")
    toy.add_argument("--processes", action="store_true", help="workers are processes instead of threads")
    toy.add_argument("--record", metavar="FILE", help="keep what a replay needs, as JSON")
    return parser


def _generate(words: list[str]) -> int:
    """Go on with the prompt that the last word is."""
    if not words or (words[-1] != "-" and _is_key(words[-1])):
        print('error: no prompt: python -m hetis_exec generate model.path=folder [key=value ...] "prompt"',
              file=sys.stderr)
        return 2
    prompt = sys.stdin.read() if words[-1] == "-" else words[-1]

    def go_on(execution: Execution) -> bool:
        from hetis_exec.serving.commands import generate

        return not generate(execution.config, execution, prompt)

    return _hydra([*words[:-1], *NO_FOLDER], go_on)


def _is_key(word: str) -> bool:
    """Whether a word is an override of Hydra rather than a prompt."""
    return re.fullmatch(r"[+~]{0,2}[\w./@-]+=\S*", word) is not None or word.startswith("--")


def _serve_http(execution: Execution) -> bool:
    from hetis_exec.serving.commands import serve

    return not serve(execution.config, execution)


def _hydra(words: list[str], use: Callable[[Execution], bool]) -> int:
    """Use a checked combination; exits with status 2 on bad input, 1 if that has failed."""
    from hetis_sim.cli import EXIT_BAD_INPUT, with_hydra

    register_execution()
    try:
        launch = launched()
    except HetisError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    if launch is not None and launch.rank:
        # The run folder is the driver's.
        words = [*words, *NO_FOLDER]
    failed: list[bool] = []

    def task(config: object) -> None:
        assert isinstance(config, ExecutionConfig)
        failed.append(_failed(config, launch, use))

    with_hydra(task, words, MAIN, ExecutionConfig)
    return 1 if any(failed) else 0


def _measure(command: str, words: list[str]) -> int:
    """Calibrate or validate."""
    from hetis_exec import measure_cli

    return measure_cli.calibrate(words) if command == "calibrate" else measure_cli.validate(words)


def _failed(config: ExecutionConfig, launch: Launch | None, use: Callable[[Execution], bool]) -> bool:
    """Do what this process is to do of a run; whether it has failed."""
    if launch is None:
        return use(prepare_execution(config))
    try:
        _refuse_sweep()
        execution = prepare_execution(config, launch)
        if launch.rank:
            return not serve_rank(config, execution.given, launch)
        return use(execution)
    except HetisError as error:
        report_failure(launch, str(error))
        raise


def _refuse_sweep() -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise HetisError("ranks of a launcher serve one run: start one torchrun for each job of a sweep")


def _serve(execution: Execution) -> bool:
    """Run, write and print; whether the run has failed."""
    from hydra.core.hydra_config import HydraConfig

    with progress_bar(execution.config, execution.prepared) as progress:
        measured = execute(execution, progress)
    folder = write_measured(measured, Path(HydraConfig.get().runtime.output_dir))
    print_figures(measured.summary, execution.prepared, _notes(measured), folder, "measured")
    if measured.error is not None:
        print(f"error: {measured.error}", file=sys.stderr)
    return measured.error is not None


def _notes(measured: Measured) -> list[str]:
    given = measured.execution.given
    weights = "random weights" if measured.execution.config.model.path is None else "weights of its folder"
    devices = len(devices_of(given.plan))
    launch = measured.execution.launch
    where = f"{os.cpu_count()} cores of this host"
    if launch is not None and not launch.one_host:
        where = f"the nodes of {launch.world_size} ranks"
    notes = [f"{weights}, {devices} workers on {where}"]
    if measured.checked is not None:
        notes.append(SAME_DECISIONS.format(measured.checked))
    return notes


def _toy(options: argparse.Namespace) -> None:
    trace = ToyTrace(options.requests, options.rate, seed=options.seed)
    given = toy_input(options.policy, trace)
    result = Executor(given, ProcessCrew if options.processes else ThreadCrew).run()
    if options.record:
        result.record.write(options.record)
    replay(given, result.record)
    _print(given, result, "processes" if options.processes else "threads")


def _print(given: ExecutorInput, result: ExecutionResult, workers: str) -> None:
    roles = roles_of_plan(given.plan.to_dict(), len(given.cluster.devices))
    summary = summarize(result.recorder, slo=SLO, roles=roles, label="measured")
    print_summary(
        summary, title=f"measured: {given.policy.name} serving a toy model on {len(roles)} {workers}",
        provenance=[SAME_DECISIONS.format(len(result.record.decisions))])
