"""Messages as records of a ring: a head of fixed size, and arrays as they are.

These are the messages of which a step has some in each layer. All others, and what a ring has no room for,
go another way; numbers keep all messages between two workers in order.
"""

from __future__ import annotations

import struct
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
    """How messages of one kind lie in a record.

    Attributes:
        number: of the kind.
        numbers, arrays: fields that are numbers and arrays, by their places.
        rest: other fields, which must be empty, and what they are then.
        head: kind, when it is due, numbers, and of each array its type and shape.
    """

    number: int
    kind: type
    numbers: tuple[int, ...]
    arrays: tuple[int, ...]
    rest: tuple[tuple[int, Any], ...]
    head: struct.Struct


def _form(number: int, kind: Any) -> Form:
    hints = [get_type_hints(kind)[name] for name in kind._fields]
    numbers = tuple(n for n, hint in enumerate(hints) if hint in (int, float))
    arrays = tuple(n for n, hint in enumerate(hints) if hint in (Array, Array | None))
    rest = tuple((n, kind._field_defaults.get(kind._fields[n])) for n in range(len(hints))
                 if n not in (*numbers, *arrays))
    scalars = "".join("q" if hints[n] is int else "d" for n in numbers)
    return Form(number, kind, numbers, arrays, rest, struct.Struct(f"<Qd{scalars}{ARRAY * len(arrays)}"))


FORMS = {kind: _form(n, kind) for n, kind in enumerate((AttentionRequest, AttentionResult, Hidden, Partial))}
BY_NUMBER = list(FORMS.values())


class LaneWriter:
    """One direction between two workers, at the sender."""

    def __init__(self, ring: RingWriter) -> None:
        self._ring = ring

    def send(self, number: int, due_s: float, message: Message) -> bool | None:
        """Write a message; whether its receiver is to be woken, or None if it is to go another way."""
        form = FORMS.get(type(message))
        if form is None or any(message[n] != empty for n, empty in form.rest):
            return None
        values: list[Any] = [form.number, due_s, *[message[n] for n in form.numbers]]
        end, placed = lines(form.head.size), []
        for n in form.arrays:
            array: Any = message[n]
            if array is None:
                values += (0, ABSENT, *(0,) * DIMENSIONS)
                continue
            if array.dtype not in CODES or array.ndim > DIMENSIONS:
                return None
            values += (CODES[array.dtype], array.ndim, *array.shape, *(0,) * (DIMENSIONS - array.ndim))
            placed.append((array, end))
            end += lines(array.nbytes)
        ring = self._ring
        place = ring.room(end)
        if place is None:
            return None
        form.head.pack_into(ring.memory, place, *values)
        for array, at in placed:
            np.ndarray(array.shape, array.dtype, ring.memory, place + at)[...] = array
        return ring.publish(number)


class LaneReader:
    """One direction between two workers, at the receiver."""

    def __init__(self, ring: RingReader) -> None:
        self.ring = ring

    def take(self) -> tuple[float, Message]:
        """When the next message is due, and it; its arrays lie in the ring for as long as they live."""
        record: Any = self.ring.take()
        form = BY_NUMBER[KIND.unpack_from(record)[0]]
        _, due_s, *values = form.head.unpack_from(record)
        fields: list[Any] = [None] * len(form.kind._fields)
        for n, empty in form.rest:
            fields[n] = empty
        count = len(form.numbers)
        for n, value in zip(form.numbers, values, strict=False):
            fields[n] = value
        at = lines(form.head.size)
        for m, n in enumerate(form.arrays):
            code, dimensions, *shape = values[count + m * (2 + DIMENSIONS):count + (m + 1) * (2 + DIMENSIONS)]
            if dimensions != ABSENT:
                array = np.ndarray(shape[:dimensions], TYPES[code], record, at)
                fields[n] = array
                at += lines(array.nbytes)
        return due_s, form.kind(*fields)
