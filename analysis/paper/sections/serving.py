"""Throughput at an SLO and without, and usable cache, of every policy in every cell."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from analysis.figures.charts import Axis, DotChart, Dots, Rule
from analysis.paper.evaluation import STRICT, Cell, Evaluation
from analysis.paper.ratios import CellRatio, cell_ratio, missing, spread, times, up_to
from analysis.paper.scale import (
    BASELINES,
    HETIS,
    MODEL_NAMES,
    TPOT_S,
    TTFT_S,
    cell_name,
    policy_name,
)
from analysis.paper.section import Finding, Section, by_rows
from analysis.paper.store import Answer
from hetis_sim.study.capacity import REQUESTS_MIN
from hetis_sim.study.estimate import estimate

Found = dict[tuple[Cell, str], Answer]
Value = Callable[[Any], Sequence[float]]


def build(evaluation: Evaluation) -> Section:
    """The section."""
    found = evaluation.serving()
    names = list(evaluation.variants)
    others = [name for name in names if name != HETIS]
    ratios = {key: {name: of_hetis(evaluation, found, name, value) for name in others}
              for key, value in MEASURES.items()}
    marked = any(at_bound(answer.value) for answer in found.values() if not answer.error)
    blocks: list[Any] = [_definitions(evaluation), *([AT_BOUND_TEXT] if marked else []),
                         "### Capacity at the SLO, requests/s",
                         by_rows({label(name): _column(evaluation, found, name, "slo") for name in names},
                                 "model, workload")]
    blocks += ["### Throughput without an SLO, requests/s", _sustained_text(),
               by_rows({label(name): _column(evaluation, found, name, "sustained") for name in names},
                       "model, workload")]
    main = [name for name in others if name in (*BASELINES, STRICT)]
    beside = [name for name in others if name not in main]
    for key, words in (("slo", "capacity at the SLO"), ("sustained", "throughput without an SLO")):
        blocks.append(ratio_chart(f"throughput-{key}", f"Hetis over the paper's baselines: {words}", words,
                                  {name: ratios[key][name] for name in main},
                                  [Rule("paper: HexGen", 1.33), Rule("paper: Splitwise", 2.25)]))
        if beside:
            blocks.append(ratio_chart(f"neighbours-{key}", f"Hetis over other systems: {words}", words,
                                      {name: ratios[key][name] for name in beside}))
    blocks += ["### Usable KV cache, thousands of tokens",
               "Tokens of context that the decoding instances of a plan can hold: heads stay with their "
               "weights, so that the fullest card is the limit, except where attention workers take any "
               "head. Cards that only prefill hold nothing for decoding.",
               by_rows({label(name): _column(evaluation, found, name, "cache") for name in names},
                       "model, workload"),
               ratio_chart("cache", "Usable KV cache, Hetis over the paper's baselines", "usable KV cache",
                           {name: ratios["cache"][name] for name in main}, [Rule("paper", 1.87)])]
    blocks += ["### Plans", _plans(evaluation, found, names)]
    return Section("serving", "Throughput and usable cache", blocks, [
        *_findings(ratios, others),
        *(Finding(f"throughput-{name}", "", _limit_note(evaluation, found, name))
          for name in BASELINES if name in others),
        Finding("throughput-others", "; ".join(
            f"{label(name)} {spread(ratios['slo'][name]) or 'none'}" for name in beside) or "left out here",
            f"{_focus_model(evaluation)} only." if beside else ""),
        *([Finding("throughput-splitwise", "", _mixed_note(evaluation, found))] if STRICT in others else [])])


CARDS = re.compile(r"\d+ x ([\w-]+)")
"""Kinds of card in the words for an instance."""

MEASURES: dict[str, Value] = {
    "slo": lambda value: value["slo"], "sustained": lambda value: value["sustained"],
    "cache": lambda value: [float(value["usable_tokens"])]}


def label(name: str) -> str:
    """A policy for people."""
    return "Splitwise, kinds apart" if name == STRICT else policy_name(name)


def of_hetis(evaluation: Evaluation, found: Found, other: str, value: Value) -> list[CellRatio]:
    """Hetis over another policy, cell by cell."""
    ratios = []
    for cell in evaluation.cells_of(other):
        mine, its = found[cell, HETIS], found[cell, other]
        why = mine.error or its.error
        if why:
            ratios.append(missing(cell, why))
            continue
        ratios.append(cell_ratio(cell, value(mine.value), value(its.value),
                                 "a seed holds the SLO at no load"))
    return ratios


def ratio_chart(key: str, title: str, words: str, ratios: dict[str, list[CellRatio]],
                rules: Sequence[Rule] = (), over: str = "Hetis / other") -> DotChart:
    """Ratios by cell, one series a policy."""
    series = []
    for number, (name, cells) in enumerate(ratios.items()):
        low, mean, high = (np.array([getattr(r.estimate, part) for r in cells])
                           for part in ("low", "mean", "high"))
        series.append(Dots(label(name), mean, number, low, high))
    rows = [cell_name(*r.cell) for r in next(iter(ratios.values()))]
    seeds = any(r.estimate.n > 1 for cells in ratios.values() for r in cells)
    return DotChart(key=key, title=title, origin="simulated", rows=rows, series=series,
                    note=words,
                    axis=Axis(over, log=True), rules=[Rule("equal", 1.0), *rules],
                    caption=f"{title}{', paired by seed, with 95 % intervals' if seeds else ''}.")


def _definitions(evaluation: Evaluation) -> str:
    limits = ", ".join(f"{TTFT_S[workload]:g} s for {cell_name('', workload).removeprefix(', ')}"
                       for workload in evaluation.scale.workloads if workload in TTFT_S)
    return ("The paper states no SLO and no definition of throughput, so there are two here. **Capacity at "
            f"the SLO**: the highest rate at which 90 % of the requests hold the limits on TTFT ({limits}) "
            f"and TPOT ({TPOT_S:g} s) and the queue does not grow ([definition](capacity.md)); limits are "
            "ours, about ten times what a mean prompt takes with Llama-70B on two A100s. **Throughput "
            f"without an SLO** is below. Seeds: {evaluation.scale.seeds}. Arrivals of a run last at least "
            f"{evaluation.scale.sojourns:g} times as long as a request stays under overload, with Hetis and "
            "each of its baselines, which makes the same number of requests for all policies, "
            f"{min(REQUESTS_MIN, evaluation.scale.requests_max):,} to {evaluation.scale.requests_max:,} "
            "of them. Every policy's plan is searched "
            f"for the load at hand.{_beside_text(evaluation)}")


def _beside_text(evaluation: Evaluation) -> str:
    """Where systems beside the paper's baselines were run, if not everywhere."""
    beside = [name for name in evaluation.variants if evaluation.cells_of(name) != evaluation.scale.cells]
    if not beside:
        return ""
    return (f" {', '.join(map(label, beside))}, with which the paper does not compare, are run for "
            f"{_focus_model(evaluation)} only.")


def _focus_model(evaluation: Evaluation) -> str:
    model = evaluation.scale.focus[0]
    return MODEL_NAMES.get(model, model)


def _sustained_text() -> str:
    return ("What is served with everything arriving at once, or the highest rate of a search at which the "
            "queue did not grow, whichever is more: some systems thrash when they are flooded.")


def _column(evaluation: Evaluation, found: Found, name: str, key: str) -> dict[str, str]:
    column: dict[str, str] = {}
    cells = evaluation.cells_of(name)
    for cell in cells:
        answer = found[cell, name]
        column[cell_name(*cell)] = _failed(answer) if answer.error else _text(answer.value, key)
    bound = {cell: evaluation.bound(cell) for cell in cells} if key == "slo" else {}
    for cell, answer in bound.items():
        value = found[cell, name]
        if not answer.error and not value.error:
            share = estimate(value.value["slo"]).mean / answer.value["requests_per_s"]
            column[cell_name(*cell)] += f" ({100 * share:.0f} %)"
    return column


def _text(value: Any, key: str) -> str:
    if key == "cache":
        return f"{value['usable_tokens'] / 1e3:,.0f}"
    return estimate(value[key], 0.0).text() + (AT_BOUND if key == "slo" and at_bound(value) else "")


AT_BOUND = " (+)"
AT_BOUND_TEXT = (f"{AT_BOUND.strip()} marks a capacity at which the SLO holds even at the bound of any "
                 "policy: the runs are too short for the queue to show, and the figure is the bound.")


def at_bound(value: Any) -> bool:
    """Whether the search ended at the bound, where every queue must grow."""
    return "too short" in value["note"]


def _failed(answer: Answer) -> str:
    return "failed (defect)" if answer.defect else f"no plan: {answer.error}"


def _plans(evaluation: Evaluation, found: Found, names: Sequence[str]) -> str:
    lines = []
    for cell in evaluation.scale.cells:
        for name in names:
            answer = found.get((cell, name))
            if answer is not None and not answer.error:
                lines.append(f"- {cell_name(*cell)}, {label(name)}: {_counted(answer.value['instances'])}")
    return "<details><summary>What each policy made of the cluster</summary>\n\n" + "\n".join(
        lines) + "\n\n</details>"


def _counted(instances: Sequence[str]) -> str:
    counts = {text: list(instances).count(text) for text in dict.fromkeys(instances)}
    return "; ".join(f"{number} of [{text}]" if number > 1 else f"[{text}]"
                     for text, number in counts.items())


def _findings(ratios: dict[str, dict[str, list[CellRatio]]], others: Sequence[str]) -> list[Finding]:
    findings = []
    for name in BASELINES:
        if name not in others:
            continue
        slo, free = ratios["slo"][name], ratios["sustained"][name]
        ours = f"at the SLO {up_to(slo)}; without {up_to(free)}"
        note = f"At the SLO {spread(slo)}, without {spread(free)}."
        if name == "splitwise" and STRICT in others:
            strict = ratios["slo"][STRICT], ratios["sustained"][STRICT]
            ours += (". With prompts on the high end and decoding on the low end only: at the SLO "
                     f"{up_to(strict[0])}; without {up_to(strict[1])}")
        findings.append(Finding(f"throughput-{name}", ours, note))
    caches = [(r, name) for name in others if name in (*BASELINES, STRICT)
              for r in ratios["cache"][name] if r.known]
    if caches:
        best, name = max(caches, key=lambda pair: pair[0].estimate.mean)
        findings.append(Finding("cache", f"up to {times(best.estimate)} over {label(name)} "
                                         f"({cell_name(*best.cell)})", "; ".join(
            f"over {label(name)} {spread(ratios['cache'][name])}" for name in others
            if name in (*BASELINES, STRICT)) + "."))
    return findings


def _mixed_note(evaluation: Evaluation, found: Found) -> str:
    """The models for which a kind of card both prefills and decodes although kinds were to be apart."""
    mixed: dict[str, str] = {}
    for cell in evaluation.scale.cells:
        answer = found[cell, STRICT]
        if not answer.error:
            kinds = {role: {kind for text in answer.value["instances"] if text.startswith(role)
                            for kind in CARDS.findall(text)} for role in ("prefill", "decode", "both")}
            both = kinds["both"] | kinds["prefill"] & kinds["decode"]
            if both:
                mixed[MODEL_NAMES.get(cell[0], cell[0])] = ", ".join(sorted(both))
    return " ".join(f"For {model} {cards} are in both pools even so: no other division of the cluster "
                    "serves the model." for model, cards in mixed.items())


def _limit_note(evaluation: Evaluation, found: Found, name: str) -> str:
    """Which limit is missed first as the load grows, with Hetis and with another policy."""
    notes = []
    for cell in evaluation.cells_of(name):
        if cell[0] != evaluation.scale.focus[0]:
            continue
        parts = [_missed(found[cell, who], who) for who in (HETIS, name)]
        if all(parts):
            notes.append(f"{cell_name(*cell)}: {', '.join(parts)}")
    return f"The limit that is missed first. {'. '.join(notes)}." if notes else ""


def _missed(answer: Answer, who: str) -> str:
    """The limit that fewer requests hold at the lowest rate that failed."""
    failure = None if answer.error else answer.value["first_failure"]
    if failure is None:
        return ""
    shares = {"TTFT": failure["ttft"], "TPOT": failure["tpot"]}
    first = min(shares, key=shares.__getitem__)
    return (f"{label(who)} {first} (at {failure['rate_rps']:.3g} requests/s {100 * shares['TTFT']:.0f} % "
            f"hold that on TTFT, {100 * shares['TPOT']:.0f} % that on TPOT)")
