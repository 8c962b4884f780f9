"""What the ratios to the paper's baselines hang on: one assumption switched at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.figures.charts import Axis, DotChart, Dots, Rule
from analysis.paper.evaluation import STRICT, Cell, Evaluation, Variant
from analysis.paper.ratios import times
from analysis.paper.scale import BASELINES, HETIS, TPOT_S, TTFT_OTHER_S, TTFT_S, cell_name
from analysis.paper.section import Finding, Section, table
from analysis.paper.sections.serving import AT_BOUND, AT_BOUND_TEXT, at_bound, label
from analysis.paper.store import Answer
from hetis_sim.study.estimate import Estimate, estimate, ratio

HOSTS = ("{gpus:{a100-80gb:4},link:nvlink3,memory_gib:512}",
         "{gpus:{rtx3090:2},link:pcie4x16,count:2,memory_gib:128}",
         "{gpus:{p100-12gb:4},link:pcie3x16,memory_gib:128}")
NVLINK = f"cluster.hosts=[{','.join(HOSTS)}]"
"""The testbed with NVLink between its A100s."""

SWITCHES: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "NVLink between A100s": (NVLINK,),
    "chunked prefill": ("scheduler.chunked_prefill=true",),
    "host 50 ms": ("cost.host_base_s=0.05",),
    "SLO x 5": (),
    "TPOT x 5": (),
    "network x 4": ("cluster.network=infiniband-ndr",),
}
"""Assumptions that hold for all policies: engine, links, SLO."""
SLO_FACTORS = {"SLO x 5": (5.0, 5.0), "TPOT x 5": (1.0, 5.0)}
"""On the limits on TTFT and TPOT."""
TESTBED = "paper"
TELLING = 1.25
"""Factor by which a switch must change a ratio for it to be called the reason."""


def build(evaluation: Evaluation) -> Section:
    """The section."""
    cells = [evaluation.scale.focus]
    names = [name for name in (HETIS, BASELINES[0], STRICT, *BASELINES[1:]) if name in evaluation.variants]
    switches = list(SWITCHES)[:evaluation.scale.switches]
    if evaluation.scale.cluster != TESTBED:
        switches = [name for name in switches if not any("cluster." in word for word in SWITCHES[name])]
    asked = [(cell, switch, name) for cell in cells for switch in switches for name in names]
    answers = evaluation.capacities("assumptions", [
        (cell, Variant(name, evaluation.variants[name].policy, _words(cell, switch)))
        for cell, switch, name in asked])
    found = dict(zip(asked, answers, strict=True))
    marked = any(at_bound(answer.value) for answer in answers if not answer.error)
    blocks: list[Any] = [
        *([AT_BOUND_TEXT] if marked else []),
        "Each line switches one assumption for all policies and searches plans and capacities anew. "
        "Capacity at the SLO and, in brackets, throughput without, requests/s; then Hetis over the "
        "baselines, paired by seed."]
    for cell in cells:
        rows, series = [], []
        ratios = {name: [_ratio(found, cell, switch, name, "slo") for switch in switches]
                  for name in names[1:]}
        free = {name: [_ratio(found, cell, switch, name, "sustained") for switch in switches]
                for name in names[1:]}
        for number, switch in enumerate(switches):
            rows.append([switch, *(_text(found[cell, switch, name]) for name in names),
                         *(f"{ratios[name][number].text()} ({free[name][number].text()})"
                           for name in names[1:])])
        blocks += [f"### {cell_name(*cell)}",
                   table(["", *map(label, names), *(f"over {label(name)}" for name in names[1:])], rows)]
        for number, name in enumerate(names[1:]):
            for key, values in (("at the SLO", ratios[name]), ("without", free[name])):
                series.append(Dots(f"{label(name)}, {key}", np.array([e.mean for e in values]),
                                   2 * number + (key == "without"), np.array([e.low for e in values]),
                                   np.array([e.high for e in values])))
        blocks.append(DotChart(
            key=f"assumptions-{cell[0]}-{cell[1]}", title=f"One assumption switched, {cell_name(*cell)}",
            caption="Hetis over the paper's baselines with one assumption switched at a time, "
                    f"{cell_name(*cell)}.",
            origin="simulated", note=cell_name(*cell), axis=Axis("throughput, Hetis / other", log=True),
            rows=switches, series=series, rules=[Rule("equal", 1.0)]))
    return Section("assumptions", "What the ratios hang on", blocks,
                   [_finding(found, cells[0], switches, name) for name in names[1:] if name in BASELINES])


def _finding(found: dict[tuple[Cell, str, str], Answer], cell: Cell, switches: Sequence[str],
             name: str) -> Finding:
    """What each switch makes of the ratio."""
    base = _ratio(found, cell, switches[0], name, "slo")
    known = {switch: ratio for switch in switches[1:]
             if not math.isnan((ratio := _ratio(found, cell, switch, name, "slo")).mean)}
    if math.isnan(base.mean) or not known:
        return Finding(f"throughput-{name}", "")
    order = sorted(known, key=lambda switch: known[switch].mean)
    words = ", ".join(f"{switch} {known[switch].mean:.2f}x" for switch in order)
    return Finding(f"throughput-{name}", "",
                   f"{cell_name(*cell)} at the SLO, one assumption switched at a time, from {times(base)}: "
                   f"{words}.{_reason(base, known, label(name))}")


def _reason(base: Estimate, known: Mapping[str, Estimate], name: str) -> str:
    """What the switches say of why a baseline is ahead, where they say anything."""
    tpot, nvlink = known.get("TPOT x 5"), known.get("NVLink between A100s")
    if tpot is None or tpot.mean < TELLING * base.mean:
        return ""
    text = (f" So it is the limit on TPOT that holds Hetis back against {name}: its primaries both "
            f"compute prompts and decode, and a prompt holds up every token behind it; {name} has "
            "other cards for decoding.")
    if nvlink is not None and nvlink.mean < base.mean:
        text += (" Collectives over PCIe are not the reason: with NVLink, Hetis gains less than "
                 f"{name} does.")
    return text


def _words(cell: Cell, switch: str) -> tuple[str, ...]:
    factors = SLO_FACTORS.get(switch)
    if factors is None:
        return SWITCHES[switch]
    ttft = factors[0] * TTFT_S.get(cell[1], TTFT_OTHER_S)
    return (f"slo.ttft_s={ttft:g}", f"slo.tpot_s={factors[1] * TPOT_S:g}")


def _ratio(found: dict[tuple[Cell, str, str], Answer], cell: Cell, switch: str, name: str,
           key: str) -> Estimate:
    mine, its = found[cell, switch, HETIS], found[cell, switch, name]
    if mine.error or its.error:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    return ratio(mine.value[key], its.value[key])


def _text(answer: Answer) -> str:
    if answer.error:
        return answer.error
    mark = AT_BOUND if at_bound(answer.value) else ""
    return f"{_mean(answer.value['slo'])}{mark} ({_mean(answer.value['sustained'])})"


def _mean(values: Sequence[float]) -> str:
    return f"{estimate(values).mean:.3g}"
