"""The page of policies is complete."""

from __future__ import annotations

import re
from pathlib import Path

from hetis_sim.policies.registry import BUILTIN

ROW = re.compile(r"^\| `([\w-]+)` \|(.*)\|$", re.MULTILINE)


def test_every_policy_has_a_row(project_root: Path) -> None:
    """With all its cells, once, and no row is of a policy that does not exist."""
    rows = ROW.findall((project_root / "docs" / "policies.md").read_text())
    assert sorted(name for name, _ in rows) == sorted(BUILTIN)
    assert all(cell.strip() for _, cells in rows for cell in cells.split("|"))


def test_the_readme_leads_to_the_pages(project_root: Path) -> None:
    """To the table and to the tutorial."""
    readme = (project_root / "README.md").read_text()
    assert "(docs/policies.md)" in readme
    assert "(docs/tutorial-policy.md)" in readme
