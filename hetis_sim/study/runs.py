"""One run of a study: a policy, planned once, under a load of one seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hetis_sim.config import RunConfig
from hetis_sim.metrics.manifest import value_sha256
from hetis_sim.policies.memory import cache_units, mesh_cache_units
from hetis_sim.policies.registry import policy_class, settings_class
from hetis_sim.run import Prepared, Result, prepare, run_prepared, write_result
from hetis_sim.spec.errors import SpecError, require
from hetis_sim.spec.lookup import require_mapping
from traces import OpenWorkload, build_workload

PLAN_REQUESTS = 5000
PLANS_KEPT = 16

_plans: dict[str, Prepared] = {}
_latest: dict[str, Prepared] = {}


@dataclass(frozen=True)
class Case:
    """A policy of a study: what it is called, and the configuration that names it."""

    label: str
    config: RunConfig


@dataclass(frozen=True)
class Load:
    """How many requests arrive, how fast, and the seed of their lengths and arrivals."""

    rate_rps: float
    requests: int | None
    seed: int


def cases_of(config: RunConfig, policies: Sequence[Any] | None = None) -> list[Case]:
    """A case for each policy; without any, for the policy of the configuration.

    Raises:
        SpecError: a policy named twice, or settings that it does not have.
    """
    if policies is None:
        return [Case(str(config.policy.get("name")), _studied(config, config.policy))]
    cases: list[Case] = []
    for entry in policies:
        given = {"name": entry} if isinstance(entry, str) else dict(require_mapping("study.policies", entry))
        if given == {"name": config.policy.get("name")}:
            given = dict(config.policy)
            label = str(given["name"])
        else:
            label = _label(given)
        require(label not in [case.label for case in cases], "study.policies", label, "named once")
        cases.append(Case(label, _studied(config, given)))
    return cases


def _label(policy: Mapping[str, Any]) -> str:
    """The policy's name with the settings that are given."""
    settings_class(policy.get("name"))
    settings = ", ".join(f"{key}={value}" for key, value in policy.items() if key != "name")
    return f"{policy['name']} ({settings})" if settings else str(policy["name"])


def _studied(config: RunConfig, policy: Mapping[str, Any]) -> RunConfig:
    """The configuration with a policy, measured as the study says."""
    study = config.study
    sim = replace(config.sim, warmup_fraction=study.warmup_fraction,
                  drop_tail_fraction=study.drop_tail_fraction)
    return replace(config, policy=dict(policy), sim=sim)


def require_open(config: RunConfig) -> None:
    """Studies set the rate of arrivals, so there must be one.

    Raises:
        SpecError: a closed loop, or a duration that would change the requests with the rate.
    """
    workload = config.workload
    if workload.arrivals == "closed":
        raise SpecError("workload.arrivals", workload.arrivals,
                        "poisson, gamma, constant, onoff or replay: a closed loop has no rate of its own")
    if workload.duration_s is not None:
        raise SpecError("workload.duration_s", workload.duration_s,
                        "null: the same requests arrive at every rate")


def seeds_of(config: RunConfig) -> list[int]:
    """The seeds; a single one where nothing in the workload is random."""
    workload = config.workload
    if workload.arrivals == "replay" or (workload.arrivals == "constant" and (
            (workload.path is not None and workload.order == "trace") or workload.table == "fixed")):
        return [workload.seed]
    return [workload.seed + n for n in range(config.study.seeds)]


def planned(config: RunConfig, rate_rps: float) -> Prepared:
    """A checked combination whose plan is searched for a rate; remembered.

    The plan goes by the mean lengths of many requests, so that it is the same for every seed. A policy
    that does not plan for the rate is asked once for all rates; combinations of one policy with one cluster,
    model and cost model, one after the other, share what has been worked out for them.

    Raises:
        HetisError: the combination cannot run.
    """
    config = replace(config, workload=_workload(config, Load(rate_rps, PLAN_REQUESTS, config.workload.seed)))
    key = _key(config)
    if key not in _plans:
        while len(_plans) >= PLANS_KEPT:
            _plans.pop(next(iter(_plans)))
        name = str(config.policy.get("name"))
        _plans[key] = _latest[name] = prepare(config, _latest.get(name))
    found = _plans[key]
    if found.config.workload == config.workload:
        return found
    workload = build_workload(config.workload, found.model.context_limit_tokens)
    assert isinstance(workload, OpenWorkload)
    return replace(found, config=config, workload=workload)


def _key(config: RunConfig) -> str:
    """Equal for configurations with equal plans."""
    decides = {item.name: getattr(config, item.name) for item in fields(config)
               if item.name not in ("study", "output", "progress")}
    if not policy_class(config.policy.get("name")).plans_for_rate:
        decides["workload"] = replace(config.workload, rate=1.0)
    return value_sha256(decides)


def _workload(config: RunConfig, load: Load) -> Any:
    """The workload's settings under a load; the rows of a trace are always those that were asked for."""
    workload = config.workload
    rows = workload.path is not None and workload.order == "trace"
    requests = workload.requests if rows or load.requests is None else load.requests
    return replace(workload, rate=load.rate_rps, requests=requests, seed=load.seed)


def under(prepared: Prepared, load: Load) -> Prepared:
    """The same plan under a load."""
    config = replace(prepared.config, workload=_workload(prepared.config, load))
    workload = build_workload(config.workload, prepared.model.context_limit_tokens)
    assert isinstance(workload, OpenWorkload)
    return replace(prepared, config=config, workload=workload)


def run_under(prepared: Prepared, load: Load) -> Result:
    """Run a plan under a load."""
    return run_prepared(under(prepared, load))


def keep(result: Result, folder: str | None, *names: str) -> None:
    """Write the run folder, if one is asked for."""
    if folder is not None:
        write_result(result, Path(folder).joinpath(*(name.replace("/", "_") for name in names)))


def in_flight(prepared: Prepared) -> int:
    """Requests of mean length that the plan's cache and batches hold at once."""
    about = prepared.workload.describe()
    context = about["prompt_tokens"]["mean"] + about["output_tokens"]["mean"] / 2
    limits, model = prepared.settings.limits, prepared.model
    total = 0.0
    for instance in prepared.plan.instances:
        units = sum(cache_units(prepared.cluster, model, limits, instance).values())
        tokens = units * limits.block_tokens / (model.layers * model.kv_heads)
        total += min(len(instance.stages) * limits.max_batch_requests, tokens / context)
    mesh = prepared.plan.mesh
    if mesh is not None:
        units = sum(mesh_cache_units(prepared.cluster, model, limits, mesh).values())
        total = units * limits.block_tokens / (model.layers * model.kv_heads) / context
    return max(1, int(total))


def instances_of(prepared: Prepared) -> tuple[str, ...]:
    """The instances of a plan in a few words each: ``both: 2 x a100-80gb (80 layers); attention 4 x t4``."""
    def count(devices: Sequence[int]) -> str:
        kinds: dict[str, int] = {}
        for device in devices:
            name = prepared.cluster.devices[device].gpu.name
            kinds[name] = kinds.get(name, 0) + 1
        return " + ".join(f"{number} x {name}" for name, number in kinds.items())

    words: list[str] = []
    for instance in prepared.plan.instances:
        stages = " -> ".join(f"{count(stage.devices)} ({stage.layers} layers)" for stage in instance.stages)
        workers = f"; attention {count(instance.attention_workers)}" if instance.attention_workers else ""
        words.append(f"{instance.role}: {stages}{workers}")
    mesh = prepared.plan.mesh
    if mesh is not None:
        words += [f"node: {count(node.devices)} (layers {node.first_layer} to {node.end_layer - 1})"
                  for node in mesh.nodes]
    return tuple(words)

