"""Measured links: point-to-point coefficients and all-reduce curves by link and number of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hetis_sim.cost.curve import Curve
from hetis_sim.cost.model import TransferCost
from hetis_sim.cost.parse import positive
from hetis_sim.spec.errors import SpecError, require


@dataclass(frozen=True)
class LinkTable:
    """By name of the link: coefficients of a message, and all-reduce curves by number of ranks.

    ``pairs`` holds messages by link and :func:`pair_of` two types of devices, where what a message takes
    depends on who waits for it. ``remarks`` holds (status, note) of links whose origin differs from that of
    the module.
    """

    messages: Mapping[str, TransferCost]
    all_reduce: Mapping[str, Mapping[int, Curve]]
    remarks: Mapping[str, tuple[str, str]]
    pairs: Mapping[tuple[str, str], TransferCost] = field(default_factory=dict)

    def all_reduce_s(self, link: str, size_bytes: float, ranks: int) -> float | None:
        """Seconds of an all-reduce; None where the link was not measured.

        Between two measured numbers of ranks the logarithm is interpolated. Beyond the largest
        the ring scales the last curve: its p-1 steps the latency, its volume (p-1)/p the rest.
        """
        curves = self.all_reduce.get(link)
        if not curves:
            return None
        if ranks in curves:
            return curves[ranks].at(size_bytes)
        below = [r for r in curves if r < ranks]
        above = [r for r in curves if r > ranks]
        if below and above:
            low, high = max(below), min(above)
            share = (ranks - low) / (high - low)
            first, second = curves[low].at(size_bytes), curves[high].at(size_bytes)
            return math.exp((1.0 - share) * math.log(first) + share * math.log(second))
        nearest = max(below) if below else min(above)
        curve = curves[nearest]
        if above:
            return curve.at(size_bytes)
        latency = curve.seconds[0]
        volume = (ranks - 1) / ranks / ((nearest - 1) / nearest)
        return latency * (ranks - 1) / (nearest - 1) + (curve.at(size_bytes) - latency) * volume

    @classmethod
    def parse(cls, raw: Any, key: str) -> LinkTable:
        """Read ``{link: {gamma_s_per_byte, beta_s, pairs}}`` or ``{link: {ranks: {bytes, seconds}}}``."""
        messages: dict[str, TransferCost] = {}
        pairs: dict[tuple[str, str], TransferCost] = {}
        reduces: dict[str, dict[int, Curve]] = {}
        remarks: dict[str, tuple[str, str]] = {}
        require(isinstance(raw, dict) and bool(raw), key, raw, "an object with at least one link")
        for link, body in raw.items():
            place = f"{key}.{link}"
            require(isinstance(body, dict), place, body, "an object")
            if "status" in body:
                remarks[link] = (str(body["status"]), str(body.get("note", "")))
            if "gamma_s_per_byte" in body:
                messages[link] = _message(body, place)
                of_pairs = body.get("pairs", {})
                require(isinstance(of_pairs, dict), f"{place}.pairs", of_pairs, "an object")
                for pair, line in of_pairs.items():
                    require(pair.count(">") == 1, f"{place}.pairs", pair, "two types, 'rank>worker'")
                    pairs[link, pair] = _message(line, f"{place}.pairs.{pair}")
                continue
            reduces[link] = {}
            for ranks, curve in body.items():
                if ranks in ("status", "note"):
                    continue
                if not ranks.isdigit() or int(ranks) < 2:
                    raise SpecError(f"{place}.{ranks}", ranks, "a number of ranks >= 2")
                reduces[link][int(ranks)] = Curve.parse(curve, f"{place}.{ranks}")
        return cls(messages, reduces, remarks, pairs)


def pair_of(rank: str, worker: str) -> str:
    """The key of messages between a rank and an attention worker of some types of devices."""
    return f"{rank}>{worker}"


def _message(body: Any, place: str) -> TransferCost:
    require(isinstance(body, dict), place, body, "an object")
    return TransferCost(positive(body.get("gamma_s_per_byte"), f"{place}.gamma_s_per_byte"),
                        positive(body.get("beta_s"), f"{place}.beta_s", zero=True))
