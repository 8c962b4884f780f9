"""Dense modules and attention of a device by themselves: for devices that compute behind the host's back.

A CUDA device is asked for kernels one after the other and waited for at the end, as it is when the
executor serves. Few layers with random weights are enough, as long as all their weights together are
more than the device's cache holds; shapes of other models can be measured likewise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from hetis_exec.backend import Kernels, Tensor, Wanted
from hetis_exec.calibrate.bench import FAR_DEVICE, PROMPT, Job, filler, owned_groups, tables_of
from hetis_exec.calibrate.copies import Cached
from hetis_exec.calibrate.samples import Point, Sample, Samples
from hetis_exec.calibrate.steps import BATCHES, QUICK_BATCHES, Sizes, decode_point, jobs_for
from hetis_exec.kernels.cuda import CudaKernels
from hetis_exec.kvcache import KvPool, TableKey
from hetis_exec.models.architecture import ELEMENT_TYPES, made_up
from hetis_exec.torch_backend import TorchBackend
from hetis_sim.control.timing import dense_share
from hetis_sim.policies.plan import InstancePlan, StagePlan
from hetis_sim.spec.model import ModelSpec

WEIGHTS_BYTES = 256 << 20
"""Weights that are gone through in turn: several times the cache of any card."""

LAYERS_MAX = 8
LOOP_S = 4e-3
"""A measurement repeats its work until it takes about so long."""

LOOPS_MAX = 64
TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096,
          6144, 8192)
QUICK_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class LoopSpec:
    """What is measured on one device.

    Attributes:
        model: its shape; as many layers are made as are needed.
        place: torch's name of the device.
        split_head: the LM head is split over the ranks, as engines do; in the executor it is not.
        graphs: kernels are recorded once and repeated, where the device can do so: without the time
            that a host takes to launch them.
    """

    device: int
    kind: str
    model: ModelSpec
    place: str
    dtype: str
    block_tokens: int
    seed: int
    split_head: bool
    graphs: bool
    pool_bytes: float

    def backend(self, layers: int, vocab: int) -> TorchBackend:
        """A backend for a model of some layers of this shape."""
        size = ELEMENT_TYPES[self.dtype]
        spec = replace(self.model, layers=layers, vocab=vocab, weight_bytes=size, kv_bytes=size)
        places = ("cpu",) * self.device + (self.place,)
        return TorchBackend(made_up(spec, size), None, self.seed, places=places, dtype=self.dtype)


class Clock:
    """Times work on a device."""

    def __init__(self, synchronize: Callable[[], None], graphs: bool) -> None:
        self._synchronize = synchronize
        self._graphs = graphs

    def prepared(self, work: Callable[[], Any], recordable: bool = True) -> Callable[[], Any]:
        """The work, done twice to warm up, and recorded if it is to be and can be."""
        for _ in range(2):
            work()
        self._synchronize()
        return recorded(work) if self._graphs and recordable else work

    def seconds(self, work: Callable[[], Any]) -> float:
        """Seconds of the work, from the mean of as many repetitions as take about LOOP_S."""
        once = self._run(work, 1)
        loops = int(min(LOOPS_MAX, max(1.0, LOOP_S / max(once, 1e-7))))
        return self._run(work, loops) / loops if loops > 1 else once

    def _run(self, work: Callable[[], Any], loops: int) -> float:
        self._synchronize()
        begun_s = time.perf_counter()
        for _ in range(loops):
            work()
        self._synchronize()
        return time.perf_counter() - begun_s


def recorded(work: Callable[[], Any]) -> Callable[[], Any]:
    """The work as a graph of kernels; the work itself where that cannot be."""
    import torch

    if not torch.cuda.is_available():
        return work
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return work

    def again(_inputs: Callable[[], Any] = work) -> None:
        graph.replay()
    return again


class LayerBench:
    """A few layers of one rank, and a pool of cache."""

    def __init__(self, spec: LoopSpec, tp: int, tables: dict[int, int]) -> None:
        model = spec.model
        self.spec, self.tp = spec, tp
        size = ELEMENT_TYPES[spec.dtype]
        layer_bytes = size * model.dense_flops_per_token_per_layer / 2 / tp
        self.layers = int(min(LAYERS_MAX, model.layers, max(1.0, -(-WEIGHTS_BYTES // layer_bytes))))
        self.owned = owned_groups(model, tp)
        vocab = -(-model.vocab // tp) if spec.split_head else model.vocab
        backend = spec.backend(self.layers, vocab)
        devices = (spec.device, *(FAR_DEVICE + n for n in range(1, tp)))
        plan = InstancePlan((StagePlan(devices, self.layers, self.owned),))
        blocks = sum(-(-tokens // spec.block_tokens) for tokens in tables.values())
        # More layers of cache than of weights: attention of one after the other finds nothing in any cache.
        self.cache_layers = min(LAYERS_MAX, model.layers)
        units = max(1, blocks * self.owned[0] * self.cache_layers)
        self.kernels: Kernels = backend.kernels(spec.device, units, spec.block_tokens)
        self.shard = backend.shard(spec.device, plan, 0, 0)
        self.pool = KvPool(units, spec.block_tokens, self.kernels, growing=False)
        self.groups = tuple(range(self.owned[0]))
        for request, tokens in tables.items():
            self._open(request, tokens)

    def _open(self, request: int, tokens: int) -> None:
        for g in self.groups:
            blocks = -(-tokens // self.spec.block_tokens)
            self.pool.open(TableKey(request, 0, g), self.cache_layers, blocks, 0)
            keys, values = (self.tensor((tokens, self.spec.model.head_dim), n) for n in range(2))
            for layer in range(self.cache_layers):
                self.pool.write(TableKey(request, 0, g), layer, 0, keys, values)

    @property
    def records_heads(self) -> bool:
        """Whether tokens are chosen within recorded steps."""
        return self.spec.graphs and isinstance(self.kernels, CudaKernels)

    def tensor(self, shape: tuple[int, ...], seed: int = 0) -> Tensor:
        """Numbers of no meaning on the device."""
        return self.kernels.from_wire(filler(self.spec.dtype, shape, seed))

    def dense(self, tokens: int) -> Callable[[], Any]:
        """All dense modules of the layers; so many layers is what a call does."""
        shard = self.shard
        hidden = self.tensor((tokens, self.spec.model.hidden))
        prepared = shard.prepare(np.arange(tokens) % self.spec.model.context_limit_tokens)
        if self.tp == 1 and self.records_heads:
            # As recorded steps have it; numbers that run away make no difference.
            return lambda: shard.through(hidden, prepared, lambda _layer, q, _k, _v: q)

        def work() -> Tensor:
            x = hidden
            for layer in range(self.layers):
                q, _, _ = shard.qkv(layer, x, prepared)
                x = x + shard.project(layer, q)
                x = x + shard.mlp(layer, x)
            return x
        return work

    def head(self, sequences: int) -> Callable[[], Any]:
        """The LM head and sampling; where steps are recorded, what of it the device does."""
        hidden = self.tensor((sequences, self.spec.model.hidden))
        if self.records_heads:
            return lambda: self.shard.likeliest(hidden)
        asked = [Wanted(n, 1) for n in range(sequences)]
        return lambda: self.shard.sample(hidden, asked)

    def prompt(self, new: int, context: int) -> Callable[[], Any]:
        """Attention of a prompt in all layers; its keys and values are stored."""
        model, groups = self.spec.model, len(self.groups)
        q = self.tensor((new, groups, model.heads_per_group, model.head_dim))
        k, v = (self.tensor((groups, new + context, model.head_dim), n) for n in range(2))
        keys = [TableKey(PROMPT, 0, g) for g in self.groups]
        rows = self.tensor((new, groups, model.head_dim)), self.tensor((new, groups, model.head_dim), 1)
        together = self.kernels.plan_prompts([self.pool.table(key) for key in keys], [0], [new], [context],
                                             model.heads_per_group)
        if together is not None:
            def all_at_once() -> None:
                for layer in range(self.cache_layers):
                    self.kernels.attend_prompts(together, layer, q, *rows)
            return all_at_once
        spots = self.pool.spots(keys, context, new)
        own_k, own_v = (x[:, context:] for x in (k, v))

        def work() -> None:
            for layer in range(self.cache_layers):
                self.pool.write_groups(spots, layer, own_k, own_v)
                self.kernels.causal(q, k, v)
        return work

    def decode(self, contexts: Sequence[int]) -> Callable[[], Any]:
        """Decode attention of a batch in all layers."""
        model = self.spec.model
        tables = [self.pool.table(TableKey(n, 0, g)) for n in range(len(contexts)) for g in self.groups]
        positions = [tokens - 1 for tokens in contexts for _ in self.groups]
        plan = self.kernels.plan(tables, positions)
        q = self.tensor((len(tables), model.heads_per_group, model.head_dim))
        k, v = (self.tensor((len(tables), model.head_dim), n) for n in range(2))

        def work() -> None:
            for layer in range(self.cache_layers):
                self.kernels.decode(plan, layer, q, k, v)
        return work


def measure_loops(spec: LoopSpec, tp: int, sizes: Sizes, tick: Callable[[], None],
                  dense_only: bool = False) -> Samples:
    """The samples of one device, model shape and degree; where attention is known, of dense modules alone."""
    token_bytes = (2 * ELEMENT_TYPES[spec.dtype] * spec.model.head_dim * owned_groups(spec.model, tp)[0]
                   * min(LAYERS_MAX, spec.model.layers))
    jobs = [] if dense_only else jobs_for(sizes, max(64, int(spec.pool_bytes / token_bytes)))
    bench = LayerBench(spec, tp, tables_of(jobs))
    clock = Clock(bench.kernels.synchronize, spec.graphs)
    with bench.kernels.working():
        samples = [sample for point, work, share in _points(bench, spec, tp, sizes, jobs)
                   for sample in _timed(clock, point, work(), share, sizes.repeats, tick,
                                        point.module != "head" or bench.records_heads)]
    decoding = {request: tokens for request, tokens in tables_of(jobs).items() if request < PROMPT}
    if tp == 1 and decoding:
        cached = Cached(bench.pool, decoding, bench.owned[0], token_bytes)
        samples += cached.samples(spec.kind, spec.model.name, sizes.repeats, tick)
    return samples


def _timed(clock: Clock, point: Point, work: Callable[[], Any], share: float, repeats: int,
           tick: Callable[[], None], recordable: bool) -> Samples:
    ready = clock.prepared(work, recordable)
    tick()
    return [Sample(point, clock.seconds(ready) / share) for _ in range(repeats)]


Work = tuple[Point, Callable[[], Callable[[], Any]], float]
"""A point, what makes its work, and how many times the point's work that is."""


def _points(bench: LayerBench, spec: LoopSpec, tp: int, sizes: Sizes, jobs: Sequence[Job]) -> list[Work]:
    model, owned, layers = spec.model, bench.owned[0], bench.layers
    share = layers * dense_share(model, owned, tp)
    points: list[Work] = [
        (Point("dense_layer", spec.kind, model.name, tp, tokens=tokens), partial(bench.dense, tokens), share)
        for tokens in (QUICK_TOKENS if sizes.quick else TOKENS) if tokens <= sizes.tokens_max]
    points += [
        (Point("head", spec.kind, model.name, tp, tokens=sequences), partial(bench.head, sequences), 1.0)
        for sequences in (QUICK_BATCHES if sizes.quick else BATCHES) if sequences <= sizes.batch_max]
    for job in jobs:
        if job.prompts:
            ((new, context),) = job.prompts
            point = Point("prefill_attention", spec.kind, model.name, tp, new_tokens=new,
                          context_tokens=context, heads=owned * model.heads_per_group, kv_heads=owned)
            points.append((point, partial(bench.prompt, new, context), bench.cache_layers))
        else:
            points.append((decode_point(spec.kind, model.name, tp, owned, job.decode),
                           partial(bench.decode, job.decode), bench.cache_layers))
    return points

