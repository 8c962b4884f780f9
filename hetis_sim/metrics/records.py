"""The tables of one run together: what summaries, checks and run folders are made from."""

from __future__ import annotations

from dataclasses import dataclass

from hetis_sim.metrics.columns import Table
from hetis_sim.metrics.itl import Segments


@dataclass(frozen=True, slots=True)
class WireTraffic:
    """What one direction of a link has carried in the whole run, in bytes by kind."""

    name: str
    bandwidth_bytes_per_s: float
    size_bytes: dict[str, float]


@dataclass(frozen=True)
class Records:
    """All that was recorded of a run, from a recorder or from a run folder.

    Attributes:
        requests: a row per ended request, in order of arrival, latencies included.
        steps, transfers: rows in order of recording.
        samples: state over time.
        itl: gaps between tokens.
        devices: label of each device id.
        capacity_bytes, busy_s, peak_bytes: per device.
        counters: by name.
        wires: what each wire has carried; empty where nobody counts.
    """

    requests: Table
    steps: Table
    transfers: Table
    samples: Table
    itl: Segments
    devices: tuple[str, ...]
    capacity_bytes: tuple[float, ...]
    busy_s: tuple[float, ...]
    peak_bytes: tuple[float, ...]
    counters: dict[str, float]
    wires: tuple[WireTraffic, ...] = ()
