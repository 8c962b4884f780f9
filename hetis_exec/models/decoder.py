"""The dense modules of decoder-only transformers, as one tensor-parallel rank computes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from hetis_exec.backend import Asked
from hetis_exec.kernels.tables import to_device
from hetis_exec.messages import Tokens
from hetis_exec.models.architecture import Architecture, Rope
from hetis_exec.models.names import layer_names, model_names
from hetis_exec.models.operations import Norms, Operations, Pair, TorchOperations, Waves
from hetis_exec.models.products import Product, product
from hetis_exec.models.sampling import Sampling
from hetis_exec.models.weights import CPU, Weights

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of one layer: its number, queries, keys and values."""


@dataclass(frozen=True, slots=True)
class Part:
    """What of a model one rank holds.

    Attributes:
        layers: their numbers.
        groups: ids of its KV groups, in ascending order.
        columns: its share of the inner width of the MLP.
        lead: adds the biases of which there must be one for all ranks.
        first, last: holds the embedding, the LM head.
    """

    layers: range
    groups: tuple[int, ...]
    columns: slice
    lead: bool
    first: bool
    last: bool


class Layer(NamedTuple):
    """Weights of one layer: Q, K and V in one matrix, gate and up projections in one."""

    attention_norm: Pair
    qkv: Product
    head_norms: Norms | None
    output: Product
    mlp_norm: Pair
    up: Product
    down: Product


class Prepared(NamedTuple):
    """Positions of a batch, and what rotates its heads."""

    positions: torch.Tensor
    waves: Waves | None


class DecoderShard:
    """See :class:`hetis_exec.backend.Shard`."""

    def __init__(self, architecture: Architecture, weights: Weights, part: Part, sampling: Sampling,
                 device: torch.device = CPU, operations: Operations | None = None) -> None:
        self.groups = part.groups
        self.layers = len(part.layers)
        self._architecture = architecture
        self._spec = architecture.spec
        self._sampling = sampling
        self._device = device
        self._operations = operations or TorchOperations(architecture)
        loader = Loader(architecture, weights, part)
        self._layers = [loader.layer(number) for number in part.layers]
        names = model_names(architecture)
        head = names.embedding if self._spec.tied_embeddings else names.head
        self._embedding = loader.weight(names.embedding) if part.first else None
        self._positions = loader.weight(names.positions) if part.first and names.positions else None
        self._final_norm = loader.pair(names.final_norm) if part.last else None
        self._head: Product | None = None
        if part.last:
            shared = self._embedding if self._spec.tied_embeddings else None
            self._head = product(loader.weight(head) if shared is None else shared)
        self._inv_freq = None if architecture.rope is None else inverse_frequencies(
            architecture.rope, self._spec.head_dim).to(device)
        self._rope_scale = 1.0 if architecture.rope is None else architecture.rope.scale

    def prepare(self, positions: Tokens) -> Prepared:
        return self.prepare_at(to_device(positions, self._device))

    def prepare_at(self, positions: torch.Tensor) -> Prepared:
        """The same for positions that are on the device."""
        if self._inv_freq is None:
            return Prepared(positions, None)
        angles, scale = positions[:, None].float() * self._inv_freq, self._rope_scale
        return Prepared(positions, self._operations.waves(scale * angles.cos(), scale * angles.sin()))

    def embed(self, tokens: Tokens, prepared: Prepared) -> torch.Tensor:
        return self.embed_at(to_device(tokens, self._device), prepared)

    def embed_at(self, tokens: torch.Tensor, prepared: Prepared) -> torch.Tensor:
        """The same for tokens that are on the device."""
        assert self._embedding is not None
        hidden = functional.embedding(tokens, self._embedding)
        if self._positions is not None:
            rows = prepared.positions + self._architecture.position_offset
            hidden = hidden + functional.embedding(rows, self._positions)
        return hidden

    def qkv(self, layer: int, hidden: torch.Tensor,
            prepared: Prepared) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._heads(layer, self._operations.norm(hidden, self._layers[layer].attention_norm), prepared)

    def _heads(self, layer: int, normal: torch.Tensor,
               prepared: Prepared) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights, spec = self._layers[layer], self._spec
        number, d, tokens = len(self.groups), spec.head_dim, len(normal)
        heads = weights.qkv(normal).view(tokens, -1, d)
        queries = number * spec.heads_per_group
        turned, v = heads[:, :queries + number], heads[:, queries + number:]
        if prepared.waves is not None:
            turned = self._operations.turn(heads, prepared.waves, queries, queries + number,
                                           weights.head_norms)
        q = turned[:, :queries].view(tokens, number, spec.heads_per_group, d)
        return q, turned[:, queries:], v

    def project(self, layer: int, attended: torch.Tensor) -> torch.Tensor:
        return self._layers[layer].output(attended.flatten(1))

    def mlp(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return self._mlp(layer, self._operations.norm(hidden, self._layers[layer].mlp_norm))

    def _mlp(self, layer: int, normal: torch.Tensor) -> torch.Tensor:
        weights = self._layers[layer]
        return weights.down(self._operations.inner(weights.up(normal)))

    def sample(self, hidden: torch.Tensor, asked: Asked) -> Tokens:
        return self._sampling.choose(self.logits(hidden), asked)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Shape (rows, vocab), in float32."""
        assert self._final_norm is not None
        return self._head_of(self._operations.norm(hidden, self._final_norm)).float()

    def likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        """The likeliest token after each row of activations, on the device."""
        assert self._final_norm is not None
        return self._head_of(self._operations.norm(hidden, self._final_norm)).argmax(dim=-1)

    def _head_of(self, normal: torch.Tensor) -> torch.Tensor:
        assert self._head is not None
        return self._head(normal)

    def whole_step(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend,
                   ends: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (tokens, vocab) where all layers and groups are here; of some tokens only, by their places.

        They are of the run's type: whoever draws from them widens them.

        ``attend(layer, q, k, v)`` is the attention to each request's own tokens, of the shape of q.
        """
        assert self._final_norm is not None
        prepared = self.prepare_at(positions)
        hidden, change = self.through(self.embed_at(tokens, prepared), prepared, attend)
        if ends is not None:
            hidden, change = hidden[ends], change[ends]
        return self._head_of(self._operations.add_norm(hidden, change, self._final_norm))

    def through(self, hidden: torch.Tensor, prepared: Prepared,
                attend: Attend) -> tuple[torch.Tensor, torch.Tensor]:
        """All layers: activations, changed in place, and what is still to be added to them."""
        change: torch.Tensor | None = None
        for number, weights in enumerate(self._layers):
            normal = self._operations.add_norm(hidden, change, weights.attention_norm)
            change = self.project(number, attend(number, *self._heads(number, normal, prepared)))
            normal = self._operations.add_norm(hidden, change, weights.mlp_norm)
            change = self._mlp(number, normal)
        assert change is not None
        return hidden, change

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        """Where the matrices lie in the memory of this host; see :class:`Product`."""
        for layer in self._layers:
            yield from (made.span for made in (layer.qkv, layer.output, layer.up, layer.down))
        if self._head is not None:
            yield self._head.span

    @property
    def first(self) -> bool:
        """Whether it holds the embedding."""
        return self._embedding is not None

    @property
    def last(self) -> bool:
        """Whether it holds the LM head."""
        return self._head is not None

    def nothing(self, tokens: int) -> torch.Tensor:
        """Activations of no meaning, shape (tokens, hidden)."""
        return torch.zeros((tokens, self._spec.hidden), dtype=self._layers[0].mlp_norm[0].dtype,
                           device=self._device)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a KV group."""
        return self._spec.heads_per_group

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return self._sampling


class Loader:
    """Takes one rank's share out of a model's tensors."""

    def __init__(self, architecture: Architecture, weights: Weights, part: Part) -> None:
        self._architecture = architecture
        self._spec = architecture.spec
        self._weights = weights
        self._part = part

    def weight(self, module: str) -> torch.Tensor:
        """A whole matrix."""
        return self._weights.tensor(f"{module}.weight")

    def bias(self, module: str, wanted: bool) -> torch.Tensor | None:
        """A whole bias, where there is one."""
        return self._weights.tensor(f"{module}.bias") if wanted else None

    def pair(self, norm: str) -> Pair:
        """Weight and bias of a norm."""
        return self.weight(norm), self.bias(norm, self._architecture.layer_norm)

    def layer(self, number: int) -> Layer:
        """One layer."""
        spec, names = self._spec, layer_names(self._architecture, number)
        qkv_biases, mlp_biases = spec.linear_biases or spec.qkv_biases, spec.linear_biases or spec.mlp_biases
        ups = (names.gate, names.up) if spec.gated_mlp else (names.up,)
        return Layer(
            self.pair(names.attention_norm),
            self._rows([names.query, names.key, names.value], qkv_biases, self._of_groups),
            (self.weight(names.query_norm), self.weight(names.key_norm)) if spec.qk_norm else None,
            product(self._of_groups(self.weight(names.output).t()).t().contiguous(),
                    self._shared_bias(names.output, spec.linear_biases or spec.output_bias)),
            self.pair(names.mlp_norm),
            self._rows(ups, mlp_biases, self._of_columns),
            product(self.weight(names.down)[:, self._part.columns].contiguous(),
                    self._shared_bias(names.down, mlp_biases)))

    def _rows(self, modules: Sequence[str], biases: bool,
              share: Callable[[torch.Tensor], torch.Tensor]) -> Product:
        """The rank's rows of several matrices, one below the other."""
        weights = torch.cat([share(self.weight(module)) for module in modules])
        if not biases:
            return product(weights)
        return product(weights, torch.cat([share(self._weights.tensor(f"{module}.bias"))
                                           for module in modules]))

    def _of_groups(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the rank's KV groups, out of those of all groups one after the other."""
        by_group = rows.reshape(self._spec.kv_heads, -1, *rows.shape[1:])
        return by_group[list(self._part.groups)].flatten(0, 1)

    def _of_columns(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[self._part.columns]

    def _shared_bias(self, module: str, wanted: bool) -> torch.Tensor | None:
        """A bias that is added once, by one rank, to the sum of all."""
        return self.bias(module, wanted and self._part.lead)


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians per position for each pair of the head dimension, shape (d / 2,).

    ``llama3`` is the scaling of Llama 3.1 (Llama Team 2024; the formula is that of its published
    reference code), ``yarn`` that of Peng et al. 2023, section 3.2.
    """
    plain = torch.pow(rope.theta, -torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "yarn":
        share = 1.0 - _ramp(rope, head_dim)
        return (1.0 - share) * plain / rope.factor + share * plain
    wavelengths = 2 * math.pi / plain
    share = (rope.original_positions / wavelengths - rope.low) / (rope.high - rope.low)
    share = share.clamp(0.0, 1.0)
    return (1.0 - share) * plain / rope.factor + share * plain


def _ramp(rope: Rope, head_dim: int) -> torch.Tensor:
    """For each pair of dimensions how much of its frequency is scaled, from 0 to 1.

    Pairs that rotate more than ``rope.high`` times within the original positions keep their frequency,
    those below ``rope.low`` rotations are scaled wholly.
    """
    def pair(rotations: float) -> float:
        """The pair, as a number, that rotates so often."""
        positions = rope.original_positions / (2 * math.pi * rotations)
        return head_dim * math.log(positions) / (2 * math.log(rope.theta))

    first, last = pair(rope.high), pair(rope.low)
    if rope.whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)
