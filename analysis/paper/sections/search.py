"""How long searches for plans take."""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.figures.charts import Axis, Line, XYChart
from analysis.paper.evaluation import Evaluation
from analysis.paper.measure.searches import FIVE_TYPES, GPUS_PER_HOST
from analysis.paper.scale import HETIS
from analysis.paper.section import Finding, Section, table
from analysis.paper.sections.serving import label
from analysis.paper.store import Answer, Job


def build(evaluation: Evaluation) -> Section:
    """The section."""
    scale = evaluation.scale
    words = [f"cluster={scale.cluster}", f"model={scale.focus[0]}", f"workload={scale.focus[1]}"]
    small = [Job("searches.search", {"words": words, "policy": dict(variant.policy)})
             for variant in evaluation.variants.values()]
    large = [Job("searches.search", {"words": words, "policy": {"name": HETIS}, "hosts": hosts})
             for hosts in scale.hosts]
    answers = evaluation.store.answers("search", [*small, *large])
    testbed, clusters = answers[:len(small)], answers[len(small):]
    rows = [[label(name), f"{answer.value['gpus']}", f"{answer.value['seconds']:.1f}"] if not answer.error
            else [label(name), answer.error, "-"]
            for name, answer in zip(evaluation.variants, testbed, strict=True)]
    blocks: list[Any] = [
        "Processor time on the machine that made this page, one core, from the configuration to the plan; "
        "the only figures here that differ from run to run.",
        table(["policy", "GPUs", "seconds"], rows),
        f"Hetis on clusters of five kinds of GPU ({', '.join(FIVE_TYPES)}; the kinds are ours), "
        f"{GPUS_PER_HOST} in a host:"]
    good = [answer.value for answer in clusters if not answer.error]
    blocks.append(table(["GPUs", "seconds"], [[f"{v['gpus']}", f"{v['seconds']:.1f}"] for v in good]))
    if good:
        blocks.append(XYChart(
            key="search", title="Search for a plan", caption="Processor time of the search for Hetis' plan "
                                                             "over the size of the cluster, five kinds of "
                                                             "GPU.", origin="measured on this machine",
            x=Axis("GPUs", low=0.0), y=Axis("seconds", low=0.0),
            lines=[Line("Hetis", np.array([float(v["gpus"]) for v in good]),
                        np.array([v["seconds"] for v in good]), markers=True)]))
    return Section("search", "Searches for plans", blocks, _findings(testbed[0], good))


def _findings(testbed: Answer, large: list[Any]) -> list[Finding]:
    findings = [Finding("search-testbed", testbed.error or f"{testbed.value['seconds']:.1f} s",
                        "One core; the durations that the search goes by are worked out within it.")]
    if large:
        most = max(large, key=lambda value: float(value["gpus"]))
        findings.append(Finding("search-large", f"{most['seconds']:.1f} s for {most['gpus']} GPUs",
                                "One core; large clusters are searched by a short list, not exhaustively."))
    return findings
