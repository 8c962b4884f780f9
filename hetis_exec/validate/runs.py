"""One load of one policy, served for real and simulated: plan, policy, settings and requests are the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd

from hetis_exec.config import ExecutionConfig
from hetis_exec.crews import crew_maker
from hetis_exec.driver import Executor
from hetis_exec.run import Execution, prepare_execution
from hetis_sim.metrics import Recorder, Summary, roles_of_plan, summarize
from hetis_sim.metrics.columns import Table
from hetis_sim.run import Prepared, run_prepared
from hetis_sim.spec.errors import HetisError
from hetis_sim.study.runs import Case, Load, cases_of, require_open, under
from hetis_sim.study.tasks import flooded_throughput
from traces import OpenWorkload

OVERLOAD_RPS = 1000.0
WARMUP = 0.2
"""Share of the requests of an overloaded run that finish before its throughput counts."""


@dataclass(frozen=True)
class Outcome:
    """What a run gave, real or simulated.

    Attributes:
        requests, steps: rows of the recorder.
    """

    requests: pd.DataFrame
    steps: pd.DataFrame
    summary: Summary


@dataclass(frozen=True)
class Subject:
    """A policy whose plan has been made."""

    label: str
    execution: Execution

    @property
    def prepared(self) -> Prepared:
        """What both worlds are prepared with."""
        return self.execution.prepared


def subjects_of(config: ExecutionConfig) -> list[Subject]:
    """The policies of a validation, each with the plan that all its runs have.

    Raises:
        HetisError: a combination that cannot run.
    """
    require_open(config)
    return [Subject(case.label, prepare_execution(_with_policy(config, case)))
            for case in cases_of(config, config.validate.policies or None)]


def _with_policy(config: ExecutionConfig, case: Case) -> ExecutionConfig:
    return replace(config, policy=case.config.policy)


def loaded(subject: Subject, load: Load) -> Prepared:
    """The plan under a load."""
    return under(subject.prepared, load)


def measure(subject: Subject, load: Load) -> Outcome:
    """Serve the requests.

    Raises:
        HetisError: the run fails.
    """
    prepared, execution = loaded(subject, load), subject.execution
    assert isinstance(prepared.workload, OpenWorkload)
    given = dataclasses.replace(execution.given, requests=prepared.workload.requests(), log_decisions=False)
    executor = Executor(given, crew_maker(execution.config, given))
    return _outcome(executor.run().recorder, prepared, "measured")


def simulate(subject: Subject, load: Load) -> Outcome:
    """Simulate the same."""
    prepared = loaded(subject, load)
    return _outcome(run_prepared(prepared).recorder, prepared, "simulated")


def _outcome(recorder: Recorder, prepared: Prepared, label: str) -> Outcome:
    roles = roles_of_plan(prepared.plan.to_dict(), len(prepared.cluster.devices))
    summary = summarize(recorder, slo=prepared.config.slo.slo(), roles=roles, label=label)
    return Outcome(recorder.requests(), recorder.steps(), summary)


def capacity_rps(subject: Subject, requests: int, seed: int,
                 run: Callable[[Subject, Load], Outcome] = measure) -> float:
    """Requests per second that finish when all come at once.

    Raises:
        HetisError: nothing finishes.
    """
    outcome = run(subject, Load(OVERLOAD_RPS, requests, seed))
    done = outcome.requests[outcome.requests["status"] == "finished"]
    if not len(done):
        raise HetisError(f"policy {subject.label}: none of {requests} requests has finished")
    columns = ("finish_s", "first_scheduled_s", "arrival_s")
    return flooded_throughput(Table({name: done[name].to_numpy() for name in columns}), WARMUP)
