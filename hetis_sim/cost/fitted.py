"""Durations from fitted profiles, module by module, with the roofline behind them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from hetis_sim.cost import floor, work
from hetis_sim.cost.attention import DecodeClass, PrefillClass
from hetis_sim.cost.curve import Curve
from hetis_sim.cost.graphs import GraphSteps
from hetis_sim.cost.host import HostOverhead
from hetis_sim.cost.links import LinkTable, pair_of
from hetis_sim.cost.memo import MemoisedCost
from hetis_sim.cost.model import NO_PACKING, AttentionCost, ProvenanceRow, TransferCost
from hetis_sim.cost.profile import HOST_DEVICE, LINKS_DEVICE, Profile
from hetis_sim.cost.roofline import RooflineCost
from hetis_sim.cost.tables import TokenTables, shape_key
from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec

GPU_MODULES = ("gemm", "elementwise", "prefill_attention", "decode_attention", "all_reduce")
# A query is reported when it lies outside the fitted range by more than this factor.
RANGE_SLACK = 2.0
# A product below this share of a layer's FLOPs (a router) is not worth a warning.
SMALL_SHARE = 0.02


def _token_lattice() -> tuple[int, ...]:
    """Token counts at which a layer is worked out: all up to 64, then both sides of tile edges."""
    counts = set(range(1, 65))
    for start, stop, step in ((64, 2048, 32), (2048, 32768, 256)):
        for edge in range(start, stop + 1, step):
            counts |= {edge, edge + 1}
    return tuple(sorted(counts))


LATTICE = _token_lattice()


@dataclass(frozen=True, slots=True)
class TokenCurve:
    """Seconds at the token counts of the lattice; straight between, in proportion beyond."""

    seconds: tuple[float, ...]

    def at(self, tokens: int) -> float:
        """Seconds for ``tokens`` >= 1."""
        if tokens >= LATTICE[-1]:
            return self.seconds[-1] * tokens / LATTICE[-1]
        i = bisect_right(LATTICE, tokens)
        low, high = LATTICE[i - 1], LATTICE[i]
        share = (tokens - low) / (high - low)
        return self.seconds[i - 1] + share * (self.seconds[i] - self.seconds[i - 1])


def _nearest_head(classes: Sequence[PrefillClass], model: ModelSpec) -> PrefillClass:
    """The class whose head size is nearest in ratio."""
    return min(classes, key=lambda c: abs(math.log(c.head_dim / model.head_dim)))


class ProfileCost(MemoisedCost):
    """Fitted where a profile has the module, roofline elsewhere; never below the physical floor.

    Dense layers and heads never get shorter with more tokens: the fitted curve is worked out
    once for each (GPU, model, degree) and replaced by its running maximum. Those that were measured on
    the machine in question are taken as they are.
    """

    def __init__(self, profiles: Mapping[str, Sequence[Profile]], roofline: RooflineCost) -> None:
        super().__init__()
        self._profiles = profiles
        self._roofline = roofline
        self._curves: dict[tuple[str, GpuSpec, ModelSpec, int], TokenCurve] = {}
        self._warnings: dict[str, None] = {}

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._warnings)

    def host_overhead_s(self, sequences: int, prompts: int = 0) -> float:
        return self._host.waited_s(sequences, prompts)

    def host_beside_s(self, sequences: int, layers: int, leads: bool, prompts: int = 0,
                      eager: bool = False) -> float:
        return self._host.beside_s(sequences, layers, leads, prompts, eager)

    def graph_steps(self) -> GraphSteps:
        return self._host.graphs

    @cached_property
    def _host(self) -> HostOverhead:
        """That of the settings, with measured times where there are any."""
        given, profile = self._roofline.host, self._with_module(HOST_DEVICE, "host_overhead")
        if profile is None or profile.host_overhead is None:
            return given
        measured = profile.host_overhead
        return replace(given, base_s=measured.base_s, per_sequence_s=measured.per_sequence_s,
                       prompt_step_s=measured.prompt_step_s, per_prompt_s=measured.per_prompt_s,
                       eager_s_per_layer=measured.eager_s_per_layer,
                       eager_s_per_prompt=measured.eager_s_per_prompt,
                       graphs=measured.graphs)

    def head_packing(self, gpu: GpuSpec) -> TransferCost:
        profile = self._with_module(gpu.name, "head_packing")
        return NO_PACKING if profile is None or profile.head_packing is None else profile.head_packing

    def cache_packing(self, gpu: GpuSpec) -> TransferCost:
        profile = self._with_module(gpu.name, "cache_packing")
        if profile is None or profile.cache_packing is None:
            return super().cache_packing(gpu)
        return profile.cache_packing

    def host_copy(self, gpu: GpuSpec) -> TransferCost:
        profile = self._with_module(gpu.name, "host_copy")
        if profile is None or profile.host_copy is None:
            return super().host_copy(gpu)
        return profile.host_copy

    def ranges(self, gpu: GpuSpec, module: str) -> Mapping[str, tuple[float, float]]:
        profile = self._with_module(HOST_DEVICE if module == "host_overhead" else gpu.name, module)
        return {} if profile is None else profile.infos[module].ranges

    # -- look-up ---------------------------------------------------------------------------

    def _with_module(self, device: str, module: str) -> Profile | None:
        """The first profile of ``device`` that has ``module``; those of the user come first."""
        for profile in self._profiles.get(device, ()):
            if module in profile.infos:
                return profile
        return None

    def _check_range(self, profile: Profile, module: str, **asked: float) -> None:
        """Note, once each, a query far outside what the module was fitted on."""
        for quantity, value in asked.items():
            ends = profile.infos[module].ranges.get(quantity)
            if ends is None or ends[0] / RANGE_SLACK <= value <= ends[1] * RANGE_SLACK:
                continue
            side = "below" if value < ends[0] else "above"
            self._warnings.setdefault(
                f"profile {profile.name}: {module} was asked for {quantity} {side} its fitted range "
                f"[{ends[0]:g}, {ends[1]:g}]; the durations are extrapolated")

    # -- dense modules ---------------------------------------------------------------------

    def _dense_layer_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        seconds = self._tokens_s("dense_layer", gpu, model, tokens, tp)
        if model.experts == 1:
            return seconds
        # The floor of a mixture is concave in the tokens, so that a chord may pass below it.
        return max(seconds, floor.dense_layer_floor_s(gpu, model, tokens, tp))

    def _head_s(self, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        return self._tokens_s("head", gpu, model, tokens, tp)

    def _tokens_s(self, module: str, gpu: GpuSpec, model: ModelSpec, tokens: int, tp: int) -> float:
        key = (module, gpu, model, tp)
        curve = self._curves.get(key)
        if curve is None:
            curve = self._curves[key] = self._token_curve(module, gpu, model, tp)
        measured, fitted = self._measured(module, gpu, model), self._with_module(gpu.name, "gemm")
        if measured is not None:
            self._check_range(measured, module, tokens=tokens, tp=tp)
        elif fitted is not None:
            self._check_range(fitted, "gemm", m=tokens)
        return curve.at(tokens)

    def _token_curve(self, module: str, gpu: GpuSpec, model: ModelSpec, tp: int) -> TokenCurve:
        bound = floor.dense_layer_floor_s if module == "dense_layer" else floor.head_floor_s
        seconds = self._measured_curve(module, gpu, model, tp)
        if seconds is not None and self._calibrated(gpu, module):
            return TokenCurve(tuple(seconds))
        if seconds is None:
            seconds = self._summed_curve(module, gpu, model, tp)
        floors = [bound(gpu, model, tokens, tp) for tokens in LATTICE]
        return TokenCurve(tuple(np.maximum.accumulate(np.maximum(seconds, floors)).tolist()))

    def _measured_curve(self, module: str, gpu: GpuSpec, model: ModelSpec, tp: int) -> list[float] | None:
        """Durations of exactly this shape, where a profile has them.

        Of a calibrated profile, those of the nearest degree that was measured, by the products' work.
        """
        profile = self._measured(module, gpu, model)
        if profile is None:
            return None
        tables: TokenTables = getattr(profile, module)
        table = tables.find(model, tp)
        if table is not None:
            return [table.at(tokens) for tokens in LATTICE]
        if profile.calibration is None:
            return None
        near = min(tables.degrees(model), key=lambda degree: abs(math.log(degree / tp)))
        found = tables.curves[shape_key(model), near]
        return [found.at(tokens) * near / tp for tokens in LATTICE]

    def _measured(self, module: str, gpu: GpuSpec, model: ModelSpec) -> Profile | None:
        """The profile that has timings of exactly this shape, at whatever degree."""
        profile = self._with_module(gpu.name, module)
        tables: TokenTables | None = None if profile is None else getattr(profile, module)
        return profile if tables is not None and tables.degrees(model) else None

    def _calibrated(self, device: str | GpuSpec, module: str) -> bool:
        """Whether a module was measured on the machine in question.

        Then no floor applies: what the cluster file says of a device's speed may be a rough figure.
        """
        profile = self._with_module(device if isinstance(device, str) else device.name, module)
        return profile is not None and profile.calibration is not None

    def _summed_curve(self, module: str, gpu: GpuSpec, model: ModelSpec, tp: int) -> list[float]:
        """Sum of the matrix products and elementwise kernels at each count of the lattice."""
        layer = module == "dense_layer"
        kernels = work.layer_elementwise if layer else work.head_elementwise
        total = np.array([sum(self._elementwise_s(gpu, kind, moved)
                              for kind, moved in kernels(model, tokens, tp)) for tokens in LATTICE])
        columns = zip(*(work.layer_gemms(model, tokens, tp) if layer else (work.head_gemm(model, tokens, tp),)
                        for tokens in LATTICE), strict=True)
        for products in columns:
            total += self._products_s(gpu, model, products, layer)
        return [float(seconds) for seconds in total]

    def _products_s(self, gpu: GpuSpec, model: ModelSpec, products: Sequence[work.Gemm],
                    layer: bool) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """One product of the layer at each count of the lattice."""
        profile = self._with_module(gpu.name, "gemm")
        if profile is None or profile.gemm is None or model.weight_bytes == 4:
            return np.array([self._roofline.gemm_s(gpu, gemm, model) for gemm in products])
        first = products[0]
        if not layer or 2.0 * first.n * first.k > SMALL_SHARE * model.dense_flops_per_token_per_layer / 8:
            self._check_range(profile, "gemm", n=first.n, k=first.k)
        m, n, k, count = (np.array([getattr(gemm, name) for gemm in products], dtype=np.float64)
                          for name in ("m", "n", "k", "count"))
        return profile.gemm.seconds(m, n, k, count, model.weight_bytes, model.activation_bytes)

    def _elementwise_s(self, gpu: GpuSpec, kind: str, moved: float) -> float:
        profile = self._with_module(gpu.name, "elementwise")
        if profile is None:
            return self._roofline.elementwise_s(gpu, moved)
        curves = profile.elementwise
        curve: Curve = curves.get(kind) or curves.get("activation") or next(iter(curves.values()))
        return curve.at(moved)

    # -- attention -------------------------------------------------------------------------

    def _prefill_attention_layer_s(self, gpu: GpuSpec, model: ModelSpec, query_heads: int,
                                   new_tokens: int, context_tokens: int) -> float:
        bound = floor.prefill_attention_floor_s(gpu, model, query_heads, new_tokens, context_tokens)
        profile = self._with_module(gpu.name, "prefill_attention")
        calibrated = self._calibrated(gpu, "prefill_attention")
        if calibrated:
            bound = 0.0
        if profile is None or (model.weight_bytes == 4 and not calibrated):
            return max(bound, self._roofline.prefill_attention_layer_s(gpu, model, query_heads, new_tokens,
                                                                       context_tokens))
        self._check_range(profile, "prefill_attention", keys=new_tokens + context_tokens)
        nearest = _nearest_head(profile.prefill_attention, model)
        if context_tokens == 0 and new_tokens < LATTICE[-1]:
            return max(self._prompt_curve(nearest, gpu, model, query_heads).at(new_tokens), bound)
        kv_heads = -(-query_heads // model.heads_per_group)
        seconds = nearest.seconds_one(query_heads, kv_heads, new_tokens, context_tokens, model.kv_bytes,
                                      model.head_dim)
        return max(seconds, bound)

    def _prompt_curve(self, fitted: PrefillClass, gpu: GpuSpec, model: ModelSpec,
                      query_heads: int) -> TokenCurve:
        """Whole prompts without context, worked out once for each number of heads; never falling."""
        key = (f"prompt {query_heads}", gpu, model, 0)
        curve = self._curves.get(key)
        if curve is None:
            new = np.array(LATTICE, dtype=np.float64)
            heads = np.full(len(new), float(query_heads))
            kv_heads = np.ceil(heads / model.heads_per_group)
            seconds = fitted.seconds(heads, kv_heads, new, np.zeros(len(new)), model.kv_bytes, model.head_dim)
            curve = self._curves[key] = TokenCurve(tuple(np.maximum.accumulate(seconds).tolist()))
        return curve

    def _decode_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        profile = self._with_module(gpu.name, "decode_attention")
        if profile is None:
            return self._roofline.decode_attention(gpu, model)
        return self._nearest_decode(profile, "decode_attention", gpu, model)

    def remote_attention(self, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        profile = self._with_module(gpu.name, "remote_attention")
        if profile is None:
            return self.decode_attention(gpu, model)
        return self._nearest_decode(profile, "remote_attention", gpu, model)

    def _nearest_decode(self, profile: Profile, module: str, gpu: GpuSpec, model: ModelSpec) -> AttentionCost:
        """Coefficients of the class that is nearest in head size, then in query heads per KV head."""
        r = model.heads_per_group
        self._check_range(profile, module, heads_per_group=r, head_dim=model.head_dim)
        classes: Sequence[DecodeClass] = getattr(profile, module)
        nearest: DecodeClass = min(classes, key=lambda c: (
            abs(math.log(c.head_dim / model.head_dim)), abs(math.log(c.heads_per_group / r))))
        a_share = (model.head_dim / nearest.head_dim) * (nearest.heads_per_group / r)
        bound = 0.0 if profile.calibration is not None else floor.decode_floor_s_per_byte(gpu, model)

        def here(cost: AttentionCost) -> AttentionCost:
            return replace(cost, a_s_per_head=cost.a_s_per_head * a_share,
                           b_s_per_byte=max(cost.b_s_per_byte, bound))

        found = here(nearest.cost)
        return found if found.lone is None else replace(found, lone=here(found.lone))

    # -- links -----------------------------------------------------------------------------

    def _transfer_cost(self, link: LinkSpec) -> TransferCost:
        table = self._messages("transfer")
        found = None if table is None else table.messages.get(link.name)
        if found is None:
            return self._roofline.transfer(link)
        if self._calibrated(LINKS_DEVICE, "transfer"):
            return found
        return TransferCost(max(found.gamma_s_per_byte, 1.0 / link.bandwidth_bytes_per_s),
                            max(found.beta_s, link.latency_s))

    def head_transfer(self, link: LinkSpec, rank: GpuSpec, worker: GpuSpec) -> TransferCost:
        table = self._messages("transfer")
        found = None if table is None else table.pairs.get((link.name, pair_of(rank.name, worker.name)))
        if found is None or not self._calibrated(LINKS_DEVICE, "transfer"):
            return self.transfer(link)
        return found

    def hop(self, link: LinkSpec) -> TransferCost:
        table = self._messages("hop")
        found = None if table is None else table.messages.get(link.name)
        return self.transfer(link) if found is None else found

    def _messages(self, module: str) -> LinkTable | None:
        """What the profile of the links says of a kind of messages."""
        profile = self._with_module(LINKS_DEVICE, module)
        table: LinkTable | None = None if profile is None else getattr(profile, module)
        return table

    def _all_reduce_s(self, gpu: GpuSpec, link: LinkSpec, size_bytes: int, ranks: int) -> float:
        seconds = None
        for device in (gpu.name, LINKS_DEVICE):
            profile = self._with_module(device, "all_reduce")
            if seconds is None and profile is not None and profile.all_reduce is not None:
                seconds = profile.all_reduce.all_reduce_s(link.name, size_bytes, ranks)
                if seconds is not None and profile.calibration is not None:
                    return seconds
        if seconds is None:
            seconds = self._ring_s(link, size_bytes, ranks)
        return max(seconds, floor.all_reduce_floor_s(link, size_bytes, ranks))

    def _ring_s(self, link: LinkSpec, size_bytes: int, ranks: int) -> float:
        """Ring of messages on a link whose collectives were not measured."""
        step = self._transfer_cost(link)
        return 2 * (ranks - 1) * (step.gamma_s_per_byte * size_bytes / ranks + step.beta_s)

    # -- origin ----------------------------------------------------------------------------

    def provenance(self, gpus: Sequence[GpuSpec], model: ModelSpec,
                   links: Sequence[LinkSpec]) -> list[ProvenanceRow]:
        rows = [self._gpu_row(module, gpu, model) for gpu in gpus for module in self._modules(gpu, model)]
        rows += [self._link_row(link) for link in links]
        host = self._with_module(HOST_DEVICE, "host_overhead")
        if host is None:
            return [*rows, self._roofline.host.provenance()]
        return [*rows, self._row("host_overhead", HOST_DEVICE, host)]

    def _modules(self, gpu: GpuSpec, model: ModelSpec) -> tuple[str, ...]:
        """Modules that durations on a card come from: whole layers where they were measured."""
        if self._measured("dense_layer", gpu, model) is None or not self._calibrated(gpu, "dense_layer"):
            return GPU_MODULES
        more = [name for name in ("remote_attention", "head_packing", "cache_packing", "host_copy")
                if self._with_module(gpu.name, name) is not None]
        return ("dense_layer", "head", *GPU_MODULES[2:], *more)

    def _gpu_row(self, module: str, gpu: GpuSpec, model: ModelSpec) -> ProvenanceRow:
        profile = self._with_module(gpu.name, module)
        if profile is None and module == "all_reduce":
            profile = self._with_module(LINKS_DEVICE, module)
            if profile is not None:
                return replace(self._row(module, gpu.name, profile), kind="derived")
        wide = model.weight_bytes == 4 and not self._calibrated(gpu, module)
        if profile is None or (wide and module in ("gemm", "prefill_attention")):
            return self._roofline.gpu_row(module, gpu)
        return self._row(module, gpu.name, profile)

    def _link_row(self, link: LinkSpec) -> ProvenanceRow:
        profile = self._with_module(LINKS_DEVICE, "transfer")
        if profile is None or profile.transfer is None or link.name not in profile.transfer.messages:
            return ProvenanceRow("transfer", link.name, "roofline", "", link.source or "link specification")
        row = self._row("transfer", link.name, profile)
        remark = profile.transfer.remarks.get(link.name)
        if remark is None:
            return row
        return replace(row, kind=remark[0], note=remark[1], median_error=None, p95_error=None)

    @staticmethod
    def _row(module: str, subject: str, profile: Profile) -> ProvenanceRow:
        info = profile.infos[module]
        return ProvenanceRow(module, subject, info.status, profile.name, info.source, info.median_error,
                             info.p95_error, info.note)
