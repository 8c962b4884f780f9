"""The figures of a summary as rows of text, for every kind of table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hetis_sim.metrics.strictjson import plain
from hetis_sim.metrics.summary import Summary

Row = tuple[str, ...]

LATENCY_HEADER: Row = ("latency", "mean [95 %]", "p50", "p90", "p95 [95 %]", "p99", "n")
DEVICE_HEADER: Row = ("device", "role", "KV mean", "KV max", "busy", "heads")
DEVICE_LINES_MAX = 24
UNBOUNDED = "?"


def as_dict(summary: Summary | Mapping[str, Any]) -> Mapping[str, Any]:
    """Plain types, whether the summary is fresh or was read from a folder."""
    result: Mapping[str, Any] = plain(summary)
    return result


def latency_rows(summary: Mapping[str, Any]) -> list[Row]:
    """One row a metric, each in the unit that suits it."""
    return [_latency_row(name, summary[f"{name}_s"]) for name in ("ttft", "tpot", "itl", "e2el")]


def _latency_row(name: str, values: Mapping[str, Any]) -> Row:
    in_ms = values["p50"] is None or values["p50"] < 1.0

    def show(point: str) -> str:
        return _seconds(values[point], in_ms)

    def with_limits(point: str) -> str:
        limits = values[f"{point}_interval"]
        if limits == [None, None]:
            return show(point)
        low, high = (UNBOUNDED if limit is None else _seconds(limit, in_ms) for limit in limits)
        return f"{show(point)} [{low}, {high}]"

    return (f"{name} ({'ms' if in_ms else 's'})", with_limits("mean"), show("p50"), show("p90"),
            with_limits("p95"), show("p99"), f"{values['n']:,}")


def _seconds(value: float | None, in_ms: bool) -> str:
    if value is None:
        return "-"
    scaled = value * 1e3 if in_ms else value
    return f"{scaled:,.{0 if abs(scaled) >= 1000 else 1 if in_ms else 2}f}"


def rate_rows(summary: Mapping[str, Any]) -> list[Row]:
    """Throughput, goodput and counts, as name and text."""
    rates, slo, counts = summary["throughput"], summary["slo"], summary["requests"]
    low, high = slo["attainment_interval"]
    attainment = "" if low is None else f" [{_percent(low)}, {_percent(high)}]"
    limits = f"ttft <= {slo['ttft_s']:g} s and tpot <= {slo['tpot_s']:g} s"
    return [
        ("requests", _counts_text(counts)),
        ("request throughput", f"{_number(rates['request_throughput'])} requests/s over "
                               f"{_number(rates['duration_s'])} s"),
        ("output throughput", f"{_number(rates['output_throughput'])} tokens/s"),
        ("total throughput", f"{_number(rates['total_token_throughput'])} tokens/s"),
        ("goodput", f"{_number(rates['request_goodput'])} requests/s with {limits}"),
        ("SLO attainment", _percent(slo["attainment"]) + attainment),
        ("preemptions", f"{summary['preemptions']:,}"),
        ("migrations", f"{summary['moves']:,}"),
        ("cache moved", _transfers_text(summary["transfers"])),
        ("KV use", f"{_percent(summary['kv_used_mean'])} mean, {_percent(summary['kv_used_max'])} max"),
        ("iteration time", _shares_text(summary["iterations"]["all"]["shares"])),
    ]


def _counts_text(counts: Mapping[str, Any]) -> str:
    text = ", ".join(f"{counts[name]:,} {name}" for name in ("submitted", "finished", "rejected"))
    if counts["rejected"]:
        reasons = [f"{name}: {number:,}" for name, number in counts["rejected_by_reason"].items()]
        text += f" ({', '.join(reasons)})"
    return text + (f", {counts['unfinished']:,} unfinished" if counts["unfinished"] else "")


def _transfers_text(transfers: Mapping[str, Any]) -> str:
    kinds = [f"{kind} {size_text(use['size_bytes'])} in {use['transfers']:,}"
             for kind, use in transfers.items()]
    return ", ".join(kinds) or "none"


def _shares_text(shares: Mapping[str, float | None]) -> str:
    parts = [f"{name.replace('_', ' ')} {_percent(share)}" for name, share in shares.items() if share]
    return ", ".join(parts) or "-"


def device_rows(summary: Mapping[str, Any]) -> list[Row]:
    """A row a device; equal cards of one role share a row in clusters of more than 24."""
    devices: Sequence[Mapping[str, Any]] = summary["devices"]
    if len(devices) <= DEVICE_LINES_MAX:
        return [(device["label"], device["role"] or "-", *_use_texts([device])) for device in devices]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for device in devices:
        card = device["label"].partition(":")[2].partition("@")[0] or device["label"]
        groups.setdefault((card, device["role"] or "-"), []).append(device)
    return [(f"{len(group)} x {card}", role, *_use_texts(group)) for (card, role), group in groups.items()]


def _use_texts(devices: Sequence[Mapping[str, Any]]) -> Row:
    def mean(name: str) -> float | None:
        values = [device[name] for device in devices if device.get(name) is not None]
        return sum(values) / len(values) if values else None

    peaks = [device["kv_used_max"] for device in devices if device["kv_used_max"] is not None]
    return (_percent(mean("kv_used_mean")), _percent(max(peaks, default=None)), _percent(mean("busy_share")),
            _number(mean("heads_mean")))


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the figures."""
    kind = {"simulated": "simulated: durations come from cost models, nothing here was measured",
            "measured": "measured on the devices named"}
    found = [summary["window"]["sentence"], kind[summary["label"]]]
    if any(UNBOUNDED in cell for row in latency_rows(summary) for cell in row):
        found.append(f"[a, {UNBOUNDED}]: the run is too short to bound this percentile on that side")
    if summary["saturation"]["verdict"] != "saturated":
        found.append(summary["saturation"]["sentence"])
    return found


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """What forbids taking the figures at face value."""
    found = []
    if summary.get("incomplete"):
        found.append(f"the run is incomplete, and its figures are of what had ended by then: "
                     f"{summary['incomplete']}")
    saturation = summary["saturation"]
    return [*found, saturation["sentence"]] if saturation["verdict"] == "saturated" else found


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def size_text(size_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.4g} TB"
