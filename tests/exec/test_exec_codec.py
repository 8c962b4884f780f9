"""Messages as bytes: what goes in comes out, and nothing else comes in."""

from __future__ import annotations

import json
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis_exec import messages
from hetis_exec.messages import (
    AttentionBatch,
    AttentionRequest,
    Beat,
    CacheData,
    Control,
    Failed,
    Open,
    Row,
    Task,
)
from hetis_exec.net.codec import (
    ARRAYS_BYTES_MAX,
    DTYPES,
    KINDS,
    CodecError,
    build,
    encode,
    offsets,
    parse,
)

INTS = st.integers(-(1 << 62), 1 << 62)
SCALARS = {int: INTS, float: st.floats(allow_nan=False), bool: st.booleans(), str: st.text(max_size=30)}


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Any that travels, some not contiguous."""
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    made = np.frombuffer(draw(st.binary(min_size=8 * int(np.prod(shape)), max_size=8 * int(np.prod(shape)))),
                         dtype=np.uint8)
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    return made[:dtype.itemsize * int(np.prod(shape))].view(dtype).reshape(shape).swapaxes(0, -1)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Whatever an annotation allows."""
    if get_origin(hint) is np.ndarray:
        return arrays()
    if get_origin(hint) in (Union, UnionType):
        return st.one_of(*[st.none() if part is NoneType else values(part) for part in get_args(hint)])
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        if parts[-1] is Ellipsis:
            return st.lists(values(parts[0]), max_size=3).map(tuple)
        return st.tuples(*map(values, parts))
    if hint in SCALARS:
        return SCALARS[hint]
    return st.builds(hint, *[values(part) for part in get_type_hints(hint, vars(messages)).values()])


def same(a: Any, b: Any) -> bool:
    """Equality of type and value, of arrays to the last bit."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def through(message: Any) -> Any:
    """A message as the other end has it."""
    head, parts = encode(message)
    parsed = parse(head)
    buffer = np.zeros(parsed.offsets[-1], dtype=np.uint8)
    for part, at in zip(parts, parsed.offsets, strict=False):
        buffer[at:at + part.nbytes] = part.reshape(-1).view(np.uint8)
    return build(parsed, buffer)


@given(st.one_of(*[values(kind) for kind in KINDS]))
@settings(max_examples=60, deadline=None)
def test_every_message_comes_out_as_it_went_in(message: Any) -> None:
    """Whatever its fields hold: types, values and bits."""
    assert same(through(message), message)


def test_numbers_of_numpy_become_those_of_python() -> None:
    """They stand in for each other everywhere in the control plane."""
    made = through(Control(np.int64(3), (Open(np.int32(1), 0, (np.int64(2),), 1, 2, 3),), 5, None))
    assert made == Control(3, (Open(1, 0, (2,), 1, 2, 3),), 5, None)
    assert type(made.ops[0].groups[0]) is int


def test_arrays_can_be_written_to() -> None:
    """They belong to the receiver."""
    made = through(CacheData(1, 2, 3, 0, (0,), (1,), 0, np.zeros((1, 1, 2, 4)), np.ones((1, 1, 2, 4)), True))
    made.keys[...] = made.values
    assert made.keys.sum() == 8


WHOLE = Control(1, (), 0, Task((Row(1, 2, 1, True, False, (0, 1), -1),), np.arange(3)))
BEAT = KINDS.index(Beat)


@pytest.mark.parametrize("head", [
    b"", b"{}", b"\xff", b"null", b"[1,2]", b"[" * 100_000, b'[0,[],[["<f4",[1]],3]]',
    json.dumps([len(KINDS), [], []]).encode(), json.dumps([-1, [], []]).encode(),
    json.dumps([True, [], []]).encode(), json.dumps(["Beat", [1], []]).encode(),
    json.dumps([BEAT, {"device": 1}, []]).encode(),
    json.dumps([BEAT, [1], [["|O", [1]]]]).encode(), json.dumps([BEAT, [1], [["<f4", [-1]]]]).encode(),
    json.dumps([BEAT, [1], [["<f4", [1.5]]]]).encode(), json.dumps([BEAT, [1], [["<f4", [1] * 99]]]).encode(),
    json.dumps([BEAT, [1], [["<f8", [ARRAYS_BYTES_MAX // 8, 2]]]]).encode(),
])
def test_heads_that_are_none_are_refused(head: bytes) -> None:
    """Before anything is made of them, and before memory is taken for their arrays."""
    with pytest.raises(CodecError):
        parse(head)


@pytest.mark.parametrize(("kind", "fields"), [
    (Beat, []), (Beat, [1, 2]), (Beat, ["1"]), (Beat, [1.0]), (Beat, [True]), (Beat, [None]),
    (Failed, [1, 2]), (Control, [1, [[99, [1]]], 0, None]),
    (Control, [1, [[0, [1, 0, 5, 1, 1, 1]]], 0, None]),
    (Control, [1, [], 0, [[], 7]]), (Control, [1, [], 0, [[], -1]]), (Control, [1, {}, 0, None]),
    (AttentionRequest, [1, 2, 3, 0, 0, 9]),
    (AttentionBatch, [1, 2, 3, [[1, 2, ["3"]]], []]),
])
def test_fields_that_do_not_fit_are_refused(kind: type, fields: list[Any]) -> None:
    """A peer can make messages, and nothing that is none."""
    head = parse(json.dumps([KINDS.index(kind), fields, [["<f4", [1]]]]).encode())
    with pytest.raises(CodecError, match=kind.__name__):
        build(head, np.zeros(64, dtype=np.uint8))


@pytest.mark.parametrize("message", [
    Failed(1, object()),  # type: ignore[arg-type]
    CacheData(1, 2, 3, 0, (0,), (1,), 0, np.array([object()]), np.zeros(1), True),
    CacheData(1, 2, 3, 0, (0,), (1,), 0, np.zeros(1, dtype=complex), np.zeros(1), True),
])
def test_what_does_not_travel_is_refused_by_the_sender(message: Any) -> None:
    """No object is ever made into bytes that only its own program understands."""
    with pytest.raises(CodecError, match="does not travel"):
        encode(message)


def test_arrays_lie_aligned_one_after_the_other() -> None:
    """Both ends count the same places."""
    assert offsets([]) == [0]
    assert offsets([1, 0, 64, 65]) == [0, 64, 64, 128, 256]
    assert through(WHOLE).task.rows == WHOLE.task.rows
