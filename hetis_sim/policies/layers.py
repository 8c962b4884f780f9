"""Splits a model's layers over pipeline stages of unequal speed and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CLEARANCE = 1e-9
SLACK = (1.05, 1.1, 1.2, 1.35, 1.6, 2.0, 3.0)


@dataclass(frozen=True, slots=True)
class StageLoad:
    """What layers cost in one stage.

    Attributes:
        fixed_s: time of the stage in an iteration without any layer.
        layer_s: time of one more layer.
        passing_s: time that one more layer adds to every stage's turn, because what is computed
            there holds up all others (prefills).
        local_layers: layers that fit together with their cache.
        most_layers: layers whose weights fit at all.
        layer_bytes: weights and cache of one layer; what a layer beyond ``local_layers`` asks
            of the attention workers, since its weights drive out as much cache.
    """

    fixed_s: float
    layer_s: float
    passing_s: float
    local_layers: float
    most_layers: float
    layer_bytes: float


def split_layers(stages: Sequence[StageLoad], layers: int, spare_bytes: float) -> tuple[int, ...] | None:
    """Layers of each stage such that a pipeline turn is as short as memory allows.

    A turn takes ``max_s (fixed_s + n_s * layer_s) + sum_s n_s * passing_s``. First each layer
    goes to the stage that is done first with it (water-filling in whole layers; of whole layers
    no split has a faster slowest stage). Then the stages are given some slack, and are filled
    up in the order of ``passing_s``; the best of these splits is taken. Layers whose cache does
    not fit beside their weights draw on ``spare_bytes``, the attention workers' memory.

    Returns:
        None where the layers do not fit. Every stage gets one layer at least.
    """
    best = _water_fill(stages, layers, spare_bytes)
    if best is None:
        return None
    level = _slowest(stages, best)
    passing = [stage.passing_s for stage in stages]
    if max(passing) - min(passing) > CLEARANCE * max(passing):
        order = sorted(range(len(stages)), key=lambda s: (stages[s].passing_s, s))
        for slack in SLACK:
            found = _fill_in_order(stages, layers, spare_bytes, order, level * slack)
            if found is not None and _turn(stages, found) < _turn(stages, best):
                best = found
    return tuple(best)


def _slowest(stages: Sequence[StageLoad], counts: Sequence[int]) -> float:
    return max(stage.fixed_s + n * stage.layer_s for stage, n in zip(stages, counts, strict=True))


def _turn(stages: Sequence[StageLoad], counts: Sequence[int]) -> float:
    passing = sum(n * stage.passing_s for stage, n in zip(stages, counts, strict=True))
    return _slowest(stages, counts) + passing


def _one_each(stages: Sequence[StageLoad], spare: float) -> float | None:
    """Spare bytes left when every stage has one layer."""
    for stage in stages:
        if stage.most_layers + CLEARANCE < 1:
            return None
        spare -= max(0.0, 1 - stage.local_layers) * stage.layer_bytes
    return spare if spare >= 0.0 else None


def _water_fill(stages: Sequence[StageLoad], layers: int, spare_bytes: float) -> list[int] | None:
    spare = _one_each(stages, spare_bytes)
    if spare is None or layers < len(stages):
        return None
    counts = [1] * len(stages)
    done = [stage.fixed_s + 2 * stage.layer_s for stage in stages]
    for _ in range(layers - len(stages)):
        s = -1
        while True:
            s = min(range(len(stages)), key=done.__getitem__)
            if done[s] == float("inf"):
                return None
            price = _price(stages[s], counts[s])
            if price is not None and price <= spare:
                break
            done[s] = float("inf")
        counts[s] += 1
        spare -= price
        done[s] += stages[s].layer_s
    return counts


def _fill_in_order(stages: Sequence[StageLoad], layers: int, spare_bytes: float, order: Sequence[int],
                   level: float) -> list[int] | None:
    """One stage after the other up to ``level``; None where that does not take all layers."""
    spare = _one_each(stages, spare_bytes)
    if spare is None:
        return None
    counts = [1] * len(stages)
    left = layers - len(stages)
    for s in order:
        stage = stages[s]
        in_time = (level - stage.fixed_s) / stage.layer_s
        affordable = max(stage.local_layers, 1.0) + spare / stage.layer_bytes
        count = min(1 + left, int(min(in_time, affordable, stage.most_layers) + CLEARANCE))
        if count > 1:
            spare -= max(0.0, count - max(stage.local_layers, 1.0)) * stage.layer_bytes
            counts[s] = count
            left -= count - 1
    return counts if left == 0 else None


def _price(stage: StageLoad, layers: int) -> float | None:
    """Bytes that one more layer asks of the attention workers; None where its weights do not fit."""
    after = layers + 1
    if after > stage.most_layers + CLEARANCE:
        return None
    return max(0.0, after - max(stage.local_layers, layers)) * stage.layer_bytes
