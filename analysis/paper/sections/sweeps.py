"""Sweeps of Hetis' own settings: Theta, Delta, wrong coefficients, eviction and redispatch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from analysis.figures.charts import Axis, DotChart, Dots, Line, Rule, XYChart
from analysis.paper.evaluation import Cell, Evaluation, Variant, hetis, seed_values
from analysis.paper.ratios import times
from analysis.paper.scale import HETIS, cell_name
from analysis.paper.section import Finding, Section, table
from analysis.paper.store import Answer, Job
from hetis_sim.study.estimate import Estimate, estimate, ratio

LOAD = 0.95
"""Rate of the sweeps, in units of Hetis' capacity at the SLO: attention workers are in use there."""
ERROR_LOAD = 0.8
OVER = 1.1
KEY = "normalised_s"


def runs(evaluation: Evaluation, what: str, asked: Sequence[tuple[Cell, Variant, float, float]],
          ) -> list[Answer]:
    """Runs of (cell, variant, rate, rate that the plan is made for)."""
    return evaluation.store.answers(what, [evaluation.latency_job(cell, variant, plan_rate, [rate])
                                           for cell, variant, rate, plan_rate in asked])


def paired(answer: Answer, base: Answer, key: str = KEY) -> Estimate:
    """One variant over another, paired by seed."""
    return ratio(seed_values(answer.value[0], key), seed_values(base.value[0], key))


def cells_of_models(evaluation: Evaluation) -> list[tuple[Cell, float]]:
    """A cell for each model, with Hetis' capacity there: that of the focus' workload, and LongBench."""
    workloads = dict.fromkeys([evaluation.scale.focus[1], "longbench"])
    cells = [(model, workload) for workload in workloads for model in evaluation.scale.models]
    found = [(cell, evaluation.capacity_rps(cell)) for cell in cells if cell in evaluation.scale.cells]
    return [(cell, rate) for cell, rate in found if rate]


def theta(evaluation: Evaluation) -> Section:
    """How far attention may be from the ideal before heads move."""
    scale, cells = evaluation.scale, cells_of_models(evaluation)
    variants = [*(hetis(f"{value:g}", theta=value) for value in scale.thetas),
                hetis("never", redispatch=False)]
    asked = [(cell, variant, LOAD * rate, rate) for cell, rate in cells for variant in variants]
    answers = runs(evaluation, "theta", asked)
    rows, lines = [], []
    worst: list[float] = []
    default = variants.index(min(variants[:-1], key=lambda v: abs(float(v.policy["theta"]) - 0.5)))
    for number, (cell, _) in enumerate(cells):
        mine = answers[number * len(variants):(number + 1) * len(variants)]
        if any(answer.error for answer in mine):
            rows.append([cell_name(*cell), next(a.error for a in mine if a.error)])
            continue
        against = [paired(answer, mine[default]) for answer in mine]
        worst += known(found.mean for found in against)
        for variant, answer, found in zip(variants, mine, against, strict=True):
            run = answer.value[0]
            rows.append([f"{cell_name(*cell)}, {variant.name}", times(found),
                         f"{fmean(seed_values(run, 'moves')):,.0f}",
                         f"{fmean(seed_values(run, 'moved_bytes')) / 1e9:,.1f}",
                         f"{fmean(seed_values(run, 'preemptions')):,.0f}"])
        lines.append(Line(cell_name(*cell), np.array(scale.thetas),
                          np.array([found.mean for found in against[:-1]]), number, markers=True))
    blocks: list[Any] = [
        f"At {100 * LOAD:g} % of Hetis' capacity in each cell: normalised latency over that with Theta = "
        f"{variants[default].name}, paired by seed; moves, gigabytes moved and preemptions of a run.",
        table(["cell, Theta", "latency", "moves", "GB moved", "preemptions"], rows)]
    if lines:
        blocks.append(XYChart(
            key="theta", title="Theta",
            caption="Normalised latency over Theta, in units of that at Theta = "
                    f"{variants[default].name}.",
            origin="simulated", x=Axis("Theta", low=0.0), y=Axis("latency, relative"), lines=lines))
    ours = "none" if not worst else (
        f"latency between {min(worst):.3f} and {max(worst):.3f} of that at {variants[default].name}, over "
        f"{len(worst)} settings and cells")
    return Section("theta", "Theta", blocks, [Finding("theta", ours, _theta_note(worst))])


def known(values: Iterable[float]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if not math.isnan(value)]


def _theta_note(worst: Sequence[float]) -> str:
    if worst and max(worst) - min(worst) < 0.05:
        return ("No value matters here: the dispatcher keeps attention close to the ideal, so that the "
                "first trigger rarely fires at any Theta.")
    return "The paper chooses 50 % between churn (smaller) and lasting imbalance (larger)."


def delta(evaluation: Evaluation) -> Section:
    """Which kinds of card do dense work, and what that is worth."""
    scale = evaluation.scale
    cells = [(cell, rate) for cell, rate in cells_of_models(evaluation) if cell[1] == scale.focus[1]]
    variants = [*(hetis(f"Delta {value:g}", delta=value) for value in scale.deltas),
                *(hetis(f"Delta {value:g}, ideal pipeline", delta=value, ideal_pipeline=True)
                  for value in (0.05,))]
    plans = evaluation.store.answers("delta: plans", [
        Job("serving.plan", {"words": evaluation.words(cell), "policy": dict(variant.policy), "rate": rate})
        for cell, rate in cells for variant in variants])
    asked = [(cell, variant) for cell, _ in cells for variant in variants]
    # Equal plans serve alike: each is run once, the default one as it was before.
    stand_ins = [_stand_in(number, asked, plans) for number in range(len(asked))]
    capacities = evaluation.capacities("delta", [(cell, stand_in) for (cell, _), stand_in
                                                 in zip(asked, stand_ins, strict=True)])
    rows = []
    roles = ""
    for number, (cell, variant) in enumerate(asked):
        plan, found = plans[number], capacities[number]
        if plan.error or found.error:
            rows.append([f"{cell_name(*cell)}, {variant.name}", plan.error or found.error])
            continue
        kinds = ", ".join(plan.value["primary"])
        rows.append([f"{cell_name(*cell)}, {variant.name}", kinds,
                     f"{plan.value['usable_tokens'] / 1e3:,.0f}",
                     *(estimate(found.value[key], 0.0).text() for key in ("slo", "sustained"))])
        if cell[0] == "llama2-70b" and variant.name == "Delta 0.05":
            roles = kinds
        if cell[0] == "llama2-70b" and "ideal" in variant.name:
            roles += f"; with an ideal pipeline {kinds}"
    blocks: list[Any] = [
        "Primary kinds of card, usable cache in thousands of tokens, capacity at the SLO and throughput "
        "without, requests/s. With an ideal pipeline the plan is made as if prefills held nobody up in it.",
        table(["cell, Delta", "primary", "cache", "at the SLO", "without"], rows)]
    findings = [Finding("delta", _delta_text(variants, cells, capacities),
                        "A larger Delta leaves more cards to attention only; plans, not durations, depend "
                        "on it.")]
    if roles:
        findings.append(Finding("roles", roles,
                                "See [design](design.md#where-the-placement-differs-from-the-paper): our "
                                "cost counts the bubbles that prefills leave in a pipeline, through which "
                                "alone the RTX 3090s could join; the table above has what either plan "
                                "serves."))
    return Section("delta", "Delta and roles", blocks, findings)


def _stand_in(number: int, asked: Sequence[tuple[Cell, Variant]], plans: Sequence[Answer]) -> Variant:
    """The first variant of the cell with the same plan; the policy as it comes if that is one of them."""
    cell, variant = asked[number]
    mine = [other for (at, other), plan in zip(asked, plans, strict=True)
            if at == cell and plan.value == plans[number].value]
    plain = [other for other in mine if other.policy == {"name": HETIS, "delta": 0.05}]
    return Variant(HETIS, {"name": HETIS}) if plain else mine[0] if mine else variant


def _delta_text(variants: Sequence[Variant], cells: Sequence[tuple[Cell, float]],
                capacities: Sequence[Answer]) -> str:
    """The Delta of highest capacity in each cell."""
    texts = []
    for number, (cell, _) in enumerate(cells):
        mine = capacities[number * len(variants):(number + 1) * len(variants)]
        means = {variant.name: fmean(answer.value["slo"])
                 for variant, answer in zip(variants, mine, strict=True)
                 if not answer.error and "ideal" not in variant.name}
        if means:
            top = max(means.values())
            best = [name.removeprefix("Delta ") for name, value in means.items() if value == top]
            texts.append(f"{cell_name(*cell)}: most with {' or '.join(best)}")
    return "; ".join(texts) or "none"


WRONG = {"attention and transfer, plan given": ("[attention,transfer]", True),
         "all modules, plan included": ("[all]", False)}
"""Which coefficients are wrong, and whether the plan is still that of the right ones: the first is what the
paper's experiment is taken to be (its models are those of attention and transfer)."""


def errors(evaluation: Evaluation) -> Section:
    """Dispatch, and plans, by wrong coefficients, durations by the right ones."""
    scale = evaluation.scale
    cells = [(cell, rate) for cell, rate in cells_of_models(evaluation) if cell[1] == scale.focus[1]]
    draws = range(scale.error_draws)
    rights = runs(evaluation, "errors", [(cell, hetis("0"), ERROR_LOAD * rate, rate) for cell, rate in cells])
    rows: list[list[str]] = []
    lines: list[Line] = []
    worst: dict[str, float] = {}
    for what, (modules, keeps_plan) in WRONG.items():
        variants = [replace(hetis(what, f"cost.policy_error={error:g}", f"cost.policy_error_seed={draw}",
                                  f"cost.policy_error_modules={modules}"), keeps_plan=keeps_plan)
                    for error in scale.errors for draw in draws]
        answers = runs(evaluation, "errors", [(cell, variant, ERROR_LOAD * rate, rate)
                                              for cell, rate in cells for variant in variants])
        for number, ((cell, _), right) in enumerate(zip(cells, rights, strict=True)):
            mine = answers[number * len(variants):(number + 1) * len(variants)]
            if any(answer.error for answer in [right, *mine]):
                rows.append([cell_name(*cell), what, next(a.error for a in [right, *mine] if a.error)])
                continue
            lost = np.array([100 * (paired(answer, right).mean - 1) for answer in mine])
            by_error = lost.reshape(len(scale.errors), len(draws))
            rows += [[cell_name(*cell), what, f"{100 * error:g} %", f"{row.mean():+.1f} %",
                      f"{row.max():+.1f} %"] for error, row in zip(scale.errors, by_error, strict=True)]
            worst[what] = max([*known(lost), worst.get(what, -math.inf)])
            lines.append(Line(f"{cell_name(*cell)}: {what}", 100 * np.array([0.0, *scale.errors]),
                              np.array([0.0, *by_error.max(axis=1)]), len(lines), markers=True))
    blocks: list[Any] = [
        "Coefficients that Hetis dispatches (and, in the second half, plans) by are wrong by the share "
        f"given, up or down by a coin of its own, {scale.error_draws} draws; durations are charged by the "
        "right ones. Normalised latency more than with right coefficients, paired by seed, at "
        f"{100 * ERROR_LOAD:g} % of Hetis' capacity.",
        table(["cell", "wrong", "error", "mean over draws", "worst draw"], rows, texts=2)]
    if lines:
        blocks.append(XYChart(
            key="errors", title="Wrong coefficients",
            caption="Normalised latency lost with wrong coefficients, the worst draw.", origin="simulated",
            x=Axis("error (%)", low=0.0), y=Axis("latency lost (%)"), lines=lines,
            rules=[Rule("paper, at most", 6.9)]))
    ours = "; ".join(f"{what}: {found:.1f} % at most" for what, found in worst.items())
    return Section("errors", "Wrong coefficients", blocks, [Finding(
        "errors", ours or "none",
        f"The largest of all models, draws and errors, at {100 * ERROR_LOAD:g} % of the capacity. The paper "
        "perturbs the attention and transfer models. Where dense work, prefill and all-reduces are misjudged "
        "too, the plan can turn.")])


def eviction(evaluation: Evaluation) -> Section:
    """Which request moves off a full card, and whether any does."""
    cells = cells_of_models(evaluation)
    variants = [hetis("benefit"), hetis("LIFO", eviction="lifo"), hetis("no redispatch", redispatch=False)]
    loads: list[tuple[Cell, float, float, str]] = []
    for cell, rate in cells:
        if cell[1] == "sharegpt":
            loads.append((cell, evaluation.scale.rate_eviction, rate, f"{evaluation.scale.rate_eviction:g} "
                                                                      "requests/s"))
        loads.append((cell, OVER * rate, rate, f"{OVER:g} x capacity"))
    answers = runs(evaluation, "eviction", [(cell, variant, rate, plan_rate)
                                             for cell, rate, plan_rate, _ in loads for variant in variants])
    rows, names, points = [], [], []
    for number, (cell, _, _, words) in enumerate(loads):
        mine = answers[number * len(variants):(number + 1) * len(variants)]
        name = f"{cell_name(*cell)}, {words}"
        if any(answer.error for answer in mine):
            rows.append([name, next(a.error for a in mine if a.error)])
            continue
        found = [paired(answer, mine[0]) for answer in mine[1:]]
        names.append(name)
        points.append(found)
        rows.append([name, *(times(e) for e in found),
                     *(f"{fmean(seed_values(answer.value[0], 'preemptions')):,.0f}" for answer in mine),
                     *(f"{fmean(seed_values(answer.value[0], 'moves')):,.0f}" for answer in mine[:2])])
    blocks: list[Any] = [
        "Normalised latency in units of that with eviction by benefit, paired by seed; then preemptions and "
        "moves of a run.",
        table(["cell, load", "LIFO", "no redispatch", "preemptions: benefit", "LIFO", "no redispatch",
               "moves: benefit", "LIFO"], rows)]
    if points:
        series = [Dots(variant.name, np.array([e[i].mean for e in points]), i,
                       np.array([e[i].low for e in points]), np.array([e[i].high for e in points]))
                  for i, variant in enumerate(variants[1:])]
        blocks.append(DotChart(key="eviction", title="Eviction and redispatch",
                               rows=[n.replace(", ", "\n", 1) for n in names],
                               caption="Normalised latency with LIFO eviction and without redispatch, in "
                                       "units of that with eviction by benefit.",
                               origin="simulated", series=series, axis=Axis("latency, relative"),
                               rules=[Rule("benefit", 1.0)]))
    return Section("eviction", "Eviction and redispatch", blocks, _eviction_findings(loads, points, names))


def _eviction_findings(loads: Sequence[Any], points: Sequence[Sequence[Estimate]],
                       names: Sequence[str]) -> list[Finding]:
    if not points:
        return [Finding("eviction", "none"), Finding("redispatch", "none")]
    at_rate = [(name, found) for name, found in zip(names, points, strict=True) if "requests/s" in name]
    lifo = "; ".join(f"LIFO {times(found[0])} ({name})" for name, found in at_rate)
    off = max((pair for pair in zip(names, points, strict=True) if not math.isnan(pair[1][1].mean)),
              key=lambda pair: pair[1][1].mean, default=None)
    return [Finding("eviction", lifo or "not run", "Normalised latency in units of that by benefit, "
                                                   f"{len(loads)} loads in all."),
            Finding("redispatch", f"off: up to {times(off[1][1])} the latency ({off[0]})" if off else "none",
                    "Normalised latency in units of that with redispatch.")]


