"""Whether the simulator ranks policies as measurements do, with ties where these cannot tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

Verdict = Literal["same", "tie", "other"]
CAPACITY = "capacity"


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of a policy in both worlds; ``noise`` is what real runs differ by, as a share, or nan."""

    measured: float
    simulated: float
    noise: float = math.nan


@dataclass(frozen=True, slots=True)
class Order:
    """Two policies by one figure.

    Attributes:
        load: share of the capacity; nan for the capacity itself.
        measured, simulated: the first's figure over the second's, less one.
        noise: of the measured one.
        verdict: ``same`` order in both worlds, ``other``, or a ``tie``: measurements cannot tell.
    """

    metric: str
    load: float
    first: str
    second: str
    measured: float
    simulated: float
    noise: float
    verdict: Verdict


def orders_of(metric: str, load: float, figures: Mapping[str, Figure]) -> list[Order]:
    """Every pair of policies, by one figure."""
    return [_order(metric, load, first, second, figures[first], figures[second])
            for first, second in combinations(figures, 2)]


def _order(metric: str, load: float, first: str, second: str, one: Figure, other: Figure) -> Order:
    measured, simulated = one.measured / other.measured - 1.0, one.simulated / other.simulated - 1.0
    noise = math.hypot(one.noise, other.noise)
    verdict: Verdict = "same" if (measured > 0) == (simulated > 0) else "other"
    if abs(measured) <= noise:
        verdict = "tie"
    return Order(metric, load, first, second, measured, simulated, noise, verdict)


def agreement(orders: Sequence[Order]) -> dict[str, int]:
    """How many pairs have each verdict."""
    return {verdict: sum(order.verdict == verdict for order in orders)
            for verdict in ("same", "tie", "other")}
