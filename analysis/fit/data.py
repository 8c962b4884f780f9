"""Readers of the public kernel timings: every reader returns SI units and one row per shape.

Columns by module:
    gemm          m, n, k, seconds
    elementwise   kind, bytes, seconds
    prefill       batch, heads, kv_heads, head_dim, new, context, seconds
    decode        batch, heads, kv_heads, head_dim, length, seconds   (heads per sequence)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

MS = 1e-3
US = 1e-6
NS = 1e-9
HALF = 2

# (hidden, query heads, KV heads, head_dim, inner width) of the architectures in the layer timings.
Architecture = tuple[int, int, int, int, int]
LLAMA_3_8B = (4096, 32, 8, 128, 14336)
QWEN_3_32B = (5120, 64, 8, 128, 25600)


@dataclass(frozen=True)
class Store:
    """The folder of public data, with the manifest that names sources and licences."""

    root: Path

    def path(self, file: str) -> Path:
        """Path of a file named relative to the folder."""
        return self.root / file

    def sources(self, files: list[str]) -> list[dict[str, Any]]:
        """Provenance of ``files`` for a profile: name, origin, commit, sha256, licence."""
        manifest = {row["file"]: row for row in json.loads((self.root / "manifest.json").read_text())}
        keys = ("source_repo", "commit", "sha256", "licence")
        return [{"file": file, **{key: manifest[file][key] for key in keys}} for file in files]


def _median(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """One row for each combination of ``keys``, with the median time."""
    return rows.groupby(keys)["seconds"].median().reset_index()


def gemm_aiconfigurator(store: Store, file: str) -> pd.DataFrame:
    """16-bit matrix products of a card, warm clocks, launches hidden in a CUDA graph."""
    rows = pd.read_parquet(store.path(file))
    rows = rows[rows["gemm_dtype"] == "bfloat16"]
    return _median(rows.assign(seconds=rows["latency"] * MS), ["m", "n", "k"])


def gemm_apex(store: Store, file: str) -> pd.DataFrame:
    """16-bit matrix products (whole microseconds, launch included)."""
    rows = pd.read_csv(store.path(file))
    # The dense axis n is the output width, the tokens are powers of two; widths that are not
    # multiples of 64 fall off the matrix units and occur in no model.
    rows = rows[rows["n"] % 64 == 0].assign(seconds=rows["time(us)"] * US)
    return rows[["m", "n", "k", "seconds"]].reset_index(drop=True)


def gemm_vidur(store: Store, files: list[str]) -> pd.DataFrame:
    """Projections of whole models by tokens and tensor-parallel degree."""
    parts = []
    for file in files:
        rows = pd.read_csv(store.path(file))
        tp = rows["num_tensor_parallel_workers"]
        head_dim = rows["n_embd"] // rows["n_head"]
        kv = np.maximum(rows["n_kv_head"] // tp, 1)
        qkv = (rows["n_head"] // tp + 2 * kv) * head_dim
        inner = rows["n_expanded_embd"] // tp
        columns = np.where(rows["use_gated_mlp"], 2, 1)
        shapes = {"attn_pre_proj": (qkv, rows["n_embd"]),
                  "attn_post_proj": (rows["n_embd"], rows["n_head"] // tp * head_dim),
                  "mlp_up_proj": (columns * inner, rows["n_embd"]),
                  "mlp_down_proj": (rows["n_embd"], inner)}
        parts += [pd.DataFrame({"m": rows["num_tokens"], "n": n, "k": k,
                                "seconds": rows[f"time_stats.{op}.median"] * MS})
                  for op, (n, k) in shapes.items()]
    rows = pd.concat(parts)
    return _median(rows[rows["seconds"] > 0], ["m", "n", "k"])


def elementwise_vidur(store: Store, files: list[str]) -> pd.DataFrame:
    """Norm with residual add, and activation, of whole models (kernels of 2023, not fused)."""
    parts = []
    for file in files:
        rows = pd.read_csv(store.path(file))
        hidden = rows["num_tokens"] * rows["n_embd"] * HALF
        inner = rows["num_tokens"] * rows["n_expanded_embd"] // rows["num_tensor_parallel_workers"] * HALF
        # A norm here is the norm and the residual add, two kernels, over the bytes of the fused one.
        norm = rows["time_stats.input_layernorm.median"] + rows["time_stats.add.median"]
        parts += [pd.DataFrame({"kind": "norm", "bytes": 4 * hidden, "seconds": norm * MS}),
                  pd.DataFrame({"kind": "activation", "bytes": np.where(rows["use_gated_mlp"], 3, 2) * inner,
                                "seconds": rows["time_stats.mlp_act.median"] * MS})]
    rows = pd.concat(parts)
    return _median(rows[rows["seconds"] > 0], ["kind", "bytes"])


def gemm_layers_ns(store: Store, files: list[tuple[str, int]]) -> pd.DataFrame:
    """Projections of Llama-3.1-8B, one file for each tensor-parallel degree; nanoseconds."""
    hidden, heads, kv_heads, head_dim, inner = LLAMA_3_8B
    parts = []
    for file, tp in files:
        rows = pd.read_csv(store.path(file))
        shapes = {"q_proj": (heads * head_dim // tp, hidden), "k_proj": (kv_heads * head_dim // tp, hidden),
                  "o_proj": (hidden, heads * head_dim // tp), "gate_proj": (inner // tp, hidden),
                  "down_proj": (hidden, inner // tp), "lm_head": (128256 // tp, hidden)}
        for layer, (n, k) in shapes.items():
            chosen = rows[rows["layer_name"] == layer]
            parts.append(pd.DataFrame({"m": chosen["input"], "n": n, "k": k,
                                       "seconds": chosen["latency(ns)"] * NS}))
    return pd.concat(parts, ignore_index=True)


def elementwise_layers_ns(store: Store, files: list[tuple[str, int]]) -> pd.DataFrame:
    """The activation of Llama-3.1-8B (its norms there are chains of small kernels, not an engine's)."""
    parts = []
    for file, tp in files:
        rows = pd.read_csv(store.path(file))
        chosen = rows[rows["layer_name"] == "act_fn"]
        # Activation and product are two kernels there: five elements move for each inner one.
        moved = chosen["input"] * LLAMA_3_8B[4] // tp * 5 * HALF
        parts.append(pd.DataFrame({"kind": "activation", "bytes": moved,
                                   "seconds": chosen["latency(ns)"] * NS}))
    return _median(pd.concat(parts), ["kind", "bytes"])


def gemm_vllm_layers(store: Store, files: list[tuple[str, Architecture, int, int]]) -> pd.DataFrame:
    """Projections inside vLLM 0.19: (file, architecture, tp, vocabulary); microseconds."""
    parts = []
    for file, (hidden, heads, kv_heads, head_dim, inner), tp, vocab in files:
        rows = pd.read_csv(store.path(file))
        shapes = {"qkv_proj": ((heads + 2 * kv_heads) * head_dim // tp, hidden),
                  "o_proj": (hidden, heads * head_dim // tp),
                  "gate_up_proj": (2 * inner // tp, hidden), "down_proj": (hidden, inner // tp)}
        for layer, (n, k) in shapes.items():
            chosen = rows[rows["layer"] == layer]
            parts.append(pd.DataFrame({"m": chosen["tokens"], "n": n, "k": k,
                                       "seconds": chosen["time_us"] * US}))
        heads_file = pd.read_csv(store.path(file.replace("dense", "per_sequence")))
        chosen = heads_file[heads_file["layer"] == "lm_head"]
        parts.append(pd.DataFrame({"m": chosen["sequences"], "n": vocab // tp, "k": hidden,
                                   "seconds": chosen["time_us"] * US}))
    return pd.concat(parts, ignore_index=True)


def elementwise_vllm_layers(store: Store, files: list[tuple[str, Architecture, int, int]]) -> pd.DataFrame:
    """Fused norm with residual, activation and rotary embedding inside vLLM 0.19."""
    parts = []
    for file, (hidden, heads, kv_heads, head_dim, inner), tp, _ in files:
        rows = pd.read_csv(store.path(file))
        width = {"layernorm": ("norm", 4 * hidden), "act_fn": ("activation", 3 * inner // tp),
                 "rotary_emb": ("rotary", 2 * (heads + kv_heads) * head_dim // tp)}
        for layer, (kind, elements) in width.items():
            chosen = rows[rows["layer"] == layer]
            parts.append(pd.DataFrame({"kind": kind, "bytes": chosen["tokens"] * elements * HALF,
                                       "seconds": chosen["time_us"] * US}))
    return _median(pd.concat(parts), ["kind", "bytes"])


def gemm_neusight(store: Store, device: str) -> pd.DataFrame:
    """FP32 linear layers with TF32 off, widths that are multiples of 4; mean of the five fastest of 25."""
    rows = pd.concat([pd.read_csv(store.path(f"kernels/neusight_fp32/{split}_linear.csv.gz"))
                      for split in ("train", "test")])
    aligned = (rows["N"] % 4 == 0) & (rows["K"] % 4 == 0)
    rows = rows[(rows["Device"] == device) & aligned]
    return _median(pd.DataFrame({"m": rows["B"] * rows["M"], "n": rows["K"], "k": rows["N"],
                                 "seconds": rows["Latency"] * MS}), ["m", "n", "k"])


def elementwise_neusight(store: Store, device: str) -> pd.DataFrame:
    """FP32 layer norm and softmax: one read and one write of each element."""
    parts = []
    for kind in ("ln", "softmax"):
        for split in ("train", "test"):
            rows = pd.read_csv(store.path(f"kernels/neusight_fp32/{split}_{kind}.csv.gz"))
            rows = rows[rows["Device"] == device]
            parts.append(pd.DataFrame({"kind": kind, "bytes": rows["B"] * rows["H"] * 8,
                                       "seconds": rows["Latency"] * MS}))
    return pd.concat(parts, ignore_index=True)


def layers_helix(store: Store, device: str) -> pd.DataFrame:
    """Whole decoder layers in vLLM by tokens (prompt) or sequences (decode); whole ms above 2.5 ms."""
    rows = pd.read_csv(store.path("kernels/helix/layer_time_by_batch.csv"))
    rows = rows[(rows["gpu"] == device) & (rows["batch_tokens"] > 0) & (rows["time_ms_per_layer"] > 0)]
    return pd.DataFrame({"architecture": rows["model"], "phase": rows["phase"],
                         "tokens": rows["batch_tokens"], "seconds": rows["time_ms_per_layer"] * MS})


def _attention_aiconfigurator(store: Store, file: str) -> pd.DataFrame:
    rows = pd.read_parquet(store.path(file))
    if "window_size" in rows:
        rows = rows[rows["window_size"] == 0]
    return rows[rows["kv_cache_dtype"].isin(["bfloat16", "float16"])]


def prefill_aiconfigurator(store: Store, file: str) -> pd.DataFrame:
    """Causal attention of whole prompts, 16-bit cache, no window."""
    rows = _attention_aiconfigurator(store, file)
    frame = pd.DataFrame({"batch": rows["batch_size"], "heads": rows["num_heads"],
                          "kv_heads": rows["num_key_value_heads"], "head_dim": rows["head_dim"],
                          "new": rows["isl"], "context": 0, "seconds": rows["latency"] * MS})
    return _median(frame, ["batch", "heads", "kv_heads", "head_dim", "new", "context"])


def decode_aiconfigurator(store: Store, file: str) -> pd.DataFrame:
    """One new token for each sequence, 16-bit cache, no window."""
    rows = _attention_aiconfigurator(store, file)
    frame = pd.DataFrame({"batch": rows["batch_size"], "heads": rows["num_heads"],
                          "kv_heads": rows["num_key_value_heads"], "head_dim": rows["head_dim"],
                          "length": rows["isl"] + rows["step"], "seconds": rows["latency"] * MS})
    return _median(frame, ["batch", "heads", "kv_heads", "head_dim", "length"])


def attention_vidur(store: Store, file: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(prefill, decode) attention of one model; prompts follow a cached context."""
    rows = pd.read_csv(store.path(file))
    tp = rows["num_tensor_parallel_workers"]
    frame = pd.DataFrame({"batch": rows["batch_size"], "heads": rows["n_q_head"] // tp,
                          "kv_heads": np.maximum(rows["n_kv_head"] // tp, 1),
                          "head_dim": rows["n_embd"] // rows["n_q_head"], "context": rows["kv_cache_size"],
                          "new": rows["prefill_chunk_size"], "is_prefill": rows["is_prefill"],
                          "prefill_s": rows["time_stats.attn_prefill.median"] * MS,
                          "decode_s": rows["time_stats.attn_decode.median"] * MS})
    prefill = frame[frame["is_prefill"] & (frame["prefill_s"] > 0)].rename(columns={"prefill_s": "seconds"})
    decode = frame[~frame["is_prefill"] & (frame["decode_s"] > 0)].rename(columns={"decode_s": "seconds"})
    decode = decode.assign(length=decode["context"] + 1)
    return (prefill[["batch", "heads", "kv_heads", "head_dim", "new", "context", "seconds"]],
            decode[["batch", "heads", "kv_heads", "head_dim", "length", "seconds"]])


def attention_vllm_layers(store: Store,
                          files: list[tuple[str, Architecture, int]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(prefill, decode) attention inside vLLM 0.19: one prompt chunk alone, or decodes alone."""
    prefills, decodes = [], []
    for file, (_, heads, kv_heads, head_dim, _), tp in files:
        rows = pd.read_csv(store.path(file))
        shape = {"heads": heads // tp, "kv_heads": kv_heads // tp, "head_dim": head_dim}
        alone = rows[(rows["n_decode"] == 0) & (rows["prefill_chunk"] > 0)]
        prefills.append(pd.DataFrame({"batch": 1, **shape, "new": alone["prefill_chunk"],
                                      "context": alone["kv_prefill"], "seconds": alone["time_us"] * US}))
        alone = rows[(rows["prefill_chunk"] == 0) & (rows["n_decode"] > 0)]
        decodes.append(pd.DataFrame({"batch": alone["n_decode"], **shape, "length": alone["kv_decode"],
                                     "seconds": alone["time_us"] * US}))
    return pd.concat(prefills, ignore_index=True), pd.concat(decodes, ignore_index=True)
