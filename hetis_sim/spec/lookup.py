"""Checks that catalogues and parsers share: names with near matches, whole numbers, known keys."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from hetis_sim.spec.errors import SpecError, require

T = TypeVar("T")


def find(key: str, name: object, catalogue: Mapping[str, T]) -> T:
    """The entry ``name`` of a catalogue; upper case and underscores are forgiven.

    Raises:
        SpecError: no such entry; the text holds the near matches, or all names.
    """
    if isinstance(name, str):
        for spelling in (name, name.strip().lower().replace("_", "-")):
            if spelling in catalogue:
                return catalogue[spelling]
    raise SpecError(key, name, near_matches(str(name), catalogue))


def near_matches(name: str, names: Collection[str]) -> str:
    """What is allowed, for an error message: the names nearest to ``name``, then all of them."""
    allowed = f"one of {', '.join(names)}"
    near = difflib.get_close_matches(name.strip().lower().replace("_", "-"), list(names), n=3, cutoff=0.6)
    return f"{allowed} (did you mean {' or '.join(near)}?)" if near else allowed


def require_known_keys(key: str, mapping: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise :class:`SpecError` for the first key of ``mapping`` that is not in ``known``."""
    for name in mapping:
        if name not in known:
            raise SpecError(f"{key}.{name}", mapping[name],
                            f"absent; the key may be {near_matches(str(name), known)}")


def require_int(key: str, value: Any, low: int, high: int) -> int:
    """``value`` as a whole number in [low, high]; bool, float and text raise :class:`SpecError`."""
    require(isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
            key, value, f"a whole number in [{low}, {high}]")
    return int(value)


def require_mapping(key: str, value: Any) -> Mapping[str, Any]:
    """``value`` if it maps names to values, else :class:`SpecError`."""
    if not isinstance(value, Mapping):
        raise SpecError(key, value, "a mapping")
    return value
