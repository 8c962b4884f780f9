"""Which column of a trace plays which role."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetis_sim.spec.errors import SpecError

ROLES = ("prompt", "output", "arrival", "session", "prefix")
TIME_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


@dataclass(frozen=True, slots=True)
class Layout:
    """Column names by role; the empty string where the trace has no such column.

    Attributes:
        time_unit: unit of numeric times (``s``, ``ms``, ``us``, ``ns``); texts are dates.
        keep_origin: times are already seconds since the start of a run and stay bit for
            bit as they are; otherwise the earliest row becomes 0.
        block_tokens: tokens per prefix block, 0 where unknown.
    """

    format: str
    prompt: str
    output: str
    arrival: str = ""
    session: str = ""
    prefix: str = ""
    time_unit: str = "s"
    keep_origin: bool = False
    block_tokens: int = 0

    @classmethod
    def of(cls, name: str, roles: Mapping[str, str], *, time_unit: str = "s", keep_origin: bool = False,
           block_tokens: int = 0) -> Layout:
        """The layout ``name`` with columns by role."""
        prompt, output, arrival, session, prefix = (roles.get(role, "") for role in ROLES)
        return cls(name, prompt, output, arrival, session, prefix, time_unit, keep_origin, block_tokens)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that must be read, without repeats."""
        named = (self.prompt, self.output, self.arrival, self.session, self.prefix)
        return tuple(dict.fromkeys(name for name in named if name))


def normalise(name: str) -> str:
    """Lower case, with every run of other characters as one underscore."""
    return re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")


def match_names(wanted: Mapping[str, str], names: Sequence[str]) -> dict[str, str] | None:
    """Columns for ``{role: normalised name}``, or ``None`` unless all are there."""
    present = {normalise(name): name for name in names}
    if any(name not in present for name in wanted.values()):
        return None
    return {role: present[name] for role, name in wanted.items()}


def check_mapping(mapping: Mapping[str, str], names: Sequence[str], label: str) -> None:
    """Raise :class:`SpecError` for an unknown role or a column that is not there."""
    for role, column in mapping.items():
        if role not in ROLES:
            raise SpecError("columns", role, f"a role of {', '.join(ROLES)}")
        if column not in names:
            raise SpecError(f"columns.{role}", column, f"a column of {label}: {', '.join(names) or 'none'}")
