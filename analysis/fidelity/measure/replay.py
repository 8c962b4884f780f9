"""One measured run in the simulator."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetis_sim.config import compose
from hetis_sim.run import prepare, run_prepared
from hetis_sim.spec.errors import HetisError

POINTS = 201
"""Points of a distribution that is kept."""

Floats = NDArray[np.float64]


def run(words: Sequence[str], rows: Sequence[Sequence[float]], until_s: float | None, since_dispatch: bool,
        links: Mapping[str, Sequence[float]], token_weighted: bool, token_share: float,
        collectives: Mapping[str, str]) -> dict[str, Any]:
    """Figures of a run: metrics, distributions, and the share of each part of its steps.

    Args:
        words: of the configuration.
        rows: arrival in seconds, prompt and output tokens of each request.
        until_s: what had happened by then counts; None for all.
        since_dispatch: TTFT counts from the first step of a request.
        links: seconds per byte and seconds of links of the machine.
        token_weighted: mean TPOT is over tokens.
        token_share: throughput is that of the first so many of all tokens.
        collectives: by card, another one whose measured all-reduces stand for its own.

    Raises:
        HetisError: the run cannot be simulated, or requests were rejected.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, "workload=trace", f"workload.path={_workload(Path(folder), rows)}",
                 *profile_words(Path(folder), links, collectives)]
        result = run_prepared(prepare(compose(*words)))
    requests = result.requests
    rejected = int((requests["status"] != "finished").sum())
    if rejected > max(1, len(requests) // 50):
        raise HetisError(f"{rejected} of {len(requests)} requests were rejected: "
                         f"{requests['reason'].value_counts().index[-1]}")
    requests = requests[requests["status"] == "finished"]
    begin = "first_scheduled_s" if since_dispatch else "arrival_s"
    columns = [requests[name].to_numpy(dtype=np.float64)
               for name in (begin, "first_token_s", "finish_s", "output_tokens")]
    found = figures(*columns, until_s=until_s, token_weighted=token_weighted)
    if token_share < 1.0:
        found["metrics"]["output_throughput"] = early_throughput(token_share, *columns)
    return {**found, "parts": _parts(result.steps), "rejected": rejected,
            "preemptions": int(requests["preemptions"].sum())}


def figures(begin: Floats, first: Floats, last: Floats, output: Floats, *, until_s: float | None,
            token_weighted: bool) -> dict[str, Any]:
    """Metrics and distributions of requests; arrays of equal length, times in seconds."""
    end = float(last.max()) if until_s is None else until_s
    made = _made_by(first, last, output, end)
    seen = first <= end
    some = seen & (made > 1)
    stop = np.minimum(last, end)
    samples = {"ttft": (first - begin)[seen], "tpot": ((stop - first) / np.maximum(made - 1, 1.0))[some],
               "e2el": (last - begin)[last <= end]}
    span_s = end - (float(begin.min()) if until_s is None else 0.0)
    metrics = {"output_throughput": float(made.sum()) / span_s}
    for name, values in samples.items():
        if len(values):
            p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
            metrics |= {f"mean_{name}_s": float(values.mean()), f"p50_{name}_s": p50, f"p95_{name}_s": p95,
                        f"p99_{name}_s": p99}
    if token_weighted and some.any():
        metrics["mean_tpot_s"] = float((stop - first)[some].sum() / (made - 1)[some].sum())
    return {"metrics": metrics, "samples": {name: thin(values) for name, values in samples.items()}}


def early_throughput(share: float, begin: Floats, first: Floats, last: Floats, output: Floats) -> float:
    """Tokens per second until so many of all tokens are made."""
    wanted, low, high = share * float(output.sum()), float(first.min()), float(last.max())
    while high - low > 1e-6 * high:
        middle = (low + high) / 2.0
        if float(_made_by(first, last, output, middle).sum()) < wanted:
            low = middle
        else:
            high = middle
    return wanted / (high - float(begin.min()))


def _made_by(first: Floats, last: Floats, output: Floats, end: float) -> Floats:
    """Tokens that each request has by a time, if they come at even intervals."""
    share = (end - first) / np.maximum(last - first, 1e-12)
    partly = np.where(first <= end, np.floor(1.0 + (output - 1.0) * np.clip(share, 0.0, 1.0)), 0.0)
    made: Floats = np.where(last <= end, output, partly)
    return made


def thin(values: Sequence[float] | Floats) -> list[float]:
    """At most ``POINTS`` of sorted values, at even ranks."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if len(ordered) <= POINTS:
        return [float(value) for value in ordered]
    return [float(value) for value in np.quantile(ordered, np.linspace(0.0, 1.0, POINTS))]


def _parts(steps: Any) -> dict[str, float]:
    """Share of each named part in the time of all steps."""
    names = [name for name in steps.columns if name.endswith("_s") and name not in ("start_s", "end_s")]
    total = float((steps["end_s"] - steps["start_s"]).sum()) or 1.0
    return {name.removesuffix("_s"): float(steps[name].sum()) / total for name in names}


def _workload(folder: Path, rows: Sequence[Sequence[float]]) -> Path:
    path = folder / "requests.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("arrival_s", "prompt_tokens", "output_tokens"))
        writer.writerows((repr(float(arrival)), int(prompt), int(output)) for arrival, prompt, output in rows)
    return path


def profile_words(folder: Path, links: Mapping[str, Sequence[float]],
                  collectives: Mapping[str, str]) -> list[str]:
    """Words that name profiles of the measured machine, written into a folder; none where there are none."""
    found = []
    if links:
        messages = {name: {"gamma_s_per_byte": cost[0], "beta_s": cost[1]} for name, cost in links.items()}
        module = {"model": "links", "status": "measured",
                  "sources": [{"text": "stated with the measured runs"}], "coefficients": messages}
        found.append(_profile(folder, "links", "transfer", module))
    for card, other in collectives.items():
        shipped = json.loads((files("hetis_sim.cost") / "profiles" / f"{other}.json").read_text("utf-8"))
        module = {**shipped["modules"]["all_reduce"], "status": "derived", "note": f"those of {other}"}
        found.append(_profile(folder, card, "all_reduce", module))
    return [f"cost.profiles=[{', '.join(found)}]"] if found else []


def _profile(folder: Path, device: str, module: str, body: Mapping[str, Any]) -> str:
    """A profile with one module; its path."""
    path = folder / f"{device}.json"
    path.write_text(json.dumps({"schema": 1, "name": f"{device}-of-the-runs", "device": device,
                                "modules": {module: body}}), encoding="utf-8")
    return str(path)
