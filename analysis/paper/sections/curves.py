"""Latency over load."""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.figures.charts import Axis, Line, XYChart
from analysis.paper.evaluation import Cell, Evaluation
from analysis.paper.scale import cell_name
from analysis.paper.section import Section
from analysis.paper.sections.serving import label
from analysis.paper.store import Answer


def build(evaluation: Evaluation) -> Section:
    """The section."""
    names = [name for name in evaluation.variants if name in evaluation.scale.main]
    capacities = {cell: evaluation.capacity_rps(cell) for cell in evaluation.scale.cells}
    asked = [(cell, name, [share * rate for share in evaluation.scale.curve])
             for cell, rate in capacities.items() if rate for name in names]
    answers = evaluation.store.answers("curves", [
        evaluation.latency_job(cell, evaluation.variants[name], capacities[cell] or 0.0, rates, [0])
        for cell, name, rates in asked])
    blocks: list[Any] = [
        "Normalised latency: the time of a request over its output tokens, averaged over requests, one "
        "seed. Plans are those for Hetis' capacity at the SLO. Hollow points: the queue grows, so that the "
        "figure depends on the length of the run."]
    for cell in evaluation.scale.cells:
        mine = [(name, rates, answer) for (at, name, rates), answer in zip(asked, answers, strict=True)
                if at == cell and not answer.error]
        if mine:
            blocks.append(_chart(cell, mine))
    return Section("curves", "Latency over load", blocks)


def _chart(cell: Cell, lines: list[tuple[str, list[float], Answer]]) -> XYChart:
    drawn = []
    for number, (name, rates, answer) in enumerate(lines):
        runs = [row[0] for row in answer.value]
        drawn.append(Line(label(name), np.array(rates),
                          np.array([np.nan if run["normalised_s"] is None else run["normalised_s"]
                                    for run in runs]), number, markers=True,
                          hollow=np.array([bool(run["saturated"]) for run in runs])))
    return XYChart(key=f"curve-{cell[0]}-{cell[1]}", title=f"Normalised latency, {cell_name(*cell)}",
                   caption=f"Normalised latency over load, {cell_name(*cell)}.", origin="simulated",
                   note=cell_name(*cell), x=Axis("requests/s", low=0.0), y=Axis("s/token", log=True),
                   lines=drawn)
