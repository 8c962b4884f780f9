"""Tiny models in Hugging Face folders, made by transformers, which also says what they generate."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="real models need the extra exec")
transformers = pytest.importorskip("transformers", reason="what real models generate is told by transformers")

from hetis_exec.driver import ExecutorInput  # noqa: E402
from hetis_exec.kernels.cpu import CpuKernels  # noqa: E402
from hetis_exec.models.architecture import Architecture, read_architecture  # noqa: E402
from hetis_exec.models.decoder import DecoderShard, Part  # noqa: E402
from hetis_exec.models.sampling import Sampling  # noqa: E402
from hetis_exec.models.weights import Weights  # noqa: E402
from hetis_exec.torch_backend import TorchBackend, operations_for  # noqa: E402

POISON = 1e4
"""Written over freed cache: whoever reads it generates something else."""

LLAMA = {"vocab_size": 89, "hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256,
         "initializer_range": 0.3, "rms_norm_eps": 1e-5}
OPT = {"vocab_size": 89, "hidden_size": 32, "ffn_dim": 50, "num_hidden_layers": 4, "num_attention_heads": 4,
       "max_position_embeddings": 256, "word_embed_proj_dim": 32, "init_std": 0.3, "dropout": 0.0}

# Rotary frequencies of Llama 3.1, with limits that 256 positions reach.
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

# YaRN, with and without numbers of its own; 256 positions are four times as many as it was made for.
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
YARN_OWN = {**YARN_ROPE, "beta_fast": 12.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False}

MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "llama3": ("Llama", {**LLAMA, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama-linear": ("Llama", {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0,
                                                            "rope_theta": 1e4}}),
    "yarn": ("Llama", {**LLAMA, "head_dim": 16, "rope_parameters": YARN_ROPE}),
    "yarn-own": ("Qwen2", {**LLAMA, "head_dim": 16, "rope_parameters": YARN_OWN}),
    "smol": ("Llama", {**LLAMA, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "talker": ("Llama", {**LLAMA, "vocab_size": 320}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 12}),
    "mistral": ("Mistral", {**LLAMA, "head_dim": 10, "sliding_window": None}),
    "opt": ("OPT", OPT),
}


@cache
def reference(name: str) -> Any:
    """The model as transformers computes it: a tiny one by name, or that of a folder.

    Biases and norms of tiny models are given values that matter.
    """
    if name not in MODELS:
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    family, settings = MODELS[name]
    torch.set_num_threads(1)
    torch.manual_seed(list(MODELS).index(name))
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(".bias") or "norm" in key:
                weight.add_(0.3 * torch.randn_like(weight))
    return model


@cache
def folder(name: str) -> Path:
    """The folder of a model."""
    if name not in MODELS:
        return Path(name)
    logging.disable(logging.WARNING)
    path = Path(mkdtemp(prefix=f"hetis-{name}-"))
    reference(name).save_pretrained(path)
    return path


def backend(name: str, **settings: Any) -> TorchBackend:
    """The same model as workers compute it."""
    return TorchBackend(read_architecture(folder(name)), folder(name), poison=POISON, **settings)


def given_for(name: str, **settings: Any) -> dict[str, Any]:
    """What :func:`exec_toys.given` takes for a model."""
    made = backend(name, **settings)
    return {"model": made.architecture.spec, "backend": made}


def is_greedy(name: str, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether transformers, asked after each of the tokens, would have gone on with the next one."""
    text = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        logits = reference(name)(text, use_cache=False).logits[0]
    likeliest: list[int] = logits[len(prompt) - 1:-1].argmax(dim=-1).tolist()
    return likeliest == list(tokens)


def wrong(name: str, what: ExecutorInput, tokens: Mapping[int, Sequence[int]]) -> list[int]:
    """Requests whose tokens are not those of transformers, or not as many as were asked for."""
    return [request.request_id for request in what.requests
            if len(tokens[request.request_id]) != request.output_tokens
            or not is_greedy(name, what.prompt(request).tolist(), tokens[request.request_id])]


# -- modules without workers -------------------------------------------------------------------------------

TEXT = np.arange(2, 70, 3) % 89

Owned = Sequence[Sequence[int]]


def shards(architecture: Architecture, weights: Weights, owned: Owned,
           place: str = "cpu") -> list[DecoderShard]:
    """One rank for each list of KV groups, over all layers, on a torch device."""
    spec, number = architecture.spec, len(owned)
    bounds = [spec.ffn_hidden * n // number for n in range(number + 1)]
    parts = [Part(range(spec.layers), tuple(groups), slice(*bounds[n:n + 2]), n == 0, True, n == 0)
             for n, groups in enumerate(owned)]
    operations = operations_for(architecture, place)
    return [DecoderShard(architecture, weights, part, Sampling(), torch.device(place), operations)
            for part in parts]


def logits(ranks: Sequence[DecoderShard], head_dim: int, dtype: torch.dtype = torch.float32,
           kernels: Any = None) -> Any:
    """Of a text, in one pass, as ranks that sum up their parts."""
    kernels = kernels or CpuKernels(1, 4, head_dim, dtype=dtype)
    prepared = ranks[0].prepare(np.arange(len(TEXT)))
    hidden = ranks[0].embed(TEXT, prepared)

    def attention(rank: DecoderShard, layer: int) -> Any:
        q, k, v = rank.qkv(layer, hidden, prepared)
        return rank.project(layer, kernels.causal(q, k.swapaxes(0, 1), v.swapaxes(0, 1)))

    for layer in range(ranks[0].layers):
        hidden = hidden + sum(attention(rank, layer) for rank in ranks)
        hidden = hidden + sum(rank.mlp(layer, hidden) for rank in ranks)
    return ranks[0].logits(hidden)
