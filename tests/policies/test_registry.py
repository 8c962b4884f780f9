"""Policies by name."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from hetis_sim.config import check_keys, compose
from hetis_sim.policies import registry
from hetis_sim.policies.base import PlanningProblem, Policy
from hetis_sim.policies.plan import Plan
from hetis_sim.policies.registry import NoSettings, make_policy, policy_class, policy_names, settings_class
from hetis_sim.spec.errors import HetisError, SpecError


@dataclass(frozen=True)
class OtherSettings:
    depth: int = 3


class OtherPolicy(Policy):
    """A policy of another package."""

    name = "other"
    settings_type = OtherSettings

    def __init__(self, settings: OtherSettings) -> None:
        self.settings = settings

    def plan(self, problem: PlanningProblem) -> Plan:
        raise AssertionError("never planned here")


class PlainPolicy(OtherPolicy):
    """A policy without settings."""

    settings_type = NoSettings

    def __init__(self) -> None:
        super().__init__(OtherSettings())


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package with three entry points, of which one is broken and one is no policy."""
    module = ModuleType("other_package")
    module.OtherPolicy, module.PlainPolicy, module.thing = OtherPolicy, PlainPolicy, 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "other_package", module)
    values = {"other": "OtherPolicy", "plain": "PlainPolicy", "broken": "Missing", "thing": "thing",
              "hetis": "thing"}
    points = [EntryPoint(name, f"other_package:{value}", "hetis.policies") for name, value in values.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "hetis.policies" else [])


@pytest.mark.parametrize("name", sorted(registry.BUILTIN))
def test_every_policy_of_the_table_loads_and_has_its_name(name: str) -> None:
    """The table and the classes agree."""
    assert policy_class(name).name == name
    assert make_policy(name).name == name


@pytest.mark.parametrize("name", sorted(registry.BUILTIN))
def test_configuration_files_hold_the_defaults(name: str) -> None:
    """conf/policy has every setting with its default, and none besides."""
    settings = settings_class(name)()
    defaults = {field.name: getattr(settings, field.name) for field in fields(settings)}
    written = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    assert compose(f"policy={name}").policy == {"name": name} | written


def test_an_unknown_name_is_refused_with_the_near_ones() -> None:
    """As a user would mistype it."""
    with pytest.raises(SpecError, match=r"policy\.name='hettis' .*did you mean hetis"):
        make_policy({"name": "hettis"})
    with pytest.raises(SpecError, match=r"policy\.name=None .*one of distserve, helix, hetis"):
        make_policy({"delta": 0.1})


def test_an_unknown_setting_is_refused_with_the_near_ones() -> None:
    """The text names the key."""
    with pytest.raises(SpecError, match=r"policy\.detla=0\.1 .*did you mean delta"):
        make_policy({"name": "hetis", "detla": 0.1})


@pytest.mark.parametrize(("words", "text"), [
    (("policy.detla=0.1",), r"policy\.detla='0\.1' .*did you mean delta"),
    (("policy=vllm", "policy.delta=0.1"), r"policy\.delta='0\.1' .*preemption"),
    (("+policy=splitwise", "+policy.mixings=false"), r"policy\.mixings='false' .*did you mean mixing")])
def test_an_unknown_setting_is_refused_before_hydra_does(words: tuple[str, ...], text: str) -> None:
    """With the settings of the policy that is chosen, whichever it is."""
    with pytest.raises(SpecError, match=text):
        compose(*words)


def test_a_setting_of_some_policy_of_a_sweep_is_let_through() -> None:
    """Its jobs are composed one by one."""
    check_keys(["policy=hetis,vllm", "policy.delta=0.1"])
    with pytest.raises(SpecError, match=r"policy\.epsilon"):
        check_keys(["policy=hetis,vllm", "policy.epsilon=0.1"])
    check_keys(["policy=mine", "policy.anything=1"])


@pytest.mark.parametrize(("key", "value"), [
    ("delta", -0.1), ("delta", float("nan")), ("theta", float("inf")), ("reserve_fraction", 1.5),
    ("reserve_fraction", True), ("lp_min_requests", 0), ("lp_min_requests", 2.5), ("dispatch", "milp"),
    ("eviction", "fifo"), ("preemption", "drop"), ("redispatch", "yes"), ("min_benefit", -1),
    ("relief_blocks", 0), ("ideal_pipeline", 1),
])
def test_values_out_of_range_are_refused_by_name(key: str, value: object) -> None:
    """The error names key and value and what is allowed."""
    with pytest.raises(SpecError, match=rf"policy\.{key}=.* is not allowed: must be"):
        make_policy({"name": "hetis", key: value})


def test_settings_reach_the_policy() -> None:
    """A mapping of name and settings, as the configuration has it."""
    policy = make_policy({"name": "hetis", "theta": 0.25, "preemption": "swap"})
    assert policy.settings.theta == 0.25  # type: ignore[attr-defined]
    assert policy.preemption == "swap"


@pytest.mark.usefixtures("plugins")
def test_other_packages_plug_in() -> None:
    """Their policies are listed, take settings, and cannot take the name of a policy that is here."""
    assert policy_names() == sorted([*registry.BUILTIN, "broken", "other", "plain", "thing"])
    assert make_policy({"name": "other", "depth": 5}).settings.depth == 5  # type: ignore[attr-defined]
    assert make_policy("plain").name == "other"
    assert policy_class("hetis").__module__ == "hetis_sim.policies.hetis.policy"
    with pytest.raises(SpecError, match=r"policy\.dept=1"):
        make_policy({"name": "other", "dept": 1})


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(("name", "text"), [("broken", "does not load"), ("thing", "no subclass of")])
def test_a_bad_plug_in_is_named(name: str, text: str) -> None:
    """With its entry point."""
    with pytest.raises(HetisError, match=rf"policy '{name}' \(other_package:\w+\) .*{text}"):
        make_policy(name)


def test_a_configuration_cannot_name_code() -> None:
    """A dotted path is just an unknown name."""
    with pytest.raises(SpecError):
        make_policy({"name": "hetis_sim.policies.hetis.policy:HetisPolicy"})
    with pytest.raises(SpecError):
        make_policy({"name": "hetis", "_target_": "os.system"})
