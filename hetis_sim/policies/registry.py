"""Policies by name. A configuration names a policy; it cannot name Python code.

Other packages plug in through an entry point of the group ``hetis.policies``: its name is the
policy's name, its object a subclass of :class:`Policy`. A policy with settings has a class
attribute ``settings_type``, a dataclass that checks its own values, and takes an instance of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from hetis_sim.policies.base import Policy
from hetis_sim.spec.errors import HetisError, SpecError
from hetis_sim.spec.lookup import find, near_matches, require_known_keys, require_mapping

ENTRY_POINT_GROUP = "hetis.policies"

BUILTIN: Mapping[str, str] = {
    "distserve": "hetis_sim.policies.distserve:DistServePolicy",
    "helix": "hetis_sim.policies.helix.policy:HelixPolicy",
    "hetis": "hetis_sim.policies.hetis.policy:HetisPolicy",
    "hetis-delta0": "hetis_sim.policies.hetis.ablations:HetisDelta0Policy",
    "hetis-greedy": "hetis_sim.policies.hetis.ablations:HetisGreedyPolicy",
    "hetis-lifo": "hetis_sim.policies.hetis.ablations:HetisLifoPolicy",
    "hetis-no-redispatch": "hetis_sim.policies.hetis.ablations:HetisNoRedispatchPolicy",
    "hetis-static": "hetis_sim.policies.hetis.ablations:HetisStaticPolicy",
    "hexgen": "hetis_sim.policies.hexgen:HexGenPolicy",
    "infinite": "hetis_sim.policies.infinite:InfinitePolicy",
    "lamina": "hetis_sim.policies.lamina:LaminaPolicy",
    "splitwise": "hetis_sim.policies.splitwise:SplitwisePolicy",
    "vllm": "hetis_sim.policies.vllm:VllmPolicy",
    "vllm_all": "hetis_sim.policies.vllm_all:VllmAllPolicy",
}
"""Where each policy of this package lives; imported only when it is asked for."""


@dataclass(frozen=True)
class NoSettings:
    """The settings of a policy that has none."""


def policy_names() -> list[str]:
    """Names of all policies, those of other packages included, in order."""
    return sorted({*BUILTIN, *_plugins()})


def policy_class(name: object) -> type[Policy]:
    """The class of a policy.

    Raises:
        SpecError: no such policy; the text holds the near matches.
        HetisError: an entry point that does not load, or is no policy.
    """
    plugins = _plugins()
    known: dict[str, EntryPoint | str] = {**plugins, **BUILTIN}
    found = find("policy.name", name, known)
    if isinstance(found, EntryPoint):
        return _load_plugin(found)
    module, _, attribute = found.partition(":")
    loaded: type[Policy] = getattr(import_module(module), attribute)
    return loaded


def settings_class(name: object) -> type[Any]:
    """The dataclass of a policy's settings.

    Raises:
        SpecError, HetisError: as :func:`policy_class`.
    """
    settings: type[Any] = getattr(policy_class(name), "settings_type", NoSettings)
    return settings


def make_policy(config: Mapping[str, Any] | str) -> Policy:
    """A policy from its name, or from a mapping of ``name`` and its settings.

    Raises:
        SpecError: an unknown policy, an unknown setting, or a value that is not allowed.
        HetisError: as :func:`policy_class`.
    """
    config = {"name": config} if isinstance(config, str) else require_mapping("policy", config)
    if "name" not in config:
        raise SpecError("policy.name", None, near_matches("", policy_names()))
    chosen, settings_type = policy_class(config["name"]), settings_class(config["name"])
    given = {str(key): value for key, value in config.items() if key != "name"}
    require_known_keys("policy", given, [field.name for field in dataclasses.fields(settings_type)])
    settings = settings_type(**given)
    return chosen() if settings_type is NoSettings else chosen(settings)  # type: ignore[call-arg]


def _plugins() -> dict[str, EntryPoint]:
    """Entry points of other packages; names of this package's policies cannot be taken over."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in BUILTIN}


def _load_plugin(point: EntryPoint) -> type[Policy]:
    try:
        loaded = point.load()
    except (ImportError, AttributeError) as error:
        raise HetisError(f"policy {point.name!r} ({point.value}) does not load: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Policy)):
        raise HetisError(f"policy {point.name!r} ({point.value}) is no subclass of "
                         f"{Policy.__module__}.{Policy.__name__}")
    return loaded
