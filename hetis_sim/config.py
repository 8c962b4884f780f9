"""The configuration of a run: one tree of typed settings, filled by Hydra or by Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.cost.host import HostOverhead
from hetis_sim.policies.base import EngineLimits
from hetis_sim.policies.registry import policy_names, settings_class
from hetis_sim.spec.errors import HetisError, SpecError, require
from hetis_sim.spec.lookup import require_known_keys
from hetis_sim.spec.parse import ClusterConfig, ModelConfig
from hetis_sim.spec.slo import Slo
from hetis_sim.study.config import StudyConfig
from traces.config import WorkloadConfig

PROFILE = "profile"
"""Shorthand of ``cost.profiles``, which takes a single path as well."""

SHORTHANDS = {"rate": "workload.rate", "requests": "workload.requests", "seed": "workload.seed",
              "policies": "study.policies", "seeds": "study.seeds"}
"""Keys that may be written without their group."""

DEFAULT_POLICY = "hetis"
"""The one in the main configurations of ``conf/``."""

OUTPUTS = ("table", "markdown", "json", "none")


@dataclass
class SchedulerConfig:
    """Settings of the engine; see :class:`SchedulerSettings` and :class:`EngineLimits`."""

    block_tokens: int = 16
    max_batch_requests: int = 256
    max_batch_tokens: int = 4096
    memory_utilization: float = 0.9
    chunked_prefill: bool = False
    chunk_tokens: int = 512
    collapse: bool = True
    rebalance_interval: int = 32
    preemptions_max: int = 100
    moves_max: int = 1
    cache_tokens: int = 0
    joint_attention: bool = False
    async_scheduling: bool = False
    prompt_patience: int = 0
    mesh_message_s: float = 0.0
    mesh_poll_s: float = 0.0
    prompt_pause_share: float = 0.5

    def settings(self) -> SchedulerSettings:
        """The checked settings."""
        limits = EngineLimits(self.block_tokens, self.max_batch_requests, self.max_batch_tokens,
                              self.memory_utilization, self.cache_tokens)
        return SchedulerSettings(limits, self.chunked_prefill, self.chunk_tokens, self.collapse,
                                 self.rebalance_interval, self.preemptions_max, self.moves_max,
                                 self.joint_attention, self.async_scheduling, self.prompt_patience,
                                 self.mesh_message_s, self.mesh_poll_s, self.prompt_pause_share)


@dataclass
class CostConfig:
    """Where durations come from.

    Attributes:
        kind: ``profile`` (measured where there are measurements) or ``roofline`` (datasheets).
        profiles: further profile files, folders of them, or calibrations that come with the package by
            name, which go before the shipped ones.
        host_base_s, host_per_sequence_s: host time of one iteration; an assumption of ours, which a profile
            with measured host time replaces.
        host_prompt_step_s, host_per_prompt_s: what an iteration with prompts takes more, and each of them.
        host_launch_s_per_layer: host time to queue the kernels of a layer, which runs ahead of the devices;
            0 with CUDA graphs.
        host_overlap: the host schedules an iteration while the one before it computes.
        cache_copies: times that an engine whose cache is not paged copies all of it in an iteration.
        cache_copy_bytes_per_s: bytes that a card reads and writes in a second while it does so; 0 for the
            rate of decode attention.
        policy_error: every coefficient that policies plan and dispatch by is wrong by this share, up or
            down at random, while durations stay what they are; see :class:`MisjudgedCost`.
        policy_error_seed: of the directions.
        policy_error_modules: whose coefficients are wrong: some of ``attention``, ``transfer``, ``dense``,
            ``prefill`` and ``collectives``, or ``all``.
    """

    kind: str = "profile"
    profiles: list[str] = field(default_factory=list)
    host_base_s: float = 2e-3
    host_per_sequence_s: float = 2e-5
    host_prompt_step_s: float = 0.0
    host_per_prompt_s: float = 0.0
    host_launch_s_per_layer: float = 0.0
    host_overlap: bool = False
    cache_copies: float = 0.0
    cache_copy_bytes_per_s: float = 0.0
    policy_error: float = 0.0
    policy_error_seed: int = 0
    policy_error_modules: list[str] = field(default_factory=lambda: ["all"])

    def host(self) -> HostOverhead:
        """The checked host time."""
        return HostOverhead(self.host_base_s, self.host_per_sequence_s, self.host_launch_s_per_layer,
                            self.host_overlap, prompt_step_s=self.host_prompt_step_s,
                            per_prompt_s=self.host_per_prompt_s)


@dataclass
class SloConfig:
    """Limits for goodput; see :class:`Slo`."""

    ttft_s: float = 5.0
    tpot_s: float = 0.2

    def slo(self) -> Slo:
        """The checked limits."""
        return Slo(self.ttft_s, self.tpot_s)


@dataclass
class SimConfig:
    """Settings of the simulation itself.

    Attributes:
        event_budget: events after which a run is given up; null derives it from the workload.
        debug: check the invariants after every event.
        log_decisions: write ``decisions.jsonl``.
        timeline: write ``timeline.json`` for Perfetto.
        warmup_fraction, drop_tail_fraction: shares of the requests left out of the figures.
    """

    event_budget: int | None = None
    debug: bool = False
    log_decisions: bool = False
    timeline: bool = False
    warmup_fraction: float = 0.0
    drop_tail_fraction: float = 0.0

    def __post_init__(self) -> None:
        require(self.event_budget is None or self.event_budget >= 1, "sim.event_budget", self.event_budget,
                "null or >= 1")


@dataclass
class RunConfig:
    """Everything that decides a run.

    Attributes:
        policy: ``name`` and the settings of that policy.
        output: what goes to standard output: a table, markdown, one JSON line, or nothing.
        progress: show progress on standard error, if that is a terminal.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    policy: dict[str, Any] = field(default_factory=lambda: {"name": "hetis"})
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    sim: SimConfig = field(default_factory=SimConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    output: str = "table"
    progress: bool = True

    def __post_init__(self) -> None:
        require(self.output in OUTPUTS, "output", self.output, f"one of {', '.join(OUTPUTS)}")


def register(name: str = "run_schema", schema: type[RunConfig] = RunConfig) -> None:
    """Make a schema known to Hydra."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=name, node=schema)


def normalise(overrides: Sequence[str]) -> list[str]:
    """Accept ``+policy=x`` for a group that has a default, and the shorthands."""
    fixed: list[str] = []
    for text in overrides:
        key, sign, value = text.partition("=")
        if sign and key.lstrip("+") in ("model", "cluster", "policy", "workload"):
            key = key.lstrip("+")
        if key == PROFILE and sign:
            key, value = "cost.profiles", value if value.startswith("[") else f"[{_quoted(value)}]"
        fixed.append(SHORTHANDS.get(key, key) + sign + value)
    return fixed


def _quoted(path: str) -> str:
    """A path as one element of a list in Hydra's grammar."""
    if not path or path[0] in "'\"":
        return path
    return "'" + path.replace("\\", "\\\\").replace("'", "\\'") + "'"


def check_keys(overrides: Sequence[str], schema: type[RunConfig] = RunConfig) -> None:
    """Refuse unknown keys with the known ones, before Hydra does so without.

    Raises:
        SpecError: a key that the configuration does not have.
    """
    for text in overrides:
        path, sign, value = text.partition("=")
        names = path.lstrip("+~").split("@")[0].replace("/", ".").split(".")
        if sign and not path.startswith("-") and names[0] != "hydra":
            _check_path(names, value, schema)
            if names[0] == "policy" and len(names) > 1:
                _check_setting(names[1], value, overrides)


def _check_setting(name: str, value: str, overrides: Sequence[str]) -> None:
    """Refuse a setting that the policy, or every policy of a sweep, does not have."""
    chosen = [text.partition("=")[2] for text in overrides if text.partition("=")[0] == "policy"]
    policies = chosen[-1].split(",") if chosen else [DEFAULT_POLICY]
    # Other folders of configurations may have policies by names of their own.
    if set(policies) <= set(policy_names()):
        known = {field.name for policy in policies for field in fields(settings_class(policy))}
        require_known_keys("policy", {name: value}, sorted({"name", *known}))


def _check_path(names: Sequence[str], value: str, kind: Any) -> None:
    for depth, name in enumerate(names):
        if not is_dataclass(kind):
            return
        known = {item.name: item for item in fields(kind)}
        if name not in known:
            near = get_close_matches(name, known, 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise SpecError(".".join(names[:depth + 1]), value, f"one of the keys {', '.join(known)}{hint}")
        kind = get_type_hints(kind)[name]


def compose(*overrides: str, main: str = "config", schema: type[RunConfig] = RunConfig) -> RunConfig:
    """The configuration that the command line would make of the same words.

    Args:
        main: the main configuration in ``conf/``.
        schema: its type, registered by the caller if it is not the simulator's.

    Raises:
        HetisError: an unknown key, group or value.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    register()
    check_keys(normalise(overrides), schema)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(version_base="1.3", config_module="conf"):
            return typed(hydra_compose(main, overrides=normalise(overrides)))
    except HydraException as error:
        raise HetisError(_in_words(error)) from error


def _in_words(error: BaseException) -> str:
    """What Hydra says of an override, with what its cause says of the value, without where it looked."""
    text = str(error).partition("\nConfig search path")[0].partition("\n    full_key")[0].strip()
    return text if error.__cause__ is None else f"{text}: {_in_words(error.__cause__)}"


def typed(config: DictConfig) -> RunConfig:
    """A composed configuration as checked dataclasses.

    Raises:
        SpecError: a value that is not allowed.
    """
    try:
        made = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, SpecError):
            raise error.__cause__ from None
        raise HetisError(str(error).splitlines()[0]) from error
    assert isinstance(made, RunConfig)
    return made
