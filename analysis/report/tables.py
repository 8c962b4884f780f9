"""Tables of a report as rows of text; the page and the tests read the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.figures.runs import ReportRun
from analysis.report.headline import number, percent, seconds, with_interval
from hetis_sim.metrics.rows import (
    DEVICE_HEADER,
    LATENCY_HEADER,
    as_dict,
    device_rows,
    latency_rows,
    rate_rows,
    size_text,
)

SHARE_MIN = 1e-4
"""Parts of an iteration below this share everywhere are rounding or nothing."""


@dataclass(frozen=True)
class TextTable:
    """Header and rows; the first column is text, the others are figures unless ``prose``."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False


def comparison_table(runs: Sequence[ReportRun]) -> TextTable:
    """One row a run: load, latencies, rates, use."""
    header = ("run", "", "load", "TTFT mean", "TTFT p95 [95 %]", "TPOT mean", "TPOT p95 [95 %]", "E2EL mean",
              "requests/s", "output tokens/s", "goodput/s", "in the SLO [95 %]", "KV mean", "preempted",
              "moves",
              "queue")
    return TextTable("All runs", header, [_comparison_row(run) for run in runs])


def _comparison_row(run: ReportRun) -> list[str]:
    summary = run.summary
    ttft, tpot, rates, slo = (summary[key] for key in ("ttft_s", "tpot_s", "throughput", "slo"))
    return [run.name, run.origin, f"{number(run.load.value)} {run.load.unit}", seconds(ttft["mean"]),
            with_interval(ttft["p95"], ttft["p95_interval"], seconds), seconds(tpot["mean"]),
            with_interval(tpot["p95"], tpot["p95_interval"], seconds), seconds(summary["e2el_s"]["mean"]),
            number(rates["request_throughput"]), number(rates["output_throughput"]),
            number(rates["request_goodput"]), with_interval(slo["attainment"], slo["attainment_interval"],
                                                            percent),
            percent(summary["kv_used_mean"]), f"{summary['preemptions']:,}", f"{summary['moves']:,}",
            summary["saturation"]["verdict"]]


def run_tables(run: ReportRun) -> list[TextTable]:
    """Latencies, rates, devices, transfers, instances: what the terminal shows, and the placement."""
    summary = as_dict(run.summary)
    tables = [TextTable("Latencies", LATENCY_HEADER, latency_rows(summary)),
              TextTable("Rates and counts", ("figure", "value"), rate_rows(summary), prose=True),
              TextTable("Devices", DEVICE_HEADER, device_rows(summary))]
    if summary["transfers"]:
        tables.append(TextTable("Cache sent in the measured window", ("what for", "transfers", "requests",
                                                                      "size"),
                                [_transfer_row(kind, use) for kind, use in summary["transfers"].items()]))
    tables.append(_iteration_table(summary))
    return tables


def _transfer_row(kind: str, use: Mapping[str, Any]) -> list[str]:
    return [kind.replace("_", " "), f"{use['transfers']:,}", f"{use['requests']:,}",
            size_text(use["size_bytes"])]


def _iteration_table(summary: Mapping[str, Any]) -> TextTable:
    kinds = summary["iterations"]
    parts = [part for part in kinds["all"]["shares"] if _occurs(part, kinds)]
    names = [part.replace("_", " ") for part in parts]
    header = ("iterations", "number", "decoding requests", "mean time", *names)
    rows = []
    for kind, use in kinds.items():
        mean_s = use["time_s"] / use["iterations"] if use["iterations"] else None
        rows.append([kind, f"{use['iterations']:,}", number(use["batch_mean"]), seconds(mean_s),
                     *(percent(use["shares"].get(part)) for part in parts)])
    return TextTable("Iterations and the shares of their time", header, rows)


def _occurs(part: str, kinds: Mapping[str, Any]) -> bool:
    return any((use["shares"].get(part) or 0.0) > SHARE_MIN for use in kinds.values())


def reason_table(run: ReportRun) -> TextTable | None:
    """Why each device has its role."""
    reasons = run.run.plan.get("reasons") or {}
    rows = [[device.label, reasons.get(str(i), "")] for i,
            device in enumerate(run.devices) if str(i) in reasons]
    return TextTable("Why each device has its role", ("device", "reason"), rows, prose=True) if rows else None


def provenance_table(run: ReportRun) -> TextTable | None:
    """Where the durations of a run come from; sources shared by modules once."""
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for row in run.run.manifest.get("provenance") or ():
        errors = [f"{name} {percent(row[key])}" for name, key in (("median", "median_error"), ("p95",
                                                                                               "p95_error"))
                  if row.get(key) is not None]
        key = (str(row["subject"]), str(row["kind"]), str(row["source"]), ", ".join(errors))
        grouped.setdefault(key, []).append(str(row["module"]).replace("_", " "))
    rows = [[subject, ", ".join(modules), kind, errors or "-", source]
            for (subject, kind, source, errors), modules in grouped.items()]
    header = ("of", "modules", "kind", "error on held-out rows", "source")
    return TextTable("Where the durations come from", header, rows, prose=True) if rows else None


def identity_table(run: ReportRun) -> TextTable:
    """What was run, to make it again."""
    manifest = run.run.manifest
    workload = manifest.get("workload") or {}
    git = manifest.get("git") or {}
    rows = [["label", run.origin], ["policy", run.policy], ["seeds", _pairs(manifest.get("seeds") or {})],
            ["workload", _workload_text(workload)], ["versions", _pairs(manifest.get("versions") or {})],
            ["revision",
             f"{git['revision']}{' (with changes)' if git.get('modified') else ''}" if git else "unknown"],
            ["hashes", _pairs({key: str(value)[:16] for key,
                               value in (manifest.get("hashes") or {}).items()})]]
    return TextTable("What was run", ("", ""), rows, prose=True)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None) or "none"


def _workload_text(workload: Mapping[str, Any]) -> str:
    if not workload:
        return "unknown"
    text = f"{workload.get('name', '')}: {workload.get('n', '?')} requests"
    for key in ("prompt_tokens", "output_tokens"):
        if isinstance(workload.get(key), Mapping):
            text += f", {key.replace('_', ' ')} mean {number(workload[key].get('mean'))}"
    return text
