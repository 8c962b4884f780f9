"""What lies between a decoder's matrix products: with torch, or fused by Triton on CUDA devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn import functional

from hetis_exec.models.architecture import Architecture

Pair = tuple[torch.Tensor, torch.Tensor | None]
"""Weight and bias."""

Norms = tuple[torch.Tensor, torch.Tensor]
"""Weights of the norms of queries and keys."""

Waves = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of a batch's positions, in the shape that operations want."""


class Operations(Protocol):
    """The operations of one architecture. Shapes: activations (tokens, hidden)."""

    def norm(self, hidden: torch.Tensor, weights: Pair) -> torch.Tensor:
        """RMSNorm, or LayerNorm."""

    def add_norm(self, hidden: torch.Tensor, change: torch.Tensor | None, weights: Pair) -> torch.Tensor:
        """Add a change to ``hidden`` in place; the norm of the sum."""

    def waves(self, cos: torch.Tensor, sin: torch.Tensor) -> Waves:
        """What :meth:`turn` needs of a batch's positions, once for all layers; shapes (tokens, d / 2)."""

    def turn(self, heads: torch.Tensor, waves: Waves, queries: int, number: int,
             norms: Norms | None) -> torch.Tensor:
        """Norm, where there is one, and rotate the first ``number`` heads, shape (tokens, number, d).

        ``heads`` (tokens, heads, d) is of no use afterwards, but for the heads that are left alone.
        """

    def inner(self, inner: torch.Tensor) -> torch.Tensor:
        """The activation of the MLP, times the other half where it is gated."""


class TorchOperations:
    """With torch, on any device."""

    def __init__(self, architecture: Architecture) -> None:
        self._epsilon = architecture.norm_epsilon
        self._layer_norm = architecture.layer_norm
        self._gated = architecture.spec.gated_mlp
        self._activation = ACTIVATIONS[architecture.activation]

    def norm(self, hidden: torch.Tensor, weights: Pair) -> torch.Tensor:
        if self._layer_norm:
            return functional.layer_norm(hidden, hidden.shape[-1:], *weights, eps=self._epsilon)
        return functional.rms_norm(hidden, hidden.shape[-1:], weights[0], self._epsilon)

    def add_norm(self, hidden: torch.Tensor, change: torch.Tensor | None, weights: Pair) -> torch.Tensor:
        if change is not None:
            hidden.add_(change)
        return self.norm(hidden, weights)

    def waves(self, cos: torch.Tensor, sin: torch.Tensor) -> Waves:
        return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]

    def turn(self, heads: torch.Tensor, waves: Waves, queries: int, number: int,
             norms: Norms | None) -> torch.Tensor:
        turned = heads[:, :number]
        if norms is not None:
            turned = torch.cat([functional.rms_norm(part, part.shape[-1:], weight, self._epsilon)
                                for part, weight in zip((turned[:, :queries], turned[:, queries:]), norms,
                                                        strict=True)], dim=1)
        return rotate(turned, waves)

    def inner(self, inner: torch.Tensor) -> torch.Tensor:
        if not self._gated:
            return self._activation(inner)
        gate, up = inner.chunk(2, dim=1)
        return self._activation(gate) * up


class FusedOperations:
    """One Triton kernel for each of them, where there is one."""

    def __init__(self, architecture: Architecture, fused: Any) -> None:
        self._torch = TorchOperations(architecture)
        self._epsilon = architecture.norm_epsilon
        self._gates = architecture.spec.gated_mlp and architecture.activation == "silu"
        self._fused = fused

    def norm(self, hidden: torch.Tensor, weights: Pair) -> torch.Tensor:
        return self.add_norm(hidden, None, weights)

    def add_norm(self, hidden: torch.Tensor, change: torch.Tensor | None, weights: Pair) -> torch.Tensor:
        if hidden.shape[1] > self._fused.WIDTH_MAX:
            return self._torch.add_norm(hidden, change, weights)
        found: torch.Tensor = self._fused.add_norm(hidden.contiguous(), change, *weights, self._epsilon)
        return found

    def waves(self, cos: torch.Tensor, sin: torch.Tensor) -> Waves:
        return cos, sin

    def turn(self, heads: torch.Tensor, waves: Waves, queries: int, number: int,
             norms: Norms | None) -> torch.Tensor:
        self._fused.turn(heads, *waves, queries, number, norms, self._epsilon)
        return heads[:, :number]

    def inner(self, inner: torch.Tensor) -> torch.Tensor:
        if not self._gates:
            return self._torch.inner(inner)
        found: torch.Tensor = self._fused.gate(inner)
        return found


def rotate(x: torch.Tensor, waves: Waves) -> torch.Tensor:
    """Rotary position embedding, in float32; halves of the last axis are rotated against each other.

    The waves are of whole width: the cosines twice, the sines once with a minus.
    """
    wide = x.float()
    half = wide.shape[-1] // 2
    return torch.addcmul(wide * waves[0], wide.roll(half, -1), waves[1]).to(x.dtype)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu, "relu": functional.relu, "gelu": functional.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
}
