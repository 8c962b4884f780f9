"""What a policy believes of durations when its profile is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis_sim.cost.graphs import GraphSteps
from hetis_sim.cost.memo import MemoisedCost
from hetis_sim.cost.model import AttentionCost, CostModel, ProvenanceRow, TransferCost
from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.errors import require, require_finite
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec

Streams = Callable[[str], np.random.Generator]
"""A generator at the start of the stream of a name, the same whenever it is asked for."""

ERROR_MAX = 0.9
MODULES: Mapping[str, tuple[str, ...]] = {
    "attention": ("a", "b", "c"), "transfer": ("gamma", "beta"), "dense": ("dense_layer", "head"),
    "prefill": ("prefill_attention",), "collectives": ("all_reduce",)}
"""The coefficients of each module."""
ALL = "all"


@dataclass(frozen=True)
class _Judgement:
    """Factors on coefficients: ``1 + error`` or ``1 - error``, a coin of its own for every name.

    Those of other modules than the ``wrong`` ones are right.
    """

    error: float
    streams: Streams
    wrong: frozenset[str]

    def factor(self, *names: str) -> float:
        if names[0] not in self.wrong:
            return 1.0
        coin = self.streams(f"policy-cost-error/{'/'.join(names)}").random()
        return 1.0 + self.error if coin < 0.5 else 1.0 - self.error


def wrong_coefficients(modules: Sequence[str]) -> frozenset[str]:
    """The coefficients of some modules.

    Raises:
        SpecError: none, or one that is not among :data:`MODULES`.
    """
    allowed = f"{ALL}, or some of {', '.join(MODULES)}"
    require(bool(modules), "cost.policy_error_modules", list(modules), allowed)
    for name in modules:
        require(name == ALL or name in MODULES, "cost.policy_error_modules", name, allowed)
    return frozenset(coefficient for name, coefficients in MODULES.items()
                     if name in modules or ALL in modules for coefficient in coefficients)


class MisjudgedCost(MemoisedCost):
    """A cost model each of whose coefficients is wrong by the same share, up or down at random.

    Policies plan and dispatch by it while durations are charged by the true one (Hetis, SC '25,
    perturbs the coefficients of its profiler by up to 20 %). Which coefficients there are is ours: a, b
    and c of decode attention by card, gamma and beta by link, and one factor on each of the dense layer,
    the LM head, prefill attention and all-reduces by card. Host time is known. These are beliefs, so
    they may undercut what a device can do.

    Args:
        truth: the right durations.
        error: share, 0 to 0.9.
        streams: where the coins come from; that of a coefficient does not depend on ``modules``.
        modules: whose coefficients are wrong, keys of :data:`MODULES`; ``all`` for every one.

    Raises:
        SpecError: an error outside that range, or an unknown module.
    """

    def __init__(self, truth: CostModel, error: float, streams: Streams,
                 modules: Sequence[str] = (ALL,)) -> None:
        super().__init__()
        require_finite("cost.policy_error", error, 0.0, ERROR_MAX)
        self.truth = truth
        self._judged = _Judgement(error, streams, wrong_coefficients(modules))

    def _dense_layer_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        return self._judged.factor("dense_layer", gpu.name) * self.truth.dense_layer_s(gpu, model, tokens, tp)

    def _head_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        return self._judged.factor("head", gpu.name) * self.truth.head_s(gpu, model, tokens, tp)

    def _prefill_attention_layer_s(self, gpu: GpuSpec, model: ModelSpec, query_heads: int,
                                   new_tokens: int, context_tokens: int) -> float:
        seconds = self.truth.prefill_attention_layer_s(gpu, model, query_heads, new_tokens, context_tokens)
        return self._judged.factor("prefill_attention", gpu.name) * seconds

    def _decode_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        return self._attention(gpu, self.truth.decode_attention(gpu, model))

    def remote_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        return self._attention(gpu, self.truth.remote_attention(gpu, model))

    def _attention(self, gpu: GpuSpec, true: AttentionCost) -> AttentionCost:
        factor = self._judged.factor
        return replace(true, a_s_per_head=factor("a", gpu.name) * true.a_s_per_head,
                       b_s_per_byte=factor("b", gpu.name) * true.b_s_per_byte,
                       c_s=factor("c", gpu.name) * true.c_s)

    def _transfer_cost(self, link: LinkSpec) -> TransferCost:
        return self._message(link, self.truth.transfer(link))

    def head_transfer(self, link: LinkSpec, rank: GpuSpec, worker: GpuSpec) -> TransferCost:
        return self._message(link, self.truth.head_transfer(link, rank, worker))

    def hop(self, link: LinkSpec) -> TransferCost:
        return self._message(link, self.truth.hop(link))

    def _message(self, link: LinkSpec, true: TransferCost) -> TransferCost:
        factor = self._judged.factor
        return replace(true, gamma_s_per_byte=factor("gamma", link.name) * true.gamma_s_per_byte,
                       beta_s=factor("beta", link.name) * true.beta_s)

    def _all_reduce_s(self, gpu: GpuSpec, link: LinkSpec, size_bytes: int, ranks: int) -> float:
        seconds = self.truth.all_reduce_s(gpu, link, size_bytes, ranks)
        return self._judged.factor("all_reduce", gpu.name, link.name) * seconds

    def host_overhead_s(self, sequences: int, prompts: int = 0) -> float:
        return self.truth.host_overhead_s(sequences, prompts)

    def head_packing(self, gpu: GpuSpec) -> TransferCost:
        return self.truth.head_packing(gpu)

    def cache_packing(self, gpu: GpuSpec) -> TransferCost:
        return self.truth.cache_packing(gpu)

    def host_copy(self, gpu: GpuSpec) -> TransferCost:
        return self.truth.host_copy(gpu)

    def host_beside_s(self, sequences: int, layers: int, leads: bool, prompts: int = 0,
                      eager: bool = False) -> float:
        return self.truth.host_beside_s(sequences, layers, leads, prompts, eager)

    def graph_steps(self) -> GraphSteps:
        return self.truth.graph_steps()

    def provenance(self, gpus: Sequence[GpuSpec], model: ModelSpec,
                   links: Sequence[LinkSpec]) -> list[ProvenanceRow]:
        return self.truth.provenance(gpus, model, links)

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.truth.warnings
