"""Attention on a GPU: blocks of query rows in waves for prompts, the paper's linear model for decode."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hetis_sim.cost.grid import Floats, Grid
from hetis_sim.cost.model import AttentionCost
from hetis_sim.cost.parse import positive
from hetis_sim.spec.errors import require

PREFILL_NUMBERS = ("flops_per_s", "block_flops_per_s", "bytes_per_s", "fixed_s", "sharpness")


@dataclass(frozen=True)
class PrefillClass:
    """Causal attention of one head size (equations ours, after the shape of FlashAttention).

        t = (fixed + (total^p + longest^p)^(1/p) + moved / bytes_per_s) * exp(correction)

        total   = 4*d*heads * pairs over the rate of the whole card; queries are padded to whole blocks
        longest = 4*d*block * (context + new) over the rate of one block: the walk of the last
                  block along all keys, which bounds the time when there are few blocks
        moved   = queries and outputs once, new keys and values three times (read, cached), the
                  cached ones once

    Attributes:
        head_dim: size of a head.
        block: query rows of a block.
        flops_per_s: rate of the whole card.
        block_flops_per_s: rate of a single block.
        bytes_per_s: reached memory bandwidth.
        fixed_s: cost of the kernel whatever its size.
        sharpness: p.
        correction: log of what is left, over (log2 blocks, log2 keys, log2 query heads per KV head).
    """

    head_dim: int
    block: int
    flops_per_s: float
    block_flops_per_s: float
    bytes_per_s: float
    fixed_s: float
    sharpness: float
    correction: Grid | None = None

    def seconds(self, heads: Floats, kv_heads: Floats, new: Floats, context: Floats, kv_bytes: int,
                head_dim: int | None = None, batch: float | Floats = 1.0) -> Floats:
        """Seconds of ``batch`` equal requests in one kernel; arrays of equal shape."""
        seconds = self.base_s(heads, kv_heads, new, context, kv_bytes, head_dim, batch)
        if self.correction is None:
            return seconds
        blocks = batch * heads * np.ceil(new / self.block)
        group = np.log2(np.maximum(heads / kv_heads, 1.0))
        corrected: Floats = seconds * np.exp(
            self.correction.at(np.log2(np.maximum(blocks, 1.0)), np.log2(context + new), group))
        return corrected

    def base_s(self, heads: Floats, kv_heads: Floats, new: Floats, context: Floats, kv_bytes: int,
               head_dim: int | None = None, batch: float | Floats = 1.0) -> Floats:
        """The same without the correction."""
        size = head_dim or self.head_dim
        rows = np.ceil(new / self.block) * self.block
        pairs = rows * context + rows * (new + 1.0) / 2.0
        total = 4.0 * size * batch * heads * pairs / self.flops_per_s
        longest = 4.0 * size * self.block * (context + new) / self.block_flops_per_s
        moved = batch * size * kv_bytes * (2.0 * heads * new + kv_heads * (6.0 * new + 2.0 * context))
        compute: Floats = (total**self.sharpness + longest**self.sharpness) ** (1.0 / self.sharpness)
        return self.fixed_s + compute + moved / self.bytes_per_s

    def seconds_one(self, heads: int, kv_heads: int, new: int, context: int, kv_bytes: int,
                    head_dim: int) -> float:
        """:meth:`seconds` of one request, without the cost of arrays."""
        blocks = heads * -(-new // self.block)
        rows = -(-new // self.block) * self.block
        total = 4.0 * head_dim * heads * rows * (context + (new + 1.0) / 2.0) / self.flops_per_s
        longest = 4.0 * head_dim * self.block * (context + new) / self.block_flops_per_s
        moved = head_dim * kv_bytes * (2.0 * heads * new + kv_heads * (6.0 * new + 2.0 * context))
        most, p = max(total, longest), self.sharpness
        compute = most * math.pow(math.pow(total / most, p) + math.pow(longest / most, p), 1.0 / p)
        seconds = self.fixed_s + compute + moved / self.bytes_per_s
        if self.correction is None:
            return seconds
        return seconds * math.exp(self.correction.at_point(
            math.log2(blocks), math.log2(context + new), math.log2(max(heads / kv_heads, 1.0))))

    def with_correction(self, correction: Grid) -> PrefillClass:
        """The same base with another correction."""
        return replace(self, correction=correction)

    @classmethod
    def parse(cls, raw: Any, key: str) -> PrefillClass:
        """Read a profile's coefficients; :class:`SpecError` names the faulty key."""
        require(isinstance(raw, dict), key, raw, "an object")
        numbers = {name: positive(raw.get(name), f"{key}.{name}", zero=name == "fixed_s")
                   for name in PREFILL_NUMBERS}
        return cls(int(positive(raw.get("head_dim"), f"{key}.head_dim")),
                   int(positive(raw.get("block"), f"{key}.block")),
                   correction=Grid.parse_optional(raw.get("correction"), f"{key}.correction"), **numbers)

    def dump(self) -> dict[str, Any]:
        """The form for a profile file."""
        raw: dict[str, Any] = {"head_dim": self.head_dim, "block": self.block}
        raw.update({name: float(f"{getattr(self, name):.4g}") for name in PREFILL_NUMBERS})
        if self.correction is not None:
            raw["correction"] = self.correction.dump()
        return raw


@dataclass(frozen=True)
class DecodeClass:
    """tau = (a*h + b*g + c) * exp(correction) for one head size and one number of query heads per KV head."""

    head_dim: int
    heads_per_group: int
    cost: AttentionCost

    @classmethod
    def parse(cls, raw: Any, key: str) -> DecodeClass:
        """Read a profile's coefficients; :class:`SpecError` names the faulty key."""
        require(isinstance(raw, dict), key, raw, "an object")
        lone = raw.get("lone")
        cost = replace(_line(raw, key), lone=None if lone is None else _line(lone, f"{key}.lone"),
                       correction=Grid.parse_optional(raw.get("correction"), f"{key}.correction"))
        return cls(int(positive(raw.get("head_dim"), f"{key}.head_dim")),
                   int(positive(raw.get("heads_per_group"), f"{key}.heads_per_group")), cost)

    def dump(self) -> dict[str, Any]:
        """The form for a profile file."""
        lone, correction = self.cost.lone, self.cost.correction
        return {"head_dim": self.head_dim, "heads_per_group": self.heads_per_group, **_dumped(self.cost),
                **({} if lone is None else {"lone": _dumped(lone)}),
                **({} if correction is None else {"correction": correction.dump()})}


def _line(raw: Any, key: str) -> AttentionCost:
    require(isinstance(raw, dict), key, raw, "an object")
    return AttentionCost(positive(raw.get("a_s_per_head"), f"{key}.a_s_per_head", zero=True),
                         positive(raw.get("b_s_per_byte"), f"{key}.b_s_per_byte"),
                         positive(raw.get("c_s"), f"{key}.c_s", zero=True))


def _dumped(cost: AttentionCost) -> dict[str, float]:
    names = ("a_s_per_head", "b_s_per_byte", "c_s")
    return {name: float(f"{getattr(cost, name):.4g}") for name in names}
