"""Messages as records of a ring: a head of fixed size, and arrays as they are.

These are the messages of which a step has some in each layer. All others, and what a ring has no room for,
go another way; numbers keep all messages between two workers in order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

import numpy as np

from hetis_exec.messages import Array, AttentionRequest, AttentionResult, Hidden, Message, Partial
from hetis_exec.net.codec import DTYPES
from hetis_exec.net.rings import RingReader, RingWriter, lines

DIMENSIONS = 4
ABSENT = 255
"""Number of dimensions of an array that is None."""

KIND = struct.Struct("<Q")
ARRAY = f"BB{DIMENSIONS}I"
TYPES = [np.dtype(name) for name in DTYPES]
CODES = {dtype: code for code, dtype in enumerate(TYPES)}


class Form(NamedTuple):
    """How messages of one kind lie in a record: numbers, then what arrays there are, then these.

    Attributes:
        number: of the kind.
        numbers, arrays: fields that are numbers and arrays, by their places.
        head: number of the kind, when it is due, and its numbers.
        described: type and shape of each array.
        begin: where the first array is.
    """

    number: int
    kind: type
    numbers: tuple[int, ...]
    arrays: tuple[int, ...]
    head: struct.Struct
    described: struct.Struct

    @property
    def begin(self) -> int:
        """Where the first array is in a record."""
        return lines(self.head.size + self.described.size)


class Layout(NamedTuple):
    """What the arrays of a record are, as bytes that say so and by shape, type and place; and its size."""

    described: bytes
    arrays: tuple[tuple[tuple[int, ...], np.dtype[Any], int] | None, ...]
    size_bytes: int


def _form(number: int, kind: Any) -> Form:
    """Of a kind of message with nothing but numbers and arrays."""
    hints = [get_type_hints(kind)[name] for name in kind._fields]
    numbers = tuple(n for n, hint in enumerate(hints) if hint in (int, float))
    arrays = tuple(n for n, hint in enumerate(hints) if hint in (Array, Array | None))
    scalars = "".join("q" if hints[n] is int else "d" for n in numbers)
    return Form(number, kind, numbers, arrays, struct.Struct(f"<Qd{scalars}"),
                struct.Struct(f"<{ARRAY * len(arrays)}"))


FORMS = {kind: _form(n, kind) for n, kind in enumerate((AttentionRequest, AttentionResult, Hidden, Partial))}
BY_NUMBER = list(FORMS.values())


def laid_out(form: Form, arrays: Sequence[Any]) -> Layout | None:
    """Where arrays of a message lie in its record; None where one does not travel like this."""
    parts: list[int] = []
    places: list[tuple[tuple[int, ...], np.dtype[Any], int] | None] = []
    end = form.begin
    for array in arrays:
        if array is None:
            parts += (0, ABSENT, *(0,) * DIMENSIONS)
            places.append(None)
            continue
        if array.dtype not in CODES or array.ndim > DIMENSIONS:
            return None
        parts += (CODES[array.dtype], array.ndim, *array.shape, *(0,) * (DIMENSIONS - array.ndim))
        places.append((array.shape, array.dtype, end))
        end += lines(array.nbytes)
    return Layout(form.described.pack(*parts), tuple(places), end)


def read_layout(form: Form, described: bytes) -> Layout:
    """The same at the receiver."""
    parts = form.described.unpack(described)
    places: list[tuple[tuple[int, ...], np.dtype[Any], int] | None] = []
    end = form.begin
    for at in range(0, len(parts), 2 + DIMENSIONS):
        code, dimensions, *sizes = parts[at:at + 2 + DIMENSIONS]
        if dimensions == ABSENT:
            places.append(None)
            continue
        shape = tuple(sizes[:dimensions])
        places.append((shape, TYPES[code], end))
        end += lines(math.prod(shape) * TYPES[code].itemsize)
    return Layout(described, tuple(places), end)


class LaneWriter:
    """One direction between two workers, at the sender.

    Messages of a step are alike, and an empty ring begins at the same place: what was found out for the last
    message is kept for the next.
    """

    def __init__(self, ring: RingWriter) -> None:
        self._ring = ring
        self._like: tuple[Any, ...] = ()
        self._layout: Layout | None = None
        self._place = -1
        self._parts: list[Any] = []

    def send(self, number: int, due_s: float, message: Message) -> bool | None:
        """Write a message; whether its receiver is to be woken, or None if it is to go another way."""
        form = FORMS.get(type(message))
        if form is None:
            return None
        arrays: list[Any] = [message[n] for n in form.arrays]
        like = (form.number, *[None if array is None else (array.shape, array.dtype) for array in arrays])
        if like != self._like:
            self._like, self._layout, self._place = like, laid_out(form, arrays), -1
        layout, ring = self._layout, self._ring
        if layout is None or (place := ring.room(layout.size_bytes)) is None:
            return None
        if place != self._place:
            self._place = place
            self._parts = [None if part is None else np.ndarray(*part[:2], ring.memory, place + part[2])
                           for part in layout.arrays]
        form.head.pack_into(ring.memory, place, form.number, due_s, *[message[n] for n in form.numbers])
        begin = place + form.head.size
        ring.memory[begin:begin + form.described.size] = layout.described
        for part, array in zip(self._parts, arrays, strict=True):
            if part is not None:
                part[...] = array
        return ring.publish(number)


class LaneReader:
    """One direction between two workers, at the receiver."""

    def __init__(self, ring: RingReader) -> None:
        self.ring = ring
        self._layouts: dict[int, Layout] = {}

    def take(self) -> tuple[float, Message]:
        """When the next message is due, and it; its arrays lie in the ring for as long as they live."""
        record: Any = self.ring.take()
        form = BY_NUMBER[KIND.unpack_from(record)[0]]
        _, due_s, *numbers = form.head.unpack_from(record)
        described = record[form.head.size:form.head.size + form.described.size]
        layout = self._layouts.get(form.number)
        if layout is None or layout.described != described:
            layout = self._layouts[form.number] = read_layout(form, described)
        fields: list[Any] = [None] * len(form.kind._fields)
        for n, value in zip(form.numbers, numbers, strict=True):
            fields[n] = value
        for n, part in zip(form.arrays, layout.arrays, strict=True):
            if part is not None:
                fields[n] = np.ndarray(part[0], part[1], record, part[2])
        return due_s, form.kind(*fields)
