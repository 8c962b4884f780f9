"""``python -m analysis report``: the command line of reports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from analysis.report.build import DETAILS, ReportOptions, build_report
from hetis_sim.spec.errors import require

EPILOG = """examples:
  python -m analysis report runs/2026-01-31/12-00-00_hetis_sharegpt
  python -m analysis report runs/2026-01-31/13-00-00_sweep --out rates
  python -m analysis report runs/hetis runs/vllm --bound 7.9 --formats pdf,png
"""


def parser() -> argparse.ArgumentParser:
    """The words it knows."""
    made = argparse.ArgumentParser(
        prog="python -m analysis report", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
        description="Make a page (report.html) and figures of run folders, simulated or measured.")
    made.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or the folder of a sweep")
    made.add_argument("--out", metavar="FOLDER", help="where to write; by default 'report' in or beside the "
                                                      "runs")
    made.add_argument("--formats", default="pdf,svg",
                      help="formats of the figures: pdf, svg, png, or none for the page alone (default: "
                           "pdf,svg)")
    made.add_argument("--details", type=int, default=DETAILS, metavar="N",
                      help=f"at most so many runs are shown one by one (default: {DETAILS})")
    made.add_argument("--bound", type=float, metavar="REQUESTS_PER_S",
                      help="throughput that no policy can exceed, drawn beside the policies'")
    made.add_argument("--window", type=float, nargs=2, metavar=("FROM_S", "TO_S"),
                      help="show the requests one by one that arrive in this stretch of time")
    made.add_argument("--title", help="heading of the page")
    return made


def main(words: Sequence[str]) -> None:
    """Make a report and print where it is.

    Raises:
        SpecError: bad input; the text says what is allowed.
    """
    given = parser().parse_args(words)
    formats = () if given.formats == "none" else tuple(name for name in given.formats.split(",") if name)
    require(given.formats == "none" or len(formats) > 0, "formats", given.formats, "pdf, svg, png or none")
    window = None if given.window is None else (given.window[0], given.window[1])
    options = ReportOptions(formats, given.details, given.bound, window, given.title)
    with progress_bar() as progress:
        page = build_report(given.runs, given.out, options, progress)
    print(page)


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    """Progress on standard error; nothing where that is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("figures", total=None)
        yield lambda drawn, total: progress.update(task, completed=drawn, total=total)
