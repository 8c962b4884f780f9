"""Runs of Helix's prototype on Google Cloud (ASPLOS '25): clusters of one kind of GPU, and mixed ones."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from configparser import ConfigParser
from configparser import Error as ConfigError
from pathlib import Path

import numpy as np

from analysis.fidelity.case import Case, DataSet, csv_rows, open_text
from analysis.fidelity.errors import summary
from analysis.fidelity.measure.replay import thin
from analysis.fidelity.sets.names import model_name
from hetis_sim.spec.errors import HetisError

FOLDER = "helix_real"

CARDS = {"a100": ("a100-40gb", 85), "l4": ("l4", 16), "t4": ("t4", 15)}
"""Cards of a machine, and GiB of its memory."""

PLACEMENTS = {"separate": "separate", "helix": "ilp", "swarm": "swarm", "petals": "petals"}
SCHEDULING = {"separate": "random", "swarm": "shortest_queue"}

LAUNCH_GAP_S = 0.1
MESSAGE_S = 50e-6
EMPTY_STEP_S = 50e-6
BACKLOG = 200

SETTINGS = (
    ("layers of each node", "policy.placement=given", "the solution files of the layouts"),
    ("requests in flight, offline",
     "workload.users: those that the client launches, 0.1 s apart; each that ends is replaced by the next",
     "llm_sys/heuristic_host.py (initial_launch_num); counted in the record, since the script's number and "
     "the record differ for 70B on A100 (18 and 30)"),
    ("requests in flight, offline, Helix's own scheduler",
     "as many as the mark of 80 % of the cache allows",
     "llm_sys/maxflow_host.py (feeding_hwm=0.8, expected_output_length_ratio=1)"),
    ("arrivals and lengths", "those of the record; outputs that never began: the median", "requests.csv"),
    ("share of memory", "0.8; 0.9 for separate pipelines of 70B", "step6_start_worker.py and ae_readme.md"),
    ("tokens in cache",
     "scheduler.cache_tokens: the smallest kv_cache_capacity over layers",
     "simulator_cluster files of the separate pipelines"),
    ("tokens of a prompt step, running requests", "4096, 256", "llm_sys/worker.py (vLLM 0.4.0.post1)"),
    ("a batch of prompts, then one of single tokens", "nodes of a mesh", "llm_sys/worker.py (force_decode)"),
    ("one message for each request",
     f"scheduler.mesh_message_s={MESSAGE_S:g}",
     "llm_sys/comm: each request is a message of two ZeroMQ frames; 50 us each are ours"),
    ("an idle worker looks for messages after an empty step of every layer",
     f"scheduler.mesh_poll_s={EMPTY_STEP_S:g} a layer",
     "llm_sys/worker.py; 50 us for an empty step are ours"),
    ("host time of a node's step",
     "2 ms + 20 us a request",
     "the simulator's default; of the 5 to 13 ms that vLLM RFC 6854 counts for an engine of that time, a "
     "worker has only scheduling and inputs"),
    ("network", "10 Gb/s", "config/machine_profiles.ini"))

FINDINGS = (
    "An earlier look found offline runs of 70B up to 6.5 times too fast. The causes: the client keeps a "
    "fixed number of requests in flight (3 on T4, 30 on A100, 40 on L4), where the simulator was given a "
    "backlog; and batches come apart. Each request is a message of its own, and an idle worker begins with "
    "those that are there when it looks. So five to eight small batches go round four nodes, each of which "
    "takes as long as a full one (35 ms for 20 layers on an A100): the record shows times between tokens "
    "in steps of 35 ms, at 139, 174 and 209 ms.",
    "What is left on A100 with 70B offline: 20 of its layers fill 34 of 42 GB. In the record 13 of 30 "
    "requests never begin, although their prompts were sent: the engine, which schedules every layer by "
    "itself, swaps out requests that sleep in one layer for those of another, and lets no prompt in while "
    "anybody is swapped. The simulator takes cache for a whole path at once.",
    "Prompts on L4 take 15 to 20 % longer than the profile says (38 against 31 ms a layer at 1,000 tokens "
    "of 70B in Helix's own table): a rate derived from another card of the family, which has more power. "
    "It is not corrected here.",
    "Runs of T4 with 70B have 3 and 8 requests: one more or less is 12 %.")


def read(folder: Path) -> DataSet:
    """All runs whose layout is known.

    Raises:
        HetisError: a file is missing or faulty.
    """
    base = folder / FOLDER
    path = base / "requests.csv.gz"
    runs: dict[str, list[dict[str, str]]] = {}
    for row in csv_rows(path, "run", "query_id", "t_dispatch", "t_first_token", "t_last_token",
                        "prompt_tokens", "generated_tokens", "output_len", "decode_lat_mean_s"):
        runs.setdefault(row["run"], []).append(row)
    cases: list[Case] = []
    left_out: list[str] = []
    for name, rows in sorted(runs.items()):
        try:
            cases.append(_case(name, rows, base / "placement"))
        except LookupError as error:
            left_out.append(f"{name}: {error.args[0]}")
    about = ("Runs of five minutes over Azure's conversation lengths on 4 A100 (40 GB), 8 L4 and 12 T4, "
             "one GPU a machine, measured by the authors of Helix; one kind of GPU each here. TTFT is "
             "their prompt latency, TPOT the mean time of a request's tokens up to the end of the record.")
    return DataSet("helix", "Helix's prototype of 2024", about, SETTINGS, cases, left_out, FINDINGS)


def _case(name: str, rows: Sequence[dict[str, str]], placement: Path) -> Case:
    parts = name.split("/")
    model, (method, _, mode) = parts[0].removeprefix("real_"), parts[1].partition("_")
    gpu = parts[2] if len(parts) > 2 else ""
    rows = sorted(rows, key=lambda row: int(row["query_id"]))
    dispatch, first, last, made, output, tpot = (np.array([_number(row[key]) for row in rows]) for key in (
        "t_dispatch", "t_first_token", "t_last_token", "generated_tokens", "output_len", "decode_lat_mean_s"))
    until_s = float(np.nanmax(last))
    output = np.where(np.isfinite(output), output, np.nanmedian(output))
    requests = [(float(t), int(row["prompt_tokens"]), max(1, int(n)))
                for t, row, n in zip(dispatch, rows, output, strict=True)]
    samples = {"ttft": (first - dispatch)[np.isfinite(first)], "tpot": tpot[np.isfinite(tpot)]}
    measured = {"output_throughput": float(np.nansum(made)) / until_s}
    for key, values in samples.items():
        measured |= {metric: value for metric, value in summary(key, values.tolist()).items()
                     if not metric.startswith("p99") or len(values) >= 100}
    words = [f"model={model_name(model)}", "workload.requests=null", "scheduler.max_batch_tokens=4096",
             *_layout(placement, model, method, gpu), *_feeding(method, mode, dispatch.tolist())]
    share = 0.9 if model == "llama70b" and method == "separate" else 0.8
    words.append(f"scheduler.memory_utilization={share}")
    return Case(" ".join(text for text in (model, method, mode, gpu) if text), words, requests, measured,
                {key: thin(values) for key, values in samples.items()}, until_s,
                since_dispatch=method == "helix" and mode == "offline")


def _number(text: str) -> float:
    return float(text) if text else math.nan


def _feeding(method: str, mode: str, dispatch_s: Sequence[float]) -> list[str]:
    """How requests come, and who is let in."""
    own = method == "helix"
    if mode != "offline":
        return [] if own else ["policy.high_water=1", "policy.output_share=0"]
    users = BACKLOG if own else in_flight(dispatch_s)
    marks = ["policy.high_water=0.8", "policy.output_share=1"] if own else ["policy.high_water=1",
                                                                          "policy.output_share=0"]
    return ["workload.arrivals=closed", f"workload.users={users}", "workload.common_queue=true",
            f"workload.stagger_s={0.0 if own else LAUNCH_GAP_S}", "workload.duration_s=301", *marks]


def in_flight(dispatch_s: Sequence[float]) -> int:
    """Requests that the client launches one after the other before it waits for the first to end."""
    count = 0
    for n, at in enumerate(sorted(dispatch_s), 1):
        if abs(at - LAUNCH_GAP_S * n) > LAUNCH_GAP_S / 2:
            break
        count = n
    return max(1, count)


def _layout(placement: Path, model: str, method: str, gpu: str) -> list[str]:
    """Words for the cluster, its nodes' layers and their engines.

    Raises:
        LookupError: the layout is not among the data.
    """
    kind = PLACEMENTS.get(method)
    if kind is None:
        raise LookupError(f"no layout of method {method!r} is known")
    start = f"layout_{model}__{kind}"
    names = [f"{start}__{gpu}_solution_file.ini.gz", f"{start}__{gpu}__ilp_sol.ini.gz"] if gpu else [
        f"{start}__{kind}_sol.ini.gz"]
    found = next((placement / name for name in names if (placement / name).is_file()), None)
    if found is None:
        raise LookupError(f"its layout ({' or '.join(names)}) is not among the data")
    ranges = solution_ranges(_ini(found))
    kinds = [gpu] * len(ranges) if gpu else node_kinds(_ini(placement / "config__cluster24.ini.gz"))
    unknown = sorted(set(kinds) - set(CARDS))
    if unknown:
        raise LookupError(f"no machine with {', '.join(unknown)} is known")
    hosts = [f"{{gpus: {{{CARDS[k][0]}: 1}}, memory_gib: {CARDS[k][1]}}}" for k in kinds]
    held = [ranges.get(n, []) for n in range(len(kinds))]
    layers = [item[1] for item in held if item]
    words = ["cluster=helix-t4", f"cluster.name=helix-{gpu or 'mixed'}",
             f"cluster.hosts=[{', '.join(hosts)}]", "policy=helix", "policy.placement=given",
             f"policy.ranges=[{', '.join(str(list(item)) for item in held)}]",
             f"policy.scheduling={SCHEDULING.get(method, 'wrr')}",
             f"policy.partial_inference={'true' if method in ('helix', 'petals') else 'false'}",
             f"scheduler.mesh_message_s={MESSAGE_S}",
             f"scheduler.mesh_poll_s={EMPTY_STEP_S * sum(layers) / len(layers):g}"]
    cluster = placement / f"layout_{model}__separate__{gpu}_simulator_cluster.ini.gz"
    if method == "separate" and cluster.is_file():
        words.append(f"scheduler.cache_tokens={cache_tokens(_ini(cluster), layers)}")
    return words


def _ini(path: Path) -> ConfigParser:
    parser = ConfigParser()
    try:
        with open_text(path) as file:
            parser.read_file(file)
    except ConfigError as error:
        raise HetisError(f"{path}: {error}") from error
    return parser


def solution_ranges(parser: ConfigParser) -> dict[int, list[int]]:
    """First layer and number of layers of each node, numbered from 0."""
    offset = parser.getint("Settings", "offset")
    found: dict[int, list[int]] = {}
    for name, text in parser["Solution"].items():
        layers = ast.literal_eval(text)
        if layers:
            found[int(name.removeprefix("compute_node_")) - offset] = [layers[0], len(layers)]
    return found


def node_kinds(parser: ConfigParser) -> list[str]:
    """Kind of card of each node."""
    count = parser.getint("NodeNames", "total_compute_nodes")
    return [parser.get(f"ComputeNode-{n}", "type").lower() for n in range(count)]


def cache_tokens(parser: ConfigParser, layers: Sequence[int]) -> int:
    """Tokens that the node with the least room holds in all its layers."""
    entries = [parser.getint(name, "kv_cache_capacity") for name in parser.sections()
               if parser.has_option(name, "kv_cache_capacity")]
    return min(room // held for room, held in zip(entries, layers, strict=True))
