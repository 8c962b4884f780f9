"""The page itself: one HTML file that needs nothing else.

A content security policy in the page keeps any browser from loading anything over a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources

from analysis.figures.charts import BarChart, Chart, Diagram
from analysis.report.encode import chart_value, dump, style_value
from analysis.report.tables import TextTable

SCRIPTS = ("base.js", "charts.js", "places.js")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

FOOTER = """Point at a figure for its values, press a name to hide its series, drag to zoom in,
double-click to zoom out. Square brackets hold 95 % intervals; a question mark stands where the run is
too short for a limit. <em>simulated</em>: durations come from cost models, nothing was measured.
<em>measured</em>: times were taken on the devices named. The same figures may lie beside this page in
<code>figures/</code>, one column of a paper wide."""


@dataclass(frozen=True)
class Section:
    """One part of a page.

    Attributes:
        anchor: for links.
        title: its heading.
        origins: labels beside the heading.
        notes: what a reader must know beside the figures.
        tables: shown first.
        charts: shown next.
        folded: tables that open on demand.
    """

    anchor: str
    title: str
    origins: Sequence[str]
    notes: Sequence[str] = ()
    tables: Sequence[TextTable] = ()
    charts: Sequence[Chart] = ()
    folded: Sequence[TextTable] = field(default=())


def render(title: str, headline: Sequence[str], warnings: Sequence[str], sections: Sequence[Section],
           notes: Sequence[str] = ()) -> str:
    """The whole page; equal arguments give equal text."""
    charts = {chart.key: chart_value(chart) for section in sections for chart in section.charts}
    data = dump({"style": style_value(), "charts": charts})
    parts = [
        _head(title), f"<header><h1>{escape(title)}</h1>", _box("headline", headline), _box("warning",
                                                                                            warnings),
        _notes(notes), _navigation(sections), "</header>",
        "<noscript><p>The figures of this page are drawn by its script, which is switched off here. They lie "
        "beside it "
        "in <code>figures/</code>.</p></noscript>", "<main>",
        *(_section(section) for section in sections), "</main>", f"<footer><p>{FOOTER}</p></footer>",
        # The parser gives this element its namespace, which the script asks it for.
        '<svg id="ns" width="0" height="0" aria-hidden="true"></svg>',
        f'<script type="application/json" id="report-data">{data}</script>',
        f"<script>{_script()}</script>", "</body>", "</html>"]
    return "\n".join(part for part in parts if part) + "\n"


def _asset(name: str) -> str:
    return resources.files("analysis.report").joinpath("assets", name).read_text(encoding="utf-8")


def _script() -> str:
    text = "\n".join(_asset(name) for name in SCRIPTS)
    assert "</script" not in text
    return f"(() => {{\n{text}}})();"


def _head(title: str) -> str:
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title>", f"<style>\n{_asset('report.css')}</style>", "</head>", "<body>"])


def _box(kind: str, sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return f'<div class="{kind}">{"".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)}</div>'


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if notes else ""


def _navigation(sections: Sequence[Section]) -> str:
    if len(sections) < 2:
        return ""
    links = "".join(f'<a href="#{escape(s.anchor)}">{escape(s.title)}</a>' for s in sections)
    return f"<nav>{links}</nav>"


def _badges(origins: Sequence[str]) -> str:
    return "".join(f' <span class="badge {escape(origin)}">{escape(origin)}</span>' for origin in origins)


def _section(section: Section) -> str:
    charts = "\n".join(_figure(chart, section.origins) for chart in section.charts)
    return "\n".join(part for part in [
        f'<section id="{escape(section.anchor)}">',
        f"<h2>{escape(section.title)}{_badges(section.origins)}</h2>",
        _notes(section.notes), *(_table(table) for table in section.tables),
        f'<div class="charts">\n{charts}\n</div>' if section.charts else "",
        *(f"<details><summary>{escape(table.title)}</summary>{_table(table, caption=False)}</details>"
          for table in section.folded), "</section>"] if part)


def _figure(chart: Chart, origins: Sequence[str]) -> str:
    zooms = not isinstance(chart, (BarChart, Diagram))
    reset = '<button type="button" class="reset" hidden>show all</button>' if zooms else ""
    return (f'<figure data-chart="{escape(chart.key)}"><div class="head"><h3>{escape(chart.title)}</h3>'
            f"<span>{_badges(_own_origins(chart, origins))}</span>{reset}</div>"
            f'<div class="plot"></div><figcaption>{escape(chart.caption)}</figcaption></figure>')


def _own_origins(chart: Chart, origins: Sequence[str]) -> list[str]:
    return [origin for origin in origins if origin in chart.origin]


def _table(table: TextTable, *, caption: bool = True) -> str:
    """A table in a box of its own, which scrolls where the table is wider than the page."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    title = f"<caption>{escape(table.title)}</caption>" if caption else ""
    shown_head = f"<thead><tr>{head}</tr></thead>" if any(table.header) else ""
    kind = ' class="prose"' if table.prose else ""
    return (f'<div class="tablebox"><table{kind}>{title}{shown_head}<tbody>\n{rows}\n</tbody></table></div>')
