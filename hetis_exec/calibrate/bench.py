"""Steps of one worker without a driver: the worker that serves, told by hand what to compute."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hetis_exec.backend import Asked, Backend, Shard, Tensor
from hetis_exec.kvcache import KvPool
from hetis_exec.messages import (
    Array,
    CacheData,
    Control,
    Expect,
    Message,
    Op,
    Open,
    Row,
    StageDone,
    StageTimes,
    Task,
    Tokens,
)
from hetis_exec.primary import PrimaryWorker, Rank
from hetis_exec.throttle import Throttle
from hetis_sim.policies.plan import InstancePlan, StagePlan
from hetis_sim.spec.model import ModelSpec

TIMEOUT_S = 600.0
FAR_DEVICE = 1 << 20
"""Numbers of devices that take part on paper only: the other ranks of a stage."""

DRAWN = (1 << 18) - 5
"""Numbers that are drawn; larger arrays repeat them, from other places in each of their rows."""


class Job(NamedTuple):
    """A step to be measured.

    Attributes:
        decode: cached tokens of each decoding request, the new one among them.
        prompts: (new tokens, tokens in cache before) of each prompt.
    """

    decode: tuple[int, ...] = ()
    prompts: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return len(self.decode) + sum(new for new, _ in self.prompts)


class Timed(NamedTuple):
    """What a step took: the worker's own times, and of its dense time that of sampling."""

    times: StageTimes
    sample_s: float
    whole_s: float


@dataclass(frozen=True)
class BenchSpec:
    """What a bench is to be made of.

    Attributes:
        device: of the cluster.
        tp: tensor-parallel degree; the bench computes rank 0.
        pool_tokens: tokens of cache that tables may take together, of all groups and layers.
    """

    device: int
    model: ModelSpec
    backend: Backend
    throttle: Throttle
    dtype: str
    block_tokens: int
    tp: int
    pool_tokens: int

    @property
    def owned(self) -> tuple[int, ...]:
        """KV groups of each rank, as even as can be."""
        return owned_groups(self.model, self.tp)


def owned_groups(model: ModelSpec, tp: int) -> tuple[int, ...]:
    """KV groups of each rank, as even as can be."""
    return tuple(model.kv_heads * (n + 1) // tp - model.kv_heads * n // tp for n in range(tp))[::-1]


def filler(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """An array of a message with numbers of no meaning, in the type that it travels in.

    They differ, as those of a text do: cards multiply equal numbers faster, for that takes less power.
    """
    size = int(np.prod(shape))
    drawn = np.random.default_rng(seed).standard_normal(min(size, DRAWN), dtype=np.float32)
    if dtype == "bfloat16":
        # Of a single the first half is a bfloat16, rounded towards 0.
        bits: Array = np.resize((drawn.view(np.uint32) >> 16).astype(np.uint16).view(np.int16), shape)
        return bits
    return np.resize(drawn, shape).astype(dtype)


class Loopback:
    """An endpoint without anyone at the other end: what is sent is kept."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, target: int, message: Message) -> None:
        """Keep a message."""
        self.sent.append(message)

    def keeps(self, target: int, bulk: bool = False) -> bool:
        """Nobody is there."""
        return False

    def receive(self, timeout_s: float) -> Message | None:
        """Nobody sends anything."""
        return None


class TimedShard:
    """A shard whose sampling is timed apart. Everything else is passed on."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self.sample_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shard, name)

    def sample(self, hidden: Tensor, asked: Asked) -> Tokens:
        """As the shard does."""
        begun_s = time.perf_counter()
        tokens = self._shard.sample(hidden, asked)
        self.sample_s += time.perf_counter() - begun_s
        return tokens


class StepBench:
    """One rank with its cache; computes steps and says what they took.

    Tables are opened once, each for the longest context that its place in a batch will have, with blocks
    in line as in service, and filled: pages that were never written to would be read from a cache.

    Args:
        tables: tokens of each request.
    """

    def __init__(self, spec: BenchSpec, tables: Mapping[int, int]) -> None:
        self.spec = spec
        self._endpoint = Loopback()
        tp, layers = spec.tp, spec.model.layers
        devices = (spec.device, *(FAR_DEVICE + n for n in range(1, tp)))
        shared = InstancePlan((StagePlan(devices, layers, spec.owned),))
        self._shard = TimedShard(spec.backend.shard(spec.device, shared, 0, 0))
        alone = InstancePlan((StagePlan((spec.device,), layers, (spec.model.kv_heads,)),))
        self.groups = spec.owned[0]
        units = sum(-(-tokens // spec.block_tokens) for tokens in tables.values()) * self.groups * layers
        pool = KvPool(units, spec.block_tokens, spec.backend.kernels(spec.device, units, spec.block_tokens),
                      growing=False)
        self._worker = PrimaryWorker(spec.device, self._endpoint, pool, TIMEOUT_S, Rank(alone, 0, 0),
                                     self._shard, throttle=spec.throttle)
        self._seq = 0
        self._used = 0
        self._rng = np.random.default_rng(spec.device)
        for request_id, tokens in tables.items():
            self._open(request_id, tokens)

    def _open(self, request_id: int, tokens: int) -> None:
        """A table with so many tokens, filled."""
        blocks = -(-tokens // self.spec.block_tokens)
        groups = tuple(range(self.groups))
        self._used += blocks * self.groups * self.spec.model.layers
        layers, tag = self.spec.model.layers, self._seq + 1
        self._control((Open(request_id, 0, groups, layers, blocks, tag), Expect(tag, layers)), None)
        d = self.spec.model.head_dim
        for layer in range(layers):
            keys, values = (filler(self.spec.dtype, (1, self.groups, tokens, d), layer) for _ in range(2))
            self._worker.cache.take(CacheData(self._seq, self._seq, request_id, 0, (layer,), groups, 0, keys,
                                              values, False))

    def step(self, job: Job) -> Timed:
        """Compute a step. Requests are numbered by their place among those that decode; prompts follow."""
        holders = (self.spec.device,) * self.spec.model.kv_heads
        rows = [Row(n, tokens - 1, 1, True, False, holders, -1) for n, tokens in enumerate(job.decode)]
        rows += [Row(PROMPT + n, context, new, True, True, holders, -1)
                 for n, (new, context) in enumerate(job.prompts)]
        tokens = self._rng.integers(self.spec.model.vocab, size=job.tokens)
        self._shard.sample_s = 0.0
        begun_s = time.perf_counter()
        self._control((), Task(tuple(rows), tokens))
        whole_s = time.perf_counter() - begun_s
        done = self._endpoint.sent[-1]
        assert isinstance(done, StageDone)
        self._endpoint.sent.clear()
        return Timed(done.times, self.sample_s, whole_s)

    @property
    def pool(self) -> KvPool:
        """Its cache."""
        return self._worker.cache.pool

    @property
    def sample_s(self) -> float:
        """Of the last step, the time that sampling took, the throttle's part included."""
        return self._shard.sample_s * self.spec.throttle.dense

    def _control(self, ops: tuple[Op, ...], task: Task | None) -> None:
        self._seq += 1
        self._worker.take(Control(self._seq, ops, self._used, task))
        with self.pool.kernels.working():
            self._worker.turn()


PROMPT = 1 << 16
"""Number of the first prompt of a step."""


def tables_of(jobs: Sequence[Job]) -> dict[int, int]:
    """Tokens that the table of each request must have room for."""
    need: dict[int, int] = {}
    for job in jobs:
        for n, tokens in enumerate(job.decode):
            need[n] = max(need.get(n, 0), tokens)
        for n, (new, context) in enumerate(job.prompts):
            need[PROMPT + n] = max(need.get(PROMPT + n, 0), new + context)
    return need
