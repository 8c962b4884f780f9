"""Runs of vLLM 0.19 with time stamps of every request (LLMServingSim's benchmark)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis.fidelity.case import Case, DataSet, json_rows, number
from analysis.fidelity.errors import summary
from analysis.fidelity.measure.replay import thin
from analysis.fidelity.sets.names import gpu_name, hosts, model_name
from hetis_sim.spec.errors import HetisError

FOLDER = "llmservingsim_vllm"
LINK = "link-of-the-machine"

SETTINGS = (
    ("token budget of a step, running requests",
     "max_num_batched_tokens, max_num_seqs",
     "meta.json of each run"),
    ("running requests first, prompts cut into pieces",
     "scheduler.chunked_prefill=true",
     "vLLM V1 (enable_chunked_prefill in the recorded configuration)"),
    ("first come first served, preemption by recomputing, last come first", "policy=vllm", "vLLM V1"),
    ("asynchronous scheduling",
     "scheduler.async_scheduling, cost.host_overlap=true",
     "async_scheduling in the recorded configuration; the default of this version"),
    ("prompts and decoding in one FlashAttention call",
     "scheduler.joint_attention=true",
     "vLLM V1's FlashAttention backend; [cost model](cost.md)"),
    ("tokens in cache",
     "scheduler.cache_tokens",
     "num_kv_tokens in meta.json, where it is; else from memory"),
    ("share of memory", "gpu_memory_utilization", "meta.json, or config.json"),
    ("link between cards", "link_bw, link_latency", "config.json of the run states it for the machine"),
    ("kernels queued by CUDA graphs",
     "cost.host_launch_s_per_layer=0",
     "cudagraph_mode in the recorded configuration"),
    ("host time of a step", "2 ms + 20 us a request, beside the devices", "the simulator's default"))

FINDINGS = (
    "Joint attention is what makes these runs come out: in a step with prompts, decoding requests cost up "
    "to three times what they cost alone. Without it, throughput of Llama-3.1-8B on the RTX PRO 6000 is 11 "
    "% too high, with it 7 %.",
    "What is left on the RTX PRO 6000: decode attention at 32 to 128 requests of 1,000 tokens takes 8 to "
    "14 % longer inside vLLM than by the fitted line (221 against 193 us at 64 requests), and requests of "
    "unequal length take longer than equal ones, which no table of equal lengths shows. Both go the same "
    "way in TTFT: above capacity, an error of the step time adds up over the queue.",
    "The run of Qwen3-32B depends on the link: with the link of a server board (37 GB/s) instead of the 16 "
    "GB/s and 20 us that its config.json states, its TPOT would be 21 % too short.",
    "Data-parallel attention with expert parallelism (Qwen3-30B-A3B) is simulated as two-way tensor "
    "parallelism with both engines' budgets: heads instead of requests are divided, and two all-reduces a "
    "layer stand for gathering and scattering around the experts.")


def read(folder: Path) -> DataSet:
    """All runs in the folder.

    Raises:
        HetisError: a file is missing or faulty.
    """
    cases: list[Case] = []
    left_out: list[str] = []
    for path in sorted(item for item in (folder / FOLDER).iterdir() if (item / "meta.json").is_file()):
        try:
            cases.append(_case(path))
        except LookupError as error:
            left_out.append(f"{path.name}: {error.args[0]}")
    about = ("vLLM 0.19 over ShareGPT requests at 10 a second, measured by the authors of LLMServingSim; "
             "most runs are above capacity, so that TTFT is the wait in the queue. E2EL and TTFT count "
             "from arrival at the client's end; clocks are aligned where a request was queued soonest "
             "after it came.")
    return DataSet("vllm", "vLLM 0.19", about, SETTINGS, cases, left_out, FINDINGS)


def _case(path: Path) -> Case:
    meta, config = _object(path / "meta.json"), _object(path / "config.json")
    rows = list(json_rows(next(iter(sorted(path.glob("requests.jsonl*"))), path / "requests.jsonl.gz")))
    if not rows:
        raise HetisError(f"{path}: no requests")
    table = {key: np.array([number(row, key, path) for row in rows]) for key in (
        "input_toks", "output_toks", "arrival_time", "queued_ts", "first_token_ts", "last_token_ts")}
    start = table["arrival_time"].min()
    # The engine's clock is another one than that of arrivals.
    shift = (table["queued_ts"] - table["arrival_time"]).min() + start
    arrival, first = table["arrival_time"] - start, table["first_token_ts"] - shift
    last, output = table["last_token_ts"] - shift, table["output_toks"]
    samples = {"ttft": first - arrival, "tpot": (last - first) / np.maximum(1.0, output - 1.0),
               "e2el": last - arrival}
    measured = {"output_throughput": float(output.sum() / last.max())}
    for name, values in samples.items():
        measured |= summary(name, values.tolist())
    order = np.argsort(arrival, kind="stable")
    requests = [(float(arrival[i]), int(table["input_toks"][i]), int(output[i])) for i in order]
    words = [*_words(meta, config), "workload.requests=null"]
    return Case(path.name.replace("_", " "), words, requests, measured,
                {name: thin(values) for name, values in samples.items()}, links={LINK: _link(config)})


def _object(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise HetisError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise HetisError(f"{path}: not an object")
    return found


def _link(config: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds per byte and seconds of a message, from GB/s and ns."""
    return 1.0 / (float(config["link_bw"]) * 1e9), float(config["link_latency"]) * 1e-9


def _words(meta: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    engine = meta["engine_kwargs"]
    tp, replicas = int(engine["tensor_parallel_size"]), int(engine["data_parallel_size"])
    joined = replicas if engine["enable_expert_parallel"] else 1
    instance = config["nodes"][0]["instances"][0]
    cards = tp * replicas
    per_byte, _ = _link(config)
    yield from (f"model={model_name(meta['model'])}", *hosts(
        gpu_name(instance["hardware"]), cards, f"{{name: {LINK}, bandwidth_gbps: {8e-9 / per_byte:.6g}, "
                                               f"latency_us: {1e-3 * float(config['link_latency']):.6g}}}"
        if cards > 1 else None))
    cache = meta.get("kv_cache") or {}
    budget, seats = int(engine["max_num_batched_tokens"]) * joined, int(engine["max_num_seqs"]) * joined
    yield from ("policy=vllm", f"policy.tp={tp * joined}", "policy.pp=1", f"policy.dp={replicas // joined}",
                "scheduler.chunked_prefill=true", f"scheduler.chunk_tokens={budget}",
                f"scheduler.max_batch_tokens={budget}", f"scheduler.max_batch_requests={seats}",
                "scheduler.joint_attention=true", "scheduler.async_scheduling=true", "cost.host_overlap=true",
                f"scheduler.block_tokens={cache.get('block_size', 16)}",
                f"scheduler.cache_tokens={cache.get('num_kv_tokens') or 0}")
    share = cache.get("gpu_memory_utilization", instance["npu_mem"].get("mem_util", 0.9))
    yield f"scheduler.memory_utilization={share}"
