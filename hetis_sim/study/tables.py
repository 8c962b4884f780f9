"""What a person reads of a study in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from hetis_sim.config import RunConfig
from hetis_sim.metrics.strictjson import dump_line
from hetis_sim.study.bound.result import Bound
from hetis_sim.study.capacity import Capacity
from hetis_sim.study.compare import Comparison, units

PLAIN_WIDTH = 110
Row = tuple[str, ...]

SIMULATED = "simulated: nothing here was measured on hardware"
CAPACITY_HEADER = ("policy", "requests/s at the SLO", "of bound", "in overload", "of bound", "seeds", "runs")


@contextmanager
def study_progress(config: RunConfig, what: str) -> Iterator[Callable[[], None] | None]:
    """Tasks that have ended, on standard error; nothing where that is not a terminal."""
    if not config.progress or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}: {task.completed:.0f} tasks ended")
    with Progress(SpinnerColumn(), text, TimeElapsedColumn(), console=Console(stderr=True),
                  transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda: progress.advance(task)


# -- capacity ----------------------------------------------------------------------------------


def print_capacity(config: RunConfig, found: Capacity) -> None:
    """Print a capacity in the configured form: a table, or one line of JSON."""
    if config.output in ("table", "markdown"):
        _print_table(config, CAPACITY_HEADER, [capacity_row(found)])
        _print_notes(capacity_notes(found))
    if config.output == "json":
        print(dump_line({"study": "capacity", **found.to_dict()}))


def capacity_row(found: Capacity) -> Row:
    """One line of the table."""
    share = found.share_of_bound
    return (found.policy, found.slo.text(), _percent(share["slo"]), found.throughput.text(),
            _percent(share["throughput"]), str(len(found.seeds)), str(found.runs))


def capacity_notes(found: Capacity) -> list[str]:
    """What the figures mean, and what a reader must know."""
    return [f"[95 % interval over seeds]; {found.requests} requests a run in the search, "
            f"{found.overload_requests} in overload",
            f"SLO: ttft <= {found.ttft_s:g} s and tpot <= {found.tpot_s:g} s for "
            f"{_percent(found.attainment)} of the requests, and no queue that grows; "
            f"searched to {_percent(found.tolerance)}",
            f"bound: {found.bound.sentence()}",
            f"plan: {_counted(found.instances)}", *found.notes, SIMULATED]


# -- comparison --------------------------------------------------------------------------------


def print_comparison(config: RunConfig, found: Comparison) -> None:
    """Print a comparison in the configured form: tables, or one line of JSON."""
    if config.output in ("table", "markdown"):
        print(f"{found.headline}\n")
        _print_table(config, ("metric", *(entry.policy for entry in found.entries)), metric_rows(found))
        first = found.entries[0].policy
        for other in found.differences:
            print()
            _print_table(config, ("paired by seed", f"{first} - {other}", f"{first} / {other}"),
                         difference_rows(found, other))
        _print_notes(comparison_notes(config, found))
    if config.output == "json":
        print(dump_line({"study": "compare", **found.to_dict()}))


def metric_rows(found: Comparison) -> list[Row]:
    """One line a metric, with all policies."""
    known = {name: unit for name, unit in units().items() if name in found.entries[0].metrics}
    return [(_named(name, unit), *(entry.metrics[name].text() for entry in found.entries))
            for name, unit in known.items()]


def difference_rows(found: Comparison, other: str) -> list[Row]:
    """One line a metric: the first policy against another one."""
    pairs = found.differences[other]
    return [(_named(name, unit), pairs[name].difference.text() + (" *" if pairs[name].decided else "  "),
             pairs[name].ratio.text()) for name, unit in units().items() if name in pairs]


def comparison_notes(config: RunConfig, found: Comparison) -> list[str]:
    """What the figures mean, and what a reader must know."""
    highest = max(entry.metrics["request_throughput"].mean for entry in found.entries)
    return [f"{len(found.seeds)} seeds, {found.requests} requests each at {found.rate_rps:.4g} requests/s: "
            "the same requests at the same times for every policy",
            "[95 % interval over seeds]; * the interval of the difference leaves out zero; ratios are "
            "geometric means",
            f"SLO: ttft <= {config.slo.ttft_s:g} s and tpot <= {config.slo.tpot_s:g} s",
            f"bound: {found.bound.sentence()}; {_percent(found.bound.share(highest))} of it is reached here",
            *(f"plan of {entry.policy}: {_counted(entry.instances)}" for entry in found.entries),
            *(_shares(entry.policy, entry.capacity) for entry in found.entries if entry.capacity),
            *found.notes, SIMULATED]


def _shares(policy: str, found: Capacity) -> str:
    share = found.share_of_bound
    return (f"capacity of {policy}: {_percent(share['slo'])} of the bound at the SLO, "
            f"{_percent(share['throughput'])} in overload")


# -- the bound ---------------------------------------------------------------------------------


def print_bound(bound: Bound) -> None:
    """Print the bound under a plan."""
    print(f"bound: {bound.sentence()}")


# -- parts -------------------------------------------------------------------------------------


def _named(name: str, unit: str) -> str:
    return f"{name.replace('_', ' ')} ({unit})"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share == share else "-"


def _counted(words: Sequence[str]) -> str:
    """Equal instances together: ``2 x [both: ...]``."""
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return "; ".join(f"{count} x [{word}]" for word, count in counts.items())


def _print_notes(notes: Sequence[str]) -> None:
    print("\n" + "\n".join(f"note: {note}" for note in notes))


def _print_table(config: RunConfig, header: Row, rows: Sequence[Row]) -> None:
    if config.output == "markdown":
        lines = [header, ("---",) * len(header), *rows]
        print("\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines))
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    terminal = sys.stdout.isatty()
    width = None if terminal else PLAIN_WIDTH
    console = Console(width=width, no_color=not terminal, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))
