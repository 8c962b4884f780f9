"""Latencies and module times at a rate that is unsaturated for Hetis and the paper's baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from analysis.figures.charts import Axis, BarChart, Bars, Rule
from analysis.paper.evaluation import STRICT, Cell, Evaluation, seed_values
from analysis.paper.ratios import CellRatio, cell_ratio, missing, spread, up_to
from analysis.paper.scale import BASELINES, COMMON_SHARE, HETIS, MESHES, cell_name
from analysis.paper.section import Finding, Section, by_rows
from analysis.paper.sections.serving import label, ratio_chart
from analysis.paper.store import Answer
from hetis_sim.metrics.columns import PARTS
from hetis_sim.study.estimate import estimate

Found = Mapping[tuple[Cell, str], Answer]

KEYS = {"ttft_p95_s": "P95 TTFT", "tpot_p95_s": "P95 TPOT", "decode_dense_s": "dense modules of an iteration",
        "attention": "decode attention of an iteration"}
MODULES = ("decode_dense_s", "attention")
PART_NAMES = {"host": "host", "dense": "dense modules", "collective": "collectives", "attention": "attention",
              "head_transfer": "head transfer", "hop": "hops", "waiting": "waiting"}


def build(evaluation: Evaluation) -> Section:
    """The section."""
    found = evaluation.latencies()
    others = [name for name in evaluation.variants if name != HETIS]
    main = [name for name in others if name in (*BASELINES, STRICT)]
    ratios = {key: {name: [_over_hetis(found, cell, name, key) for cell in evaluation.cells_of(name)]
                    for name in others} for key in KEYS}
    blocks: list[Any] = [
        f"At {100 * COMMON_SHARE:g} % of the least capacity among Hetis, Splitwise and HexGen, the same rate "
        "for all policies of a cell. A star marks a policy whose queue grows there: its figures say how "
        "long the run was.",
        "### P95 TTFT, s", _columns(evaluation, found, "ttft_p95_s", 1.0),
        "### P95 TPOT, ms", _columns(evaluation, found, "tpot_p95_s", 1e3),
        "### Modules of a decode iteration, ms",
        "Means over decoded tokens, summed over the stages that a token passes: dense modules, then decode "
        "attention with the transfer of heads to attention workers. Helix is left out: its requests "
        "go from node to node, and no iteration of a whole model is recorded.",
        _columns(evaluation, found, "decode_dense_s", 1e3), _columns(evaluation, found, "attention", 1e3)]
    rules = {"ttft_p95_s": [Rule("paper: HexGen", 1.22), Rule("paper: Splitwise", 1.47)],
             "tpot_p95_s": [Rule("paper", 1.39)], "decode_dense_s": [Rule("paper", 1.29)],
             "attention": [Rule("paper", 1.49)]}
    for key, words in KEYS.items():
        blocks.append(ratio_chart(f"latency-{key.removesuffix('_s').replace('_', '-')}",
                                  f"{words}: the paper's baselines over Hetis", words,
                                  {name: ratios[key][name] for name in main}, rules[key], "other / Hetis"))
    for phase in ("decode", "prefill"):
        chart = _parts_chart(evaluation, found, phase)
        blocks += [chart] if chart is not None else []
    return Section("latency", "Latencies and modules at an unsaturated rate", blocks,
                   _findings(evaluation, found, ratios, main))


def _values(answer: Answer, key: str) -> list[float]:
    runs = answer.value[0]
    if key == "attention":
        return [sum(pair) for pair in zip(seed_values(runs, "decode_attention_s"),
                                          seed_values(runs, "decode_head_transfer_s"), strict=True)]
    return seed_values(runs, key)


def _over_hetis(found: Found, cell: Cell, name: str, key: str) -> CellRatio:
    mine, its = found.get((cell, HETIS)), found.get((cell, name))
    if mine is None or its is None:
        return missing(cell, "no common rate")
    if mine.error or its.error:
        return missing(cell, mine.error or its.error)
    if any(run["saturated"] for run in its.value[0]):
        return missing(cell, "its queue grows at the common rate")
    return cell_ratio(cell, _values(its, key), _values(mine, key))


def _columns(evaluation: Evaluation, found: Found, key: str, scale: float) -> str:
    columns: dict[str, dict[str, str]] = {"requests/s": {
        cell_name(*cell): f"{evaluation.common_rate(cell) or 0.0:.3g}" for cell in evaluation.scale.cells}}
    for name in evaluation.variants:
        if key in MODULES and name in MESHES:
            continue
        column = columns[label(name)] = {}
        for cell in evaluation.scale.cells:
            answer = found.get((cell, name))
            if answer is not None and not answer.error:
                star = "*" if any(run["saturated"] for run in answer.value[0]) else ""
                text = estimate([scale * value for value in _values(answer, key)], 0.0).text()
                column[cell_name(*cell)] = text + star
    return by_rows(columns, "model, workload")


def _parts_chart(evaluation: Evaluation, found: Found, phase: str) -> BarChart | None:
    """Where an iteration's time goes, in the cell of the sweeps."""
    cell = evaluation.scale.focus
    names = [name for name in evaluation.variants if name not in MESHES
             and (cell, name) in found and not found[cell, name].error
             and all(np.isfinite(seed_values(found[cell, name].value[0], f"{phase}_dense_s")))]
    if not names:
        return None
    means = {part: np.array([1e3 * fmean(seed_values(found[cell, name].value[0], f"{phase}_{part}_s"))
                             for name in names]) for part in PARTS}
    series = [Bars(PART_NAMES[part], means[part], number) for number, part in enumerate(PARTS)]
    what = "a decode iteration" if phase == "decode" else "a step of prompts"
    return BarChart(key=f"parts-{phase}", title=f"Where the time of {what} goes, {cell_name(*cell)}",
                    caption=f"Where the time of {what} goes at the common rate, {cell_name(*cell)}: a mean "
                            "over tokens, summed over the stages that a token passes.",
                    origin="simulated", axis=Axis("ms", low=0.0), categories=[label(name) for name in names],
                    series=series)


def _share_note(evaluation: Evaluation, found: Found, name: str) -> str:
    """What of a step of prompts goes into collectives, with Hetis and with another policy."""
    cell = evaluation.scale.focus
    shares = []
    for who in (HETIS, name):
        answer = found.get((cell, who))
        if answer is None or answer.error:
            return ""
        runs = answer.value[0]
        whole = sum(fmean(seed_values(runs, f"prefill_{part}_s")) for part in PARTS)
        shares.append(100 * fmean(seed_values(runs, "prefill_collective_s")) / whole)
    return (f" {cell_name(*cell)}: collectives over PCIe take {shares[0]:.0f} % of the time of a step of "
            f"prompts with Hetis, {shares[1]:.0f} % with {label(name)}.")


def _stall_note(evaluation: Evaluation, found: Found, name: str) -> str:
    """What of the time between tokens is no decode iteration, with Hetis and with another policy."""
    notes = []
    for cell in evaluation.cells_of(name):
        stalls = [_stalled(found.get((cell, who))) for who in (HETIS, name)]
        if cell[0] == evaluation.scale.focus[0] and all(stall is not None for stall in stalls):
            notes.append(f"{cell_name(*cell)} {stalls[0]:.0f} % and {stalls[1]:.0f} %")
    return ("Of the mean time between two tokens, what is no decode iteration (mostly prompts of others that "
            f"are computed first) is, with Hetis and {label(name)}: {', '.join(notes)}." if notes else "")


def _stalled(answer: Answer | None) -> float | None:
    """Per cent."""
    if answer is None or answer.error:
        return None
    runs = answer.value[0]
    gap = fmean(seed_values(runs, "gap_s"))
    return 100 * (1 - sum(fmean(seed_values(runs, f"decode_{part}_s")) for part in PARTS) / gap)


def _findings(evaluation: Evaluation, found: Found, ratios: Mapping[str, Mapping[str, list[CellRatio]]],
              main: Sequence[str]) -> list[Finding]:
    findings = []
    for name in BASELINES:
        if name in main:
            ttft = ratios["ttft_p95_s"][name]
            findings.append(Finding(f"ttft-{name}", up_to(ttft),
                                    f"{spread(ttft)}." + _share_note(evaluation, found, name)))
            findings.append(Finding(f"throughput-{name}", "", _stall_note(evaluation, found, name)))
    for claim, key in (("tpot", "tpot_p95_s"), ("dense", "decode_dense_s"), ("attention", "attention")):
        texts = [f"over {label(name)} {up_to(ratios[key][name])}" for name in main]
        findings.append(Finding(claim, "; ".join(texts), "; ".join(
            f"{label(name)} {spread(ratios[key][name])}" for name in main) + "."))
    return findings


