"""Messages between workers: heads sent away, sums over ranks, activations handed on.

Measured on workers that are really there and on the transport that serves, in steps that a script
tells them to compute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hetis_exec.backend import Backend
from hetis_exec.calibrate.bench import filler, owned_groups
from hetis_exec.calibrate.samples import Point, Sample, Samples
from hetis_exec.calibrate.steps import decode_point, spread_contexts
from hetis_exec.calibrate.turns import turns
from hetis_exec.crew import Crew, WorkerSpec
from hetis_exec.errors import ExecutorError, WorkerError
from hetis_exec.messages import (
    Arrived,
    Beat,
    CacheData,
    Close,
    Control,
    Expect,
    Failed,
    Message,
    Op,
    Open,
    Row,
    StageDone,
    Task,
)
from hetis_exec.throttle import NONE, Throttle, cores
from hetis_sim.cost.links import pair_of
from hetis_sim.policies.plan import InstancePlan, StagePlan
from hetis_sim.spec.model import ModelSpec

MakeCrew = Callable[[Sequence[WorkerSpec]], Crew]

START_S = 180.0
WAIT_S = 120.0
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
QUICK_BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (32, 128, 448)
LONG_CONTEXT, LONG_BATCH = 1024, 2
"""Batches up to that size are measured with contexts of that length besides."""

SENT = (8, 16, 32, 64, 128, 512)
"""Tokens of prompts whose cache leaves."""

SENT_TURNS = 2

SUMS = (1, 4, 16, 32, 64, 128, 256, 512)
QUICK_SUMS = (1, 4, 16, 64, 256)
HEADS_S, SUMS_S = 60.0, 30.0
"""No further turn begins when heads, or sums and hops, have taken so long."""

PIECE_TOKENS = 64
"""A table is filled by messages of so many tokens each."""


@dataclass(frozen=True)
class CrewSpec:
    """What the workers of a script are made of.

    Attributes:
        kinds: type of every device of the cluster.
        links: name of the link between two devices.
        throttles: by device.
        pin: see :func:`hetis_exec.throttle.cores`.
    """

    model: ModelSpec
    backend: Backend
    dtype: str
    block_tokens: int
    kinds: Sequence[str]
    links: Callable[[int, int], str]
    throttles: Mapping[int, Throttle]
    pin: Any
    make_crew: MakeCrew


class Script:
    """Tells the workers of one instance what to do, and hears what it took them."""

    def __init__(self, spec: CrewSpec, plan: InstancePlan, tables: Mapping[int, int],
                 holders: Mapping[int, Sequence[Sequence[int]]]) -> None:
        """Start the workers and fill the tables.

        Args:
            tables: tokens of each request.
            holders: for each request and stage, the device of each KV group; of ``PROMPT``, of prompts that
                are :meth:`sent`.
        """
        self._spec = spec
        self._plan = plan
        self._holders = holders
        self._seq = 0
        self._used = dict.fromkeys(plan.devices, 0)
        self._rng = np.random.default_rng(0)
        places = [(device, s, rank) for s, stage in enumerate(plan.stages)
                  for rank, device in enumerate(stage.devices)]
        places += [(device, -1, 0) for device in plan.attention_workers]
        units = self._units({**tables, PROMPT: SENT[-1]} if PROMPT in holders else tables)
        pinned = cores(spec.pin, plan.devices, sorted(os.sched_getaffinity(0)))
        self.crew = spec.make_crew([
            WorkerSpec(device, plan, stage, rank, units[device], spec.block_tokens, spec.backend, WAIT_S,
                       spec.throttles.get(device, NONE), pinned.get(device))
            for device, stage, rank in places])
        self.crew.start()
        self._await_workers()
        for request_id, tokens in tables.items():
            self._open(request_id, tokens)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._spec.block_tokens)

    def _units(self, tables: Mapping[int, int]) -> dict[int, int]:
        units = dict.fromkeys(self._plan.devices, 0)
        for request_id, tokens in tables.items():
            for stage, held in zip(self._plan.stages, self._holders[request_id], strict=True):
                for device in held:
                    units[device] += self._blocks(tokens) * stage.layers
        return units

    def _open(self, request_id: int, tokens: int) -> None:
        ops: dict[int, list[Op]] = {}
        seq, d = self._seq + 1, self._spec.model.head_dim
        data: list[tuple[int, CacheData]] = []
        for s, (stage, held) in enumerate(zip(self._plan.stages, self._holders[request_id], strict=True)):
            for device in dict.fromkeys(held):
                groups = tuple(g for g, holder in enumerate(held) if holder == device)
                starts = range(0, tokens, PIECE_TOKENS)
                ops.setdefault(device, []).append(
                    Open(request_id, s, groups, stage.layers, self._blocks(tokens), seq))
                ops[device].append(Expect(seq, len(starts)))
                self._used[device] += self._blocks(tokens) * stage.layers * len(groups)
                for start in starts:
                    shape = (stage.layers, len(groups), min(PIECE_TOKENS, tokens - start), d)
                    k, v = (filler(self._spec.dtype, shape, n) for n in range(2))
                    data.append((device, CacheData(seq, seq, request_id, s, tuple(range(stage.layers)),
                                                   groups, start, k, v, False)))
        self._send({device: tuple(found) for device, found in ops.items()}, {})
        for device, piece in data:
            self.crew.endpoint.send(device, piece)
        left = len(ops)
        while left:
            left -= isinstance(self._hear(), Arrived)

    def step(self, decode: Mapping[int, int], prompt_tokens: int = 0) -> list[StageDone]:
        """Compute a step: cached tokens of decoding requests, and one prompt without a table.

        Returns:
            The reports of all ranks.
        """
        rows = [(Row(request_id, tokens - 1, 1, True, False, (), -1), self._holders[request_id])
                for request_id, tokens in decode.items()]
        if prompt_tokens:
            own = [[device for device, owned in zip(stage.devices, stage.owned_groups, strict=True)
                    for _ in range(owned)] for stage in self._plan.stages]
            rows.append((Row(PROMPT, 0, prompt_tokens, True, True, (), -1), own))
        count = len(decode) + prompt_tokens
        tokens = self._rng.integers(self._spec.model.vocab, size=count)
        tasks = {}
        for s, stage in enumerate(self._plan.stages):
            held = tuple(row._replace(holders=tuple(holders[s])) for row, holders in rows)
            for device in stage.devices:
                tasks[device] = Task(held, tokens if s == 0 else None)
        self._send({}, tasks)
        reports: list[StageDone] = []
        while len(reports) < len(tasks):
            report = self._hear()
            if isinstance(report, StageDone):
                reports.append(report)
        return reports

    def sent(self, prompt_tokens: int) -> StageDone:
        """Compute a prompt in one stage, whose cache leaves layer by layer and is forgotten where it arrives.

        Returns:
            The report of the rank.
        """
        (stage,), (held,) = self._plan.stages, self._holders[PROMPT]
        (holder,), groups, tag = set(held), tuple(range(len(held))), self._seq + 1
        blocks = self._blocks(prompt_tokens)
        units = blocks * stage.layers * len(groups)
        row = Row(PROMPT, 0, prompt_tokens, True, True, tuple(held), tag)
        tokens = self._rng.integers(self._spec.model.vocab, size=prompt_tokens)
        self._used[holder] += units
        self._send({holder: (Open(PROMPT, 0, groups, stage.layers, blocks, tag), Expect(tag, stage.layers))},
                   {stage.devices[0]: Task((row,), tokens)})
        heard = [self._hear(), self._hear()]
        self._used[holder] -= units
        self._send({holder: (Close(PROMPT, 0, groups),)}, {})
        return next(message for message in heard if isinstance(message, StageDone))

    def _send(self, ops: Mapping[int, tuple[Op, ...]], tasks: Mapping[int, Task]) -> None:
        self._seq += 1
        for device in self._plan.devices:
            self.crew.endpoint.send(device, Control(self._seq, ops.get(device, ()), self._used[device],
                                                    tasks.get(device)))

    def _hear(self) -> Message:
        """The next report that is no sign of life.

        Raises:
            WorkerError: a worker has failed or ended.
            ExecutorError: nothing comes.
        """
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            message = self.crew.endpoint.receive(0.5)
            if isinstance(message, Failed):
                raise WorkerError(message.device, message.reason)
            if message is None:
                for device, how in self.crew.dead():
                    raise WorkerError(device, how)
            elif not isinstance(message, Beat):
                return message
        raise ExecutorError(f"no worker has answered for {WAIT_S:g} s")

    def _await_workers(self) -> None:
        silent, deadline_s = set(self._plan.devices), time.monotonic() + START_S
        while silent:
            message = self.crew.endpoint.receive(0.5)
            if isinstance(message, Failed):
                raise WorkerError(message.device, message.reason)
            if isinstance(message, Beat):
                silent.discard(message.device)
            for device, how in self.crew.dead():
                raise WorkerError(device, how)
            if time.monotonic() > deadline_s:
                raise WorkerError(min(silent), "it has not started")


PROMPT = 1 << 20


@contextmanager
def script(spec: CrewSpec, plan: InstancePlan, tables: Mapping[int, int],
           holders: Mapping[int, Sequence[Sequence[int]]]) -> Iterator[Script]:
    """Workers that are gone afterwards."""
    made = Script(spec, plan, tables, holders)
    try:
        yield made
    finally:
        made.crew.stop(at_once=True)


# -- heads that live elsewhere -------------------------------------------------------------------------


def measure_star(spec: CrewSpec, rank: int, worker: int, repeats: int, quick: bool,
                 batch_max: int, tick: Callable[[], None]) -> Samples:
    """A rank and an attention worker: all heads there, or only some of them.

    Of a step, the time in which the rank packs is known, and the time in which the worker computes. What
    is left of the time that it spends on remote heads, with none of its own to compute meanwhile, is two
    messages for each layer. ``tick`` is called after each step that counts.
    """
    kv_heads = spec.model.kv_heads
    plan = InstancePlan((StagePlan((rank,), spec.model.layers, (kv_heads,)),), (worker,))
    batches = [n for n in (QUICK_BATCHES if quick else BATCHES) if n <= batch_max]
    long = max(CONTEXTS[-1], min(LONG_CONTEXT, spec.model.context_limit_tokens))
    away, split = range(max(batches)), range(1000, 1000 + max(batches))
    shared = [worker if g >= kv_heads // 2 else rank for g in range(kv_heads)]
    holders: dict[int, list[list[int]]] = {n: [[worker] * kv_heads] for n in away}
    holders |= {n: [shared] for n in split}
    samples: Samples = []
    tables = {n: long if n < LONG_BATCH else CONTEXTS[-1] for n in holders}
    with script(spec, plan, tables, {**holders, PROMPT: holders[0]}) as workers:
        workers.step({0: long})
        for turn in turns(repeats, HEADS_S, quick):
            rng = np.random.default_rng(turn)
            for batch in batches:
                # The first step of a batch takes longer than those that follow on it.
                first = spread_contexts(CONTEXTS[0], batch, CONTEXTS[-1], rng)
                workers.step(dict(zip(away, first, strict=False)))
                for tokens in (*CONTEXTS, *((long,) if batch <= LONG_BATCH else ())):
                    longest = max(tokens, CONTEXTS[-1])
                    spread = spread_contexts(tokens, batch, longest, rng)
                    (done,) = workers.step(dict(zip(away, spread, strict=False)))
                    samples += _star_samples(spec, done, rank, worker, kv_heads, spread)
                    tick()
                workers.step(dict(zip(split, first, strict=False)))
                for tokens in CONTEXTS[::2]:
                    spread = spread_contexts(tokens, batch, CONTEXTS[-1], rng)
                    (done,) = workers.step(dict(zip(split, spread, strict=False)))
                    samples += _shared_samples(spec, done, rank, worker, shared.count(worker), spread)
                    tick()
        for _ in range(min(repeats, SENT_TURNS)):
            for tokens in (n for n in SENT if n <= spec.model.context_limit_tokens):
                samples.append(_cache_sample(spec, workers.sent(tokens), rank, tokens))
                tick()
    return samples


def _cache_sample(spec: CrewSpec, done: StageDone, rank: int, tokens: int) -> Sample:
    """Of a prompt all of whose cache has left: sending it, in each layer."""
    size_bytes = tokens * spec.model.kv_heads * spec.model.kv_bytes_per_token_per_layer_per_group
    return Sample(Point("cache_packing", spec.kinds[rank], size_bytes=size_bytes, messages=1),
                  done.times.packing_s / spec.model.layers)


def _shared_samples(spec: CrewSpec, done: StageDone, rank: int, worker: int, groups: int,
                    contexts: Sequence[int]) -> Samples:
    """Of a step with some of the heads at the worker: packing, and its attention."""
    busy_s = dict(done.worker_busy_s)[worker] / spec.model.layers
    point = decode_point(spec.kinds[worker], spec.model.name, 1, groups, contexts)
    return [_packing(spec, done, rank, groups * len(contexts)),
            Sample(replace(point, module="remote_attention"), busy_s)]


def _star_samples(spec: CrewSpec, done: StageDone, rank: int, worker: int, groups: int,
                  contexts: Sequence[int]) -> Samples:
    """Of a step with all heads at the worker: packing, its attention, and what is left for messages."""
    model, layers = spec.model, spec.model.layers
    packing = _packing(spec, done, rank, groups * len(contexts))
    busy_s = dict(done.worker_busy_s)[worker] / layers
    point = decode_point(spec.kinds[worker], model.name, 1, groups, contexts)
    way = Point("transfer", spec.links(rank, worker), size_bytes=packing.point.size_bytes, messages=2,
                between=pair_of(spec.kinds[rank], spec.kinds[worker]))
    left_s = done.times.head_transfer_s / layers - packing.seconds - busy_s
    attention = Sample(replace(point, module="remote_attention"), busy_s)
    return [packing, attention, Sample(way, max(1e-9, left_s))]


def _packing(spec: CrewSpec, done: StageDone, rank: int, rows: int) -> Sample:
    size_bytes = rows * spec.model.remote_bytes_per_token(spec.model.heads_per_group)
    return Sample(Point("head_packing", spec.kinds[rank], size_bytes=size_bytes, messages=1),
                  done.times.packing_s / spec.model.layers)


# -- ranks and stages -----------------------------------------------------------------------------------


def measure_sums(spec: CrewSpec, ranks: Sequence[int], repeats: int, quick: bool,
                 tokens_max: int, tick: Callable[[], None]) -> Samples:
    """Sums over tensor-parallel ranks by size, in whole steps; ``tick`` is called after each.

    The rank that waits least has only the sum's own time in it.
    """
    owned = owned_groups(spec.model, len(ranks))
    plan = InstancePlan((StagePlan(tuple(ranks), spec.model.layers, owned),))
    link = spec.links(ranks[0], ranks[1])
    element = spec.model.activation_bytes
    samples: Samples = []
    with script(spec, plan, {}, {}) as workers:
        workers.step({}, 8)
        for _ in turns(repeats, SUMS_S, quick):
            for tokens in (n for n in (QUICK_SUMS if quick else SUMS) if n <= tokens_max):
                reports = workers.step({}, tokens)
                seconds = min(done.times.collective_s for done in reports) / (2 * spec.model.layers)
                point = Point("all_reduce", link, size_bytes=tokens * spec.model.hidden * element,
                              ranks=len(ranks), messages=1)
                samples.append(Sample(point, seconds))
                tick()
    return samples


def measure_hops(spec: CrewSpec, first: int, second: int, repeats: int, quick: bool,
                 tokens_max: int, tick: Callable[[], None]) -> Samples:
    """Activations on their way from one stage to the next, by size; ``tick`` is called after each step."""
    if spec.model.layers < 2:
        return []
    kv_heads, layers = spec.model.kv_heads, spec.model.layers
    stages = (StagePlan((first,), 1, (kv_heads,)), StagePlan((second,), layers - 1, (kv_heads,)))
    samples: Samples = []
    with script(spec, InstancePlan(stages), {}, {}) as workers:
        workers.step({}, 8)
        for _ in turns(repeats, SUMS_S, quick):
            for tokens in (n for n in (QUICK_SUMS if quick else SUMS) if n <= tokens_max):
                reports = workers.step({}, tokens)
                times = next(done.times for done in reports if done.stage == 1)
                hop_s = times.begun_s - max(times.sent_s, times.free_s)
                size_bytes = tokens * spec.model.hidden * spec.model.activation_bytes
                samples.append(Sample(Point("hop", spec.links(first, second), size_bytes=size_bytes,
                                            messages=1), max(1e-9, hop_s)))
                tick()
    return samples
