"""Whether the simulator ranks policies as measurements do, with ties where these cannot tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

Verdict = Literal["same", "tie", "other"]
VERDICTS: tuple[Verdict, ...] = ("same", "tie", "other")
CAPACITY = "capacity"


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of a policy in both worlds.

    Attributes:
        noise: what real runs differ by, as a share; nan where that is not known.
        paced: as simulated at the machine's measured pace; nan where that was not measured.
    """

    measured: float
    simulated: float
    noise: float = math.nan
    paced: float = math.nan


@dataclass(frozen=True, slots=True)
class Order:
    """Two policies by one figure.

    Attributes:
        load: share of the capacity; nan for the capacity itself.
        measured, simulated: the first's figure over the second's, less one.
        noise: of the measured one.
        verdict: ``same`` order in both worlds, ``other``, or a ``tie``: measurements cannot tell.
        paced: as ``simulated``, at the pace that the machine had beside the runs; nan where not measured.
        paced_verdict: of that; the verdict itself where there is none.
    """

    metric: str
    load: float
    first: str
    second: str
    measured: float
    simulated: float
    noise: float
    verdict: Verdict
    paced: float
    paced_verdict: Verdict


def orders_of(metric: str, load: float, figures: Mapping[str, Figure]) -> list[Order]:
    """Every pair of policies, by one figure."""
    return [_order(metric, load, first, second, figures[first], figures[second])
            for first, second in combinations(figures, 2)]


def _order(metric: str, load: float, first: str, second: str, one: Figure, other: Figure) -> Order:
    measured, simulated, paced = (a / b - 1.0 for a, b in (
        (one.measured, other.measured), (one.simulated, other.simulated), (one.paced, other.paced)))
    noise = math.hypot(one.noise, other.noise)
    verdict = _verdict(measured, simulated, noise)
    return Order(metric, load, first, second, measured, simulated, noise, verdict, paced,
                 verdict if math.isnan(paced) else _verdict(measured, paced, noise))


def _verdict(measured: float, simulated: float, noise: float) -> Verdict:
    if abs(measured) <= noise:
        return "tie"
    return "same" if (measured > 0) == (simulated > 0) else "other"


def agreement(orders: Sequence[Order], paced: bool = False) -> dict[str, int]:
    """How many pairs have each verdict."""
    verdicts = [order.paced_verdict if paced else order.verdict for order in orders]
    return {verdict: verdicts.count(verdict) for verdict in VERDICTS}
