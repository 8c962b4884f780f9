"""What a person reads in the terminal: results, placements, verdicts, progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hetis_sim.config import RunConfig
from hetis_sim.cost.outside import sentence
from hetis_sim.metrics import Summary, print_summary, summary_line, summary_markdown
from hetis_sim.policies.memory import cache_bytes, mesh_cache_bytes, stage_weight_bytes
from hetis_sim.policies.plan import SINK, SOURCE, MeshPlan
from hetis_sim.run import Prepared, Result
from hetis_sim.spec.gpu import GIB
from traces import OpenWorkload

PLAIN_WIDTH = 110


@contextmanager
def progress_bar(config: RunConfig, prepared: Prepared) -> Iterator[Callable[[int], None] | None]:
    """Progress on standard error while a run lasts; nothing where that is not a terminal."""
    if not config.progress or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress

    workload = prepared.workload
    total = len(workload) if isinstance(workload, OpenWorkload) else config.workload.requests
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("requests", total=total)
        yield lambda ended: progress.update(task, completed=ended)


def print_result(result: Result, folder: Path | None = None) -> None:
    """Print a run's figures in the configured form."""
    notes = [*provenance_notes(result.prepared), *outside_notes(result.summary)]
    print_figures(result.summary, result.prepared, notes, folder)


def print_figures(summary: Summary, prepared: Prepared, notes: Sequence[str], folder: Path | None = None,
                  label: str = "simulated") -> None:
    """Print the figures of a run, simulated or measured, in the configured form."""
    output, title = prepared.config.output, _title(prepared, label)
    if output == "json":
        print(summary_line(summary, policy=prepared.policy.name, run=str(folder or "")))
    elif output == "markdown":
        print(summary_markdown(summary, title=title, provenance=notes))
    elif output == "table":
        print_summary(summary, title=title, provenance=notes)
        if folder is not None:
            print(f"written to {folder}")


def _title(prepared: Prepared, label: str = "simulated") -> str:
    counts = ", ".join(f"{count} x {name}" for name, count in prepared.cluster.gpu_counts.items())
    return (f"{label}: {prepared.policy.name} serving {prepared.model.name} on {prepared.cluster.name} "
            f"({counts}), workload {prepared.workload.name}")


def provenance_notes(prepared: Prepared) -> list[str]:
    """One sentence for each kind of origin of the durations, and the warnings of profiles."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for row in prepared.provenance():
        kinds.setdefault(row.kind, {}).setdefault(row.subject, []).append(row.module.replace("_", " "))
    notes = []
    for kind, explain in (("measured", "fitted to measured kernels"),
                          ("derived", "derived from measurements of a relative (see docs/cost.md)"),
                          ("roofline", "from datasheets (roofline): nothing is measured"),
                          ("setting", "settings")):
        if kind in kinds:
            notes.append(f"durations {explain}: {_grouped(kinds[kind])}")
    return [*notes, *prepared.cost.warnings]


def outside_notes(summary: Summary) -> list[str]:
    """One sentence for each quantity that a run asked for outside its fitted range."""
    return [sentence(mark) for mark in summary.outside_ranges]


def _grouped(modules: dict[str, list[str]]) -> str:
    """Subjects with the same modules together: ``a, b (x, y); c (z)``."""
    subjects: dict[tuple[str, ...], list[str]] = {}
    for subject, names in modules.items():
        subjects.setdefault(tuple(names), []).append(subject)
    return "; ".join(f"{', '.join(who)} ({', '.join(names)})" for names, who in subjects.items())


def print_plan(prepared: Prepared) -> None:
    """Print the placement: every GPU's role, memory and the reason for it."""
    console = _console()
    console.print(f"{prepared.policy.name} places {prepared.model.name} on {prepared.cluster.name}")
    for number, instance in enumerate(prepared.plan.instances):
        stages = " -> ".join(f"{stage.layers} layers on {_devices(prepared, stage.devices)}"
                             for stage in instance.stages)
        workers = (f"; attention workers {_devices(prepared, instance.attention_workers)}"
                   if instance.attention_workers else "")
        console.print(f"instance {number} ({instance.role}): {stages}{workers}")
    if prepared.plan.mesh is not None:
        console.print(_mesh_table(prepared, prepared.plan.mesh))
    console.print(_memory_table(prepared))
    same: dict[str, list[str]] = {}
    for device, reason in sorted(prepared.plan.reasons.items()):
        same.setdefault(reason, []).append(prepared.cluster.devices[device].label)
    for reason, labels in same.items():
        console.print(f"{', '.join(labels)}: {reason}")
    for key, value in prepared.plan.search.items():
        console.print(f"search {key}: {_plainly(value)}", style="dim")


def _plainly(value: object) -> str:
    """A figure of the search as a person would write it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_plainly(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(_plainly(item) for item in value)
    return str(value)


def _devices(prepared: Prepared, devices: tuple[int, ...]) -> str:
    kinds: dict[str, int] = {}
    for device in devices:
        name = prepared.cluster.devices[device].gpu.name
        kinds[name] = kinds.get(name, 0) + 1
    return " + ".join(f"{count} x {name}" for name, count in kinds.items())


def _mesh_table(prepared: Prepared, mesh: MeshPlan) -> Table:
    """The nodes in the order of their layers: rates, and where requests go from there."""
    def edges(at: int) -> str:
        names = [f"{mesh.edges[e].target if mesh.edges[e].target != SINK else 'end'}: "
                 f"{mesh.edges[e].tokens_per_s:,.0f}" for e in mesh.outgoing[at]]
        return ", ".join(names)

    table = Table(box=None, header_style="bold", pad_edge=False)
    for header in ("node", "GPUs", "layers", "rate tokens/s", "flow tokens/s", "goes on to node: tokens/s"):
        table.add_column(header, justify="right" if header.endswith(" tokens/s") else "left")
    table.add_row("start", "", "", "", f"{_flow_from(mesh, SOURCE):,.0f}", edges(SOURCE))
    for n, node in enumerate(mesh.nodes):
        table.add_row(str(n), _devices(prepared, node.devices), f"{node.first_layer}-{node.end_layer - 1}",
                      f"{node.tokens_per_s:,.0f}", f"{_flow_from(mesh, n):,.0f}", edges(n))
    return table


def _flow_from(mesh: MeshPlan, at: int) -> float:
    return sum(mesh.edges[e].tokens_per_s for e in mesh.outgoing[at])


def _memory_table(prepared: Prepared) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for header in ("GPU", "role", "memory GiB", "weights GiB", "cache GiB", "other GiB"):
        table.add_column(header, justify="left" if header in ("GPU", "role") else "right")
    rows: dict[int, tuple[str, float, float]] = {}
    for number, instance in enumerate(prepared.plan.instances):
        cache = cache_bytes(prepared.cluster, prepared.model, prepared.settings.limits, instance)
        last = len(instance.stages) - 1
        for s, stage in enumerate(instance.stages):
            for rank, device in enumerate(stage.devices):
                weights = float(stage_weight_bytes(prepared.model, stage, rank, s == 0, s == last))
                rows[device] = (f"primary {number}.{s}", weights, cache[device])
        for device in instance.attention_workers:
            rows[device] = (f"attention worker {number}", 0.0, cache[device])
    mesh = prepared.plan.mesh
    if mesh is not None:
        left_bytes = mesh_cache_bytes(prepared.cluster, prepared.model, prepared.settings.limits, mesh)
        for n, node in enumerate(mesh.nodes):
            ends = node.first_layer == 0, node.end_layer == mesh.layers
            for rank, device in enumerate(node.devices):
                weights = float(stage_weight_bytes(prepared.model, node, rank, *ends))
                rows[device] = (f"node {n}", weights, left_bytes[device])
    for spec in prepared.cluster.devices:
        role, weights, left = rows.get(spec.device_id, ("unused", 0.0, 0.0))
        memory, room = float(spec.gpu.memory_bytes), max(0.0, float(left))
        sizes = (memory, weights, room, memory - weights - room)
        table.add_row(spec.label, role, *(f"{amount / GIB:.1f}" for amount in sizes))
    return table


def print_validation(prepared: Prepared) -> None:
    """Say that a combination can run, and what of its workload cannot be served."""
    controller = prepared.controller()
    longest = max(controller.context_limits)
    print(f"ok: {_title(prepared)} can run")
    print(f"longest request that fits: {longest} tokens (model limit {prepared.model.context_limit_tokens})")
    if isinstance(prepared.workload, OpenWorkload):
        totals = prepared.workload.lengths.prompt_tokens + prepared.workload.lengths.output_tokens
        refused = int((totals > longest).sum())
        print(f"requests: {len(totals)}, of which {refused} would be rejected as too long")
    for note in provenance_notes(prepared):
        print(f"note: {note}")


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH, no_color=True, highlight=False)
