"""Cache on its way from the instance that has computed a prompt to the one that decodes it.

The two cut layers and heads as each pleases: what a rank of one holds goes to whoever holds the same
groups of the same layers in the other. Either the whole cache is sent at once, or every layer as soon
as it has been computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hetis_exec.groups import Groups, Holders
from hetis_exec.holdings import Shipment
from hetis_exec.messages import Abroad, Onward, Send
from hetis_exec.mirror import Mirror
from hetis_sim.control.handoff import shared_layers
from hetis_sim.control.step import Transfer
from hetis_sim.policies.plan import InstancePlan


class Route(NamedTuple):
    """Groups of some layers that go from one position to a position of another instance.

    Attributes:
        stage, target_stage: of the two positions.
        first, at: the first of the layers, as the two stages count.
    """

    stage: int
    source: int
    target_stage: int
    target: int
    groups: Groups
    first: int
    at: int
    layers: int


def routes(source: InstancePlan, given: Holders, target: InstancePlan, taken: Holders) -> Iterator[Route]:
    """How the cache of a request gets from its holders in one instance to those in another."""
    starts, others = _first_layers(source), _first_layers(target)
    for stage, other, layers in shared_layers(source, target):
        common = max(starts[stage], others[other])
        first, at = common - starts[stage], common - others[other]
        pairs: dict[tuple[int, int], list[int]] = {}
        for group, pair in enumerate(zip(given[stage], taken[other], strict=True)):
            pairs.setdefault(pair, []).append(group)
        for (a, b), groups in sorted(pairs.items()):
            yield Route(stage, a, other, b, tuple(groups), first, at, layers)


def _first_layers(plan: InstancePlan) -> list[int]:
    return [sum(stage.layers for stage in plan.stages[:n]) for n in range(len(plan.stages))]


def send(transfer: Transfer, source: Mirror, target: Mirror, after: int) -> None:
    """Have a finished prompt's cache sent; ``after`` is the number of the message that makes room for it."""
    shipment, tokens = target.expected(transfer)
    for route in _routes(transfer, source, target):
        to, abroad = target.device(route.target), _abroad(route, after)
        source.send(route.source, Send(transfer.request_id, route.stage, route.groups, 0, tokens, to,
                                       shipment.tag, abroad=abroad))
        _count(shipment, route, source, target, tokens, 1)
    target.ship(shipment)


def stream(transfer: Transfer, source: Mirror, target: Mirror, after: int) -> dict[int, tuple[Onward, ...]]:
    """Have a prompt's cache sent while it is computed.

    Returns:
        For every stage of the source, what its ranks send on.
    """
    shipment, tokens = target.expected(transfer)
    found: dict[int, tuple[Onward, ...]] = {}
    for route in _routes(transfer, source, target):
        onward = Onward(source.device(route.source), target.device(route.target), route.groups, shipment.tag,
                        _abroad(route, after))
        found[route.stage] = (*found.get(route.stage, ()), onward)
        _count(shipment, route, source, target, tokens, route.layers)
    target.ship(shipment)
    return found


def _routes(transfer: Transfer, source: Mirror, target: Mirror) -> Iterator[Route]:
    request_id = transfer.request_id
    return routes(source.plan, source.known[request_id].cover.holders, target.plan,
                  target.landings[request_id].cover.holders)


def _abroad(route: Route, after: int) -> Abroad:
    return Abroad(route.target_stage, route.first, route.layers, route.at, after)


def _count(shipment: Shipment, route: Route, source: Mirror, target: Mirror, tokens: int,
           pieces: int) -> None:
    to = target.device(route.target)
    target.carry(shipment, source.device(route.source), to, tokens, len(route.groups) * route.layers)
    shipment.expect(to, pieces)
