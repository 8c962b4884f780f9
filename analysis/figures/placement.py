"""The placement as a diagram: stages from left to right, attention workers below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from analysis.figures.charts import Arrow, Box, Diagram, Text
from analysis.figures.runs import ReportRun, alike_instances, alike_nodes, by_card

WIDTH = 28.0
BOX_WIDTH = 8.7
GAP = (WIDTH - 3 * BOX_WIDTH) / 2
IN_A_ROW = 3
LINE = 1.15
PADDING = 0.55
CHARACTERS = 20
"""Letters that fit into the width of a box."""

PRIMARY, ATTENTION, UNUSED = range(3)
KINDS = ("dense modules and attention", "attention only", "not used")

Entry = tuple[list[str], int, str]
"""Lines, kind and note of a box."""


def plan_chart(run: ReportRun) -> Diagram:
    """The plan of a run. Instances that are alike are drawn once."""
    page = _Page()
    used: set[int] = set()
    for numbers, instance in alike_instances(run):
        own = [run.run.plan["instances"][number] for number in numbers]
        used.update(device for each in own for device in _devices(each))
        page.heading(_heading(numbers, instance))
        stages = page.row_of_boxes([_stage_entry(run, own, s) for s in range(len(instance["stages"]))],
                                   arrows=True)
        workers = _worker_entries(run, own)
        if workers:
            page.connected(stages, workers)
        page.y += 0.6
    nodes = alike_nodes(run)
    if nodes:
        used.update(device for _, alike in nodes for node in alike for device in node["devices"])
        page.heading("a mesh: every request passes its layers on a way of its own")
        page.row_of_boxes([_node_entry(run, label, alike) for label, alike in nodes])
        page.y += 0.6
    idle = [device for device in range(len(run.devices)) if device not in used]
    if idle:
        page.heading("beside the mesh" if nodes else "beside the instances")
        page.row_of_boxes([(["not used", f"{len(own)} x {card}", _hosts(run, own)], UNUSED, _note(run, own))
                           for card, own in by_card(run, idle).items()])
    kinds = sorted({box.kind for box in page.boxes})
    boxes = [Box(b.x, b.y, b.width, b.height, b.lines, kinds.index(b.kind), b.note) for b in page.boxes]
    return Diagram(key="plan", title="Placement",
                   caption="Who computes what. Pipeline stages run from left to right; each holds the "
                           "weights of its "
                           "layers, split by tensor parallelism over its devices. Attention workers hold "
                           "cache of any "
                           "stage of their instance and no weights.",
                   origin=run.origin, width=WIDTH, height=page.y, kinds=[KINDS[kind] for kind in kinds],
                   boxes=boxes,
                   arrows=page.arrows, texts=page.texts)


class _Page:
    """Boxes put below one another."""

    def __init__(self) -> None:
        self.y = 0.2
        self.boxes: list[Box] = []
        self.arrows: list[Arrow] = []
        self.texts: list[Text] = []

    def heading(self, text: str) -> None:
        self.texts.append(Text(0.1, self.y + 0.55, text))
        self.y += LINE + 0.2

    def row_of_boxes(self, entries: Sequence[Entry], *, arrows: bool = False) -> list[Box]:
        """Boxes from left to right, in as many rows as needed."""
        placed: list[Box] = []
        for first in range(0, len(entries), IN_A_ROW):
            row = entries[first:first + IN_A_ROW]
            height = max(len(lines) for lines, _, _ in row) * LINE + 2 * PADDING
            for i, (lines, kind, note) in enumerate(row):
                placed.append(Box(i * (BOX_WIDTH + GAP), self.y, BOX_WIDTH, height,
                                  [_fitted(line) for line in lines], kind, note))
            self.y += height + 0.9
        if arrows:
            self.arrows += [_arrow(one, other) for one, other in pairwise(placed)]
        self.boxes += placed
        return placed

    def connected(self, stages: Sequence[Box], entries: Sequence[Entry]) -> None:
        """Attention workers below their stages, joined by one line: every stage uses every worker."""
        last_row = [box for box in stages if box.y == stages[-1].y]
        rail = self.y - 0.1
        self.y += 0.8
        workers = self.row_of_boxes(entries)
        first_row = [box for box in workers if box.y == workers[0].y]
        middles = [box.x + box.width / 2 for box in (*last_row, *first_row)]
        self.arrows.append(Arrow([(min(middles), rail), (max(middles), rail)], plain=True))
        for box in last_row:
            x = box.x + box.width / 2
            self.arrows.append(Arrow([(x, box.y + box.height), (x, rail)], plain=True))
        for box in first_row:
            x = box.x + box.width / 2
            self.arrows.append(Arrow([(x, rail), (x, box.y)]))


def _arrow(one: Box, other: Box) -> Arrow:
    if one.y == other.y:
        y = one.y + one.height / 2
        return Arrow([(one.x + one.width, y), (other.x, y)])
    below = one.y + one.height + 0.45
    start, end = one.x + one.width / 2, other.x + other.width / 2
    return Arrow([(start, one.y + one.height), (start, below), (end, below), (end, other.y)])


def _heading(numbers: Sequence[int], instance: Mapping[str, Any]) -> str:
    if len(numbers) == 1:
        text = f"instance {numbers[0]}"
    elif len(numbers) <= 4:
        text = f"instances {', '.join(map(str, numbers))}: alike, each with"
    else:
        text = f"{len(numbers)} instances ({numbers[0]} to {numbers[-1]}): alike, each with"
    role = instance.get("role", "both")
    return text if role == "both" else f"{text} ({role} only)"


def _stage_entry(run: ReportRun, instances: Sequence[Mapping[str, Any]], s: int) -> Entry:
    stage = instances[0]["stages"][s]
    everywhere = [device for instance in instances for device in instance["stages"][s]["devices"]]
    lines = [f"stage {s}: {stage['layers']} layers"]
    lines += [f"{len(own)} x {card}" for card, own in by_card(run, stage["devices"]).items()]
    lines += [_hosts(run, everywhere), _groups(stage["owned_groups"])]
    return [line for line in lines if line], PRIMARY, _note(run, everywhere)


def _node_entry(run: ReportRun, label: str, nodes: Sequence[Mapping[str, Any]]) -> Entry:
    devices = [device for node in nodes for device in node["devices"]]
    lines = [label, *(f"{len(own)} x {card}" for card, own in by_card(run, devices).items())]
    if len(nodes[0]["devices"]) > 1:
        lines.append(f"{len(nodes)} nodes of {len(nodes[0]['devices'])}")
    lines.append(f"{sum(node['tokens_per_s'] for node in nodes):,.0f} tokens/s")
    return [*lines, _hosts(run, devices)], PRIMARY, _note(run, devices)


def _groups(owned: Sequence[int]) -> str:
    if len(set(owned)) == 1:
        return f"{owned[0]} KV group{'s' if owned[0] != 1 else ''}" + (" each" if len(owned) > 1 else "")
    return "KV groups " + "+".join(map(str, owned))


def _worker_entries(run: ReportRun, instances: Sequence[Mapping[str, Any]]) -> list[Entry]:
    entries: list[Entry] = []
    everywhere = by_card(run, [d for instance in instances for d in instance.get("attention_workers", ())])
    for card, own in by_card(run, instances[0].get("attention_workers", ())).items():
        entries.append((["attention", f"{len(own)} x {card}", _hosts(run, everywhere[card])], ATTENTION,
                        _note(run, everywhere[card])))
    return entries


def _devices(instance: Mapping[str, Any]) -> list[int]:
    ranks = [device for stage in instance["stages"] for device in stage["devices"]]
    return ranks + list(instance.get("attention_workers", ()))


def _hosts(run: ReportRun, devices: Sequence[int]) -> str:
    hosts = list(dict.fromkeys(run.devices[device].host for device in devices))
    text = ", ".join(hosts)
    return text if len(text) <= CHARACTERS else f"{len(hosts)} hosts"


def _fitted(line: str) -> str:
    return line if len(line) <= CHARACTERS + 1 else line[:CHARACTERS - 2] + "..."


def _note(run: ReportRun, devices: Sequence[int]) -> str:
    """Every device, and why the first of them is there."""
    reason = run.run.plan.get("reasons", {}).get(str(devices[0]), "")
    labels = ", ".join(run.devices[device].label for device in devices)
    return f"{labels}: {reason}" if reason else labels
