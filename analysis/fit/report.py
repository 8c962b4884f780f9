"""The table of held-out errors, as docs/cost.md shows it."""

from __future__ import annotations

from typing import Any

HEAD = """| card | module | status | n | median | p95 | n (all) | median (all) | p95 (all) |
|---|---|---|---:|---:|---:|---:|---:|---:|"""


def error_table(profiles: dict[str, dict[str, Any]]) -> str:
    """Markdown: one row for each card and module that has an error of its own."""
    rows = [HEAD]
    for name, profile in profiles.items():
        for module, content in profile["modules"].items():
            error = content["held_out"]
            if error is None:
                continue
            figures = [f"{error['n']}", f"{error['median']:.1%}", f"{error['p95']:.1%}", f"{error['n_all']}",
                       f"{error['median_all']:.1%}", f"{error['p95_all']:.1%}"]
            rows.append(f"| {' | '.join([name, module, content['status'], *figures])} |")
    return "\n".join(rows)
