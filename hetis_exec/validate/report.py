"""What a validation writes, and what it prints."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from hetis_exec.config import ExecutionConfig
from hetis_exec.validate.compare import Error, Part, plain_error
from hetis_exec.validate.profiles import files_of
from hetis_sim.metrics import build_manifest
from hetis_sim.metrics.manifest import value_sha256
from hetis_sim.metrics.strictjson import plain

FORMAT = 1
RESULT, TABLE, REQUESTS = "validation.json", "validation.csv", "requests.parquet"
SHOWN = ("mean", "p95")


@dataclass(frozen=True)
class Compared:
    """A policy at a load.

    Attributes:
        rate_rps: of arrivals.
        errors: of latencies, rates and use of the cache.
        parts: of iterations.
        requests: of all seeds, paired.
    """

    policy: str
    load: float
    capacity_rps: float
    rate_rps: float
    errors: list[Error]
    parts: list[Part]
    requests: pd.DataFrame


def write_validation(folder: Path, config: ExecutionConfig, found: Sequence[Compared]) -> Path:
    """Write ``validation.json``, ``validation.csv`` and ``requests.parquet``."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = [{"policy": one.policy, "load": one.load, "capacity_rps": one.capacity_rps,
              "rate_rps": one.rate_rps, "errors": [plain_error(error) for error in one.errors],
              "parts": [plain_error(part) for part in one.parts]} for one in found]
    manifest = build_manifest(label="measured", seeds={"workload": config.workload.seed},
                              hashes={"config": value_sha256(asdict(config))},
                              extra={"profiles": _hashes(config)})
    content = {"format": FORMAT, "manifest": manifest, "config": asdict(config), "cases": cases}
    (folder / RESULT).write_text(json.dumps(plain(content), indent=1) + "\n", encoding="utf-8")
    rows = [{"policy": one.policy, "load": one.load, **plain_error(error)} for one in found
            for error in one.errors]
    pd.DataFrame(rows).to_csv(folder / TABLE, index=False)
    pd.concat([one.requests for one in found], ignore_index=True).to_parquet(folder / REQUESTS, index=False)
    return folder


def _hashes(config: ExecutionConfig) -> dict[str, str]:
    return {file.name: str(json.loads(file.read_text(encoding="utf-8")).get("sha256"))
            for file in files_of(config)}


def print_validation(found: Sequence[Compared]) -> None:
    """The table of errors, and below it the parts of iterations that differ most."""
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for header in ("policy", "load", "figure", "", "measured", "simulated", "error", "95% interval", "noise"):
        table.add_column(header, justify="left" if header in ("policy", "figure", "") else "right")
    for one in found:
        for n, error in enumerate(error for error in one.errors if error.statistic in SHOWN):
            first = (one.policy, f"{one.load:.0%}") if n == 0 else ("", "")
            table.add_row(*first, error.metric.replace("_", " "), error.statistic, f"{error.measured:.4g}",
                          f"{error.simulated:.4g}", _percent(error.error),
                          f"{_percent(error.low)} to {_percent(error.high)}", _percent(error.noise))
    console.print(table)
    console.print(_parts_table(found))


def _parts_table(found: Sequence[Compared]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False,
                  title="milliseconds of an iteration, simulated less measured (measured)")
    kinds = [(one, kind) for one in found for kind in dict.fromkeys(part.kind for part in one.parts)]
    names = list(dict.fromkeys(part.part for one in found for part in one.parts if part.part != "requests"))
    for header in ("policy", "load", "kind", *names):
        left = header in ("policy", "kind")
        table.add_column(header.replace("_", " "), justify="left" if left else "right")
    for one, kind in kinds:
        here = {part.part: part for part in one.parts if part.kind == kind}
        cells = [f"{1e3 * (here[name].simulated_s - here[name].measured_s):+.2f} "
                 f"({1e3 * here[name].measured_s:.2f})" for name in names]
        table.add_row(one.policy, f"{one.load:.0%}", kind, *cells)
    return table


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:+.1f}%"
