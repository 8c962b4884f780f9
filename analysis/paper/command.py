"""``python -m analysis paper``: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from analysis.paper.evaluation import Evaluation
from analysis.paper.options import check_options, tell
from analysis.paper.page import write_page
from analysis.paper.scale import BASELINES, FULL, HETIS, QUICK, Scale
from analysis.paper.section import Section
from analysis.paper.sections import (
    assumptions,
    curves,
    devices,
    granularity,
    latency,
    search,
    serving,
    sweeps,
)
from analysis.paper.store import Store
from hetis_sim.spec.errors import HetisError, require

SECTIONS: dict[str, Callable[[Evaluation], Section]] = {
    "serving": serving.build, "latency": latency.build, "curves": curves.build,
    "assumptions": assumptions.build, "devices": devices.build, "granularity": granularity.build,
    "theta": sweeps.theta, "delta": sweeps.delta, "errors": sweeps.errors, "eviction": sweeps.eviction,
    "search": search.build}
"""In the order of the page."""

PAGE, PICTURES, ANSWERS = "paper.md", "figures", "answers"
DOCS = Path(__file__).resolve().parents[2] / "docs"

EPILOG = """examples:
  python -m analysis paper --quick --out runs/look      everything in small
  python -m analysis paper --only devices --only search
  python -m analysis paper --docs                       also writes docs/paper.md and its pictures

Answers are kept in FOLDER/answers; a run that was cut off goes on where it was, and answers of other code or
settings are never used.
"""


def parser() -> argparse.ArgumentParser:
    """The words it knows."""
    made = argparse.ArgumentParser(
        prog="python -m analysis paper", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
        description="Run the evaluation of the Hetis paper in the simulator and write a page with figures.")
    made.add_argument("--out", metavar="FOLDER", default="runs/paper", help="where to write (default: "
                                                                            "runs/paper)")
    made.add_argument("--quick", action="store_true", help="fewer cells, seeds and requests")
    made.add_argument("--only", action="append", metavar="SECTION", help=f"one of {', '.join(SECTIONS)}; may "
                                                                         "be repeated")
    for name, kind in (("models", "models"), ("workloads", "workloads"),
                       ("policies", "policies beside Hetis and the paper's baselines")):
        made.add_argument(f"--{name}", metavar="NAMES",
                          help=f"some of the {kind}, separated by commas (default: all)")
    made.add_argument("--docs", action="store_true", help="also write docs/paper.md and docs/paper/*.svg")
    made.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    return made


def main(words: Sequence[str]) -> None:
    """Run and print where the page is.

    Raises:
        SpecError: bad input; the text says what is allowed.
        HetisError: a fault in the code came up; the page is written all the same.
    """
    given = parser().parse_args(words)
    check_options(given, SECTIONS, DOCS)
    out = Path(given.out)
    store = Store(out / ANSWERS, given.workers, tell)
    scale = narrowed(QUICK if given.quick else FULL, given.models, given.workloads, given.policies)
    sections = run(scale, store, given.only)
    write_page(out / PAGE, out / PICTURES, scale, sections, ("svg", "pdf"))
    print(out / PAGE)
    if given.docs:
        write_page(DOCS / PAGE, DOCS / "paper", scale, sections, in_docs=True)
        print(DOCS / PAGE)
    print(f"processor time of all answers: {store.cpu_s:,.0f} s", file=sys.stderr)
    if store.defects:
        raise HetisError("\n".join(["faults came up; their cells say so:", *store.defects]))


def narrowed(scale: Scale, models: str | None, workloads: str | None, policies: str | None) -> Scale:
    """A scale with some of its models and workloads, and of the policies beside the paper's.

    Raises:
        SpecError: a name that the scale does not have.
    """
    some_models = _some("models", models, scale.models)
    some_workloads = _some("workloads", workloads, scale.workloads)
    beside = _some("policies", policies, [name for name in scale.policies if name not in (HETIS, *BASELINES)])
    model, workload = scale.focus
    focus = (model if model in some_models else some_models[-1],
             workload if workload in some_workloads else some_workloads[0])
    return replace(scale, models=some_models, workloads=some_workloads, focus=focus,
                   policies=(HETIS, *BASELINES, *beside))


def _some(key: str, names: str | None, known: Sequence[str]) -> tuple[str, ...]:
    """Those that are named, separated by commas, in the order of the scale."""
    if names is None:
        return tuple(known)
    chosen = [name for name in names.split(",") if name]
    for name in chosen:
        require(name in known, key, name, f"one of {', '.join(known) or 'none here'}")
    require(bool(chosen) or key == "policies", key, names, f"at least one of {', '.join(known)}")
    return tuple(name for name in known if name in chosen)


def run(scale: Scale, store: Store, only: Sequence[str] | None = None) -> list[Section]:
    """The sections asked for, in the order of the page."""
    evaluation = Evaluation(scale, store)
    return [build(evaluation) for name, build in SECTIONS.items() if not only or name in only]
