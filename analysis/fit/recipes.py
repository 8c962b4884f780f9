"""Which data each card's profile is fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from analysis.fit import data
from analysis.fit.data import LLAMA_3_8B, QWEN_3_32B, Architecture, Store
from analysis.fit.modules import (
    Module,
    decode_module,
    elementwise_module,
    gemm_module,
    prefill_module,
)
from hetis_sim.cost.attention import DecodeClass, PrefillClass
from hetis_sim.cost.curve import Curve
from hetis_sim.cost.gemm import TileWaveGemm

VIDUR_MODELS = ("Llama-2-70b-hf", "Llama-2-7b-hf", "internlm-20b", "CodeLlama-34b-Instruct-hf")
LAYERS = "kernels/llmservingsim/"
RTX4090 = LAYERS + "RTX4090_Llama-3.1-8B_tp1_{part}.csv.gz"
RTX_PRO = tuple((LAYERS + f"RTXPRO6000_{model}_tp{tp}_{{part}}.csv.gz", shape, tp, vocab)
                for model, shape, vocab in (("Llama-3.1-8B", LLAMA_3_8B, 128256),
                                            ("Qwen3-32B", QWEN_3_32B, 151936)) for tp in (1, 2))

Rows = Callable[[Store], pd.DataFrame]


@dataclass(frozen=True)
class Table:
    """Rows of one module and the files that they come from."""

    files: tuple[str, ...]
    rows: Rows
    note: str = ""


@dataclass
class Fitted:
    """What was fitted for one card: models for those derived from it, modules for its file."""

    name: str
    modules: dict[str, Module] = field(default_factory=dict)
    gemm: TileWaveGemm | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    prefill: list[PrefillClass] = field(default_factory=list)
    decode: list[DecodeClass] = field(default_factory=list)


@dataclass(frozen=True)
class Recipe:
    """Tables of a card that was measured."""

    gemm: Table | None = None
    elementwise: Table | None = None
    prefill: Table | None = None
    decode: Table | None = None


def _gemm_dense(folder: str, version: str) -> Table:
    file = f"kernels/aiconfigurator/{folder}/gemm/{version}/gemm_perf.parquet"
    return Table((file,), lambda store: data.gemm_aiconfigurator(store, file))


def _attention(folder: str, version: str) -> tuple[Table, Table]:
    place = f"kernels/aiconfigurator/{folder}/attention/{version}"
    prefill, decode = f"{place}/context_attention_perf.parquet", f"{place}/generation_attention_perf.parquet"
    return (Table((prefill,), lambda store: data.prefill_aiconfigurator(store, prefill)),
            Table((decode,), lambda store: data.decode_aiconfigurator(store, decode)))


def _vidur(folder: str, models: Iterable[str]) -> tuple[Table, Table]:
    files = [f"{folder}/{model}_mlp.csv.gz" for model in models]
    return (Table(tuple(files), lambda store: data.gemm_vidur(store, files)),
            Table(tuple(files), lambda store: data.elementwise_vidur(store, files),
                  "norm and residual add were two kernels when measured; their sum stands for the fused one"))


def _vllm_layers(files: tuple[tuple[str, Architecture, int, int], ...]) -> Recipe:
    dense = [(file.format(part="dense"), shape, tp, vocab) for file, shape, tp, vocab in files]
    attention = [(file.format(part="attention"), shape, tp) for file, shape, tp, _ in files]
    names = tuple(file for file, *_ in dense)
    both = tuple(file for file, *_ in attention)
    return Recipe(
        Table(names + tuple(name.replace("dense", "per_sequence") for name in names),
              lambda store: data.gemm_vllm_layers(store, dense)),
        Table(names, lambda store: data.elementwise_vllm_layers(store, dense)),
        Table(both, lambda store: data.attention_vllm_layers(store, attention)[0]),
        Table(both, lambda store: data.attention_vllm_layers(store, attention)[1]))


def _layers_ns(*files: tuple[str, int]) -> Recipe:
    chosen = [(LAYERS + file, tp) for file, tp in files]
    names = tuple(file for file, _ in chosen)
    return Recipe(Table(names, lambda store: data.gemm_layers_ns(store, chosen)),
                  Table(names, lambda store: data.elementwise_layers_ns(store, chosen),
                        "one kind of kernel only (activation and product, two launches); it stands for all"))


def _recipes() -> dict[str, Recipe]:
    a30 = "kernels/vidur_opt_a30/qwen2_7b_attention.csv.gz"
    a30_dense = _vidur("kernels/vidur_opt_a30", ("qwen2_7b", "Llama-2-7b-hf"))
    apex = "kernels/apex/V100-PCIE-16GB_gemm_half.csv.gz"
    return {
        "a100-80gb": Recipe(_gemm_dense("a100_sxm", "sglang/0.5.10"),
                            _vidur("kernels/vidur/a100", VIDUR_MODELS)[1],
                            *_attention("a100_sxm", "vllm/0.14.0")),
        "h100-sxm": Recipe(_gemm_dense("h100_sxm", "vllm/0.24.0"),
                           _vidur("kernels/vidur/h100", VIDUR_MODELS)[1],
                           *_attention("h100_sxm", "vllm/0.24.0")),
        "h200": Recipe(_gemm_dense("h200_sxm", "vllm/0.24.0"), None, *_attention("h200_sxm", "vllm/0.24.0")),
        "l40s": Recipe(_gemm_dense("l40s", "vllm/0.24.0"), None, *_attention("l40s", "vllm/0.24.0")),
        "rtx-pro-6000": Recipe(_gemm_dense("rtx_pro_6000_server", "vllm/0.24.0"),
                               _vllm_layers(RTX_PRO).elementwise,
                               *_attention("rtx_pro_6000_server", "vllm/0.24.0")),
        "rtx4090": _vllm_layers(((RTX4090, LLAMA_3_8B, 1, 128256),)),
        "a40": Recipe(*_vidur("kernels/vidur/a40", VIDUR_MODELS)),
        "a30": Recipe(*a30_dense, Table((a30,), lambda store: data.attention_vidur(store, a30)[0]),
                      Table((a30,), lambda store: data.attention_vidur(store, a30)[1])),
        "a6000": _layers_ns(("A6000_Llama-3.1-8B_tp1_layers.csv.gz", 1),
                            ("A6000_Llama-3.1-8B_tp2_layers.csv.gz", 2)),
        "rtx3090": _layers_ns(("RTX3090_Llama-3.1-8B_tp1_layers.csv.gz", 1)),
        "v100-16gb": Recipe(Table((apex,), lambda store: data.gemm_apex(store, apex),
                                  "whole microseconds, launch included")),
    }


RECIPES = _recipes()


def fit_card(store: Store, name: str) -> Fitted:
    """Every module of a measured card."""
    recipe, found = RECIPES[name], Fitted(name)
    if recipe.gemm is not None:
        found.gemm, found.modules["gemm"] = gemm_module(
            name, recipe.gemm.rows(store), _origin(store, recipe.gemm), note=recipe.gemm.note)
    if recipe.elementwise is not None:
        found.curves, found.modules["elementwise"] = elementwise_module(
            recipe.elementwise.rows(store), _origin(store, recipe.elementwise), recipe.elementwise.note)
    if recipe.prefill is not None:
        found.prefill, found.modules["prefill_attention"] = prefill_module(
            name, recipe.prefill.rows(store), _origin(store, recipe.prefill))
    if recipe.decode is not None:
        found.decode, found.modules["decode_attention"] = decode_module(
            name, recipe.decode.rows(store), _origin(store, recipe.decode))
    return found


def _origin(store: Store, table: Table) -> list[dict[str, Any]]:
    return store.sources(list(table.files))
