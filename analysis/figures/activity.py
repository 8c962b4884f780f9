"""What goes on over time: requests in the system, tokens made, cache on the links."""

from __future__ import annotations

import numpy as np

from analysis.figures.charts import Axis, BarChart, Bars, Chart, Floats, Line, XYChart, thinned
from analysis.figures.runs import ReportRun, place_name
from analysis.figures.series import covered_s, edges_of, middles, spread_rate
from analysis.figures.usage import time_axis, window_rules

RATE_CELLS = 60
LINKS_SHOWN = 16
KIND_NAMES = {"push": "push (prompt cache to attention workers)", "move": "move (heads of running requests)",
              "swap_out": "swap out", "swap_in": "swap in", "handoff": "handoff (to a decode pool)"}
WIRE_NAMES = {"cache": "cache", "heads": "heads (queries, keys, values, outputs)",
              "collectives": "collectives", "activations": "activations between stages"}


def activity_charts(run: ReportRun) -> list[Chart]:
    """Requests running and waiting, tokens per second, and, where cache was sent, transfers."""
    charts: list[Chart] = []
    if len(run.run.samples):
        charts.append(_queue_chart(run))
    if len(run.run.steps):
        charts.append(_token_chart(run))
    if len(run.run.transfers):
        charts += [_transfer_rates(run), _transfer_counts(run)]
    if run.run.summary.get("wires"):
        charts.append(_wire_chart(run))
    elif len(run.run.transfers):
        charts.append(_link_chart(run))
    return charts


def _queue_chart(run: ReportRun) -> XYChart:
    samples = run.run.samples
    now_s = np.asarray(samples["now_s"], dtype=np.float64)
    lines = []
    for number, name in enumerate(("running", "waiting")):
        x, y = thinned(now_s, np.asarray(samples[name], dtype=np.float64))
        lines.append(Line(name, x, y, number, step=True))
    return XYChart(key="queue", title="Requests running and waiting",
                   caption="Requests that hold cache or are being computed (running), and those that wait to "
                           "be.",
                   origin=run.origin, x=time_axis(), y=Axis("requests", low=0.0, whole=True), lines=lines,
                   rules=window_rules(run))


def _token_chart(run: ReportRun) -> XYChart:
    edges = edges_of(0.0, run.end_s, RATE_CELLS)
    steps, requests = run.run.steps, run.run.requests
    start, end = (np.asarray(steps[name], dtype=np.float64) for name in ("start_s", "end_s"))
    first_s = np.asarray(requests["first_token_s"], dtype=np.float64)
    first_s = first_s[np.isfinite(first_s)]
    # A prompt's last part makes the first token; all later ones come from decode iterations.
    output = spread_rate(start, end, np.asarray(steps["decode_tokens"], dtype=np.float64), edges)
    output += np.histogram(first_s, edges)[0] / np.diff(edges)
    prompt = spread_rate(start, end, np.asarray(steps["prefill_tokens"], dtype=np.float64), edges)
    lines = [Line(name, middles(edges), values, number)
             for number, (name, values) in enumerate((("output tokens", output), ("prompt tokens", prompt)))]
    return XYChart(key="tokens", title="Tokens computed over time",
                   caption="Output tokens made and prompt tokens computed per second, averages over "
                           "stretches of "
                           "time; what is computed again after a preemption counts again.",
                   origin=run.origin, x=time_axis(), y=Axis("tokens/s", low=0.0), lines=lines,
                   rules=window_rules(run))


# -- transfers ----------------------------------------------------------------------------


def _columns(run: ReportRun) -> tuple[Floats, Floats, Floats]:
    frame = run.run.transfers
    start, end, size = (np.asarray(frame[name], dtype=np.float64) for name in ("start_s", "end_s",
                                                                               "size_bytes"))
    return start, end, size


def _kinds(run: ReportRun) -> list[str]:
    return [kind for kind in KIND_NAMES if (run.run.transfers["kind"] == kind).any()]


def _transfer_rates(run: ReportRun) -> XYChart:
    edges = edges_of(0.0, run.end_s, RATE_CELLS)
    start, end, size = _columns(run)
    lines = []
    for kind in _kinds(run):
        own = np.asarray(run.run.transfers["kind"] == kind)
        rate = spread_rate(start[own], end[own], size[own] / 1e6, edges)
        lines.append(Line(KIND_NAMES[kind], middles(edges), rate, list(KIND_NAMES).index(kind)))
    return XYChart(key="transfers", title="Cache sent over time",
                   caption="Bytes of cache sent per second by what for, each transfer spread evenly over its "
                           "time.",
                   origin=run.origin, x=time_axis(), y=Axis("cache sent (MB/s)", low=0.0), lines=lines,
                   rules=window_rules(run))


def _transfer_counts(run: ReportRun) -> XYChart:
    start = _columns(run)[0]
    lines = []
    for kind in _kinds(run):
        begun = np.sort(start[np.asarray(run.run.transfers["kind"] == kind)])
        x, y = thinned(np.r_[0.0, begun, run.end_s], np.r_[0.0, np.arange(1, len(begun) + 1), len(begun)])
        lines.append(Line(KIND_NAMES[kind], x, y, list(KIND_NAMES).index(kind), step=True))
    return XYChart(key="transfer-counts", title="Transfers so far",
                   caption="Transfers of cache that have begun, by what for: one for each pair of devices.",
                   origin=run.origin, x=time_axis(), y=Axis("transfers begun", low=0.0, whole=True),
                   lines=lines,
                   rules=window_rules(run))


def _wire_chart(run: ReportRun) -> BarChart:
    """Busy share of every direction of a link, by what it carried."""
    wires = run.run.summary["wires"]
    shown = wires[:LINKS_SHOWN]
    duration_s = run.run.summary["whole_run"]["duration_s"]
    series = [Bars(name, np.array([wire["size_bytes"][kind] / wire["bandwidth_bytes_per_s"] / duration_s
                                   for wire in shown]), number)
              for number, (kind, name) in enumerate(WIRE_NAMES.items())]
    left_out = len(wires) - len(shown)
    return BarChart(key="busy-links", title="Busy shares of links",
                    caption="Time that the bytes on each direction of a link take at its bandwidth, as a "
                            "share of the whole run; in brackets what it carried."
                            + (f" {left_out} less busy ones are left out." if left_out else ""),
                    origin=run.origin, axis=Axis("busy (share of time)", low=0.0),
                    categories=[f"{wire['name']} ({_size(sum(wire['size_bytes'].values()) / 1e9)})"
                                for wire in shown],
                    series=series)


def _link_chart(run: ReportRun) -> BarChart:
    """Busy share of each pair of hosts in one direction, by the cache sent over it.

    For runs that count nothing else on wires: measured ones, and those of earlier versions.
    """
    start, end, size = _columns(run)
    ends = run.run.transfers[["source", "target"]].to_numpy()
    names = [f"{place_name(run, int(source))} to {place_name(run, int(target))}" for source, target in ends]
    names = ["within " + name.partition(" to ")[0] if name.partition(" to ")[0] == name.partition(" to ")[2]
             else name for name in names]
    labels = np.array(names)
    window = run.window
    by_link: dict[str, Floats] = {}
    for link in sorted(set(names)):
        own = labels == link
        by_link[link] = np.array([covered_s(start[own], end[own], window.from_s,
                                            window.to_s) / window.duration_s,
                                  size[own].sum() / 1e9])
    most = sorted(by_link, key=lambda link: (-by_link[link][0], link))[:LINKS_SHOWN]
    left_out = len(by_link) - len(most)
    return BarChart(key="busy-links", title="Busy shares of links",
                    caption="Share of the measured window in which cache is under way from one place to "
                            "another, with "
                            "the cache sent in the whole run. Heads, collectives and activations are not "
                            "counted in this run: the parts of an iteration show them."
                            + (f" {left_out} less busy links are left out." if left_out else ""),
                    origin=run.origin, axis=Axis("cache under way (share of time)", low=0.0),
                    categories=[f"{link} ({_size(by_link[link][1])})" for link in most],
                    series=[Bars("cache under way", np.array([by_link[link][0] for link in most]))])


def _size(gigabytes: float) -> str:
    return f"{gigabytes:.3g} GB" if gigabytes >= 1 else f"{1e3 * gigabytes:.3g} MB"
