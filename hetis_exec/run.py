"""From a configuration to a measured run and its folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

from hetis_exec.config import ExecutionConfig
from hetis_exec.crews import crew_maker, workers_of
from hetis_exec.driver import ExecutionResult, Executor, ExecutorInput
from hetis_exec.errors import ExecutorError, ReplayError
from hetis_exec.language.workload import Texts, TextSettings, texts_of
from hetis_exec.launch import Launch, check_place
from hetis_exec.models.architecture import ELEMENT_TYPES, Architecture, made_up, read_architecture
from hetis_exec.places import devices_of
from hetis_exec.replay import replay
from hetis_exec.throttle import Throttle, by_device, cores, described, have_cores, read_throttles
from hetis_sim.metrics import Summary, Trim, build_manifest, roles_of_plan, summarize, write_run
from hetis_sim.metrics.manifest import value_sha256
from hetis_sim.run import Prepared, prepare
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.errors import HetisError, SpecError
from hetis_sim.spec.parse import cluster_from_mapping
from traces import OpenWorkload

RECORD = "record.json"


@dataclass(frozen=True)
class Execution:
    """A checked combination, ready to run.

    Attributes:
        config: as the user gave it.
        prepared: what the control plane decides with.
        given: what is to be executed.
        launch: what the launcher of ranks has said, if there is one.
        texts: reads what is generated, where the workload has texts or these may end early.
    """

    config: ExecutionConfig
    prepared: Prepared
    given: ExecutorInput
    launch: Launch | None = None
    texts: Texts | None = None


@dataclass(frozen=True)
class Measured:
    """What a measured run gives back.

    Attributes:
        checked: decisions that the simulator has repeated, None if it was not asked to or has not.
        error: what has ended the run early or was wrong with it.
    """

    execution: Execution
    result: ExecutionResult
    summary: Summary
    checked: int | None
    error: ExecutorError | None = None


def prepare_execution(config: ExecutionConfig, launch: Launch | None = None) -> Execution:
    """Check a configuration; everything but the run itself.

    Raises:
        HetisError: the combination cannot run; the text says why.
    """
    try:
        from hetis_exec.devices import find_places, find_type
        from hetis_exec.models.sampling import Sampling
        from hetis_exec.torch_backend import TorchBackend
    except ModuleNotFoundError as error:
        raise HetisError(f"{error.name} is not installed: real models need the extra exec "
                         "(pip install 'hetis-sim[exec]')") from error
    if launch is not None:
        check_place(launch, cluster_from_mapping(config.cluster))
    settings = config.executor
    folder = None if config.model.path is None else Path(config.model.path).expanduser()
    architecture = _architecture(config, folder)
    here = None if launch is None else launch.ranks_here
    places = find_places(settings.devices, cluster_from_mapping(config.cluster), here)
    dtype = find_type(settings.dtype, places)
    prepared = prepare(config.for_control(ELEMENT_TYPES[dtype]))
    if not isinstance(prepared.workload, OpenWorkload):
        raise SpecError("workload.arrivals", config.workload.arrivals, "an open workload: arrivals in time")
    architecture = (made_up(prepared.model, ELEMENT_TYPES[dtype]) if architecture is None
                    else replace(architecture, spec=prepared.model))
    backend = TorchBackend(architecture, folder, settings.seed,
                           Sampling(settings.temperature, settings.top_p, settings.seed, settings.top_k),
                           threads=settings.threads, places=places, dtype=dtype,
                           cuda_graphs=settings.cuda_graphs, warm=settings.warm_up)
    wishes = TextSettings(settings.max_tokens, settings.ignore_eos, settings.chat)
    requests, prompts, texts = texts_of(prepared.workload, folder, wishes, prepared.model.vocab)
    devices = devices_of(prepared.plan)
    given = ExecutorInput(prepared.cluster, prepared.model, prepared.cost, prepared.policy, prepared.plan,
                          requests, prepared.settings, settings.seed, settings.timeout_s,
                          log_decisions=settings.check or settings.record or config.sim.log_decisions,
                          debug=config.sim.debug, backend=backend,
                          here=here, prompts=prompts, throttles=_throttles(config, launch, prepared.cluster),
                          cores=cores(settings.pin, devices, sorted(os.sched_getaffinity(0))))
    return Execution(config, prepared, given, launch, texts)


def _throttles(config: ExecutionConfig, launch: Launch | None, cluster: ClusterSpec) -> dict[int, Throttle]:
    """By device; of workers with a core each where every device of the cluster has one, whatever the plan."""
    settings = config.executor
    found = by_device(read_throttles(settings.throttle, cluster), cluster)
    devices = [device.device_id for device in cluster.devices]
    given = cores(settings.pin, devices, sorted(os.sched_getaffinity(0)))
    if workers_of(config, launch) != "processes" or not have_cores(len(devices), given.values()):
        return found
    return {device: throttle.with_core for device, throttle in found.items()}


def _architecture(config: ExecutionConfig, folder: Path | None) -> Architecture | None:
    """That of the model folder; a bad one is refused before anything else is looked at."""
    if folder is None:
        return None
    if not (folder / "config.json").is_file():
        raise SpecError("model.path", str(folder), "a folder with config.json and safetensors")
    return read_architecture(folder, context_limit_tokens=config.model.context_limit_tokens)


def execute(execution: Execution, progress: Callable[[int], None] | None = None) -> Measured:
    """Run a checked combination.

    A run that a worker's failure has ended early gives back what had finished by then, with its error;
    so does one in which the simulator decides otherwise.

    Raises:
        HetisError: the combination cannot run.
    """
    make_crew = crew_maker(execution.config, execution.given, execution.launch)
    executor = Executor(execution.given, make_crew, progress, execution.texts)
    try:
        result = executor.run()
    except ExecutorError as error:
        if error.result is None:
            raise
        return _measured(execution, error.result, None, error)
    if not execution.config.executor.check:
        return _measured(execution, result, None)
    try:
        replay(execution.given, result.record)
    except ReplayError as error:
        return _measured(execution, result, None, error)
    return _measured(execution, result, len(result.record.decisions))


def _measured(execution: Execution, result: ExecutionResult, checked: int | None,
              error: ExecutorError | None = None) -> Measured:
    config, prepared = execution.config, execution.prepared
    roles = roles_of_plan(prepared.plan.to_dict(), len(prepared.cluster.devices))
    summary = summarize(result.recorder, slo=config.slo.slo(), roles=roles, label="measured",
                        trim=Trim(config.sim.warmup_fraction, config.sim.drop_tail_fraction))
    return Measured(execution, result, summary, checked, error)


def write_measured(measured: Measured, path: Path) -> Path:
    """Write the run folder, with the files of a simulated run."""
    execution, config = measured.execution, measured.execution.config
    prepared, about = execution.prepared, execution.prepared.workload.describe()
    plan = prepared.plan.to_dict()
    manifest = build_manifest(
        label="measured", seeds={"workload": config.workload.seed, "executor": config.executor.seed},
        hashes={"workload": about["sha256"], "config": value_sha256(asdict(config)),
                "plan": value_sha256(plan.get("mesh") or plan["instances"])},
        extra={"workload": dict(about), "executor": {
            "torch": metadata.version("torch"), "cores": os.cpu_count(),
            "throttle": described(read_throttles(config.executor.throttle, prepared.cluster)),
            "pin": config.executor.pin,
            "checked_decisions": measured.checked,
            "error": None if measured.error is None else str(measured.error)}})
    folder = write_run(path, recorder=measured.result.recorder, summary=measured.summary, manifest=manifest,
                       plan=plan, config=asdict(config),
                       decisions=measured.result.record.decisions if config.sim.log_decisions else None)
    if execution.texts is not None:
        execution.texts.write(folder)
    if config.executor.record:
        measured.result.record.write(folder / RECORD)
    return folder
