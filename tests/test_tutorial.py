"""The tutorial's code runs as it stands on the page, and prints what the page shows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

CODE_LINES_MAX = 60
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`([\w/.]+\.(?:py|toml|yaml))`[^`]*\Z")


@dataclass(frozen=True)
class Block:
    """A block of code: its language, its text, and the file that the sentence before it names."""

    language: str
    text: str
    file: str | None


def blocks(page: str) -> list[Block]:
    """All blocks in order."""
    found, end = [], 0
    for match in FENCE.finditer(page):
        named = FILE.search(page[end:match.start()].rstrip().rsplit("\n\n", 1)[-1])
        found.append(Block(match[1], match[2], named[1] if named else None))
        end = match.end()
    return found


@pytest.fixture(scope="module")
def page(project_root: Path) -> list[Block]:
    """The blocks of the tutorial."""
    return blocks((project_root / "docs" / "tutorial-policy.md").read_text())


def test_the_policy_is_one_short_file_and_one_configuration(page: list[Block]) -> None:
    """Under 60 lines of Python."""
    files = {block.file: block.text for block in page if block.file}
    assert set(files) == {"spill.py", "pyproject.toml", "mine/policy/spill.yaml"}
    assert files["spill.py"].count("\n") < CODE_LINES_MAX


def test_the_page_runs_as_a_reader_would(page: list[Block], project_root: Path, tmp_path: Path) -> None:
    """Files are written, the package is installed, and every block runs and prints what is shown."""
    packages = tmp_path / "packages"
    paths = os.pathsep.join((str(packages), str(project_root)))
    environment = {**os.environ, "PYTHONPATH": paths, "MPLBACKEND": "Agg"}
    ran = 0
    for block, shown in followed(page):
        if block.file:
            (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.file).write_text(block.text)
            continue
        for command in commands(block, packages):
            done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True,
                                  timeout=300, check=False)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            if shown is not None:
                assert done.stdout == shown
            ran += 1
    assert ran == 5


def followed(page: list[Block]) -> Iterator[tuple[Block, str | None]]:
    """Blocks of code, each with the output that is shown below it."""
    for block, after in zip(page, [*page[1:], None], strict=True):
        if block.language:
            yield block, after.text if after is not None and not after.language else None


def commands(block: Block, packages: Path) -> list[list[str]]:
    """What a block asks to be run; packages are installed beside the page, without the network."""
    if block.language == "python":
        return [[sys.executable, "-c", block.text]]
    words = {"hetis-sim": [sys.executable, "-m", "hetis_sim"], "pip": [sys.executable, "-m", "pip"]}
    found = []
    for line in block.text.splitlines():
        name, *rest = shlex.split(line)
        extra = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check",
                 "--target", str(packages)] if name == "pip" else []
        found.append([*words[name], *rest, *extra])
    return found
