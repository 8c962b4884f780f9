"""``python -m analysis validation``: figures of what ``python -m hetis_exec validate`` has written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.figures.draw import save_chart
from analysis.validation.figures import validation_charts
from analysis.validation.tables import page
from hetis_sim.spec.errors import SpecError, require

RESULT, REQUESTS = "validation.json", "requests.parquet"
FORMAT = 2
PAGE = "validation.md"


def parser() -> argparse.ArgumentParser:
    """The words it knows."""
    made = argparse.ArgumentParser(
        prog="python -m analysis validation",
        description="Draw errors, scatter plots and distributions of a validation, and write its tables.")
    made.add_argument("folder", metavar="FOLDER", help="what python -m hetis_exec validate has written")
    made.add_argument("--out", metavar="FOLDER", help="where to write; by default 'figures' in the folder")
    made.add_argument("--formats", default="pdf,svg", help="of pdf, svg, png (default: pdf,svg)")
    return made


def main(words: Sequence[str]) -> None:
    """Draw the figures and print where they are.

    Raises:
        SpecError: no validation there, or an unknown format.
    """
    given = parser().parse_args(words)
    folder = Path(given.folder)
    raw, requests = read_validation(folder)
    out = Path(given.out) if given.out else folder / "figures"
    formats = [name for name in given.formats.split(",") if name]
    require(bool(formats), "formats", given.formats, "pdf, svg or png")
    for chart in validation_charts(raw["cases"], requests):
        save_chart(chart, out, formats)
    (out / PAGE).write_text(page(raw), encoding="utf-8")
    print(out)


def read_validation(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """The content of ``validation.json`` and the requests of a validation.

    Raises:
        SpecError: no such files, or of another format.
    """
    try:
        raw = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        requests = pd.read_parquet(folder / REQUESTS)
    except (OSError, ValueError) as error:
        raise SpecError("folder", str(folder),
                        f"what python -m hetis_exec validate writes ({error})") from error
    require(isinstance(raw, dict) and raw.get("format") == FORMAT, "validation.json: format",
            raw.get("format") if isinstance(raw, dict) else raw, str(FORMAT))
    return raw, requests
