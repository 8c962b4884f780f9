"""The evaluation's jobs: which there are, and what they depend on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from analysis.paper.scale import (
    COMMON_SHARE,
    HETIS,
    TPOT_S,
    TTFT_OTHER_S,
    TTFT_S,
    Scale,
)
from analysis.paper.store import Answer, Job, Store

Cell = tuple[str, str]
Settings = Mapping[str, Any]

STRICT = "splitwise, kinds apart"
STRICT_SETTINGS: Settings = {"name": "splitwise", "share_kinds": False, "high_end_bias": 1000.0,
                             "queue_tokens": 1 << 30}
"""Splitwise as Hetis' evaluation describes it: prompts on the high end, decoding on the low end, whatever
queues there are."""


@dataclass(frozen=True)
class Variant:
    """A policy, its settings, and other words of the configuration, under one name.

    ``keeps_plan``: it is given the plan that the policy makes without these words.
    """

    name: str
    policy: Settings
    words: tuple[str, ...] = ()
    keeps_plan: bool = False


class Evaluation:
    """Asks the store for figures; every question is remembered there."""

    def __init__(self, scale: Scale, store: Store, policies: Sequence[str] | None = None) -> None:
        self.scale = scale
        self.store = store
        self.policies = list(policies or scale.run_policies)
        strict = [STRICT] if "splitwise" in self.policies else []
        order = [name for name in self.policies if name in scale.main]
        rest = [name for name in self.policies if name not in scale.main]
        self.variants = {name: policy_variant(name) for name in [*order, *strict, *rest]}
        self.seeds = list(range(scale.seeds))

    def cells_of(self, name: str) -> list[Cell]:
        """The cells in which a policy is run: systems beside the paper's baselines in those of one model."""
        model = self.scale.focus[0]
        everywhere = name in (*self.scale.main, STRICT)
        return [cell for cell in self.scale.cells if everywhere or cell[0] == model]

    # -- capacities ------------------------------------------------------------------------

    def words(self, cell: Cell, *more: str) -> list[str]:
        """The configuration of a cell, before the policy."""
        scale, (model, workload) = self.scale, cell
        return [f"cluster={scale.cluster}", f"model={model}", f"workload={workload}",
                f"slo.ttft_s={TTFT_S.get(workload, TTFT_OTHER_S)}", f"slo.tpot_s={TPOT_S}",
                f"study.seeds={scale.seeds}", f"study.tolerance={scale.tolerance}",
                f"study.requests_max={scale.requests_max}", "study.workers=1", *more]

    def capacities(self, what: str, asked: Sequence[tuple[Cell, Variant]]) -> list[Answer]:
        """Capacity of each variant in its cell; where there is no bound, why there is none."""
        configurations = [self.words(cell, *variant.words) for cell, variant in asked]
        bounds = self.store.answers(f"{what}: bounds", [
            Job("serving.bound", {"words": words}) for words in configurations])
        lengths = self.lengths(list(dict.fromkeys(cell for cell, _ in asked)))
        jobs = {i: Job("serving.capacity", {"words": words, "policy": dict(variant.policy),
                                            "bound": bound.value, "requests": lengths[cell]})
                for i, (words, bound, (cell, variant)) in enumerate(
                    zip(configurations, bounds, asked, strict=True)) if not bound.error}
        found = dict(zip(jobs, self.store.answers(what, list(jobs.values())), strict=True))
        return [found.get(i, bounds[i]) for i in range(len(asked))]

    def lengths(self, cells: Sequence[Cell]) -> dict[Cell, int]:
        """Requests of each run of a search in a cell: the same for all policies, what the main ones need."""
        bounds = self.store.answers("bounds", [Job("serving.bound", {"words": self.words(cell)})
                                               for cell in cells])
        asked = [(cell, Job("serving.run_length", {
            "words": self.words(cell), "policy": dict(self.variants[name].policy), "bound": bound.value,
            "sojourns": self.scale.sojourns}))
            for cell, bound in zip(cells, bounds, strict=True) if not bound.error for name in self.scale.main]
        found = dict.fromkeys(cells, 0)
        answers = self.store.answers("run lengths", [job for _, job in asked])
        for (cell, _), answer in zip(asked, answers, strict=True):
            found[cell] = max(found[cell], answer.value or 0)
        return {cell: number or self.scale.requests_max for cell, number in found.items()}

    def bound(self, cell: Cell) -> Answer:
        """No policy serves more in a cell."""
        return self.store.answers("bounds", [Job("serving.bound", {"words": self.words(cell)})])[0]

    def serving(self) -> dict[tuple[Cell, str], Answer]:
        """Capacity of every policy in its cells."""
        # Large models first: a run that is cut off has the cells of the sweeps then.
        asked = [(cell, name) for cell in reversed(self.scale.cells) for name in self.variants
                 if cell in self.cells_of(name)]
        answers = self.capacities("capacity", [(cell, self.variants[name]) for cell, name in asked])
        return dict(zip(asked, answers, strict=True))

    def capacity_rps(self, cell: Cell, name: str = HETIS) -> float | None:
        """Mean capacity of a policy in a cell, or its throughput where it holds the SLO at no load."""
        answer = self.capacities("capacity", [(cell, self.variants[name])])[0]
        if answer.error:
            return None
        return fmean(answer.value["slo"]) or fmean(answer.value["overload"])

    # -- given rates -----------------------------------------------------------------------

    def common_rate(self, cell: Cell) -> float | None:
        """A rate at which neither Hetis nor a baseline of the paper is saturated."""
        found = [self.capacity_rps(cell, name) for name in self.scale.main]
        known = [rate for rate in found if rate]
        return COMMON_SHARE * min(known) if known else None

    def latency_job(self, cell: Cell, variant: Variant, plan_rate: float, rates: Sequence[float],
                    seeds: Sequence[int] | None = None) -> Job:
        """Runs of a variant at given rates, with a plan made for one."""
        return Job("serving.latency", {
            "words": self.words(cell, *variant.words), "policy": dict(variant.policy), "plan_rate": plan_rate,
            "rates": list(rates), "seeds": list(seeds or self.seeds), "requests": self.scale.requests,
            **({"plan_words": self.words(cell)} if variant.keeps_plan else {})})

    def latencies(self) -> dict[tuple[Cell, str], Answer]:
        """Runs of every policy at the common rate of each cell; cells without one are left out."""
        rates = {cell: self.common_rate(cell) for cell in self.scale.cells}
        asked = [(cell, name) for cell in self.scale.cells if rates[cell] for name in self.variants
                 if cell in self.cells_of(name)]
        jobs = [self.latency_job(cell, self.variants[name], rates[cell] or 0.0, [rates[cell] or 0.0])
                for cell, name in asked]
        return dict(zip(asked, self.store.answers("latency", jobs), strict=True))


def policy_variant(name: str) -> Variant:
    """A policy by its registered name, or the restricted Splitwise."""
    return Variant(name, STRICT_SETTINGS if name == STRICT else {"name": name})


def hetis(name: str, *words: str, **settings: Any) -> Variant:
    """Hetis with other settings."""
    return Variant(name, {"name": HETIS, **settings}, words)


def seed_values(runs: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """One figure of several runs; nan where there is none."""
    return [float("nan") if run[key] is None else float(run[key]) for run in runs]
