"""A part of the evaluation: text, figures, and what it answers of the paper's statements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis.figures.charts import Chart


@dataclass(frozen=True)
class Finding:
    """Our answer to a statement of the paper.

    Attributes:
        claim: key of the statement.
        ours: our figures; empty where another section has them, and this one adds a remark.
        note: where and why they differ, or how they were worked out.
    """

    claim: str
    ours: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One part.

    Attributes:
        key, title: what ``--only`` calls it, and its heading.
        blocks: paragraphs and tables in Markdown, and charts, in order.
        findings: answers.
    """

    key: str
    title: str
    blocks: Sequence[str | Chart]
    findings: Sequence[Finding] = ()

    @property
    def charts(self) -> list[Chart]:
        """Its figures."""
        return [block for block in self.blocks if isinstance(block, Chart)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table; the first ``texts`` columns are text, the others are figures."""
    lines = [header, [*["---"] * texts, *["---:"] * (len(header) - texts)], *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def by_rows(columns: Mapping[str, Mapping[str, str]], first: str) -> str:
    """A table from columns of figures by row."""
    names = list(dict.fromkeys(row for column in columns.values() for row in column))
    return table([first, *columns], [[name, *(column.get(name, "-") for column in columns.values())]
                                     for name in names])
