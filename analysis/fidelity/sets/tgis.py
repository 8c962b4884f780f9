"""Closed loops against TGIS, IBM's fork of TGI (LLM-Pilot)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.fidelity.case import Case, DataSet, Row, csv_rows, number
from analysis.fidelity.sets.names import gpu_name, hosts, model_name

FOLDER = "ibm_llm_pilot"
FILE = "aggregate.csv.gz"

FLASH = ("llama-7b", "llama-13b", "EleutherAI__gpt-neox-20b", "bigcode__starcoder")
"""Models that TGIS serves without padding, with the engine that is simulated here."""

PATIENCE = 24
HOST_BASE_S = 1.5e-3
HOST_PER_SEQUENCE_S = 90e-6
LAUNCH_S = 280e-6
COLLECTIVES_S = 60e-6
CACHE_COPIES = 2

SETTINGS = (
    ("prompts hold up decoding",
     "scheduler.chunked_prefill=false",
     "TGIS, router/src/batcher.rs: prefill, then concatenate"),
    ("when prompts that wait may do so",
     f"scheduler.prompt_patience={PATIENCE}",
     "the same file, and MAX_WAITING_TOKENS=24, the launcher's default"),
    ("share of memory",
     "scheduler.memory_utilization=0.95",
     "the margin of 20 % (BATCH_SAFETY_MARGIN, the launcher's default) is of what weights leave; nobody is "
     "preempted here"),
    ("the cache is copied twice an iteration",
     f"cost.cache_copies={CACHE_COPIES}",
     "flash_causal_lm.py: to make room for each token, and when requests have ended (at these lengths "
     "nearly always)"),
    ("kernels are queued one by one",
     f"cost.host_launch_s_per_layer={LAUNCH_S:g}, {COLLECTIVES_S:g} more with several cards",
     "first principles: about 12 kernels, 12 views and 10 modules a layer in flash_llama_modeling.py, at "
     "the 9, 2 and 5 us that PyTorch's dispatch takes on a current core and 5 us for each launch; two "
     "collectives of 30 us"),
    ("host time of an iteration",
     f"{HOST_BASE_S:g} s + {HOST_PER_SEQUENCE_S:g} s a request",
     "first principles: a gRPC round trip and some 40 operations; for each request two slices by values on "
     "the device, its token fetched, and messages"),
    ("lengths",
     "prompts exponential, outputs by the quantiles of one-user runs, both with each point's mean",
     "single requests were not published; (latency - TTFT) / ITL of the runs with one user says how many "
     "tokens were asked for"),
    ("users", "a closed loop without think time for 120 s", "LLM-Pilot"))

FINDINGS = (
    "Up to 8 users (46 points) the engine is as documented: throughput is off by 12 to 14 % at the median, "
    "TPOT by 13 to 18 %. From 16 users on (27 points) throughput is 62 % too high, because a user's "
    "request may be several sequences: by the paper (arXiv 2410.02425) the generator draws batch sizes and "
    "decoding parameters from production traces, and sets the largest batch weight by a search on each "
    "card. The points give neither. Here each request is one sequence, decoded greedily. The signs agree: "
    "with 64 users of Llama-7B the measured time between tokens is 28 ms longer on one H100 than on four, "
    "which the cache of 64 sequences of these lengths cannot explain. Nothing was fitted to make up for it.",
    "A100 hosts take about 1.5 times as long to queue kernels as H100 hosts do (15 against 10 ms for "
    "Llama-7B on two and four cards with one user); one figure for all is simulated, so that errors with "
    "one user have both signs.",
    "TTFT with one user is 6 to 36 ms too short: the client, the network and tokenisation are not in it.")


def read(folder: Path) -> DataSet:
    """All points without errors.

    Raises:
        HetisError: the file is missing or faulty.
    """
    path = folder / FOLDER / FILE
    rows = [row for row in csv_rows(path, "model_key", "gpu", "tp", "users", "n_all", "in_mean", "out_mean",
                                    "itl_mean_ms", "ttft_p50_ms", "lat_p50_ms", "error_rate", "out_tok_per_s")
            if number(row, "error_rate", path) == 0.0]
    lengths = output_quantiles([[number(row, key, path) for key in (
        "lat_p50_ms", "lat_p95_ms", "lat_p99_ms", "ttft_p50_ms", "itl_mean_ms")]
        for row in rows if row["users"] == "1"])
    cases: list[Case] = []
    left_out: dict[str, int] = {}
    for row in rows:
        why = _left_out(row)
        if why:
            left_out[why] = left_out.get(why, 0) + 1
            continue
        cases.append(_case(row, path, lengths))
    about = ("Closed loops of 1 to 128 users for two minutes each, measured by IBM for LLM-Pilot; only "
             "points without errors.")
    return DataSet("tgis", "TGIS of 2023/24", about, SETTINGS, cases,
                   [f"{why}: {count} points" for why, count in left_out.items()], FINDINGS)


def _left_out(row: dict[str, str]) -> str:
    model, tp = row["model_key"], int(row["tp"])
    if model not in FLASH:
        return ("encoder-decoder models, which the simulator does not have" if "t5" in model or "ul2" in model
                or "mt0" in model else "models that TGIS serves in padded batches by another engine (MPT, "
                                       "CodeGen)")
    if model == "bigcode__starcoder" and tp > 1:
        return "StarCoder on several cards, each with a copy of its one KV head, which no layout here has"
    return ""


def _case(row: dict[str, str], path: Path, quantiles: Sequence[tuple[float, float]]) -> Case:
    tp, users = int(row["tp"]), int(row["users"])
    gpu, nvlink = _card(row["gpu"])
    n = max(4 * users, min(8000, int(1.5 * number(row, "n_all", path))))
    requests = list(_requests(n, number(row, "in_mean", path), number(row, "out_mean", path), quantiles))
    words = [f"model={model_name(row['model_key'])}", *hosts(gpu, tp, nvlink if tp > 1 else None),
             "policy=vllm", f"policy.tp={tp}", "policy.pp=1", "workload.arrivals=closed",
             f"workload.users={users}",
             "workload.common_queue=true", "workload.duration_s=120", "workload.requests=null",
             f"scheduler.prompt_patience={PATIENCE}", "scheduler.memory_utilization=0.95",
             f"cost.host_base_s={HOST_BASE_S}", f"cost.host_per_sequence_s={HOST_PER_SEQUENCE_S}",
             f"cost.host_launch_s_per_layer={LAUNCH_S + (COLLECTIVES_S if tp > 1 else 0.0):g}",
             f"cost.cache_copies={CACHE_COPIES}"]
    measured = {"output_throughput": number(row, "out_tok_per_s", path)}
    for metric, column in (("mean_tpot_s", "itl_mean_ms"), ("p50_ttft_s", "ttft_p50_ms"),
                           ("p95_ttft_s", "ttft_p95_ms"), ("mean_e2el_s", "lat_mean_ms"),
                           ("p50_e2el_s", "lat_p50_ms"), ("p95_e2el_s", "lat_p95_ms")):
        measured[metric] = number(row, column, path) / 1e3
    name = f"{row['model_key'].rpartition('__')[2]} {tp} x {row['gpu']}, {users} users"
    return Case(name, words, requests, measured, token_weighted=True)


def _card(name: str) -> tuple[str, str | None]:
    """The card as ``gpu_features.csv`` has it: A100 of 40 GB on PCIe, H100 with NVLink."""
    if name == "A100":
        return "a100-pcie-40gb", None
    return gpu_name(name), "nvlink4" if name == "H100" else None


def output_quantiles(rows: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Quantiles of the tokens that requests asked for, from runs with one user at a time.

    Args:
        rows: latency at the 50th, 95th and 99th percentile, TTFT and time between tokens, in ms.

    Returns:
        (share, tokens), from 1 token to a thousand, the most that TGIS allows by default.
    """
    if not rows:
        return [(0.0, 1.0), (1.0, 1024.0)]
    table = np.array(rows)
    tokens = np.median(1.0 + (table[:, :3] - table[:, 3:4]) / table[:, 4:5], axis=0)
    levels = np.maximum.accumulate(np.clip(tokens, 1.0, 1024.0)).tolist()
    return [(0.0, 1.0), *zip((0.5, 0.95, 0.99), levels, strict=True), (1.0, 1024.0)]


def _requests(n: int, prompt: float, output: float,
              quantiles: Sequence[tuple[float, float]]) -> Iterator[Row]:
    """Requests with given mean lengths, the same for equal arguments."""
    random = np.random.default_rng(0)
    prompts = np.maximum(1.0, np.round(random.exponential(prompt, n)))
    shares, tokens = (np.array(column) for column in zip(*quantiles, strict=True))
    scale = output / _by_share((np.arange(100_000) + 0.5) / 100_000, shares, tokens).mean()
    outputs = np.maximum(1.0, np.round(_by_share(random.random(n), shares, tokens) * scale))
    for a, b in zip(prompts.tolist(), outputs.tolist(), strict=True):
        yield 0.0, int(min(a, 900.0)), int(min(b, 1024.0))


def _by_share(at: NDArray[np.float64], shares: NDArray[np.float64],
              tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quantiles in between, straight in the logarithm."""
    found: NDArray[np.float64] = np.exp(np.interp(at, shares, np.log(tokens)))
    return found
