"""From a configuration to a result: the Python face of ``python -m hetis_sim``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetis_sim.config import RunConfig, compose
from hetis_sim.control.controller import Controller
from hetis_sim.control.make import make_controller
from hetis_sim.control.mesh.controller import MeshController
from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.cost.load import load_cost_model
from hetis_sim.cost.misjudged import MisjudgedCost
from hetis_sim.cost.model import CostModel, ProvenanceRow
from hetis_sim.metrics import Recorder, Summary, Trim, build_manifest, roles_of_plan, summarize, write_run
from hetis_sim.metrics.manifest import value_sha256
from hetis_sim.policies.base import PlanningProblem, Policy
from hetis_sim.policies.plan import Plan
from hetis_sim.policies.registry import make_policy
from hetis_sim.sim.clock import EventBudgetError
from hetis_sim.sim.simulation import Simulation, SimulationInput
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec
from hetis_sim.spec.parse import cluster_from_mapping, model_from_mapping
from hetis_sim.spec.request import Request
from hetis_sim.spec.slo import Slo
from traces import ClosedLoopWorkload, OpenWorkload, RngStreams, build_workload, length_facts

if TYPE_CHECKING:
    import pandas as pd

# A step takes a handful of events, and every step makes at least one token.
EVENTS_PER_TOKEN = 60
EVENTS_FREE = 100_000


@dataclass(frozen=True)
class Prepared:
    """A checked combination, ready to run: nothing that could be refused is left for later.

    ``believed`` is what the policy takes durations to be where it is made to err, else None.
    """

    config: RunConfig
    cluster: ClusterSpec
    model: ModelSpec
    cost: CostModel
    policy: Policy
    workload: OpenWorkload | ClosedLoopWorkload
    settings: SchedulerSettings
    plan: Plan
    believed: CostModel | None = None

    @cached_property
    def gpus(self) -> tuple[GpuSpec, ...]:
        """The kinds of card in the cluster."""
        return tuple({device.gpu.name: device.gpu for device in self.cluster.devices}.values())

    def provenance(self) -> list[ProvenanceRow]:
        """Where the durations come from."""
        links = {host.link.name: host.link for host in self.cluster.hosts}
        links[self.cluster.network.name] = self.cluster.network
        return self.cost.provenance(self.gpus, self.model, list(links.values()))

    def controller(self) -> Controller | MeshController:
        """A fresh control plane for the plan."""
        return make_controller(self.cluster, self.model, self.cost, self.policy, self.plan, self.settings,
                               believed=self.believed)


@dataclass(frozen=True)
class Result:
    """What a run gives back.

    Attributes:
        summary: all figures.
        recorder: the rows they come from.
        prepared: what was run.
        decisions: lines of the decision log, None when it was off.
        events: events of the simulation.
    """

    summary: Summary
    recorder: Recorder
    prepared: Prepared
    decisions: list[str] | None
    events: int

    @property
    def requests(self) -> pd.DataFrame:
        """One row per request."""
        return self.recorder.requests()

    @property
    def steps(self) -> pd.DataFrame:
        """One row per step."""
        return self.recorder.steps()


class IncompleteRunError(EventBudgetError):
    """A run was given up before its end.

    Attributes:
        result: what had ended by then; its summary says that it is incomplete, and why.
    """

    def __init__(self, reason: str, result: Result) -> None:
        super().__init__(reason)
        self.result = result


def prepare(config: RunConfig, like: Prepared | None = None) -> Prepared:
    """Check a configuration and place the model; everything but the run itself.

    Args:
        like: a combination whose cluster, model and cost model are taken over, with all that they remember,
            where the two configurations agree in them.

    Raises:
        HetisError: the combination cannot run; the text says why.
    """
    if like is not None and any(getattr(config, part) != getattr(like.config, part)
                                for part in ("cluster", "model", "cost")):
        like = None
    cluster = like.cluster if like is not None else cluster_from_mapping(config.cluster)
    model = like.model if like is not None else model_from_mapping(config.model)
    settings = config.scheduler.settings()
    config.slo.slo()
    Trim(config.sim.warmup_fraction, config.sim.drop_tail_fraction)
    policy = make_policy(config.policy)
    cost, believed = (like.cost, like.believed) if like is not None else _costs(config, cluster, model)
    workload = build_workload(config.workload, model.context_limit_tokens)
    assert isinstance(workload, OpenWorkload | ClosedLoopWorkload)
    problem = planning_problem(cluster, model, believed or cost, settings, workload, config.slo.slo())
    prepared = Prepared(config, cluster, model, cost, policy, workload, settings, policy.plan(problem),
                        believed)
    prepared.controller()
    return prepared


def _costs(config: RunConfig, cluster: ClusterSpec, model: ModelSpec) -> tuple[CostModel, CostModel | None]:
    """The durations, and what the policy takes them to be where it is made to err."""
    given = config.cost
    cost = load_cost_model(given.kind, profiles=given.profiles, host=given.host(),
                           gpus=[device.gpu for device in cluster.devices], model=model,
                           cache_copies=given.cache_copies,
                           cache_copy_bytes_per_s=given.cache_copy_bytes_per_s)
    if not given.policy_error:
        return cost, None
    streams = RngStreams(given.policy_error_seed)
    return cost, MisjudgedCost(cost, given.policy_error, streams.stream, given.policy_error_modules)


def planning_problem(cluster: ClusterSpec, model: ModelSpec, cost: CostModel, settings: SchedulerSettings,
                     workload: OpenWorkload | ClosedLoopWorkload, slo: Slo) -> PlanningProblem:
    """What a policy is told to plan for; of the workload, what an operator would know."""
    facts = length_facts(workload.known_lengths(), model.context_limit_tokens)
    return PlanningProblem(cluster, model, cost, settings.limits, facts.prompt_tokens, facts.output_tokens,
                           workload.describe().get("rate_rps"), slo,
                           settings.chunk_tokens if settings.chunked_prefill else 0,
                           facts.prompt_parts, facts.context_tokens)


def simulate(config: RunConfig | str | None = None, *overrides: str, output: str | Path | None = None,
             progress: Callable[[int], None] | None = None) -> Result:
    """Run a configuration.

    ``simulate()`` runs the defaults; ``simulate("policy=vllm", "rate=2")`` takes the words of
    the command line; ``simulate(config)`` takes a :class:`RunConfig`.

    Args:
        config: a configuration, or the first override.
        overrides: further overrides.
        output: folder to write the run to; nothing is written without it.
        progress: called with the number of requests that have ended, now and then.

    Raises:
        IncompleteRunError: the event budget is used up; what had ended is written and in the error.
        HetisError: the combination cannot run; the text says why.
    """
    if config is None or isinstance(config, str):
        config = compose(*([] if config is None else [config]), *overrides)
    try:
        result = run_prepared(prepare(config), progress)
    except IncompleteRunError as error:
        if output is not None:
            write_result(error.result, output)
        raise
    if output is not None:
        write_result(result, output)
    return result


def run_prepared(prepared: Prepared, progress: Callable[[int], None] | None = None) -> Result:
    """Run a checked combination.

    Raises:
        IncompleteRunError: the event budget is used up.
    """
    simulation = make_simulation(prepared, progress)
    try:
        recorder = simulation.run()
    except EventBudgetError as error:
        result = make_result(prepared, simulation, simulation.recorder, incomplete=str(error))
        raise IncompleteRunError(str(error), result) from error
    return make_result(prepared, simulation, recorder)


def make_simulation(prepared: Prepared, progress: Callable[[int], None] | None = None) -> Simulation:
    """A simulation of a checked combination, not yet run."""
    config = prepared.config
    workload: list[Request] | Any
    if isinstance(prepared.workload, OpenWorkload):
        workload = prepared.workload.requests()
    else:
        workload = prepared.workload.begin()
    return Simulation(SimulationInput(
        prepared.cluster, prepared.model, prepared.cost, prepared.policy, prepared.plan, workload,
        prepared.settings, event_budget(prepared), config.sim.log_decisions, config.sim.debug,
        prepared.believed), progress)


def make_result(prepared: Prepared, simulation: Simulation, recorder: Recorder,
                incomplete: str = "") -> Result:
    """The figures of a simulation that has run; ``incomplete`` says why it did not run to its end."""
    config = prepared.config
    trim = Trim(config.sim.warmup_fraction, config.sim.drop_tail_fraction)
    roles = roles_of_plan(prepared.plan.to_dict(), len(prepared.cluster.devices))
    summary = summarize(recorder, slo=config.slo.slo(), trim=trim, roles=roles,
                        submitted=len(simulation.controller.states),
                        horizon_s=simulation.clock.now if incomplete else None, incomplete=incomplete,
                        outside_ranges=[mark.to_dict() for mark in simulation.watch.found()])
    decisions = simulation.controller.log.lines if config.sim.log_decisions else None
    return Result(summary, recorder, prepared, decisions, simulation.clock.events)


def event_budget(prepared: Prepared) -> int:
    """The configured budget, or one that no workload of these lengths can need."""
    if prepared.config.sim.event_budget is not None:
        return prepared.config.sim.event_budget
    about = prepared.workload.describe()
    requests = about.get("n") or prepared.config.workload.requests or 1_000_000
    tokens = about["prompt_tokens"]["mean"] + about["output_tokens"]["mean"]
    # In a mesh every node of a path has a step and messages of its own for a token.
    hops = len(prepared.plan.mesh.nodes) if prepared.plan.mesh is not None else 1
    return int(EVENTS_FREE + EVENTS_PER_TOKEN * requests * tokens * hops)


def write_result(result: Result, path: str | Path) -> Path:
    """Write a run folder."""
    from hetis_sim.metrics import write_timeline

    prepared = result.prepared
    folder = write_run(path, recorder=result.recorder, summary=result.summary, manifest=manifest(result),
                       plan=prepared.plan.to_dict(), config=asdict(prepared.config),
                       decisions=result.decisions)
    if prepared.config.sim.timeline:
        write_timeline(Path(folder) / "timeline.json", result.steps, result.recorder.transfers(),
                       result.recorder.samples())
    return folder


def manifest(result: Result) -> dict[str, Any]:
    """What is needed to make the run again, and where its durations come from."""
    prepared = result.prepared
    about: Mapping[str, Any] = prepared.workload.describe()
    plan = prepared.plan.to_dict()
    return build_manifest(
        label="simulated", seeds={"workload": prepared.config.workload.seed},
        hashes={"workload": about["sha256"], "config": value_sha256(asdict(prepared.config)),
                "plan": value_sha256(plan.get("mesh") or plan["instances"])},
        provenance=prepared.provenance(),
        extra={"workload": dict(about), "cost_warnings": list(prepared.cost.warnings),
               "outside_ranges": list(result.summary.outside_ranges),
               "events": result.events, "incomplete": result.summary.incomplete})
