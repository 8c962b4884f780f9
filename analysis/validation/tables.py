"""A validation in words: errors against what real runs differ by, the machine's pace, and the ranking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

FIGURES = (("tpot", "mean"), ("tpot", "p95"), ("e2el", "mean"), ("e2el", "p95"), ("ttft", "mean"),
           ("output_throughput", "mean"))
PARTS = ("host", "dense", "attention", "head_transfer", "collective", "hop", "waiting", "all")
ERRORS = ("Simulated over measured, less one, with a 95 % bootstrap interval. *Real against real* is what "
          "runs of the same requests differ by. *At measured pace*: with simulated times of computing scaled "
          "by what a short piece of work took beside the runs.")
Case = Mapping[str, Any]


def page(raw: Mapping[str, Any]) -> str:
    """Markdown of what ``validation.json`` holds."""
    cases: Sequence[Case] = raw["cases"]
    lines = ["# Validation", "", *_state(raw), "", "## Errors", "",
             ERRORS, "", *_errors(cases), "", "## Pace", "", *_pace(cases),
             "", "## Parts of an iteration", "",
             "Milliseconds: measured, and in brackets what the cost model gives the same steps, less that: "
             "as it is and, where the pace was measured within the run, at that of the moment.",
             "", *_parts(cases), "", "## Ranking", "", *_ranking(raw.get("ranking") or [])]
    return "\n".join(lines) + "\n"


def _state(raw: Mapping[str, Any]) -> list[str]:
    if raw.get("complete", True):
        return ["All runs were done."]
    return [f"Incomplete: {len(raw.get('left_out') or [])} runs are missing, {len(raw.get('failed') or {})} "
            "have failed."]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _errors(cases: Sequence[Case]) -> Iterator[str]:
    yield _row("policy", "load", "figure", "measured", "error", "95 % interval", "real against real",
               "at measured pace")
    yield "|" + "---|" * 8
    for case in cases:
        errors = {(error["metric"], error["statistic"]): error for error in case["errors"]}
        for key in FIGURES:
            error = errors.get(key)
            if error is not None:
                yield _row(case["policy"], f"{case['load']:.0%}", f"{key[0]} {key[1]}".replace("_", " "),
                           f"{error['measured']:.4g}", percent(error["error"]),
                           span(error["low"], error["high"]), span(error["noise_low"], error["noise_high"]),
                           percent(error.get("paced")))


def _pace(cases: Sequence[Case]) -> Iterator[str]:
    yield _row("policy", "load", "device", "part", "share of the calibrated speed")
    yield "|" + "---|" * 5
    for case in cases:
        runs = [run["slowdown"] for run in case.get("runs") or [] if run["slowdown"]]
        for kind in runs[0] if runs else ():
            for part in runs[0][kind]:
                speeds = [1.0 / run[kind][part] for run in runs]
                yield _row(case["policy"], f"{case['load']:.0%}", kind, part,
                           f"{min(speeds):.2f} to {max(speeds):.2f}")


def _parts(cases: Sequence[Case]) -> Iterator[str]:
    yield _row("policy", "load", "kind", *(part.replace("_", " ") for part in PARTS))
    yield "|" + "---|" * (3 + len(PARTS))
    for case in cases:
        for kind in dict.fromkeys(part["kind"] for part in case["parts"]):
            here = {part["part"]: part for part in case["parts"] if part["kind"] == kind}
            yield _row(case["policy"], f"{case['load']:.0%}", kind,
                       *(_part(here.get(name)) for name in PARTS))


def _part(part: Mapping[str, Any] | None) -> str:
    if part is None or not part["measured_s"]:
        return ""
    text = f"{1e3 * part['measured_s']:.2f}"
    known = [part[name] for name in ("same_s", "same_paced_s") if part.get(name) is not None]
    less = ", ".join(f"{1e3 * (seconds - part['measured_s']):+.2f}" for seconds in known)
    return f"{text} ({less})" if less else text


def _ranking(orders: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not orders:
        yield "One policy only."
        return
    counts = {verdict: sum(order["verdict"] == verdict for order in orders)
              for verdict in ("same", "tie", "other")}
    yield (f"{counts['same']} of {len(orders)} pairs of policies rank as measured, {counts['tie']} cannot be "
           f"told apart by measurements, {counts['other']} rank the other way round. Each row gives the "
           "first policy's figure over the second's, less one.")
    yield ""
    yield _row("figure", "load", "first", "second", "measured", "noise", "simulated", "at measured pace",
               "order")
    yield "|" + "---|" * 9
    for order in orders:
        load = order["load"]
        yield _row(order["metric"].replace("_", " "), "" if load is None else f"{load:.0%}", order["first"],
                   order["second"], percent(order["measured"]), percent(order["noise"]).lstrip("+"),
                   percent(order["simulated"]), percent(order["paced"]), order["verdict"])


def percent(value: float | None) -> str:
    """A share with its sign; nothing for what is not known."""
    return "" if value is None else f"{100 * value:+.1f} %"


def span(low: float | None, high: float | None) -> str:
    """From one share to another."""
    return "" if low is None or high is None else f"{percent(low)} to {percent(high)}"
