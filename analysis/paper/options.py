"""What the commands that write a page of many simulations share: checks of their words, and progress."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Collection
from pathlib import Path

from hetis_sim.spec.errors import require


def check_options(given: Namespace, parts: Collection[str], docs: Path) -> None:
    """Look at ``--only``, ``--workers`` and ``--docs``.

    Args:
        parts: what ``--only`` may name.
        docs: where the documentation of a checkout lies.

    Raises:
        SpecError: one of them is wrong; the text says what is allowed.
    """
    for name in given.only or ():
        require(name in parts, "only", name, f"one of {', '.join(parts)}")
    require(given.workers is None or given.workers >= 1, "workers", given.workers, ">= 1")
    require(not (given.docs and (given.quick or given.only)), "docs", given.docs,
            "given without --quick and --only: the documentation holds full runs")
    require(not given.docs or docs.is_dir(), "docs", given.docs, "given in a checkout of the project")


def tell(what: str, done: int, total: int) -> None:
    """Progress on standard error: one line that is written over where that is a terminal."""
    end = "\r" if sys.stderr.isatty() and done < total else "\n"
    print(f"{what}: {done} of {total}    ", end=end, file=sys.stderr, flush=True)
