"""One load of one policy, served for real and simulated: plan, policy, settings and requests are the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pandas as pd

from hetis_exec.config import ExecutionConfig
from hetis_exec.crews import crew_maker
from hetis_exec.driver import Executor, ExecutorInput
from hetis_exec.errors import ReplayError
from hetis_exec.places import CPU
from hetis_exec.records import RunRecord
from hetis_exec.replay import Replay
from hetis_exec.run import Execution, prepare_execution
from hetis_sim.cost.paced import PacedCost, Slowdown
from hetis_sim.metrics import Recorder, Trim, summarize
from hetis_sim.metrics.columns import Table
from hetis_sim.run import Prepared, event_budget
from hetis_sim.sim.simulation import Simulation, SimulationInput
from hetis_sim.spec.errors import HetisError
from hetis_sim.spec.request import Request
from hetis_sim.study.runs import Case, Load, cases_of, require_open, under
from hetis_sim.study.tasks import flooded_throughput
from traces import OpenWorkload

OVERLOAD_RPS = 1000.0
FLOODED = 0.2
"""Share of the requests of an overloaded run that finish before its throughput counts."""

WARMUP_ID = 1 << 40
"""Numbers of requests from here on warm up."""
WARMUP_PROMPTS = (8, 16, 32, 48)
WARMUP_REQUESTS, WARMUP_S, CARD_WARMUP_S = 8, 4.0, 15.0


@dataclass(frozen=True)
class Outcome:
    """What a run gave, real or simulated, after its warm-up.

    Attributes:
        requests, steps: rows of the recorder.
        rates: figures that a run has one of.
        same: of a real run, its own steps with the parts that the cost model gives them; None where the
            simulator does not make the same steps.
    """

    requests: pd.DataFrame
    steps: pd.DataFrame
    rates: dict[str, float]
    same: pd.DataFrame | None = None


@dataclass(frozen=True)
class Subject:
    """A policy whose plan has been made.

    Attributes:
        begin_s: when requests that count may arrive, once those that warm up are over.
    """

    label: str
    execution: Execution
    begin_s: float

    @property
    def prepared(self) -> Prepared:
        """What both worlds are prepared with."""
        return self.execution.prepared


@dataclass(frozen=True)
class LoadedCase:
    """A load of a subject, ready to be run in either world.

    Attributes:
        requests: those that warm up, then those that count.
        begin_s: when the first of those that count may arrive.
    """

    prepared: Prepared
    requests: list[Request]
    begin_s: float


def subjects_of(config: ExecutionConfig) -> list[Subject]:
    """The policies of a validation, each with the plan that all its runs have.

    Raises:
        HetisError: a combination that cannot run.
    """
    require_open(config)
    found = [(case.label, prepare_execution(_with_policy(config, case)))
             for case in cases_of(config, config.validate.policies or None)]
    return [Subject(label, execution, _begin_s(execution)) for label, execution in found]


def _with_policy(config: ExecutionConfig, case: Case) -> ExecutionConfig:
    return replace(config, policy=case.config.policy)


def loaded(subject: Subject, load: Load) -> LoadedCase:
    """The plan under a load, after a warm-up.

    Requests that end one after the other bring up every size of batch: kernels are compiled, graphs
    recorded and memory touched before anything counts. The simulator gets them too.
    """
    prepared, begin_s = under(subject.prepared, load), subject.begin_s
    assert isinstance(prepared.workload, OpenWorkload)
    warm = _warming(subject.execution) if begin_s else []
    counted = [replace(request, arrival_s=request.arrival_s + begin_s)
               for request in prepared.workload.requests()]
    return LoadedCase(prepared, [*warm, *counted], begin_s)


def _warming(execution: Execution) -> list[Request]:
    """The requests that warm up."""
    most = execution.prepared.model.context_limit_tokens // 2
    number = execution.config.scheduler.max_batch_requests
    if not _has_cards(execution):
        number = min(WARMUP_REQUESTS, number)
    return [Request(WARMUP_ID + n, 0.0, min(WARMUP_PROMPTS[n % len(WARMUP_PROMPTS)], most), min(n + 1, most))
            for n in range(number)]


def _begin_s(execution: Execution) -> float:
    """When requests that count may arrive: twice what warming up takes in the simulator, if not more."""
    given, prepared = execution.config.validate.warmup_s, execution.prepared
    if given is not None:
        return given
    warm = _warming(execution)
    recorder = Simulation(SimulationInput(
        prepared.cluster, prepared.model, prepared.cost, prepared.policy, prepared.plan, warm,
        prepared.settings, event_budget(prepared) + 100 * len(warm))).run()
    simulated_s = float(recorder.requests()["finish_s"].fillna(0.0).max())
    return max(CARD_WARMUP_S if _has_cards(execution) else WARMUP_S, float(math.ceil(2.0 * simulated_s)))


def _has_cards(execution: Execution) -> bool:
    return any(place != CPU for place in getattr(execution.given.backend, "places", ()))


def measure(subject: Subject, load: Load, rest: Callable[[float], None] | None = None) -> Outcome:
    """Serve the requests; what ``rest`` does between steps takes no time of the run.

    Raises:
        HetisError: the run fails, or its warm-up takes longer than it is given.
    """
    case, execution = loaded(subject, load), subject.execution
    given = dataclasses.replace(execution.given, requests=case.requests, log_decisions=False)
    result = Executor(given, crew_maker(execution.config, given), rest=rest).run()
    recorder = result.recorder
    rows = recorder.requests()
    warm_s = float(rows[rows["request_id"] >= WARMUP_ID]["finish_s"].max())
    if warm_s > case.begin_s:
        raise HetisError(f"policy {subject.label}: the warm-up has taken {warm_s:.1f} s, "
                         f"validate.warmup_s={case.begin_s:g}: give it more")
    return replace(_outcome(recorder, case), same=_same_steps(given, result.record, case.begin_s))


def _same_steps(given: ExecutorInput, record: RunRecord, begin_s: float) -> pd.DataFrame | None:
    """The steps of a real run as the cost model sees them: same batches, same contexts, same places of heads.

    Other steps than those of the simulation, whose requests meet at other times.
    """
    try:
        steps = Replay(given, record).run().steps()
    except ReplayError:
        return None
    # What is left of the measured time would be called waiting.
    return steps[steps["start_s"] >= begin_s].assign(waiting_s=0.0)


def simulate(subject: Subject, load: Load, slowdowns: Mapping[str, Slowdown] | None = None) -> Outcome:
    """Simulate the same, at the profile's pace or with the times of computing scaled by type of device.

    The policy goes by the profile in either case, as in the real run.
    """
    case = loaded(subject, load)
    prepared = case.prepared
    cost = PacedCost(prepared.cost, slowdowns) if slowdowns else prepared.cost
    simulation = Simulation(SimulationInput(
        prepared.cluster, prepared.model, cost, prepared.policy, prepared.plan, case.requests,
        prepared.settings, event_budget(prepared) + 100 * len(case.requests),
        believed=prepared.cost if slowdowns else None))
    return _outcome(simulation.run(), case)


def _outcome(recorder: Recorder, case: LoadedCase) -> Outcome:
    requests, steps, samples = recorder.requests(), recorder.steps(), recorder.samples()
    counted = requests[requests["request_id"] < WARMUP_ID]
    warm = sum(request.request_id >= WARMUP_ID for request in case.requests)
    trim = Trim((warm + 0.5) / len(case.requests)) if warm else Trim()
    summary = summarize(recorder, slo=case.prepared.config.slo.slo(), trim=trim)
    later = samples[samples["now_s"] >= case.begin_s]
    used = later[[name for name in later.columns if name.startswith("used_bytes_")]].sum(axis=1)
    rates = {"request_throughput": summary.throughput.request_throughput,
             "output_throughput": summary.throughput.output_throughput,
             "kv_used_mean": summary.kv_used_mean,
             "kv_used_max": float(used.max()) / max(1.0, sum(recorder.capacity_bytes))}
    return Outcome(counted.reset_index(drop=True), steps[steps["start_s"] >= case.begin_s], rates)


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
    return flooded_throughput(Table({name: done[name].to_numpy() for name in columns}), FLOODED)
