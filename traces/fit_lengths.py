"""Fit the quantile tables of ``traces/tables`` to public data sets.

    python -m traces.fit_lengths --data ../shared/data
    python -m traces.fit_lengths --data ../shared/data --check

The first writes the tables, the second prints how far the shipped ones are from the data
and fails where a Kolmogorov-Smirnov distance exceeds 0.03 (0.1 below 1000 rows).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hetis_sim.spec.errors import HetisError, SpecError
from traces.fit_sources import SOURCES, DataSet
from traces.lengths import SCHEMA, LengthTable, load_table, table_from_json
from traces.rng import RngStreams
from traces.table import FloatArray, IntArray

TABLES = Path(__file__).parent / "tables"
CHECK_DRAWS = 1_000_000
COMPARED = ("prompt_tokens", "output_tokens", "total_tokens")
KS_MAX, KS_MAX_FEW_ROWS, FEW_ROWS = 0.03, 0.1, 1000
TAILS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.99, 0.995, 0.9975, 0.999, 0.9995)


class Shape(NamedTuple):
    """Size of a component: even steps of both grids, and bins of the prompt's rank."""

    prompt_steps: int
    output_steps: int
    bins: int


def shape_for(rows: int) -> Shape:
    """Finer where there is more data: about 40 rows or more behind every output grid."""
    if rows < FEW_ROWS:
        return Shape(32, 16, 4)
    return Shape(200, 64, 16)


def grid(steps: int, rows: int) -> FloatArray:
    """Probabilities: even steps, and the tails as far as ``rows`` can tell them."""
    tails = [p for p in TAILS if rows * min(p, 1 - p) >= 1]
    return np.unique(np.round(np.concatenate((np.linspace(0, 1, steps + 1), tails)), 6))


def fit_component(name: str, weight: float, prompt: IntArray, output: IntArray) -> dict[str, Any]:
    """Quantiles of the prompt, and of the output in bins of the prompt's rank.

    Prompts of equal length have equal claim to every rank that they cover: ties are
    broken by a fixed shuffle, not by the order of the file.
    """
    shape = shape_for(len(prompt))
    shuffled = RngStreams(0).stream("ties").permutation(len(prompt))
    order = shuffled[np.argsort(prompt[shuffled], kind="stable")]
    prompt_grid = grid(shape.prompt_steps, len(prompt))
    output_grid = grid(shape.output_steps, len(prompt) // shape.bins)
    return {
        "name": name,
        "weight": round(weight, 6),
        "rows": len(prompt),
        "prompt_probabilities": prompt_grid.tolist(),
        "prompt_tokens": quantiles(prompt, prompt_grid),
        "output_probabilities": output_grid.tolist(),
        "output_tokens": [quantiles(output[part], output_grid) for part in np.array_split(order, shape.bins)],
    }


def quantiles(values: IntArray, probabilities: FloatArray) -> list[float]:
    """Linear quantiles (Hyndman and Fan's type 7), to a tenth of a token."""
    return [round(float(q), 1) for q in np.quantile(values, probabilities)]


def fit_table(data: DataSet) -> dict[str, Any]:
    """The document of a table, goodness of fit included."""
    rows = len(data.prompt)
    components = [
        fit_component(name, float(np.mean(data.labels == index)), data.prompt[data.labels == index],
                      data.output[data.labels == index])
        for index, name in enumerate(data.components)]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "name": data.name,
        "description": data.description,
        "source": {**data.source, "rows": rows},
        "notes": list(data.notes),
        "total_tokens_max": int((data.prompt + data.output).max()),
        "components": components,
    }
    if data.arrivals:
        document["arrivals_of_the_trace"] = data.arrivals
    document["goodness"] = goodness(table_from_json(document), data)
    return document


def goodness(table: LengthTable, data: DataSet) -> dict[str, Any]:
    """How draws compare with the data: KS distance, mean, p50, p95, rank correlation."""
    drawn = table.draw(RngStreams(0).stream("goodness"), CHECK_DRAWS)
    pairs = {
        "prompt_tokens": (data.prompt, drawn.prompt_tokens),
        "output_tokens": (data.output, drawn.output_tokens),
        "total_tokens": (data.prompt + data.output, drawn.prompt_tokens + drawn.output_tokens),
    }
    result: dict[str, Any] = {"draws": CHECK_DRAWS}
    for name, (real, ours) in pairs.items():
        distance = round(ks_distance(real, ours), 4)
        result[name] = {"ks": distance, "real": _summary(real), "drawn": _summary(ours)}
    result["spearman"] = {"real": round(spearman(data.prompt, data.output), 3),
                          "drawn": round(spearman(drawn.prompt_tokens, drawn.output_tokens), 3)}
    return result


def ks_distance(a: IntArray, b: IntArray) -> float:
    """Largest distance between two empirical distribution functions."""
    points = np.union1d(a, b)
    below = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def spearman(a: IntArray, b: IntArray) -> float:
    """Rank correlation, ties at their mean rank; 0 for a constant."""
    ranks = [_mean_ranks(x) for x in (a, b)]
    if min(r.std() for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _mean_ranks(values: IntArray) -> FloatArray:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2.0)[which], dtype=np.float64)


def _summary(tokens: IntArray) -> dict[str, float]:
    return {"mean": round(float(tokens.mean()), 1), "p50": round(float(np.quantile(tokens, 0.5)), 1),
            "p95": round(float(np.quantile(tokens, 0.95)), 1)}


def write_table(document: Mapping[str, Any], folder: Path) -> Path:
    """Write one table, with every list of numbers on a line of its own."""
    path = folder / f"{document['name']}.json"
    path.write_text(_pretty(document, 0) + "\n", "utf-8")
    return path


def _pretty(value: Any, depth: int) -> str:
    pad = " " * (depth + 1)
    if isinstance(value, Mapping):
        items = [f"{pad}{json.dumps(k)}: {_pretty(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + "\n" + " " * depth + "}"
    if isinstance(value, list) and value and isinstance(value[0], (list, Mapping, str)):
        return "[\n" + ",\n".join(pad + _pretty(v, depth + 1) for v in value) + "\n" + " " * depth + "]"
    if isinstance(value, list):
        return "[" + ", ".join(map(_number, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(value)


def report(name: str, rows: int, fit: Mapping[str, Any]) -> str:
    """One line on a table."""
    cells = [f"{what.split('_')[0]} ks {fit[what]['ks']:.4f} mean {fit[what]['real']['mean']:.1f}"
             f"/{fit[what]['drawn']['mean']:.1f}" for what in COMPARED]
    rho = fit["spearman"]
    return f"{name:20s} {rows:6d} rows  {'  '.join(cells)}  rho {rho['real']:+.3f}/{rho['drawn']:+.3f}"


def good(rows: int, fit: Mapping[str, Any]) -> bool:
    """Whether all KS distances are small enough for this many rows."""
    limit = KS_MAX if rows >= FEW_ROWS else KS_MAX_FEW_ROWS
    return all(fit[what]["ks"] <= limit for what in COMPARED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m traces.fit_lengths", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds traces/")
    parser.add_argument("--out", type=Path, default=TABLES, help="folder for the tables")
    parser.add_argument("--only", action="append", choices=sorted(SOURCES), help="one table; may be repeated")
    parser.add_argument("--check", action="store_true", help="compare the shipped tables, write nothing")
    options = parser.parse_args(arguments)
    failed = []
    for name in options.only or sorted(SOURCES):
        try:
            if not options.data.is_dir():
                raise SpecError("--data", str(options.data), "a folder that exists")
            data = SOURCES[name](options.data / "traces")
        except HetisError as error:
            print(error, file=sys.stderr)
            return 2
        if options.check:
            fit = goodness(load_table(name), data)
        else:
            document = fit_table(data)
            write_table(document, options.out)
            fit = document["goodness"]
        print(report(name, len(data.prompt), fit))
        if not good(len(data.prompt), fit):
            failed.append(name)
    if failed:
        print(f"too far from the data: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
