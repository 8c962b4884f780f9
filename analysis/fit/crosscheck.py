"""The shipped fits against other people's timings of the same cards, none of which was fitted on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.fit import data, gemm
from analysis.fit.cards import card
from analysis.fit.data import Store
from analysis.fit.errors import score
from analysis.fit.modules import (
    decode_limited,
    decode_rows,
    gemm_limited,
    gemm_rows,
    predict_decode,
    predict_prefill,
    prefill_limited,
    prefill_rows,
)
from analysis.fit.recipes import LAYERS, RTX_PRO, VIDUR_MODELS
from hetis_sim.cost.profile import Profile, parse_profile

AICONFIGURATOR = "kernels/aiconfigurator/a100_sxm/"
VIDUR_ATTENTION = "kernels/vidur/a100/llama2_70b_tp2_attention_flash_e2d00e9.csv.gz"


@dataclass(frozen=True)
class Check:
    """One module of one card against another source."""

    name: str
    module: str
    source: str
    rows: Callable[[Store], pd.DataFrame]


CHECKS = (
    Check("a100-80gb", "gemm", "vLLM 0.14 on another A100 (aiconfigurator)",
          lambda s: data.gemm_aiconfigurator(s, AICONFIGURATOR + "gemm/vllm/0.14.0/gemm_perf.parquet")),
    Check("a100-80gb", "gemm", "TensorRT-LLM 1.0 on another A100 (aiconfigurator)",
          lambda s: data.gemm_aiconfigurator(s, AICONFIGURATOR + "gemm/trtllm/1.0.0/gemm_perf.parquet")),
    Check("a100-80gb", "gemm", "whole models, 2023 (vidur)",
          lambda s: data.gemm_vidur(s, [f"kernels/vidur/a100/{m}_mlp.csv.gz" for m in VIDUR_MODELS])),
    Check("h100-sxm", "gemm", "whole models (vidur)",
          lambda s: data.gemm_vidur(s, [f"kernels/vidur/h100/{m}_mlp.csv.gz" for m in VIDUR_MODELS])),
    Check("h100-sxm", "gemm", "Llama-3.1-8B in PyTorch (LLMServingSim)",
          lambda s: data.gemm_layers_ns(s, [(LAYERS + "H100_Llama-3.1-8B_tp1_layers.csv.gz", 1)])),
    Check("rtx-pro-6000", "gemm", "Llama-3.1-8B and Qwen3-32B inside vLLM 0.19 (LLMServingSim)",
          lambda s: data.gemm_vllm_layers(s, [(f.format(part="dense"), shape, tp, vocab)
                                              for f, shape, tp, vocab in RTX_PRO])),
    Check("a100-80gb", "prefill_attention", "Llama-2-70B, tp 2, FlashAttention (vidur)",
          lambda s: data.attention_vidur(s, VIDUR_ATTENTION)[0]),
    Check("a100-80gb", "decode_attention", "Llama-2-70B, tp 2, FlashAttention (vidur)",
          lambda s: data.attention_vidur(s, VIDUR_ATTENTION)[1]),
    Check("rtx-pro-6000", "prefill_attention", "chunks after a context inside vLLM 0.19 (LLMServingSim)",
          lambda s: data.attention_vllm_layers(s, [(f.format(part="attention"), shape, tp)
                                                   for f, shape, tp, _ in RTX_PRO])[0]),
    Check("rtx-pro-6000", "decode_attention", "inside vLLM 0.19 (LLMServingSim)",
          lambda s: data.attention_vllm_layers(s, [(f.format(part="attention"), shape, tp)
                                                   for f, shape, tp, _ in RTX_PRO])[1]),
)


def cross_table(store: Store, profiles: dict[str, dict[str, Any]]) -> str:
    """Markdown: signed median, median and 95th percentile of the relative error for each check."""
    lines = ["| card | module | other source | n | signed median | median | p95 |",
             "|---|---|---|---:|---:|---:|---:|"]
    for check in CHECKS:
        profile = parse_profile(profiles[check.name], check.name)
        predicted, measured, limited = _compare(check, profile, check.rows(store))
        error = score(predicted, measured, limited, check.source)
        signed = float(np.median(predicted[limited] / measured[limited] - 1.0))
        lines.append(f"| {check.name} | {check.module} | {check.source} | {error.n} | {signed:+.1%} | "
                     f"{error.median:.1%} | {error.p95:.1%} |")
    return "\n".join(lines)


def _compare(check: Check, profile: Profile, rows: pd.DataFrame) -> tuple[Any, Any, Any]:
    """(predicted, measured, rows where the GPU is the limit)."""
    if check.module == "gemm":
        assert profile.gemm is not None
        rows = gemm_rows(check.name, rows)
        predicted, limited = gemm.predict(profile.gemm, rows, 2), gemm_limited(rows, card(check.name))
    elif check.module == "prefill_attention":
        rows = prefill_rows(rows)
        predicted = predict_prefill(profile.prefill_attention, rows)
        limited = prefill_limited(check.name, rows)
    else:
        rows = decode_rows(check.name, rows)
        predicted = predict_decode(profile.decode_attention, rows)
        limited = decode_limited(rows)
    return predicted, rows["seconds"].to_numpy(), limited
