"""Messages as bytes, without pickle.

A message becomes a head, which is JSON, and the arrays that it holds, which travel beside it as they
are. What a head may look like follows from the annotations of the message's NamedTuple: whatever does
not fit them is refused, so a peer can make nothing but messages.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from hetis_exec import messages
from hetis_exec.errors import ExecutorError
from hetis_exec.messages import Message

HEAD_BYTES_MAX = 64 << 20
"""Of one head: a step of tens of thousands of tokens takes a few MiB."""

ARRAYS_BYTES_MAX = 64 << 30
"""Of the arrays of one message: the cache of a long request over all layers takes some GiB."""

DIMENSIONS_MAX = 8
ALIGN_BYTES = 64

DTYPES = ("<f2", "<f4", "<f8", "<i2", "<i4", "<i8", "|u1", "<u2")
"""What arrays may hold; bfloat16 travels as the bits of its numbers."""

KINDS: tuple[type, ...] = get_args(Message)
"""Messages; their numbers on the wire are their places here."""

Parsed = Callable[[Any], Any]


class CodecError(ExecutorError):
    """Bytes that are no message, or a message that has no bytes."""


class ArraySpec(NamedTuple):
    """One array of a message: an entry of :data:`DTYPES`, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Head(NamedTuple):
    """A message whose arrays have not come yet."""

    kind: int
    fields: list[Any]
    arrays: tuple[ArraySpec, ...]

    @property
    def offsets(self) -> list[int]:
        """Where each array begins in a buffer that holds them all, and at the end that buffer's size."""
        return offsets([spec.size_bytes for spec in self.arrays])


def offsets(sizes: Sequence[int]) -> list[int]:
    """Places of arrays of the given sizes in bytes one after the other, each aligned; then their end."""
    places = [0]
    for size in sizes:
        places.append(-(-(places[-1] + size) // ALIGN_BYTES) * ALIGN_BYTES)
    return places


def encode(message: Message) -> tuple[bytes, list[np.ndarray[Any, Any]]]:
    """The head of a message, and its arrays, contiguous.

    Raises:
        CodecError: an array of a type that does not travel, or a head that is too long.
    """
    arrays: list[np.ndarray[Any, Any]] = []
    kind = KINDS.index(type(message))
    fields = _writer(cast(Any, type(message)))(message, arrays)
    specs = [_described(array) for array in arrays]
    head = json.dumps([kind, fields, specs], default=_plain_number, separators=(",", ":")).encode()
    if len(head) > HEAD_BYTES_MAX:
        raise CodecError(f"a {type(message).__name__} of {len(head)} bytes; at most {HEAD_BYTES_MAX} travel")
    return head, arrays


def parse(head: bytes | bytearray | memoryview) -> Head:
    """The head of a message; the sizes of its arrays are checked, its fields are when it is built.

    Raises:
        CodecError: it is none.
    """
    try:
        kind, fields, specs = json.loads(bytes(head))
        arrays = tuple(ArraySpec(_dtype(dtype), tuple(_size(n) for n in _few(shape)))
                       for dtype, shape in specs)
    except (ValueError, TypeError, RecursionError) as error:
        raise CodecError(f"no head of a message: {error}") from None
    if type(kind) is not int or not 0 <= kind < len(KINDS) or not isinstance(fields, list):
        raise CodecError(f"no message of kind {kind!r}: must be 0..{len(KINDS) - 1}")
    if sum(spec.size_bytes for spec in arrays) > ARRAYS_BYTES_MAX:
        raise CodecError(f"arrays {arrays}: at most {ARRAYS_BYTES_MAX} bytes travel")
    return Head(kind, fields, arrays)


def build(head: Head, buffer: np.ndarray[Any, Any]) -> Message:
    """The message of a head; its arrays lie in ``buffer``, of uint8, at the head's offsets.

    Raises:
        CodecError: a field is not what the message has there.
    """
    arrays = []
    for spec, at in zip(head.arrays, head.offsets, strict=False):
        part = buffer[at:at + spec.size_bytes]
        arrays.append(part.view(np.dtype(spec.dtype)).reshape(spec.shape))
    kind = KINDS[head.kind]
    try:
        return cast(Message, _reader(kind)([head.fields, arrays]))
    except (ValueError, TypeError, IndexError) as error:
        raise CodecError(f"no {kind.__name__}: {error}") from None


def _plain_number(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise CodecError(f"{type(value).__name__} does not travel")


def _described(array: np.ndarray[Any, Any]) -> tuple[str, tuple[int, ...]]:
    if array.dtype.str not in DTYPES or array.ndim > DIMENSIONS_MAX:
        raise CodecError(f"an array of {array.dtype} with {array.ndim} dimensions does not travel")
    return array.dtype.str, array.shape


def _dtype(name: object) -> str:
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"an array of {name!r}")
    return name


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value <= ARRAYS_BYTES_MAX:
        raise ValueError(f"an array of size {value!r}")
    return value


def _few(shape: object) -> list[object]:
    if not isinstance(shape, list) or len(shape) > DIMENSIONS_MAX:
        raise ValueError(f"an array of shape {shape!r}")
    return shape


# -- what annotations mean -------------------------------------------------------------------------------


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
def _writer(hint: Any) -> Callable[[Any, list[Any]], Any]:
    """Makes JSON of a value, and collects its arrays."""
    if _is_plain(hint):
        return lambda value, _: value
    if _is_array(hint):
        return _write_array
    if _is_record(hint):
        parts = [_writer(part) for part in _hints(hint).values()]
        return lambda value, arrays: [write(part, arrays) for write, part in zip(parts, value, strict=True)]
    inner = _optional(hint)
    if inner is not None:
        write = _writer(inner)
        return lambda value, arrays: None if value is None else write(value, arrays)
    if _union(hint):
        kinds = {kind: (n, _writer(kind)) for n, kind in enumerate(_union(hint))}
        return lambda value, arrays: [kinds[type(value)][0], kinds[type(value)][1](value, arrays)]
    item = _writer(_items_of(hint))
    return lambda value, arrays: [item(part, arrays) for part in value]


def _write_array(value: Any, arrays: list[Any]) -> int:
    # Shapes of no dimension would gain one.
    arrays.append(np.ascontiguousarray(value).reshape(np.shape(value)))
    return len(arrays) - 1


def _items_of(hint: Any) -> Any:
    """X of ``tuple[X, ...]``."""
    item, more = get_args(hint)
    assert get_origin(hint) is tuple
    assert more is Ellipsis
    return item


def _reader(kind: type) -> Parsed:
    """Makes a message of [fields, arrays]."""
    return lambda given: _read(kind)(given[0], given[1])


@cache
def _read(hint: Any) -> Callable[[Any, list[Any]], Any]:
    if _is_array(hint):
        return _read_array
    if _is_record(hint):
        return _record_reader(hint)
    inner = _optional(hint)
    if inner is not None:
        read = _read(inner)
        return lambda value, arrays: None if value is None else read(value, arrays)
    if _union(hint):
        kinds = [_read(part) for part in _union(hint)]
        return lambda value, arrays: kinds[_number(value[0], len(kinds))](value[1], arrays)
    if get_origin(hint) is tuple:
        return _tuple_reader(hint)
    return SCALARS[hint]


def _record_reader(kind: Any) -> Callable[[Any, list[Any]], Any]:
    parts = [_read(part) for part in _hints(kind).values()]

    def read(value: Any, arrays: list[Any]) -> Any:
        _require_list(value)
        return kind(*[read_part(part, arrays) for read_part, part in zip(parts, value, strict=True)])

    return read


def _tuple_reader(hint: Any) -> Callable[[Any, list[Any]], Any]:
    parts = get_args(hint)
    if parts[-1] is Ellipsis:
        item = _read(parts[0])
        if parts[0] is int:
            return _read_ints
        return lambda value, arrays: tuple([item(part, arrays) for part in _require_list(value)])
    readers = [_read(part) for part in parts]
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


def _scalar(*allowed: type) -> Callable[[Any, list[Any]], Any]:
    def read(value: Any, _: list[Any]) -> Any:
        if type(value) not in allowed:
            raise ValueError(f"{value!r} where {allowed[0].__name__} belongs")
        return allowed[0](value)

    return read


SCALARS: dict[Any, Callable[[Any, list[Any]], Any]] = {
    int: _scalar(int), float: _scalar(float, int), bool: _scalar(bool), str: _scalar(str)}
