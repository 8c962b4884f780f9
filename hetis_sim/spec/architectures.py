"""Catalogue of model architectures, from the ``config.json`` that their authors published.

Context limits are those files' ``max_position_embeddings``: of the Instruct releases where base
and Instruct differ (Qwen2.5 reaches further with YaRN, which a setting may claim).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hetis_sim.spec.lookup import find
from hetis_sim.spec.model import ModelSpec


def _llama(name: str, layers: int, hidden: int, heads: tuple[int, int], ffn: int, vocab: int, context: int,
           head_dim: int = 128, **more: Any) -> ModelSpec:
    """A decoder of Llama's kind: RMSNorm, rotary positions, SwiGLU; ``heads`` is (query, KV)."""
    return ModelSpec(name=name, layers=layers, hidden=hidden, query_heads=heads[0], kv_heads=heads[1],
                     head_dim=head_dim, ffn_hidden=ffn, vocab=vocab, context_limit_tokens=context, **more)


def _qwen2(name: str, layers: int, hidden: int, heads: tuple[int, int], ffn: int, vocab: int,
           head_dim: int = 128, tied: bool = False) -> ModelSpec:
    """Qwen2.5: biases on Q, K and V."""
    return _llama(name, layers, hidden, heads, ffn, vocab, 32768, head_dim, tied_embeddings=tied,
                  qkv_biases=True)


def _qwen3(name: str, layers: int, hidden: int, heads: tuple[int, int], ffn: int, tied: bool = False,
           **more: Any) -> ModelSpec:
    """Qwen3: a norm on Q and K, no biases."""
    return _llama(name, layers, hidden, heads, ffn, 151936, 40960, tied_embeddings=tied, qk_norm=True, **more)


def _opt(name: str, layers: int, hidden: int, heads: int) -> ModelSpec:
    """OPT: LayerNorm and biases, ReLU, learned positions (two rows of padding), tied embeddings."""
    return ModelSpec(name=name, layers=layers, hidden=hidden, query_heads=heads, kv_heads=heads,
                     head_dim=hidden // heads, ffn_hidden=4 * hidden, vocab=50272, gated_mlp=False,
                     tied_embeddings=True, context_limit_tokens=2048, learned_positions=2050,
                     linear_biases=True)


_ALL = (
    # Llama 1
    _llama("llama-7b", 32, 4096, (32, 32), 11008, 32000, 2048),
    _llama("llama-13b", 40, 5120, (40, 40), 13824, 32000, 2048),
    _llama("llama-30b", 60, 6656, (52, 52), 17920, 32000, 2048),
    _llama("llama-65b", 80, 8192, (64, 64), 22016, 32000, 2048),
    # Llama 2
    _llama("llama2-7b", 32, 4096, (32, 32), 11008, 32000, 4096),
    _llama("llama2-13b", 40, 5120, (40, 40), 13824, 32000, 4096),
    _llama("llama2-70b", 80, 8192, (64, 8), 28672, 32000, 4096),
    # Llama 3, 3.1 to 3.3
    _llama("llama3-8b", 32, 4096, (32, 8), 14336, 128256, 8192),
    _llama("llama3-70b", 80, 8192, (64, 8), 28672, 128256, 8192),
    _llama("llama3.1-8b", 32, 4096, (32, 8), 14336, 128256, 131072),
    _llama("llama3.1-70b", 80, 8192, (64, 8), 28672, 128256, 131072),
    _llama("llama3.1-405b", 126, 16384, (128, 8), 53248, 128256, 131072),
    _llama("llama3.2-1b", 16, 2048, (32, 8), 8192, 128256, 131072, head_dim=64, tied_embeddings=True),
    _llama("llama3.2-3b", 28, 3072, (24, 8), 8192, 128256, 131072, tied_embeddings=True),
    _llama("llama3.3-70b", 80, 8192, (64, 8), 28672, 128256, 131072),
    _llama("smollm2-135m", 30, 576, (9, 3), 1536, 49152, 8192, head_dim=64, tied_embeddings=True),
    # OPT
    _opt("opt-125m", 12, 768, 12),
    _opt("opt-1.3b", 24, 2048, 32),
    _opt("opt-2.7b", 32, 2560, 32),
    _opt("opt-6.7b", 32, 4096, 32),
    _opt("opt-13b", 40, 5120, 40),
    _opt("opt-30b", 48, 7168, 56),
    _opt("opt-66b", 64, 9216, 72),
    # Qwen
    _qwen2("qwen2.5-0.5b", 24, 896, (14, 2), 4864, 151936, head_dim=64, tied=True),
    _qwen2("qwen2.5-1.5b", 28, 1536, (12, 2), 8960, 151936, tied=True),
    _qwen2("qwen2.5-3b", 36, 2048, (16, 2), 11008, 151936, tied=True),
    _qwen2("qwen2.5-7b", 28, 3584, (28, 4), 18944, 152064),
    _qwen2("qwen2.5-14b", 48, 5120, (40, 8), 13824, 152064),
    _qwen2("qwen2.5-32b", 64, 5120, (40, 8), 27648, 152064),
    _qwen2("qwen2.5-72b", 80, 8192, (64, 8), 29568, 152064),
    _qwen3("qwen3-0.6b", 28, 1024, (16, 8), 3072, tied=True),
    _qwen3("qwen3-1.7b", 28, 2048, (16, 8), 6144, tied=True),
    _qwen3("qwen3-4b", 36, 2560, (32, 8), 9728, tied=True),
    _qwen3("qwen3-8b", 36, 4096, (32, 8), 12288),
    _qwen3("qwen3-14b", 40, 5120, (40, 8), 17408),
    _qwen3("qwen3-32b", 64, 5120, (64, 8), 25600),
    _qwen3("qwen3-30b-a3b", 48, 2048, (32, 4), 768, experts=128, experts_per_token=8),
    _qwen3("qwen3-235b-a22b", 94, 4096, (64, 4), 1536, experts=128, experts_per_token=8),
    # Mistral: version 0.1 of the 7B attends to a sliding window, 0.2 and later do not
    _llama("mistral-7b", 32, 4096, (32, 8), 14336, 32000, 32768),
    _llama("mistral-7b-v0.3", 32, 4096, (32, 8), 14336, 32768, 32768),
    _llama("mixtral-8x7b", 32, 4096, (32, 8), 14336, 32000, 32768, experts=8, experts_per_token=2),
    _llama("mixtral-8x22b", 56, 6144, (48, 8), 16384, 32000, 65536, experts=8, experts_per_token=2),
    # Others
    _llama("phi-4", 40, 5120, (40, 10), 17920, 100352, 16384),
    _llama("gemma-2b", 18, 2048, (8, 1), 16384, 256000, 8192, head_dim=256, tied_embeddings=True),
    _llama("gemma-7b", 28, 3072, (16, 16), 24576, 256000, 8192, head_dim=256, tied_embeddings=True),
    ModelSpec("gpt-neox-20b", 44, 6144, 64, 64, 96, 24576, 50432, gated_mlp=False, context_limit_tokens=2048,
              linear_biases=True),
    ModelSpec("starcoder", 40, 6144, 48, 1, 128, 24576, 49152, gated_mlp=False, tied_embeddings=True,
              context_limit_tokens=8192, learned_positions=8192, linear_biases=True),
)

MODELS: Mapping[str, ModelSpec] = MappingProxyType({spec.name: spec for spec in _ALL})
"""All architectures of the catalogue by name, in fp16."""


def model(name: str, key: str = "model.name") -> ModelSpec:
    """The architecture ``name`` of the catalogue, in fp16.

    Raises:
        SpecError: no such architecture; the text names ``key`` and the near matches.
    """
    return find(key, name, MODELS)
