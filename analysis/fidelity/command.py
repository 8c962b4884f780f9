"""``python -m analysis fidelity``: the command line."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from analysis.fidelity.case import METRICS, Case, DataSet, require_folder
from analysis.fidelity.errors import relative
from analysis.fidelity.page import Compared, write_page
from analysis.fidelity.sets import curves, helix, tgis, vllm
from analysis.fidelity.switches import RUNS, SWITCHES, farthest, without
from analysis.paper.options import check_options, tell
from analysis.paper.store import Job, Store
from hetis_sim.metrics.strictjson import dump_line
from hetis_sim.spec.errors import HetisError, require

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "serving_e2e"
DOCS = ROOT / "docs"
PACKAGE = "analysis.fidelity.measure"

SETS: dict[str, tuple[Callable[[Path], DataSet], str]] = {
    "vllm": (vllm.read, vllm.FOLDER), "helix": (helix.read, helix.FOLDER), "tgis": (tgis.read, tgis.FOLDER),
    "curves": (curves.read, curves.FOLDER)}
"""In the order of the page: how each is read, and its folder."""

QUICK = {"vllm": 1, "helix": 3, "tgis": 9, "curves": 2}
"""Every how many runs of a set a quick look takes."""

EPILOG = """examples:
  python -m analysis fidelity                    all data sets (some minutes on two cores)
  python -m analysis fidelity --quick            fewer runs, under a minute
  python -m analysis fidelity --only vllm --data MY/serving_e2e
  python -m analysis fidelity --docs             also writes docs/fidelity.md and its pictures

Measured by others, simulated here; nothing is fitted to these runs. Answers are kept in FOLDER/answers; a
run that was cut off goes on where it was, and answers of other code or settings are never used.
"""


def parser() -> argparse.ArgumentParser:
    """The words it knows."""
    made = argparse.ArgumentParser(
        prog="python -m analysis fidelity", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Simulate public measured runs and say how far off the simulator is.")
    made.add_argument("--data", metavar="FOLDER", default=str(DATA), help="where the measured runs are "
                                                                          "(default: "
                                                                         "../shared/data/serving_e2e)")
    made.add_argument("--out", metavar="FOLDER", default="runs/fidelity", help="where to write (default: "
                                                                               "runs/fidelity)")
    made.add_argument("--quick", action="store_true", help="fewer runs")
    made.add_argument("--only", action="append", metavar="SET", help=f"one of {', '.join(SETS)}; may be "
                                                                     "repeated")
    made.add_argument("--docs", action="store_true", help="also write docs/fidelity.md and "
                                                          "docs/fidelity/*.svg")
    made.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    return made


def main(words: Sequence[str]) -> None:
    """Run and print where the page is.

    Raises:
        SpecError: bad input; the text says what is allowed.
        HetisError: a file of the data is missing or faulty, or a fault in the code came up.
    """
    given = parser().parse_args(words)
    check_options(given, SETS, DOCS)
    data, out = Path(given.data), Path(given.out)
    require_folder(data, "data")
    sets = read_sets(data, given.only, quick=given.quick)
    store = Store(out / "answers", given.workers, tell)
    compared = [compare(found, store) for found in sets]
    write_tables(out, compared)
    write_page(out / "fidelity.md", out / "figures", compared, quick=given.quick, formats=("svg", "pdf"))
    print(out / "fidelity.md")
    if given.docs:
        write_page(DOCS / "fidelity.md", DOCS / "fidelity", compared, in_docs=True)
        print(DOCS / "fidelity.md")
    print(f"processor time of all answers: {store.cpu_s:,.0f} s", file=sys.stderr)
    if store.defects:
        raise HetisError("\n".join(["faults came up; their runs are left out:", *store.defects]))


def read_sets(data: Path, only: Sequence[str] | None = None, *, quick: bool = False) -> list[DataSet]:
    """The data sets that are there, or those asked for.

    Raises:
        SpecError: one that was asked for is not there, or none is.
        HetisError: a file is missing or faulty.
    """
    names = [name for name in SETS if (name in only if only else (data / SETS[name][1]).is_dir())]
    require(bool(names), "data", str(data), f"a folder with some of {', '.join(f for _, f in SETS.values())}")
    found = []
    for name in names:
        read, folder = SETS[name]
        require_folder(data / folder, "data")
        given = read(data)
        found.append(replace(given, cases=given.cases[::QUICK[name]]) if quick else given)
    return found


def compare(found: DataSet, store: Store) -> Compared:
    """Simulate all runs of a data set."""
    answers = store.answers(found.key, [job(case) for case in found.cases])
    compared = Compared(found, [(case, answer.value, answer.error) for case, answer in
                                zip(found.cases, answers, strict=True)])
    return replace(compared, switched=switched(compared, store))


def job(case: Case) -> Job:
    """What simulates a run."""
    return Job("replay.run", case.arguments(), PACKAGE)


def switched(compared: Compared, store: Store) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics of the runs farthest off without each mechanism, by run and mechanism."""
    key = compared.given.key
    switches = SWITCHES.get(key, {})
    cases = {case.name: case for case, _, _ in compared.runs}
    names = farthest([compared.pairs(metric) for metric in ("output_throughput", "mean_tpot_s")], RUNS)
    asked = [(name, what, without(cases[name], words)) for name in names for what, words in switches.items()]
    answers = store.answers(f"{key}, mechanisms", [job(case) for _, _, case in asked])
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in names}
    for (name, what, _), answer in zip(asked, answers, strict=True):
        if answer.value:
            found[name][what] = answer.value["metrics"]
    return found


def write_tables(out: Path, compared: Sequence[Compared]) -> None:
    """``points.csv``, a row for each run and metric, and ``fidelity.json`` with the errors."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "points.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("data_set", "run", "metric", "measured", "simulated", "error"))
        for each in compared:
            for case, answer, _ in each.runs:
                for metric in METRICS:
                    if answer and metric in case.measured and metric in answer["metrics"]:
                        a, b = case.measured[metric], answer["metrics"][metric]
                        error = relative(a, b) if a > 0 else ""
                        writer.writerow((each.given.key, case.name, metric, a, b, error))
    document = {each.given.key: each.document() for each in compared}
    (out / "fidelity.json").write_text(dump_line(document), encoding="utf-8")
