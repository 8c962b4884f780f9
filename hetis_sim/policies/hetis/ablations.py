"""Hetis with one decision taken away each, under names of their own.

An ablation is Hetis with other defaults; the settings that make it what its name says are fixed, all others
can be changed. Which decisions are ablated is the paper's evaluation (LIFO) and ours (the others).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hetis_sim.policies.hetis.policy import HetisPolicy
from hetis_sim.policies.hetis.settings import HetisSettings
from hetis_sim.spec.errors import require


@dataclass(frozen=True)
class AblationSettings(HetisSettings):
    """Settings of which those named in ``fixed`` keep their defaults."""

    fixed: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in self.fixed:
            value, only = getattr(self, key), getattr(type(self), key)
            require(value == only, f"policy.{key}", value, f"{only}, which is what the ablation stands for")


@dataclass(frozen=True)
class StaticSettings(AblationSettings):
    """Heads stay where the same split for all requests puts them."""

    fixed: ClassVar[tuple[str, ...]] = ("dispatch", "redispatch")
    dispatch: str = "static"
    redispatch: bool = False


class HetisStaticPolicy(HetisPolicy):
    """Hetis with static heads: every request gets one split, by cache, and keeps it.

    Against ``hetis-no-redispatch`` it shows what choosing heads request by request brings.
    """

    name: ClassVar[str] = "hetis-static"
    settings_type: ClassVar[type] = StaticSettings


@dataclass(frozen=True)
class GreedySettings(AblationSettings):
    """Requests are placed one after the other, however many arrive together."""

    fixed: ClassVar[tuple[str, ...]] = ("dispatch",)
    dispatch: str = "greedy"


class HetisGreedyPolicy(HetisPolicy):
    """Hetis that never solves the linear program."""

    name: ClassVar[str] = "hetis-greedy"
    settings_type: ClassVar[type] = GreedySettings


@dataclass(frozen=True)
class NoRedispatchSettings(AblationSettings):
    """Heads of running requests stay where they are."""

    fixed: ClassVar[tuple[str, ...]] = ("redispatch",)
    redispatch: bool = False


class HetisNoRedispatchPolicy(HetisPolicy):
    """Hetis without its second time-scale: neither trigger moves heads; a full device preempts."""

    name: ClassVar[str] = "hetis-no-redispatch"
    settings_type: ClassVar[type] = NoRedispatchSettings


@dataclass(frozen=True)
class LifoSettings(AblationSettings):
    """The latest arrival leaves a full device."""

    fixed: ClassVar[tuple[str, ...]] = ("eviction",)
    eviction: str = "lifo"


class HetisLifoPolicy(HetisPolicy):
    """Hetis that takes the latest arrival off a full device, not the request with the largest benefit."""

    name: ClassVar[str] = "hetis-lifo"
    settings_type: ClassVar[type] = LifoSettings


@dataclass(frozen=True)
class Delta0Settings(AblationSettings):
    """A type of GPU does dense work if that improves the cost at all."""

    fixed: ClassVar[tuple[str, ...]] = ("delta",)
    delta: float = 0.0


class HetisDelta0Policy(HetisPolicy):
    """Hetis without the margin of its exclusion rule."""

    name: ClassVar[str] = "hetis-delta0"
    settings_type: ClassVar[type] = Delta0Settings
