"""What a validation writes, and what it prints."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from hetis_exec.config import ExecutionConfig
from hetis_exec.validate.case import Compared, Validation
from hetis_exec.validate.compare import Error, plain_error
from hetis_exec.validate.profiles import hashes_of
from hetis_exec.validate.ranking import agreement
from hetis_sim.metrics import build_manifest
from hetis_sim.metrics.manifest import value_sha256
from hetis_sim.metrics.strictjson import plain

FORMAT = 2
RESULT, TABLE, REQUESTS = "validation.json", "validation.csv", "requests.parquet"
SHOWN = ("mean", "p95")


def write_validation(folder: Path, config: ExecutionConfig, found: Validation) -> Path:
    """Write ``validation.json``, ``validation.csv`` and ``requests.parquet``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = [{"policy": one.policy, "load": one.load, "capacity_rps": one.capacity_rps,
              "rate_rps": one.rate_rps, "errors": [plain_error(error) for error in one.errors],
              "parts": [plain_error(part) for part in one.parts], "runs": one.runs} for one in found.cases]
    manifest = build_manifest(label="measured", seeds={"workload": config.workload.seed},
                              hashes={"config": value_sha256(asdict(config))},
                              extra={"profiles": hashes_of(config)})
    content = {"format": FORMAT, "complete": found.complete, "left_out": found.left_out,
               "failed": found.failed, "manifest": manifest, "config": asdict(config),
               "capacities": found.capacities, "ranking": [asdict(order) for order in found.orders],
               "cases": cases}
    text = json.dumps(plain(content), indent=1) + "\n"
    rows = pd.DataFrame([{"policy": one.policy, "load": one.load, **plain_error(error)}
                         for one in found.cases for error in one.errors])
    requests = pd.concat([one.requests for one in found.cases], ignore_index=True)
    _replace(folder / REQUESTS, lambda path: requests.to_parquet(path, index=False))
    _replace(folder / TABLE, lambda path: rows.to_csv(path, index=False))
    _replace(folder / RESULT, lambda path: path.write_text(text, encoding="utf-8"))
    return folder


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)


def print_validation(found: Validation) -> None:
    """The table of errors, the pace of the machine, parts of iterations that differ, and the ranking."""
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    console.print(_errors_table(found.cases))
    for line in pace_lines(found.cases):
        console.print(line, soft_wrap=True)
    console.print(_parts_table(found.cases))
    for line in ranking_lines(found):
        console.print(line, soft_wrap=True)


def _errors_table(cases: Sequence[Compared]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    headers = ("policy", "load", "figure", "", "measured", "simulated", "error", "95% interval",
               "real against real", "at measured pace")
    for header in headers:
        table.add_column(header, justify="left" if header in ("policy", "figure", "") else "right")
    for one in cases:
        for n, error in enumerate(error for error in one.errors if error.statistic in SHOWN):
            first = (one.policy, f"{one.load:.0%}") if n == 0 else ("", "")
            table.add_row(*first, error.metric.replace("_", " "), error.statistic, *_cells(error))
    return table


def _cells(error: Error) -> tuple[str, ...]:
    return (f"{error.measured:.4g}", f"{error.simulated:.4g}", _percent(error.error),
            _range(error.low, error.high), _range(error.noise_low, error.noise_high), _percent(error.paced))


def pace_lines(cases: Sequence[Compared]) -> list[str]:
    """How fast the machine was beside the runs of each case, as a share of its calibrated speed."""
    lines = []
    for one in cases:
        words = []
        for kind in one.runs[0]["slowdown"]:
            for part in one.runs[0]["slowdown"][kind]:
                speeds = sorted(1.0 / run["slowdown"][kind][part] for run in one.runs if run["slowdown"])
                ends = f"{speeds[0]:.2f}" if len(speeds) == 1 else f"{speeds[0]:.2f} to {speeds[-1]:.2f}"
                words.append(f"{kind} {part} {ends}")
        if words:
            lines.append(f"{one.policy}, {one.load:.0%}: machine at {', '.join(words)} of its calibrated "
                         "speed")
    return lines


def ranking_lines(found: Validation) -> list[str]:
    """Whether policies rank alike in both worlds."""
    if not found.orders:
        return []
    plain, paced = agreement(found.orders), agreement(found.orders, paced=True)
    lines = [f"ranking of policies: {plain['same']} of {len(found.orders)} pairs as measured, {plain['tie']} "
             f"that measurements cannot tell apart, {plain['other']} the other way round "
             f"({paced['other']} at the measured pace)"]
    for order in found.orders:
        if "other" in (order.verdict, order.paced_verdict):
            where = "" if math.isnan(order.load) else f" at {order.load:.0%}"
            pace = "" if math.isnan(order.paced) else f", at the measured pace {_percent(order.paced)}"
            lines.append(f"  {order.metric}{where}: {order.first} against {order.second}: measured "
                         f"{_percent(order.measured)}, simulated {_percent(order.simulated)}{pace}")
    return lines


def _parts_table(cases: Sequence[Compared]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False,
                  title="milliseconds of an iteration: the cost model's for the measured steps, less measured"
                        " (measured); below, the same at the pace of the moment, and the simulation's less"
                        " measured")
    kinds = [(one, kind) for one in cases for kind in dict.fromkeys(part.kind for part in one.parts)]
    names = list(dict.fromkeys(part.part for one in cases for part in one.parts if part.part != "requests"))
    for header in ("policy", "load", "kind", *names):
        left = header in ("policy", "kind")
        table.add_column(header.replace("_", " "), justify="left" if left else "right")
    for one, kind in kinds:
        here = {part.part: part for part in one.parts if part.kind == kind}
        table.add_row(one.policy, f"{one.load:.0%}", kind, *[
            f"{_milliseconds(part.same_s - part.measured_s)} ({1e3 * part.measured_s:.2f})"
            for part in (here[name] for name in names)])
        for column in ("same_paced_s", "simulated_s"):
            table.add_row("", "", "", *[_milliseconds(getattr(here[name], column) - here[name].measured_s)
                                        for name in names])
    return table


def _milliseconds(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{1e3 * seconds:+.2f}"


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:+.1f}%"


def _range(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{_percent(low)} to {_percent(high)}"
