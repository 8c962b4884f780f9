"""``python -m hetis_exec toy`` runs a small trace on workers of this host and prints what was measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hetis_exec.crew import ThreadCrew
from hetis_exec.driver import ExecutionResult, Executor, ExecutorInput
from hetis_exec.processes import ProcessCrew
from hetis_exec.replay import replay
from hetis_exec.toy import ToyTrace, toy_input
from hetis_sim.metrics import print_summary, roles_of_plan, summarize
from hetis_sim.policies.registry import policy_names
from hetis_sim.spec.errors import HetisError
from hetis_sim.spec.slo import Slo

SLO = Slo(0.5, 0.05)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        _toy(options)
    except HetisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    trace = ToyTrace()
    parser = argparse.ArgumentParser(prog="python -m hetis_exec", description=__doc__)
    toy = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "toy", help="a small trace on a toy model", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    toy.add_argument("--policy", default="hetis", help=f"one of {', '.join(policy_names())}")
    toy.add_argument("--requests", type=int, default=trace.requests, help="length of the trace")
    toy.add_argument("--rate", type=float, default=trace.rate_per_s, help="mean arrivals per second")
    toy.add_argument("--seed", type=int, default=trace.seed, help="of the trace, the prompts and the weights")
    toy.add_argument("--processes", action="store_true", help="workers are processes instead of threads")
    toy.add_argument("--record", metavar="FILE", help="keep what a replay needs, as JSON")
    return parser


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
        provenance=["replayed in the simulator with the measured times: the same "
                    f"{len(result.record.decisions)} decisions, byte for byte"])


if __name__ == "__main__":
    sys.exit(main())
