"""``python -m analysis COMMAND``: everything that is made from finished runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from hetis_sim.spec.errors import HetisError

Command = Callable[[Sequence[str]], None]

COMMANDS: dict[str, tuple[str, str]] = {
    "fidelity": ("analysis.fidelity.command", "how far off simulated runs are from measured ones of others"),
    "paper": ("analysis.paper.command", "the evaluation of the Hetis paper, run in the simulator"),
    "report": ("analysis.report.command", "a page and figures of run folders"),
    "validation": ("analysis.validation.command", "figures of real runs beside simulated ones"),
}
"""Where each command's ``main`` is, and what it makes. Modules are imported when they are asked for."""

EXIT_BAD_INPUT = 2


def usage() -> str:
    """The commands, one a line."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: python -m analysis COMMAND ...", "", "commands:", *lines, "",
                      "python -m analysis COMMAND --help says more."])


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 2 on bad input."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] not in COMMANDS:
        print(f"error: command={words[0]!r} is not allowed: must be one of {', '.join(COMMANDS)}\n",
              file=sys.stderr)
        print(usage(), file=sys.stderr)
        return EXIT_BAD_INPUT
    command: Command = import_module(COMMANDS[words[0]][0]).main
    try:
        command(words[1:])
    except HetisError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
