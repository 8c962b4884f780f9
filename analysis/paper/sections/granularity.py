"""What of a request is divided over devices: heads, whole requests or tokens."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np

from analysis.figures.charts import Axis, DotChart, Dots, Rule
from analysis.paper.evaluation import Evaluation, hetis, seed_values
from analysis.paper.ratios import times
from analysis.paper.scale import cell_name
from analysis.paper.section import Finding, Section, table
from analysis.paper.sections.sweeps import LOAD, cells_of_models, paired, runs
from hetis_sim.study.estimate import Estimate, ratio

UNITS = ("head", "request", "sequence")
PARTS = ("attention", "head_transfer")


def build(evaluation: Evaluation) -> Section:
    """The section."""
    cells = cells_of_models(evaluation)
    variants = [hetis(f"by {unit}", granularity=unit) for unit in UNITS]
    answers = runs(evaluation, "granularity", [(cell, variant, LOAD * rate, rate)
                                               for cell, rate in cells for variant in variants])
    rows: list[list[str]] = []
    names: list[str] = []
    latencies: list[list[Estimate]] = []
    transfers: list[tuple[str, Estimate]] = []
    for number, (cell, _) in enumerate(cells):
        mine = answers[number * len(variants):(number + 1) * len(variants)]
        name = cell_name(*cell)
        if any(answer.error for answer in mine):
            rows.append([name, next(a.error for a in mine if a.error)])
            continue
        head, *others = mine
        for variant, answer in zip(variants, mine, strict=True):
            run = answer.value[0]
            parts = [1e3 * fmean(seed_values(run, f"decode_{part}_s")) for part in PARTS]
            rows.append([f"{name}, {variant.name}", times(paired(answer, head)),
                         *(f"{part:.2f}" for part in parts),
                         f"{fmean(seed_values(run, 'preemptions')):,.0f}"])
        names.append(name)
        latencies.append([paired(answer, head) for answer in others])
        transfers.append((name, ratio(seed_values(others[-1].value[0], "decode_head_transfer_s"),
                                      seed_values(head.value[0], "decode_head_transfer_s"))))
    blocks: list[Any] = [
        f"Hetis with equal plans, objective and triggers, at {100 * LOAD:g} % of its capacity: normalised "
        "latency in units of that by head, paired by seed; decode attention and transfer to attention "
        "workers in an iteration, ms; preemptions of a run.",
        table(["cell, unit", "latency", "attention", "transfer", "preemptions"], rows)]
    if latencies:
        series = [Dots(variant.name, np.array([found[i].mean for found in latencies]), i,
                       np.array([found[i].low for found in latencies]),
                       np.array([found[i].high for found in latencies]))
                  for i, variant in enumerate(variants[1:])]
        blocks.append(DotChart(
            key="granularity", title="What is divided", rows=names, series=series, origin="simulated",
            caption="Normalised latency when whole requests or tokens are divided over devices, in units of "
                    "that by head.",
            axis=Axis("latency, relative"), rules=[Rule("by head", 1.0)]))
    found = "; ".join(f"{times(estimate)} ({name})" for name, estimate in transfers
                      if estimate.mean == estimate.mean)
    ours = f"in whole runs the transfer of an iteration by sequence over by head is {found}" if found else ""
    return Section("granularity", "Heads, requests or tokens", blocks, [Finding(
        "offload", ours, "" if ours else "In whole runs no heads were away at the load of the comparison.")])
