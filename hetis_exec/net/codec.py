"""Messages as bytes, without pickle.

A message becomes a head, which is JSON, and the arrays that it holds, which travel beside it as they
are. What a head may look like follows from the annotations of the message's NamedTuple: whatever does
not fit them is refused, so a peer can make nothing but messages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast, get_args

import numpy as np

from hetis_exec.errors import ExecutorError
from hetis_exec.messages import Message
from hetis_exec.net.schema import reader, writer
from hetis_exec.resident import Resident

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
    """A message whose arrays have not come yet.

    Attributes:
        stay: they are tensors that stay on devices.
    """

    kind: int
    fields: list[Any]
    arrays: tuple[ArraySpec, ...]
    stay: bool = False

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


def encode(message: Message) -> tuple[bytes, list[Any]]:
    """The head of a message, and its arrays, contiguous; or its tensors, where they are to stay on devices.

    Raises:
        CodecError: an array of a type that does not travel, or a head that is too long.
    """
    arrays: list[Any] = []
    kind = KINDS.index(type(message))
    fields = writer(cast(Any, type(message)))(message, arrays)
    specs = [_described(array) for array in arrays]
    stay = [isinstance(array, Resident) for array in arrays]
    if any(stay) and not all(stay):
        raise CodecError(f"a {type(message).__name__} with some of its arrays on devices")
    parts = [kind, fields, specs, *([1] if any(stay) else ())]
    head = json.dumps(parts, default=_plain_number, separators=(",", ":")).encode()
    if len(head) > HEAD_BYTES_MAX:
        raise CodecError(f"a {type(message).__name__} of {len(head)} bytes; at most {HEAD_BYTES_MAX} travel")
    return head, arrays


def parse(head: bytes | bytearray | memoryview) -> Head:
    """The head of a message; the sizes of its arrays are checked, its fields are when it is built.

    Raises:
        CodecError: it is none.
    """
    try:
        kind, fields, specs, *more = json.loads(bytes(head))
        arrays = tuple(ArraySpec(_dtype(dtype), tuple(_size(n) for n in _few(shape)))
                       for dtype, shape in specs)
    except (ValueError, TypeError, RecursionError) as error:
        raise CodecError(f"no head of a message: {error}") from None
    if type(kind) is not int or not 0 <= kind < len(KINDS) or not isinstance(fields, list) or (
            more not in ([], [1])):
        raise CodecError(f"no message of kind {kind!r}: must be 0..{len(KINDS) - 1}")
    if sum(spec.size_bytes for spec in arrays) > ARRAYS_BYTES_MAX:
        raise CodecError(f"arrays {arrays}: at most {ARRAYS_BYTES_MAX} bytes travel")
    return Head(kind, fields, arrays, bool(more))


def build(head: Head, buffer: np.ndarray[Any, Any]) -> Message:
    """The message of a head; its arrays lie in ``buffer``, of uint8, at the head's offsets.

    Raises:
        CodecError: a field is not what the message has there.
    """
    arrays = []
    for spec, at in zip(head.arrays, head.offsets, strict=False):
        part = buffer[at:at + spec.size_bytes]
        arrays.append(part.view(np.dtype(spec.dtype)).reshape(spec.shape))
    return message_of(head, arrays)


def message_of(head: Head, arrays: Sequence[Any]) -> Message:
    """The message of a head, with its arrays or tensors.

    Raises:
        CodecError: a field is not what the message has there.
    """
    kind = KINDS[head.kind]
    try:
        return cast(Message, reader(cast(Any, kind))(head.fields, list(arrays)))
    except (ValueError, TypeError, IndexError) as error:
        raise CodecError(f"no {kind.__name__}: {error}") from None


def _plain_number(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise CodecError(f"{type(value).__name__} does not travel")


def _described(array: np.ndarray[Any, Any] | Resident) -> tuple[str, tuple[int, ...]]:
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
