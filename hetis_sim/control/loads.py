"""Decode load of an instance: one row per lane, one column per position."""

from __future__ import annotations

from operator import add

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Loads:
    """KV groups of the members of every lane, and what their cache amounts to.

    With n iterations issued, the cached tokens of a member are ``offset + n``. So the KV
    group-tokens of a lane at a position are ``base + groups * n``, where base sums
    groups x offset: an iteration changes n alone, whatever the lane holds.

    Attributes:
        groups, base: shape (lanes, positions); ``groups`` are those that grow.
        issued: n, shape (lanes,).
        still, merged: groups in token ranges, which do not grow, and groups of tails whose output
            is merged with theirs; shape (lanes, positions). ``base`` holds the ranges' group-tokens.
        ranged: members with token ranges; while it is 0, nothing in ``still`` and ``merged``.
        extra_groups, extra_tokens: per position, of requests that hold cache outside lanes.
    """

    __slots__ = ("base", "extra_groups", "extra_tokens", "groups", "issued", "merged", "ranged", "still")

    def __init__(self, lanes: int, positions: int) -> None:
        self.groups: Ints = np.zeros((lanes, positions), dtype=np.int64)
        self.base: Ints = np.zeros((lanes, positions), dtype=np.int64)
        self.issued: Ints = np.zeros(lanes, dtype=np.int64)
        self.still: Ints = np.zeros((lanes, positions), dtype=np.int64)
        self.merged: Ints = np.zeros((lanes, positions), dtype=np.int64)
        self.ranged = 0
        self.extra_groups = [0] * positions
        self.extra_tokens = [0] * positions

    def decoding(self) -> tuple[Ints, Ints]:
        """Groups computed and group-tokens per position, over all lanes."""
        if len(self.issued) == 1:
            groups, tokens = self.groups[0], self.base[0] + self.issued[0] * self.groups[0]
        else:
            groups, tokens = self.groups.sum(axis=0), self.base.sum(axis=0) + self.issued @ self.groups
        return (groups + self.still.sum(axis=0) if self.ranged else groups), tokens

    def held(self) -> list[int]:
        """Groups per position, of everything that holds cache."""
        groups = self.groups.sum(axis=0)
        if self.ranged:
            groups += self.still.sum(axis=0)
        return list(map(add, groups.tolist(), self.extra_groups))

    def total(self) -> tuple[list[int], list[int]]:
        """Groups and group-tokens per position, of everything that holds cache."""
        groups, tokens = self.decoding()
        return (list(map(add, groups.tolist(), self.extra_groups)),
                list(map(add, tokens.tolist(), self.extra_tokens)))
