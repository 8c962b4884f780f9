"""Use of devices: cache, heads and busy time, over time and in total."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.figures.charts import Axis, BarChart, Bars, Chart, Floats, HeatMap, Line, Rule, XYChart
from analysis.figures.runs import ReportRun, alike_instances, alike_nodes, by_card
from analysis.figures.series import edges_of, growth_rate, held_average, held_line, paced

STAGES_SHOWN = 12
"""Where there are more stages than this, instances that are alike share their bars."""

ROWS_LABELLED = 20
"""Maps of more devices than this name kinds of card instead of each device."""


def device_charts(run: ReportRun) -> list[Chart]:
    """Cache per kind of device, heads and busy time per device over time; none without samples."""
    if not len(run.run.samples) or not run.devices:
        return []
    edges = edges_of(0.0, run.end_s)
    now_s = np.asarray(run.run.samples["now_s"], dtype=np.float64)
    used = held_average(now_s, run.samples("used_bytes"), edges)
    charts: list[Chart] = [_kv_lines(run, used, edges)]
    charts += [chart for chart in (_head_map(run, now_s, edges), _kv_map(run, used, edges))
               if chart is not None]
    busy = run.samples("busy_s")
    if busy.any():
        charts.append(_busy_map(run, growth_rate(now_s, paced(now_s, busy), edges), edges))
    return charts


def window_rules(run: ReportRun) -> list[Rule]:
    """Borders of the measured window, where it is not the whole run."""
    window = run.window
    rules = [Rule("measured from", window.from_s, vertical=True)] if window.dropped_warmup else []
    return rules + ([Rule("measured until", window.to_s, vertical=True)] if window.dropped_tail else [])


def groups_of(run: ReportRun) -> dict[str, list[int]]:
    """Devices by kind of card and role."""
    found: dict[str, list[int]] = {}
    for number, device in enumerate(run.devices):
        found.setdefault(f"{device.card}, {device.role or 'no role'}", []).append(number)
    return found


def time_axis() -> Axis:
    """Time since the start of the run."""
    return Axis("time (s)", low=0.0)


def _capacity(run: ReportRun) -> Floats:
    """Cache of each device, nan for those without any."""
    return np.where(run.capacity_bytes > 0, run.capacity_bytes, np.nan)


def _kv_lines(run: ReportRun, used: Floats, edges: Floats) -> XYChart:
    share = used / _capacity(run)
    lines = []
    for number, (name, devices) in enumerate(groups_of(run).items()):
        own = share[:, devices]
        own = own[:, np.isfinite(own).any(axis=0)]
        if not own.shape[1]:
            continue
        x, mean = held_line(edges, own.mean(axis=1))
        low, high = held_line(edges, own.min(axis=1))[1], held_line(edges, own.max(axis=1))[1]
        several = own.shape[1] > 1
        lines.append(Line(f"{len(devices)} x {name}", x, mean, number, step=True,
                          low=low if several else None,
                          high=high if several else None, band=True))
    return XYChart(key="kv-use", title="KV use over time",
                   caption="Share of the KV cache in use: the line is the mean over the devices of a kind, "
                           "the area "
                           "reaches from the least to the most used of them. Averages over stretches of "
                           "time.",
                   origin=run.origin, x=time_axis(), y=Axis("KV cache in use (share)", low=0.0), lines=lines,
                   rules=window_rules(run))


def _head_map(run: ReportRun, now_s: Floats, edges: Floats) -> HeatMap | None:
    """Heads by device as counted; where nobody counted them, by the cache that they take."""
    counted = "heads_0" in run.run.samples and bool(np.isfinite(run.samples("heads")).all())
    held = held_average(now_s, run.samples("heads" if counted else "used_bytes"), edges)
    total = held.sum(axis=1, keepdims=True)
    if not total.any():
        return None
    share = np.divide(held, total, out=np.full_like(held, np.nan), where=total > 0)
    what = ("all heads of running requests, counted in each layer" if counted
            else "all cached (token, layer, KV head) entries")
    return _map(run, "heads", "Heads on devices over time",
                f"Where the heads are: share of {what}, that each device holds. A column sums to one; "
                "colours go by the square root, so that small shares are seen. Averages over stretches of "
                "time, grey where nothing was cached.",
                share, edges, Axis("share of heads", low=0.0), None, root=True)


def _kv_map(run: ReportRun, used: Floats, edges: Floats) -> HeatMap:
    return _map(run, "kv-map", "KV use of each device over time",
                "Share of each device's own KV cache that is in use. Averages over stretches of time.",
                used / _capacity(run), edges, Axis("KV cache in use (share)", low=0.0), 1.0)


def _busy_map(run: ReportRun, busy: Floats, edges: Floats) -> HeatMap:
    return _map(run, "busy-map", "Busy devices over time",
                "Share of time in which each device computes; sending and waiting are not busy. The work of "
                "a "
                "step counts from when it is recorded on, a second of work a second of time.",
                busy, edges, Axis("busy (share)", low=0.0), 1.0)


def _map(run: ReportRun, key: str, title: str, caption: str, values: Floats, edges: Floats, scale: Axis,
         ceiling: float | None, *, root: bool = False) -> HeatMap:
    rows = [device.label for device in run.devices]
    return HeatMap(key=key, title=title, caption=caption, origin=run.origin, x=time_axis(), edges=edges,
                   rows=rows,
                   values=values.T, scale=scale, ceiling=ceiling, root=root, groups=_row_groups(run))


def _row_groups(run: ReportRun) -> list[tuple[int, str]]:
    """First row and label of neighbouring devices of one card, for maps of many rows."""
    if len(run.devices) <= ROWS_LABELLED:
        return []
    cards = [device.card for device in run.devices]
    starts = [i for i, card in enumerate(cards) if i == 0 or card != cards[i - 1]]
    ends = [*starts[1:], len(cards)]
    labels = [f"{end - start} x {cards[start]}" for start, end in zip(starts, ends, strict=True)]
    return list(zip(starts, labels, strict=True))


# -- totals -------------------------------------------------------------------------------


def busy_chart(run: ReportRun) -> BarChart | None:
    """Busy share of every pipeline stage and of the attention workers of every instance."""
    rows = _stage_rows(run, [[number] for number in range(len(run.run.plan["instances"]))])
    rows += _node_rows(run)
    if len(rows) > STAGES_SHOWN and run.run.plan["instances"]:
        rows = _stage_rows(run, [numbers for numbers, _ in alike_instances(run)])
    share = np.array([row["busy_share"] for row in run.summary["devices"]], dtype=np.float64)
    rows = [(name, own) for name, own in rows if np.isfinite(share[own]).any()]
    if not rows:
        return None
    mean = np.array([np.nanmean(share[own]) for _, own in rows])
    low, high = (np.array([pick(share[own]) for _, own in rows]) for pick in (np.nanmin, np.nanmax))
    shown = (high - low).max() > 0.0
    return BarChart(key="busy-stages", title="Busy shares of stages and attention workers",
                    caption="Share of the measured window in which devices compute, mean over the devices of "
                            "a stage"
                            + ("; whiskers reach from the least to the most busy of them." if shown else "."),
                    origin=run.origin, axis=Axis("busy (share of time)", low=0.0, high=1.0),
                    categories=[name for name, _ in rows],
                    series=[Bars("busy", mean, 0, low if shown else None, high if shown else None)])


def _stage_rows(run: ReportRun, instances: Sequence[Sequence[int]]) -> list[tuple[str, list[int]]]:
    """Label and devices of every stage and kind of attention worker; instances put together share a row."""
    rows = []
    for numbers in instances:
        own = [run.run.plan["instances"][number] for number in numbers]
        start = "" if len(run.run.plan["instances"]) == 1 else f"instance {numbers[0]}, "
        start = start if len(numbers) == 1 else f"{len(numbers)} instances, each "
        for s, stage in enumerate(own[0]["stages"]):
            rows.append((f"{start}stage {s}: {_cards(run, stage['devices'])}",
                         [device for instance in own for device in instance["stages"][s]["devices"]]))
        workers = by_card(run, [device for instance in own for device in instance.get("attention_workers",
                                                                                      ())])
        rows += [(f"{start}attention: {len(devices) // len(own)} x {card}", devices)
                 for card, devices in workers.items()]
    return rows


def _node_rows(run: ReportRun) -> list[tuple[str, list[int]]]:
    """Label and devices of the nodes of a mesh that hold the same layers."""
    rows = []
    for label, nodes in alike_nodes(run):
        devices = [device for node in nodes for device in node["devices"]]
        rows.append((f"{label}: {_cards(run, devices)}", devices))
    return rows


def _cards(run: ReportRun, devices: Sequence[int]) -> str:
    return " + ".join(f"{len(own)} x {card}" for card, own in by_card(run, devices).items())


PART_NAMES = {"host": "host", "dense": "dense", "collective": "collective", "attention": "attention",
              "head_transfer": "head transfer", "hop": "stage hop", "waiting": "waiting", "other": "other"}
PART_SHOWN_MIN = 1e-4


def iteration_chart(runs: Sequence[ReportRun], origin: str) -> BarChart | None:
    """Where an iteration's time goes, by part, for each kind of step and each run."""
    rows = []
    for run in runs:
        for kind in ("prefill", "decode", "mixed"):
            use = run.summary["iterations"].get(kind)
            if use and use["iterations"] and use["time_s"]:
                rows.append((f"{run.name}: {kind}" if len(runs) > 1 else kind, use))
    if not rows:
        return None
    parts: dict[str, Floats] = {}
    for part in PART_NAMES:
        shares = np.array([use["shares"].get(part) or 0.0 for _, use in rows])
        times_ms = shares * np.array([1e3 * use["time_s"] / use["iterations"] for _, use in rows])
        if (shares > PART_SHOWN_MIN).any():
            parts[part] = np.where(shares > PART_SHOWN_MIN, times_ms, 0.0)
    fills = {part: i for i, part in enumerate(PART_NAMES)}
    return BarChart(key="iteration-parts", title="Where an iteration's time goes",
                    caption="Mean time of one iteration of a lane by what lies on its critical path, for "
                            "iterations "
                            "that compute prompts (prefill), tokens (decode) or both (mixed).",
                    origin=origin, axis=Axis("time of an iteration (ms)", low=0.0), categories=[name for name,
                                                                                                _ in rows],
                    series=[Bars(PART_NAMES[part], values, fills[part]) for part, values in parts.items()])
