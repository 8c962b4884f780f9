"""The page: Markdown with a table of all statements, and the sections with their figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis.figures.charts import Chart
from analysis.figures.draw import save_chart
from analysis.paper.claims import CLAIMS, PAPER, Claim
from analysis.paper.scale import Scale
from analysis.paper.section import Finding, Section, table

NOT_RUN = "not run"
NOT_MODELLED = "not modelled"


def write_page(page: Path, pictures: Path, scale: Scale, sections: Sequence[Section],
               formats: Sequence[str] = ("svg",)) -> None:
    """Write ``page`` and the figures that it shows, in ``pictures``; figures of earlier pages are removed."""
    page.parent.mkdir(parents=True, exist_ok=True)
    if pictures.is_dir():
        for old in pictures.iterdir():
            if old.suffix in (".svg", ".pdf"):
                old.unlink()
    for section in sections:
        for chart in section.charts:
            save_chart(_marked(chart, scale), pictures, formats)
    text = page_text(scale, sections, pictures.relative_to(page.parent).as_posix())
    page.write_text(text, encoding="utf-8")


def _marked(chart: Chart, scale: Scale) -> Chart:
    """A chart that says when it was made in a hurry."""
    from dataclasses import replace

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
    return (f"What {PAPER} states, beside what comes out here. Everything is simulated with "
            "[durations](cost.md) from kernel timings and datasheets; nothing is tuned to a figure of the "
            "paper. The paper's values are \"up to\" over its models and traces; ours are worked out the "
            "same way, the largest over all cells, with the 95 % interval of that cell over seeds: a "
            "largest of several is above what one cell would give on average. Where no value of the paper "
            "is given, the row is ours. `python -m analysis paper` makes this page anew." + hurry)


def statement_table(sections: Sequence[Section]) -> str:
    """Every statement of the paper with our answer."""
    found = {finding.claim: finding for section in sections for finding in section.findings}
    return table(["quantity", "paper", "here", "remark"],
                 [_row(claim, found.get(claim.key)) for claim in CLAIMS])


def _row(claim: Claim, finding: Finding | None) -> list[str]:
    paper = claim.value or "(ours)"
    if finding is not None:
        return [claim.quantity, paper, finding.ours, finding.note]
    if claim.section:
        return [claim.quantity, paper, NOT_RUN, ""]
    return [claim.quantity, paper, NOT_MODELLED, "Times of storing and indexing cache blocks are part of no "
                                                 "duration here."]
