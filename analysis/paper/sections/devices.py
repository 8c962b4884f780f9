"""Figures of devices and links from the cost model: gaps, offloading, attention workers, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.figures.charts import Axis, Line, Rule, XYChart
from analysis.paper.evaluation import Evaluation
from analysis.paper.measure.devices import CONTEXT, PREFILL_TOKENS, SEQUENCES
from analysis.paper.scale import cell_name
from analysis.paper.section import Finding, Section, by_rows, table
from analysis.paper.store import Answer, Job

SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
GAPS = {"prefill_mlp": f"MLP, {PREFILL_TOKENS} prompt tokens", "dense_op": f"dense layer, {PREFILL_TOKENS} "
                                                                           "prompt tokens",
        "dense_decode": f"dense layer, {SEQUENCES} decodes", "attention": f"decode attention, {SEQUENCES} x "
                                                                          f"{CONTEXT} tokens",
        "decode": f"whole decode layer, {SEQUENCES} x {CONTEXT} tokens", "memory": "memory"}


def build(evaluation: Evaluation) -> Section:
    """The section."""
    scale = evaluation.scale
    one = [(model, scale.workloads[0]) for model in scale.models]
    jobs = {"gaps": [Job("devices.gaps", {"words": _words(evaluation, cell)}) for cell in one],
            "workers": [Job("devices.attention_workers", {"words": _words(evaluation, cell)})
                        for cell in scale.cells],
            "offload": [Job("devices.offload", {"words": _words(evaluation, cell), "shares": list(SHARES)})
                        for cell in one],
            "accuracy": [Job("devices.accuracy", {"words": _words(evaluation, one[0])})]}
    answers = evaluation.store.answers("devices", [job for group in jobs.values() for job in group])
    found: dict[str, list[Answer]] = {}
    for key, group in jobs.items():
        found[key], answers = answers[:len(group)], answers[len(group):]
    parts = [_gaps(one, found["gaps"]), _workers(scale.cells, found["workers"]),
             _offload(one, found["offload"]), _accuracy(found["accuracy"][0])]
    blocks: list[Any] = ["Nothing is simulated here: these are durations of the [cost model](cost.md), "
                         "whose coefficients come from kernel timings and datasheets."]
    findings: list[Finding] = []
    for more, answered in parts:
        blocks += more
        findings += answered
    return Section("devices", "Devices and links", blocks, findings)


def _words(evaluation: Evaluation, cell: tuple[str, str]) -> list[str]:
    return [f"cluster={evaluation.scale.cluster}", f"model={cell[0]}", f"workload={cell[1]}"]


def _gaps(cells: Sequence[tuple[str, str]], answers: Sequence[Answer]) -> tuple[list[Any], list[Finding]]:
    good = {cell_name(*cell).split(",")[0]: answer.value
            for cell, answer in zip(cells, answers, strict=True) if not answer.error}
    if not good:
        return [_why(answers)], []
    columns = {name: {GAPS[key]: f"{value[key]:.1f}" for key in GAPS} for name, value in good.items()}
    blocks = ["### The gap between A100 and P100",
              "Times of a P100 over those of an A100 (memory: the other way round).", by_rows(columns, "")]

    def over(key: str) -> str:
        figures = [value[key] for value in good.values()]
        return f"{min(figures):.1f}x to {max(figures):.1f}x" if len(figures) > 1 else f"{figures[0]:.1f}x"

    return blocks, [
        Finding("gap-mlp", over("prefill_mlp"),
                "The P100 computes 16-bit products at its fp32 rate, 9.3 TFLOP/s: that is how PyTorch calls "
                "cuBLAS on a card of its age ([cost model](cost.md)). With fp16 accumulation, at twice the "
                "rate, the ratio would be half of ours; the paper's lies between, and it states neither "
                "sizes nor precision."),
        Finding("gap-decode", over("decode"),
                f"A whole layer at {SEQUENCES} x {CONTEXT} tokens; the size is ours. The ratio goes from "
                "that of attention, which is the ratio of memory rates, to that of dense work, as the share "
                "of dense work grows."),
        Finding("gap-dense", over("dense_op"), f"A dense layer over {PREFILL_TOKENS} prompt tokens."),
        Finding("gap-memory", over("memory"),
                "80 GiB over 12 GiB as the driver reports them; the paper divides the nominal sizes.")]


def _workers(cells: Sequence[tuple[str, str]], answers: Sequence[Answer]) -> tuple[list[Any], list[Finding]]:
    rows, lines = [], []
    best, where = 0.0, ""
    for number, (cell, answer) in enumerate(zip(cells, answers, strict=True)):
        if answer.error:
            rows.append([cell_name(*cell), answer.error])
            continue
        times = answer.value
        speed = times[0]["alone_s"] / times[-1]["alone_s"]
        if speed > best:
            best, where = speed, cell_name(*cell)
        rows.append([cell_name(*cell), f"{times[0]['context']:.0f}",
                     *(f"{1e3 * row['alone_s']:.2f}" for row in times), f"{speed:.2f}x",
                     f"{times[0]['shared_s'] / times[-1]['shared_s']:.2f}x"])
        lines.append(Line(cell_name(*cell), np.array([float(row["workers"]) for row in times]),
                          np.array([times[0]["alone_s"] / row["alone_s"] for row in times]), number,
                          markers=True))
    if not lines:
        return [_why(answers)], []
    count = len(answers[0].value) if not answers[0].error else 4
    chart = XYChart(key="attention-workers", title="Attention with several attention workers",
                    caption="How many times shorter decode attention of a layer gets with more P100s that "
                            "hold all heads of a batch, transfer included.", origin="from the cost model",
                    x=Axis("attention workers", whole=True), y=Axis("speed-up", low=0.0),
                    lines=[Line("ideal", np.arange(1.0, count + 1), np.arange(1.0, count + 1), len(lines)),
                           *lines])
    blocks: list[Any] = [
        "### One to four attention workers",
        f"Decode attention of one layer for {SEQUENCES} requests over contexts of the workload's mean "
        "length, in ms, all heads at the P100s, queries and outputs over the network included; in the last "
        "column the A100 takes its share.",
        table(["model, workload", "context", "1 worker", *(f"{n} workers" for n in range(2, count + 1)),
               f"1 over {count}", "with the A100"], rows), chart]
    return blocks, [Finding("workers", f"up to {best:.2f}x ({where})",
                            "All workers are behind one network interface of the A100s' host, so what the "
                            "queries take on it does not shrink: with short contexts, and with grouped "
                            "heads, it is a larger share. The paper's setting is not known to us.")]


def _offload(cells: Sequence[tuple[str, str]], answers: Sequence[Answer]) -> tuple[list[Any], list[Finding]]:
    rows, lines = [], []
    ratios = {}
    for number, (cell, answer) in enumerate(zip(cells, answers, strict=True)):
        model = cell_name(*cell).split(",")[0]
        if answer.error:
            rows.append([model, answer.error])
            continue
        value = answer.value
        ratios[model] = (value["bytes_ratio"], value["time_ratio"])
        rows.append([model, f"{100 * value['balanced']:.0f} %", f"{value['bytes_ratio']:.2f}x",
                     f"{value['time_ratio']:.2f}x"])
        lines.append(Line(model, 100 * np.array(value["shares"]),
                          value["by_sequence_s"] / np.array(value["by_head_s"]), number, markers=True))
    if not lines:
        return [_why(answers)], []
    chart = XYChart(key="offload", title="Cost of offloading by sequence over by head",
                    caption="Time on the link to one P100, offloading by sequence over offloading by head, "
                            "over the share of the cache that is offloaded.", origin="from the cost model",
                    x=Axis("share offloaded (%)", low=0.0), y=Axis("by sequence / by head", log=True),
                    lines=lines, rules=[Rule("paper", 2.68)])
    blocks: list[Any] = [
        "### Offloading to one attention worker",
        f"What travels for a layer and an iteration of {SEQUENCES} requests. By sequence, every query goes "
        "to the worker and every partial output comes back, whatever its share; by head only what belongs "
        "to the heads there. At the share at which A100 and P100 are done together:",
        table(["model", "share offloaded", "bytes", "time on the link"], rows), chart]
    text = ", ".join(f"{a:.2f}x in bytes and {b:.2f}x in time ({model})" for model, (a, b) in ratios.items())
    return blocks, [Finding("offload", text,
                            "At the balanced share. The ratio of bytes is what the share makes of it (half "
                            "its inverse for models without grouped heads); of times less, since every "
                            "message takes its fixed time. That the paper compares with offloading by "
                            "sequence is our reading.")]


def _accuracy(answer: Answer) -> tuple[list[Any], list[Finding]]:
    if answer.error:
        return [answer.error], []
    known = [row for row in answer.value if row["median"] is not None]
    rows = [[row["module"].replace("_", " "), row["subject"], row["kind"],
             *("-" if row[key] is None else f"{100 * (1 - row[key]):.1f} %" for key in ("median", "p95"))]
            for row in answer.value]
    blocks: list[Any] = ["### Accuracy on timings that the fits did not see",
                         "100 % less the absolute relative error: median, and 95th percentile. Where "
                         "nothing was measured on the card itself there is none.",
                         table(["module", "card or link", "origin", "median", "95th percentile"], rows)]

    def best(module: str) -> str:
        mine = [row for row in known if row["module"] == module]
        return ", ".join(f"{100 * (1 - row['median']):.1f} % ({row['subject']})" for row in mine) or "none"

    return blocks, [
        Finding("accuracy-attention", best("decode_attention"),
                "Median over held-out kernel timings of the A100; nothing of the RTX 3090 and the P100 was "
                "measured for this. No line follows how batch times heads falls onto the multiprocessors."),
        Finding("accuracy-transfer", best("transfer"),
                "Median over held-out messages; the 100 Gb/s network is derived from other links.")]


def _why(answers: Sequence[Answer]) -> str:
    return "Failed: " + next((answer.error for answer in answers if answer.error), "")
