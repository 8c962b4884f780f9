"""A tiny real transformer: RMSNorm, rotary embedding, grouped attention, gated MLP, in float64.

Weights are drawn from a seed, so every worker makes its own share of the same model. Sums in
another order differ in the last bits only; greedy tokens are the same however the model is
split. :meth:`ToyModel.generate` is the plain single-process computation to compare with.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from hetis_exec.backend import Asked
from hetis_exec.messages import Array, Tokens
from hetis_exec.places import TeamPlan, layers_of, owned_groups, stages_of
from hetis_sim.spec.errors import require
from hetis_sim.spec.model import ModelSpec

ROTARY_BASE = 10_000.0
NORM_EPSILON = 1e-6


class LayerWeights(NamedTuple):
    """One layer, with G groups of r query heads.

    Shapes: query (hidden, G, r, d), key and value (hidden, G, d), output (G, r, d, hidden),
    gate and up (hidden, ffn), down (ffn, hidden).
    """

    query: Array
    key: Array
    value: Array
    output: Array
    gate: Array
    up: Array
    down: Array

    def share(self, groups: Sequence[int], columns: slice) -> LayerWeights:
        """The weights of some KV groups and some columns of the MLP."""
        chosen = list(groups)
        return LayerWeights(self.query[:, chosen], self.key[:, chosen], self.value[:, chosen],
                            self.output[chosen], self.gate[:, columns], self.up[:, columns],
                            self.down[columns])


class ToyModel:
    """All weights of a small dense model.

    Raises:
        SpecError: an architecture that this model does not compute.
    """

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        require(spec.experts == 1 and not spec.shared_ffn_hidden, "model.experts", spec.experts, "1 (dense)")
        require(spec.gated_mlp, "model.gated_mlp", spec.gated_mlp, "True")
        require(not spec.learned_positions, "model.learned_positions", spec.learned_positions, "0 (rotary)")
        require(spec.head_dim % 2 == 0, "model.head_dim", spec.head_dim, "even (rotary)")
        for key in ("linear_biases", "qkv_biases", "output_bias", "mlp_biases", "qk_norm"):
            require(not getattr(spec, key), f"model.{key}", getattr(spec, key), "False")
        self.spec = spec
        self._seed = seed

    def _draw(self, name: str, shape: tuple[int, ...], fan_in: int) -> Array:
        stream = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        weights: Array = stream.standard_normal(shape) / np.sqrt(fan_in)
        return weights

    @cached_property
    def embedding(self) -> Array:
        """Shape (vocab, hidden)."""
        return self._draw("embedding", (self.spec.vocab, self.spec.hidden), 1)

    @cached_property
    def head(self) -> Array:
        """Shape (hidden, vocab)."""
        if self.spec.tied_embeddings:
            return self.embedding.T
        return self._draw("head", (self.spec.hidden, self.spec.vocab), self.spec.hidden)

    def layer(self, number: int) -> LayerWeights:
        """The weights of one layer."""
        spec = self.spec
        hidden, ffn, d = spec.hidden, spec.ffn_hidden, spec.head_dim
        groups, r = spec.kv_heads, spec.heads_per_group

        def draw(name: str, shape: tuple[int, ...], fan_in: int) -> Array:
            return self._draw(f"layer{number}.{name}", shape, fan_in)

        return LayerWeights(
            query=draw("query", (hidden, groups, r, d), hidden),
            key=draw("key", (hidden, groups, d), hidden),
            value=draw("value", (hidden, groups, d), hidden),
            output=draw("output", (groups, r, d, hidden), groups * r * d),
            gate=draw("gate", (hidden, ffn), hidden),
            up=draw("up", (hidden, ffn), hidden),
            down=draw("down", (ffn, hidden), ffn))

    @cached_property
    def _layers(self) -> list[LayerWeights]:
        return [self.layer(number) for number in range(self.spec.layers)]

    def generate(self, prompt: Tokens, count: int) -> list[int]:
        """Greedy continuation by whole passes over the whole text: no cache, no split."""
        text = list(prompt)
        for _ in range(count):
            text.append(int(np.argmax(self._last_logits(np.array(text)))))
        return text[len(prompt):]

    def _last_logits(self, text: Tokens) -> Array:
        positions = np.arange(len(text))
        mask = np.where(positions[None, :] > positions[:, None], -np.inf, 0.0)
        x = self.embedding[text]
        for layer in self._layers:
            normal = norm(x)
            q = rotate(np.einsum("th,hgrd->tgrd", normal, layer.query), positions)
            k = rotate(np.einsum("th,hgd->tgd", normal, layer.key), positions)
            v = np.einsum("th,hgd->tgd", normal, layer.value)
            scores = np.einsum("tgrd,sgd->grts", q, k) / np.sqrt(self.spec.head_dim) + mask
            mixed = np.einsum("grts,sgd->tgrd", softmax(scores), v)
            x = x + np.einsum("tgrd,grdh->th", mixed, layer.output)
            normal = norm(x)
            x = x + (silu(normal @ layer.gate) * (normal @ layer.up)) @ layer.down
        logits: Array = norm(x[-1:])[0] @ self.head
        return logits


class ToyShard:
    """Some layers, some KV groups, some columns of the MLP; see :class:`hetis_exec.backend.Shard`."""

    def __init__(self, model: ToyModel, plan: TeamPlan, stage: int, rank: int) -> None:
        part = stages_of(plan)[stage]
        first_layer = layers_of(plan, stage).start
        self.groups = tuple(owned_groups(part, rank))
        self.layers = part.layers
        self.heads_per_group = model.spec.heads_per_group
        bounds = [model.spec.ffn_hidden * n // part.tp for n in (rank, rank + 1)]
        self._weights = [model.layer(first_layer + n).share(self.groups, slice(*bounds))
                         for n in range(part.layers)]
        self._embedding = model.embedding
        self._head = model.head

    def prepare(self, positions: Tokens) -> Tokens:
        return positions

    def embed(self, tokens: Tokens, prepared: Tokens) -> Array:
        return self._embedding[tokens]

    def qkv(self, layer: int, hidden: Array, prepared: Tokens) -> tuple[Array, Array, Array]:
        weights, normal = self._weights[layer], norm(hidden)
        q = np.tensordot(normal, weights.query, 1)
        k = np.tensordot(normal, weights.key, 1)
        return rotate(q, prepared), rotate(k, prepared), np.tensordot(normal, weights.value, 1)

    def project(self, layer: int, attended: Array) -> Array:
        return np.tensordot(attended, self._weights[layer].output, 3)

    def mlp(self, layer: int, hidden: Array) -> Array:
        weights, normal = self._weights[layer], norm(hidden)
        result: Array = (silu(normal @ weights.gate) * (normal @ weights.up)) @ weights.down
        return result

    def sample(self, hidden: Array, asked: Asked) -> Tokens:
        tokens: Tokens = np.argmax(norm(hidden) @ self._head, axis=-1)
        return tokens


def norm(x: Array) -> Array:
    """RMSNorm without a scale."""
    result: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)
    return result


def softmax(scores: Array) -> Array:
    """Over the last axis."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: Array = weights / weights.sum(axis=-1, keepdims=True)
    return result


def silu(x: Array) -> Array:
    """The logistic function times its argument."""
    result: Array = x / (1.0 + np.exp(-x))
    return result


def rotate(x: Array, positions: Tokens) -> Array:
    """Rotary position embedding over the last axis; the first axis runs over the positions."""
    half = x.shape[-1] // 2
    angles = positions[:, None] / ROTARY_BASE ** (np.arange(half) / half)
    shape = (len(positions),) + (1,) * (x.ndim - 2) + (half,)
    cos, sin = np.cos(angles).reshape(shape), np.sin(angles).reshape(shape)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate((a * cos - b * sin, a * sin + b * cos), axis=-1)
