"""A machine that runs at another pace than when its profile was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetis_sim.cost.graphs import GraphSteps
from hetis_sim.cost.memo import MemoisedCost
from hetis_sim.cost.model import AttentionCost, CostModel, ProvenanceRow, TransferCost
from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.errors import require_finite
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec

FEW_TOKENS, PROMPT_TOKENS = 8, 64
"""Sizes of the batch and of the prompt whose times tell the pace of a machine."""


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Times that work takes over what it took when the profile was measured.

    Attributes:
        dense: of dense modules and the LM head, on few tokens: weights are read from memory.
        attention: of decode attention.
        prompt: of dense modules on the tokens of a prompt, where products are the limit; None for ``dense``.
        prompt_attention: of the attention of prompts; None for ``attention``.
    """

    dense: float = 1.0
    attention: float = 1.0
    prompt: float | None = None
    prompt_attention: float | None = None

    def __post_init__(self) -> None:
        for part in ("dense", "attention", "prompt", "prompt_attention"):
            if getattr(self, part) is not None:
                require_finite(f"slowdown.{part}", getattr(self, part), 0.0, open_low=True)

    @property
    def of_prompt_attention(self) -> float:
        """Of the attention of prompts."""
        return self.attention if self.prompt_attention is None else self.prompt_attention

    def of_tokens(self, tokens: int) -> float:
        """Of dense modules on so many tokens: in between, by the logarithm of the tokens (ours)."""
        if self.prompt is None or tokens <= FEW_TOKENS:
            return self.dense
        share = min(1.0, math.log(tokens / FEW_TOKENS) / math.log(PROMPT_TOKENS / FEW_TOKENS))
        return float(self.dense ** (1.0 - share) * self.prompt ** share)


NO_SLOWDOWN = Slowdown()


class PacedCost(MemoisedCost):
    """The durations of another cost model, with those of computing scaled by device; the rest as they are.

    Args:
        whole: durations at the pace of the profile.
        slowdowns: by type of device; those that are not named run at the profile's pace.
    """

    def __init__(self, whole: CostModel, slowdowns: Mapping[str, Slowdown]) -> None:
        super().__init__()
        self._whole = whole
        self._slowdowns = dict(slowdowns)

    def _of(self, gpu: GpuSpec) -> Slowdown:
        return self._slowdowns.get(gpu.name, NO_SLOWDOWN)

    def _dense_layer_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        return self._of(gpu).of_tokens(tokens) * self._whole.dense_layer_s(gpu, model, tokens, tp)

    def _head_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        return self._of(gpu).of_tokens(tokens) * self._whole.head_s(gpu, model, tokens, tp)

    def _prefill_attention_layer_s(self, gpu: GpuSpec, model: ModelSpec, query_heads: int,
                                   new_tokens: int, context_tokens: int) -> float:
        seconds = self._whole.prefill_attention_layer_s(gpu, model, query_heads, new_tokens, context_tokens)
        return self._of(gpu).of_prompt_attention * seconds

    def _decode_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        return self._whole.decode_attention(gpu, model).scaled(self._of(gpu).attention)

    def remote_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        return self._whole.remote_attention(gpu, model).scaled(self._of(gpu).attention)

    def _transfer_cost(self, link: LinkSpec) -> TransferCost:
        return self._whole.transfer(link)

    def head_transfer(self, link: LinkSpec, rank: GpuSpec, worker: GpuSpec) -> TransferCost:
        return self._whole.head_transfer(link, rank, worker)

    def hop(self, link: LinkSpec) -> TransferCost:
        return self._whole.hop(link)

    def _all_reduce_s(self, gpu: GpuSpec, link: LinkSpec, size_bytes: int, ranks: int) -> float:
        return self._whole.all_reduce_s(gpu, link, size_bytes, ranks)

    def host_overhead_s(self, sequences: int, prompts: int = 0) -> float:
        return self._whole.host_overhead_s(sequences, prompts)

    def head_packing(self, gpu: GpuSpec) -> TransferCost:
        return self._whole.head_packing(gpu)

    def cache_packing(self, gpu: GpuSpec) -> TransferCost:
        return self._whole.cache_packing(gpu)

    def host_copy(self, gpu: GpuSpec) -> TransferCost:
        return self._whole.host_copy(gpu)

    def ranges(self, gpu: GpuSpec, module: str) -> Mapping[str, tuple[float, float]]:
        return self._whole.ranges(gpu, module)

    def host_beside_s(self, sequences: int, layers: int, leads: bool, prompts: int = 0,
                      eager: bool = False) -> float:
        return self._whole.host_beside_s(sequences, layers, leads, prompts, eager)

    def graph_steps(self) -> GraphSteps:
        return self._whole.graph_steps()

    def provenance(self, gpus: Sequence[GpuSpec], model: ModelSpec,
                   links: Sequence[LinkSpec]) -> list[ProvenanceRow]:
        return self._whole.provenance(gpus, model, links)

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._whole.warnings

