"""What the annotations of messages allow, in JSON: how their fields are written, and how they are read.

Records (NamedTuples) are lists of their fields, a choice between records is the number of the one and its
list, and an array is its place among the arrays of its message.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from hetis_exec import messages
from hetis_exec.resident import Resident

Walk = Callable[[Any, list[Any]], Any]
"""Goes through a value and the arrays of its message."""


def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, vars(messages))


def _is_array(hint: Any) -> bool:
    return get_origin(hint) is np.ndarray


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def _union(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()


def _optional(hint: Any) -> Any:
    """X of ``X | None``, else None."""
    parts = _union(hint)
    return next(part for part in parts if part is not type(None)) if type(None) in parts else None


def _is_plain(hint: Any) -> bool:
    """Whether JSON holds it as it is: no arrays, and no choice between records."""
    if _is_array(hint):
        return False
    if _is_record(hint):
        return all(_is_plain(part) for part in _hints(hint).values())
    if _optional(hint) is not None:
        return _is_plain(_optional(hint))
    if _union(hint):
        return False
    return all(_is_plain(part) for part in get_args(hint) if part is not Ellipsis)


@cache
def writer(hint: Any) -> Walk:
    """Makes JSON of a value, and collects its arrays."""
    if _is_plain(hint):
        return lambda value, _: value
    if _is_array(hint):
        return _write_array
    if _is_record(hint):
        parts = [writer(part) for part in _hints(hint).values()]
        return lambda value, arrays: [write(part, arrays) for write, part in zip(parts, value, strict=True)]
    inner = _optional(hint)
    if inner is not None:
        write = writer(inner)
        return lambda value, arrays: None if value is None else write(value, arrays)
    if _union(hint):
        kinds = {kind: (n, writer(kind)) for n, kind in enumerate(_union(hint))}
        return lambda value, arrays: [kinds[type(value)][0], kinds[type(value)][1](value, arrays)]
    item = writer(_items_of(hint))
    return lambda value, arrays: [item(part, arrays) for part in value]


def _write_array(value: Any, arrays: list[Any]) -> int:
    # Shapes of no dimension would gain one.
    arrays.append(value if isinstance(value, Resident) else
                  np.ascontiguousarray(value).reshape(np.shape(value)))
    return len(arrays) - 1


def _items_of(hint: Any) -> Any:
    """X of ``tuple[X, ...]``."""
    item, more = get_args(hint)
    assert get_origin(hint) is tuple
    assert more is Ellipsis
    return item


@cache
def reader(hint: Any) -> Walk:
    """Makes a value of JSON and of the arrays that belong to it; what does not fit is a ValueError."""
    if _is_array(hint):
        return _read_array
    if _is_record(hint):
        return _record_reader(hint)
    inner = _optional(hint)
    if inner is not None:
        read = reader(inner)
        return lambda value, arrays: None if value is None else read(value, arrays)
    if _union(hint):
        kinds = [reader(part) for part in _union(hint)]
        return lambda value, arrays: kinds[_number(value[0], len(kinds))](value[1], arrays)
    if get_origin(hint) is tuple:
        return _tuple_reader(hint)
    return SCALARS[hint]


def _record_reader(kind: Any) -> Walk:
    parts = [reader(part) for part in _hints(kind).values()]

    def read(value: Any, arrays: list[Any]) -> Any:
        _require_list(value)
        return kind(*[read_part(part, arrays) for read_part, part in zip(parts, value, strict=True)])

    return read


def _tuple_reader(hint: Any) -> Walk:
    parts = get_args(hint)
    if parts[-1] is Ellipsis:
        item = reader(parts[0])
        if parts[0] is int:
            return _read_ints
        return lambda value, arrays: tuple([item(part, arrays) for part in _require_list(value)])
    readers = [reader(part) for part in parts]
    return lambda value, arrays: tuple(
        [read(part, arrays) for read, part in zip(readers, _require_list(value), strict=True)])


def _require_list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"{value!r} where a list belongs")
    return value


def _number(value: Any, end: int) -> int:
    if type(value) is not int or not 0 <= value < end:
        raise ValueError(f"{value!r} where a number below {end} belongs")
    return value


def _read_array(value: Any, arrays: list[Any]) -> Any:
    return arrays[_number(value, len(arrays))]


def _read_ints(value: Any, _: list[Any]) -> tuple[int, ...]:
    for part in _require_list(value):
        if type(part) is not int:
            raise ValueError(f"{part!r} where an integer belongs")
    return tuple(value)


def _scalar(*allowed: type) -> Walk:
    def read(value: Any, _: list[Any]) -> Any:
        if type(value) not in allowed:
            raise ValueError(f"{value!r} where {allowed[0].__name__} belongs")
        return allowed[0](value)

    return read


SCALARS: dict[Any, Walk] = {
    int: _scalar(int), float: _scalar(float, int), bool: _scalar(bool), str: _scalar(str)}
