"""Whose heads are whose: rows of a share are the same ones however they are picked."""

from __future__ import annotations

import numpy as np
import pytest

from hetis_exec.messages import Row, Span
from hetis_exec.rows import in_rows
from hetis_exec.shares import divide
from hetis_exec.toy_backend import ToyKernels

GROUPS = (3, 5, 7, 8)
KERNELS = ToyKernels(1, 1, 1)


def row(n: int, holders: tuple[int, ...], *, prefill: bool = False, older: tuple[Span, ...] = ()) -> Row:
    """A request of one new token, or of three; holders of the rank's groups, in order."""
    by_group = [9] * 10
    for group, holder in zip(GROUPS, holders, strict=True):
        by_group[group] = holder
    return Row(n, 20 + n, 3 if prefill else 1, True, prefill, tuple(by_group), -1, older=older)


def places(rows: list[Row], device: int) -> list[tuple[int, int]]:
    """Row and column of every decoding group that a device holds, in the order of a share."""
    found, at = [], 0
    for one in rows:
        if not one.prefill:
            found += [(at, n) for n, g in enumerate(GROUPS) if one.holders[g] == device]
        at += one.new_tokens
    return found


ALIKE = [row(n, (0, 0, 1, 1)) for n in range(4)]
CASES = {
    "alike": (ALIKE, (True, True)),
    "beside prompts": ([row(8, (0, 0, 0, 0), prefill=True), *ALIKE, row(9, (1, 1, 1, 1), prefill=True)],
                       (True, True)),
    "others": ([*ALIKE, row(5, (0, 1, 1, 1))], (False, False)),
    "in between": ([row(n, (0, 1, 1, 0)) for n in range(3)], (False, True)),
    "a prompt in between": ([ALIKE[0], row(8, (0, 0, 0, 0), prefill=True), ALIKE[1]], (False, False)),
    "some rows": ([row(0, (1, 1, 1, 1)), row(1, (0, 0, 0, 0)), row(2, (0, 0, 0, 0))], (True, True)),
    "one": ([row(0, (0, 1, 0, 0))], (False, True)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_share_has_the_rows_of_its_groups(name: str) -> None:
    """As a view where they fill a block of the batch, else picked; what is put back lands where it was."""
    rows, blocks = CASES[name]
    tokens = sum(one.new_tokens for one in rows)
    rng = np.random.default_rng(0)
    queries, keys = rng.random((tokens, len(GROUPS), 2, 3)), rng.random((tokens, len(GROUPS), 3))
    shares = divide(rows, GROUPS, KERNELS).by_device
    for device, is_block in zip((0, 1), blocks, strict=True):
        share, at = shares[device], tuple(np.array(places(rows, device)).T)
        assert (share.block is not None) == is_block
        assert (in_rows(share.queries(queries), 2) == queries[at]).all()
        assert (in_rows(share.new(keys), 1) == keys[at]).all()
        assert np.shares_memory(share.queries(queries), queries) == share.is_view == is_block
        attended = np.zeros_like(queries)
        expected = attended.copy()
        expected[at] = queries[at]
        assert (share.put(attended, queries[at]) == expected).all()


def test_all_of_a_batch_is_no_copy() -> None:
    """A device that computes everything works on the arrays as they are."""
    share = divide([row(n, (2, 2, 2, 2)) for n in range(3)], GROUPS, KERNELS).by_device[2]
    values = np.ones((3, 4, 2, 3))
    assert share.whole
    assert np.shares_memory(share.queries(values), values)
    assert share.put(np.zeros_like(values), values.reshape(-1, 2, 3)).shape == values.shape


def test_parts_are_no_block() -> None:
    """Rows whose tokens are divided come in an order of their own."""
    older = (Span(16, tuple([4] * 10)),)
    shares = divide([row(n, (0, 0, 1, 1), older=older) for n in range(3)], GROUPS, KERNELS).by_device
    assert all(share.block is None and not share.whole for share in shares.values())
    values = np.arange(12.0).reshape(3, 4, 1)
    assert shares[4].queries(values).ravel().tolist() == list(range(12))
    assert shares[0].new(values).ravel().tolist() == [0, 1, 4, 5, 8, 9]
