"""Admission that leaves running requests room to grow."""

from __future__ import annotations

from collections.abc import Sequence

from hetis_sim.policies.plan import Placement
from hetis_sim.policies.view import InstanceView, RequestView


def usable_units(view: InstanceView, reserve_fraction: float) -> dict[int, int]:
    """Free units per device, less a share of each device's cache that running requests may grow into."""
    if not reserve_fraction:
        return dict(view.free_units)
    capacity = view.capacity_units
    return {d: units - int(reserve_fraction * capacity[d]) for d, units in view.free_units.items()}


def dispatch_at_home(requests: Sequence[RequestView], view: InstanceView,
                     reserve_fraction: float) -> list[Placement]:
    """Placements of the longest prefix that fits, every head at the rank that holds its weights.

    A request that is alone on its instance may use the reserve.
    """
    placed: list[Placement] = []
    placement = view.plan.local_placement
    free = dict(view.free_units) if not view.running else usable_units(view, reserve_fraction)
    for request in requests:
        need = view.units_needed(placement, request.context_tokens + 1)
        if any(units > free[device] for device, units in need.items()):
            break
        if not placed:
            free = usable_units(view, reserve_fraction)
        for device, units in need.items():
            free[device] -= units
        placed.append(placement)
    return placed
