"""A summary for people (terminal, Markdown) and for machines (one line of JSON)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from hetis_sim.metrics.rows import (
    DEVICE_HEADER,
    LATENCY_HEADER,
    Row,
    as_dict,
    device_rows,
    latency_rows,
    notes,
    rate_rows,
    warnings,
)
from hetis_sim.metrics.strictjson import dump_line
from hetis_sim.metrics.summary import Summary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PLAIN_WIDTH = 110


def print_summary(summary: Summary | Mapping[str, Any], *, file: TextIO | None = None,
                  width: int | None = None, title: str = "", provenance: Sequence[str] = ()) -> None:
    """Print a summary: latencies, rates and counts, devices, warnings.

    In anything but a terminal the text is 110 columns wide and free of control sequences.
    Where the latencies do not fit with their intervals, they are printed without.

    Args:
        summary: fresh, or ``load_run(path).summary``.
        file: where to; standard output by default.
        width: columns; the terminal's by default.
        title: a first line.
        provenance: sentences on where the durations come from, printed last.
    """
    figures = as_dict(summary)
    file = file or sys.stdout
    console = _console(file, width)
    with console.capture() as capture:
        _print_blocks(console, figures, title, provenance)
    # Tables come padded to their width; a file is better off without.
    file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def _print_blocks(console: Console, figures: Mapping[str, Any], title: str,
                  provenance: Sequence[str]) -> None:
    if title:
        console.print(title, style="bold")
    latencies = [LATENCY_HEADER, *latency_rows(figures)]
    if _needed_width(latencies) > console.width:
        latencies = [tuple(cell.partition(" [")[0] for cell in row) for row in latencies]
    console.print(_table(latencies[0], latencies[1:]))
    console.print(_pairs(rate_rows(figures)))
    if figures["devices"]:
        console.print(_table(DEVICE_HEADER, device_rows(figures), text_columns=2))
    for warning in warnings(figures):
        console.print(f"warning: {warning}", style="bold yellow", soft_wrap=True)
    for note in (*notes(figures), *provenance):
        console.print(f"note: {note}", style="dim", soft_wrap=True)


def _console(file: TextIO, width: int | None) -> Console:
    from rich.console import Console

    terminal = file.isatty()
    return Console(file=file, width=width or (None if terminal else PLAIN_WIDTH), force_terminal=terminal,
                   color_system="auto" if terminal else None, markup=False, emoji=False, highlight=False)


def _needed_width(rows: Sequence[Row]) -> int:
    """Columns that a table takes: the widest cells, and two columns of space after each."""
    return sum(max(len(cell) for cell in column) + 2 for column in zip(*rows, strict=True))


def _table(header: Row, rows: Sequence[Row], text_columns: int = 1) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for number, name in enumerate(header):
        left = number < text_columns
        table.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _pairs(rows: Sequence[Row]) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def summary_markdown(summary: Summary | Mapping[str, Any], *, title: str = "",
                     provenance: Sequence[str] = ()) -> str:
    """The same as Markdown."""
    figures = as_dict(summary)
    blocks = [f"## {title}"] if title else []
    blocks.append(_markdown_table(LATENCY_HEADER, latency_rows(figures)))
    blocks.append(_markdown_table(("figure", "value"), rate_rows(figures)))
    if figures["devices"]:
        blocks.append(_markdown_table(DEVICE_HEADER, device_rows(figures)))
    blocks += [f"**Warning:** {warning}" for warning in warnings(figures)]
    blocks.append("\n".join(f"- {remark}" for remark in (*notes(figures), *provenance)))
    return "\n\n".join(blocks) + "\n"


def _markdown_table(header: Row, rows: Sequence[Row]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def summary_line(summary: Summary | Mapping[str, Any], **context: Any) -> str:
    """All figures as one line of strict JSON, after the given context (policy, rate, seed)."""
    return dump_line({**context, **as_dict(summary)})
