"""Where cache, devices, links and iteration time went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetis_sim.metrics.columns import PARTS, STEP_KINDS, TRANSFER_KINDS, Table
from hetis_sim.metrics.records import Records, WireTraffic
from hetis_sim.metrics.window import Window

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """One device over the measured window.

    Attributes:
        device: its id.
        label: its name.
        role: ``primary``, ``attention``, ``idle`` or empty where unknown.
        capacity_bytes: cache it can hold.
        peak_bytes: most cache seen in the whole run.
        kv_used_mean: average over time of the share in use; nan without capacity.
        kv_used_max: ``peak_bytes`` as a share.
        busy_s: time in which it computed.
        busy_share: of the window.
        busy_whole_run_s: the same from the start of the run to its end.
        heads_mean: query heads held, averaged over the layers of the model and over time; nan where
            nobody counted them.
    """

    device: int
    label: str
    role: str
    capacity_bytes: float
    peak_bytes: float
    kv_used_mean: float
    kv_used_max: float
    busy_s: float
    busy_share: float
    busy_whole_run_s: float
    heads_mean: float


@dataclass(frozen=True, slots=True)
class TransferUse:
    """Transfers of one kind that began in the measured window."""

    transfers: int
    requests: int
    size_bytes: float


@dataclass(frozen=True, slots=True)
class WireUse:
    """One direction of a link over the whole run.

    Attributes:
        name: ``host1 in``, ``3:a100-80gb@host0 out``, ``host0 to host2``.
        bandwidth_bytes_per_s: that is reached, not the peak of the datasheet.
        size_bytes: by what for: ``cache``, ``heads``, ``collectives``, ``activations``.
        busy_share: time that these bytes take at that bandwidth, as a share of the run.
    """

    name: str
    bandwidth_bytes_per_s: float
    size_bytes: dict[str, float]
    busy_share: float


@dataclass(frozen=True, slots=True)
class IterationUse:
    """Where the time of steps that began in the window went, over all lanes.

    Attributes:
        steps: rows of the record.
        iterations: that they stand for.
        batch_mean: requests in an iteration, averaged over iterations.
        time_s: summed over lanes, so it can exceed the window.
        shares: of that time by named part; ``other`` is what no part claims.
    """

    steps: int
    iterations: int
    batch_mean: float
    time_s: float
    shares: dict[str, float]


def device_use(records: Records, roles: Sequence[str], window: Window,
               whole: Window) -> tuple[DeviceUse, ...]:
    """Use of every device in the window of the whole run; ``roles`` may be empty."""
    weights = _held_s(records.samples["now_s"], window)
    rows = []
    for device, (label, capacity) in enumerate(zip(records.devices, records.capacity_bytes, strict=True)):
        used = records.samples[f"used_bytes_{device}"]
        peak = max(float(used.max(initial=0.0)), records.peak_bytes[device])
        busy_s = _busy_s(records, device, window, whole)
        rows.append(DeviceUse(
            device, label, roles[device] if roles else "", capacity, peak,
            _ratio(_weighted_mean(used, weights), capacity), _ratio(peak, capacity), busy_s,
            _ratio(busy_s, window.duration_s), records.busy_s[device],
            _heads_mean(records, device, weights)))
    return tuple(rows)


def cluster_kv_use(records: Records, window: Window) -> tuple[float, float]:
    """Share of the whole cluster's cache in use: average over time in the window, and most in the run."""
    if not records.devices:
        return math.nan, math.nan
    total = np.sum([records.samples[f"used_bytes_{i}"] for i in range(len(records.devices))], axis=0)
    capacity = sum(records.capacity_bytes)
    mean = _weighted_mean(total, _held_s(records.samples["now_s"], window))
    return _ratio(mean, capacity), _ratio(float(total.max(initial=0.0)), capacity)


def _held_s(now_s: Floats, window: Window) -> Floats:
    """How long, within the window, each sample is the latest one."""
    until_s = np.append(now_s[1:], np.inf)
    held: Floats = np.clip(until_s, window.from_s, window.to_s) - np.clip(now_s, window.from_s, window.to_s)
    return held


def _weighted_mean(values: Floats, weights: Floats) -> float:
    return float(values @ weights / weights.sum()) if weights.sum() > 0 else math.nan


def _heads_mean(records: Records, device: int, weights: Floats) -> float:
    """Folders of earlier versions hold no counts."""
    name = f"heads_{device}"
    return _weighted_mean(records.samples[name], weights) if name in records.samples.columns else math.nan


def _busy_s(records: Records, device: int, window: Window, whole: Window) -> float:
    """Work of a device in the window, from its work so far in the samples.

    Where a driver told its work at the end only, it is taken as even over the run.
    """
    total = records.busy_s[device]
    if not window.trimmed:
        return total
    now_s, so_far = records.samples["now_s"], records.samples[f"busy_s_{device}"]
    if not so_far.any():
        return _ratio(total * window.duration_s, whole.duration_s)
    return float(np.interp(window.to_s, now_s, so_far) - np.interp(window.from_s, now_s, so_far))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def transfer_use(transfers: Table, window: Window) -> dict[str, TransferUse]:
    """Transfers by kind, kinds without any left out."""
    inside = transfers.rows(window.covers(transfers["start_s"]))
    found = {}
    for code, kind in enumerate(TRANSFER_KINDS):
        chosen = inside["kind"] == code
        if chosen.any():
            found[kind] = TransferUse(int(chosen.sum()), len(np.unique(inside["request_id"][chosen])),
                                      float(inside["size_bytes"][chosen].sum()))
    return found


def wire_use(wires: Sequence[WireTraffic], whole: Window) -> tuple[WireUse, ...]:
    """Every wire that has carried anything; the busiest come first."""
    found = [WireUse(wire.name, wire.bandwidth_bytes_per_s, wire.size_bytes,
                     _ratio(sum(wire.size_bytes.values()) / wire.bandwidth_bytes_per_s, whole.duration_s))
             for wire in wires]
    return tuple(sorted(found, key=lambda use: (-use.busy_share, use.name)))


def iteration_use(steps: Table, window: Window) -> dict[str, IterationUse]:
    """Time by part over all steps, and over those of each kind that occurs."""
    kind = np.where(window.covers(steps["start_s"]), steps["kind"], len(STEP_KINDS))

    def by_kind(values: NDArray[Any]) -> Floats:
        sums = np.bincount(kind, weights=values, minlength=len(STEP_KINDS))
        return np.asarray(sums[:len(STEP_KINDS)], dtype=np.float64)

    sums = {f"{part}_s": by_kind(steps[f"{part}_s"]) for part in PARTS}
    sums["time_s"] = by_kind(steps["end_s"] - steps["start_s"])
    sums["steps"] = by_kind(np.ones(len(steps)))
    sums["iterations"] = by_kind(steps["iterations"])
    sums["batches"] = by_kind(steps["requests"] * steps["iterations"])
    found = {"all": _iteration_use({name: float(values.sum()) for name, values in sums.items()})}
    for code, name in enumerate(STEP_KINDS):
        if sums["steps"][code]:
            found[name] = _iteration_use({key: float(values[code]) for key, values in sums.items()})
    return found


def _iteration_use(sums: Mapping[str, float]) -> IterationUse:
    shares = {part: _ratio(sums[f"{part}_s"], sums["time_s"]) for part in PARTS}
    # What is left over from exact sums is rounding, not time.
    rest = 1.0 - sum(shares.values())
    shares["other"] = 0.0 if abs(rest) < 1e-9 else rest
    return IterationUse(int(sums["steps"]), int(sums["iterations"]),
                        _ratio(sums["batches"], sums["iterations"]), sums["time_s"], shares)


def roles_of_plan(plan: Mapping[str, Any], devices: int) -> tuple[str, ...]:
    """Role of every device in a plan as written to ``plan.json``.

    A primary of an instance that serves one phase only is named after the phase. The GPUs of a mesh's
    nodes are primaries.
    """
    roles = ["idle"] * devices
    for instance in plan.get("instances", ()):
        phase = instance.get("role", "both")
        for stage in instance["stages"]:
            for device in stage["devices"]:
                roles[device] = "primary" if phase == "both" else phase
        for device in instance.get("attention_workers", ()):
            roles[device] = "attention"
    for node in (plan.get("mesh") or {}).get("nodes", ()):
        for device in node["devices"]:
            roles[device] = "primary"
    return tuple(roles)
