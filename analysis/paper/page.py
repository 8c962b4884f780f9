"""The page: Markdown with a table of all statements, and the sections with their figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from analysis.figures.charts import Chart
from analysis.figures.draw import save_chart
from analysis.paper.claims import CLAIMS, PAPER, Claim
from analysis.paper.scale import MODEL_NAMES, WORKLOAD_NAMES, Scale, policy_name
from analysis.paper.section import Finding, Section, table
from analysis.paper.store import code_hash
from hetis_sim.policies.registry import policy_names

PAGE_LINK = re.compile(r"\[([^\]]+)\]\(([a-z]+\.md)[^)]*\)")
PICTURE = re.compile(r"^!\[[^\]]*\]\([^)]*?([\w.-]+)\.svg\)$", re.MULTILINE)
NOT_RUN = "not run"
NOT_MODELLED = "not modelled"


def write_page(page: Path, pictures: Path, scale: Scale, sections: Sequence[Section],
               formats: Sequence[str] = ("svg",), *, in_docs: bool = False) -> None:
    """Write ``page`` and the figures that it shows, in ``pictures``; those that it showed before are removed.

    Links to other pages of the documentation stay links on a page that lies among them.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    shown = page.read_text(encoding="utf-8") if page.is_file() else ""
    for key in PICTURE.findall(shown):
        # What else lies there is not ours.
        for suffix in (".svg", ".pdf"):
            (pictures / f"{key}{suffix}").unlink(missing_ok=True)
    for section in sections:
        for chart in section.charts:
            save_chart(_marked(chart, scale), pictures, formats)
    text = page_text(scale, sections, pictures.relative_to(page.parent).as_posix())
    if not in_docs:
        text = PAGE_LINK.sub(r"\1 (docs/\2)", text)
    page.write_text(text, encoding="utf-8")


def _marked(chart: Chart, scale: Scale) -> Chart:
    """A chart that says when it was made in a hurry."""
    if scale.name == "full":
        return chart
    return replace(chart, note=f"{chart.note}, {scale.name}" if chart.note else scale.name)


def page_text(scale: Scale, sections: Sequence[Section], pictures: str) -> str:
    """The page in Markdown; ``pictures`` is the way from it to its figures."""
    parts = ["# The paper's evaluation in the simulator", _introduction(scale), statement_table(sections)]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [f"![{block.title}]({pictures}/{block.key}.svg)\n\n*{block.caption}*"
                  if isinstance(block, Chart) else block for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _introduction(scale: Scale) -> str:
    hurry = "" if scale.name == "full" else (
        f"\n\n**A {scale.name} run: too few seeds and requests for these figures to be cited.**")
    named = [*(MODEL_NAMES[name] for name in MODEL_NAMES if name not in scale.models),
             *(WORKLOAD_NAMES[name] for name in WORKLOAD_NAMES if name not in scale.workloads),
             *(policy_name(name) for name in policy_names() if name not in scale.policies)]
    without = f" Left out here: {', '.join(named)}." if named else ""
    return (f"What {PAPER} states, beside what comes out here. Everything is simulated with "
            "[durations](cost.md) from kernel timings and datasheets; nothing is tuned to a figure of the "
            "paper. The paper's values are \"up to\" over its models and traces; ours are worked out the "
            "same way, the largest over all cells, with the 95 % interval of that cell over seeds: a "
            "largest of several is above what one cell would give on average. Where no value of the paper "
            "is given, the row is ours. `python -m analysis paper` makes this page anew (code "
            f"{code_hash()[:12]}).{without}{hurry}")


def statement_table(sections: Sequence[Section]) -> str:
    """Every statement of the paper with our answers; several sections may add to one."""
    found = [finding for section in sections for finding in section.findings]
    rows = [_row(claim, [finding for finding in found if finding.claim == claim.key]) for claim in CLAIMS]
    return table(["quantity", "paper", "here", "remark"], rows, texts=4)


def _row(claim: Claim, findings: Sequence[Finding]) -> list[str]:
    paper = claim.value or "(ours)"
    if any(finding.ours for finding in findings):
        return [claim.quantity, paper, "; ".join(finding.ours for finding in findings if finding.ours),
                " ".join(finding.note for finding in findings if finding.note)]
    if claim.section:
        return [claim.quantity, paper, NOT_RUN, ""]
    return [claim.quantity, paper, NOT_MODELLED, "Times of storing and indexing cache blocks are part of no "
                                                 "duration here."]
