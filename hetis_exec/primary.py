"""The primary worker: one tensor-parallel rank of one pipeline stage."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from hetis_exec.backend import Shard, Tensor, Wanted, WholeSteps
from hetis_exec.batches import Batch, Stored
from hetis_exec.dividing import DividedHeads
from hetis_exec.errors import CacheError, ExecutorError
from hetis_exec.kvcache import KvPool, TableKey
from hetis_exec.leaving import LeavingCache
from hetis_exec.messages import (
    DRIVER,
    AttentionResult,
    Control,
    Hidden,
    Message,
    Partial,
    Row,
    StageDone,
    StageTimes,
    Stop,
    Task,
    Tokens,
)
from hetis_exec.places import TeamPlan, stages_of
from hetis_exec.shares import Share, divide
from hetis_exec.sums import Reducer, sums_for
from hetis_exec.throttle import NONE, Throttle, throttled
from hetis_exec.transport import Endpoint
from hetis_exec.workers import Stopped, Worker
from hetis_sim.policies.plan import MeshPlan

DENSE, ATTENTION, HEAD_TRANSFER, COLLECTIVE, PACKING = PARTS = (
    "dense", "attention", "head_transfer", "collective", "packing")
"""Parts of a stage's time, in the order of :class:`StageTimes`, whose head transfer contains packing."""


@dataclass(frozen=True, slots=True)
class Rank:
    """The place of a primary worker in its instance or mesh."""

    plan: TeamPlan
    stage: int
    rank: int

    @property
    def peers(self) -> tuple[int, ...]:
        """Devices of the stage, in the order of their ranks."""
        return stages_of(self.plan)[self.stage].devices

    @property
    def next_devices(self) -> tuple[int, ...]:
        """Devices of the next stage; none after the last, and none that a node would have."""
        if isinstance(self.plan, MeshPlan):
            return ()
        after = self.plan.stages[self.stage + 1:self.stage + 2]
        return after[0].devices if after else ()


class PrimaryWorker(Worker):
    """Dense modules, prefill attention, and decode attention of the heads that stay here."""

    def __init__(self, device: int, endpoint: Endpoint, pool: KvPool, timeout_s: float, place: Rank,
                 shard: Shard, whole_steps: WholeSteps | None = None, throttle: Throttle = NONE,
                 warm_up: Callable[[], None] | None = None, reducer: Reducer | None = None) -> None:
        super().__init__(device, endpoint, pool, timeout_s, throttle, warm_up)
        self.place = place
        self.shard = shard
        self.kernels = pool.kernels
        self._sums = sums_for(self, place.peers, reducer, timeout_s)
        self._leaving = LeavingCache(self, place.stage, shard.groups)
        self._heads = DividedHeads(self, place.stage)
        self._controls: deque[Control | Stop] = deque()
        self._box: dict[tuple[object, ...], Message] = {}
        self._whole_steps = whole_steps
        self._all_here = (device,) * len(shard.groups)
        self.stopwatch = throttled(pool.kernels.stopwatch(), throttle, pool.kernels.synchronize)
        self._free_s = 0.0

    def packed(self, target: int, tensors: Sequence[Tensor], bulk: bool = False) -> list[Any]:
        if not self.keeps(target, bulk):
            self._sums.settle()  # the device is waited for
        return super().packed(target, tensors, bulk)

    def turn(self) -> None:
        self.pump()
        while self._controls:
            control = self._controls.popleft()
            if isinstance(control, Stop):
                raise Stopped
            self.wait_until(partial(self.cache.may_apply, control), "cache that is to be sent on")
            self.cache.apply(control)
            if control.task is not None:
                self.execute(control.seq, control.task)

    def take(self, message: Message) -> None:
        match message:
            case Control() | Stop():
                self._controls.append(message)
            case Hidden():
                self._box[Hidden, message.seq] = message
            case Partial():
                self._box[Partial, message.seq, message.number, message.rank] = message
            case AttentionResult():
                self._box[AttentionResult, message.seq, message.layer, message.sender] = message
            case _:
                raise ExecutorError(f"primary worker {self.device} does not know what to do with {message}")

    def fetch(self, key: tuple[object, ...], what: str) -> Message:
        """A message from another worker, by its kind and what tells it from others."""
        self.wait_until(lambda: key in self._box, what)
        return self._box.pop(key)

    # -- a step ------------------------------------------------------------------------------------

    def execute(self, seq: int, task: Task) -> None:
        """One stage of a step: attention and MLP of every layer, then on to the next stage."""
        if self._is_whole(task):
            self._execute_whole(seq, task)
            return
        batch = self.batch(seq, task.rows)
        hidden, sent_s, begun_s = self._input(batch, task)
        self.make_ready(batch)
        self.stopwatch.start()
        self._hand_over(batch, self.through(batch, range(self.shard.layers), hidden), sent_s, begun_s)

    def make_ready(self, batch: Batch) -> None:
        """Wait for the cache that a batch reads here, and find out where it is."""
        stage, items, parts = self.place.stage, batch.local.items, batch.local.parts
        self.wait_until(lambda: all(self.cache.ready(i.request_id, stage, i.groups)
                                    for i in (*items, *parts)), "heads on their way here")
        batch.plan = self.cache.plan(stage, items) if items else None
        batch.parts_plan = self.cache.plan_parts(stage, parts) if parts else None
        batch.prompts = self._plan_prompts(batch.rows)

    def through(self, batch: Batch, layers: range, hidden: Tensor) -> Tensor:
        """Activations after some layers."""
        for layer in layers:
            self.beat()
            hidden = hidden + self._sum(batch, 2 * layer, self._attention_block(batch, layer, hidden))
            hidden = hidden + self._sum(batch, 2 * layer + 1, self._mlp(layer, hidden))
        self._sums.settle()
        return hidden

    def _is_whole(self, task: Task) -> bool:
        """Whether a step can be done in one: of plain decoding or of prompts, whose cache is all here."""
        steps, rows = self._whole_steps, task.rows
        if steps is None or not self.cache.all_ready:
            return False
        if any(row.holders != self._all_here or row.older for row in rows):
            return False
        if not any(row.prefill for row in rows):
            return len(rows) <= steps.rows_max
        if any(not row.prefill or row.push_tag >= 0 or row.onward for row in rows):
            return False
        return steps.takes_prompts([row.request_id for row in rows], [row.new_tokens for row in rows])

    def _execute_whole(self, seq: int, task: Task) -> None:
        """A step in one piece: its parts are not told apart, and what its host does is not among them."""
        steps, rows = self._whole_steps, task.rows
        assert steps is not None
        assert task.tokens is not None
        begun_s = time.perf_counter()
        self.beat()
        request_ids, positions = [row.request_id for row in rows], [row.position for row in rows]
        if rows[0].prefill:
            sampled = [n for n, row in enumerate(rows) if row.samples]
            asked = [Wanted(rows[n].request_id, rows[n].position + rows[n].new_tokens, rows[n].sample)
                     for n in sampled]
            tokens = steps.run_prompts(request_ids, positions, [row.new_tokens for row in rows], task.tokens,
                                       sampled, asked)
        else:
            asked = [Wanted(row.request_id, row.position + 1, row.sample) for row in rows]
            tokens = steps.run(request_ids, positions, task.tokens, asked)
        ended_s = time.perf_counter()
        times = StageTimes(begun_s, self._free_s, begun_s, ended_s, steps.computed_s, 0.0, 0.0, 0.0)
        self._free_s = ended_s
        self.send(DRIVER, StageDone(seq, self.device, 0, 0, times, (), tokens))

    def _input(self, batch: Batch, task: Task) -> tuple[Tensor, float, float]:
        """Activations, when they were sent, and when work on them begins."""
        begun_s = time.perf_counter()
        if task.tokens is not None:
            return self.shard.embed(task.tokens, batch.prepared), begun_s, begun_s
        message = self.fetch((Hidden, batch.seq), f"activations of step {batch.seq}")
        assert isinstance(message, Hidden)
        return self.kernels.from_wire(message.values), message.sent_s, time.perf_counter()

    def batch(self, seq: int, rows: tuple[Row, ...]) -> Batch:
        """A step as this rank computes it; attention workers are told what it is going to ask them."""
        positions = np.concatenate([np.arange(row.position, row.position + row.new_tokens) for row in rows])
        shares = divide(rows, self.shard.groups, self.kernels)
        local = shares.by_device.pop(self.device, None) or Share()
        prefills = any(row.prefill for row in rows)
        batch = Batch(seq, rows, self.shard.prepare(positions), prefills, local, shares.by_device,
                      shares.divided, shares.number)
        self._heads.tell(batch)
        return batch

    def _hand_over(self, batch: Batch, hidden: Tensor, sent_s: float, begun_s: float) -> None:
        place = self.place
        ends = not place.next_devices and place.rank == 0
        ended_s = self.report(batch, self.sample(batch, hidden) if ends else None, sent_s, begun_s)
        for device in place.next_devices if place.rank == 0 else ():
            self.send(device, Hidden(batch.seq, self.packed(device, [hidden])[0], ended_s))

    def report(self, batch: Batch, tokens: Tokens | None, sent_s: float, begun_s: float) -> float:
        """Tell the driver that this stage is free, before the next can hear of its work; when that was."""
        place = self.place
        self.stopwatch.lap(DENSE)
        spent = self.stopwatch.read()
        spent[HEAD_TRANSFER] = spent.get(HEAD_TRANSFER, 0.0) + spent.get(PACKING, 0.0)
        ended_s = time.perf_counter()
        times = StageTimes(sent_s, self._free_s, begun_s, ended_s, *(spent.get(part, 0.0) for part in PARTS))
        self._free_s = ended_s
        self.send(DRIVER, StageDone(batch.seq, self.device, place.stage, place.rank, times,
                                    tuple(batch.worker_busy_s.items()), tokens))
        return ended_s

    def sample(self, batch: Batch, hidden: Tensor) -> Tokens:
        ends, asked = [], []
        for row, end in zip(batch.rows, accumulate(row.new_tokens for row in batch.rows), strict=True):
            if row.samples:
                ends.append(end - 1)
                asked.append(Wanted(row.request_id, row.position + row.new_tokens, row.sample))
        return self.shard.sample(hidden[self.kernels.index(ends)], asked)

    def _sum(self, batch: Batch, number: int, values: Tensor) -> Tensor:
        """Sum of all ranks' values."""
        if len(self.place.peers) == 1:
            return values
        total = self._sums.total(batch.seq, number, values)
        self.stopwatch.lap(COLLECTIVE)
        return total

    def _mlp(self, layer: int, hidden: Tensor) -> Tensor:
        values = self.shard.mlp(layer, hidden)
        self._lap_before_sum()
        return values

    def _lap_before_sum(self) -> None:
        """Dense work of one layer and the next is one lap where no other rank is waited for in between."""
        if len(self.place.peers) > 1:
            self.stopwatch.lap(DENSE)

    # -- attention ---------------------------------------------------------------------------------

    def _attention_block(self, batch: Batch, layer: int, hidden: Tensor) -> Tensor:
        """Remote heads are sent off first and gathered last."""
        kernels, lap = self.kernels, self.stopwatch.lap
        q, k, v = self.shard.qkv(layer, hidden, batch.prepared)
        attended = kernels.empty_like(q) if batch.prompts is None else None
        if batch.prefills and batch.prompts is None:
            self._store_prompts(batch, layer, k, v)
        lap(DENSE)
        picked = self._heads.send(batch, layer, (q, k, v))
        if batch.is_divided:
            lap(PACKING)
        if attended is None:
            attended = kernels.attend_prompts(batch.prompts, layer, q, k, v)
        joining = kernels.joining(batch.number, q) if batch.divided is not None else None
        found = self._heads.attend(batch, layer, picked)
        leaving = self._prefill(batch, layer, q, k, v, attended) if batch.prefills else []
        lap(ATTENTION)
        attended = self._heads.put(batch.local, attended, found, joining)
        for row, keys, values in leaving:
            self._leaving.send(batch.seq, layer, row, keys, values)
        if leaving or batch.is_divided:
            lap(PACKING)
        for device, share in batch.remote.items():
            key = AttentionResult, batch.seq, layer, device
            result = self.fetch(key, f"heads from device {device}")
            assert isinstance(result, AttentionResult)
            lap(HEAD_TRANSFER)
            attended = self._heads.take(share, attended, result, joining)
            batch.worker_busy_s[device] = batch.worker_busy_s.get(device, 0.0) + result.busy_s
            lap(PACKING)
        if joining is not None:
            attended[batch.divided] = joining.result()
        projected = self.shard.project(layer, attended)
        self._lap_before_sum()
        return projected

    def _plan_prompts(self, rows: Sequence[Row]) -> Any:
        """Attention of the prompts of a batch together, if it can be computed so."""
        stage, own, pool = self.place.stage, self.shard.groups, self.cache.pool
        begins = list(accumulate((row.new_tokens for row in rows), initial=0))
        chosen = [(row, begin) for row, begin in zip(rows, begins, strict=False) if row.prefill]
        if not chosen or any(row.older for row, _ in chosen):
            return None
        tables = [pool.tables.get(TableKey(row.request_id, stage, g)) for row, _ in chosen for g in own]
        if any(table is None for table in tables) and any(row.position for row, _ in chosen):
            return None
        return self.kernels.plan_prompts(
            tables, [begin for _, begin in chosen], [row.new_tokens for row, _ in chosen],
            [row.position for row, _ in chosen], self.shard.heads_per_group)

    def _prefill(self, batch: Batch, layer: int, q: Tensor, k: Tensor, v: Tensor,
                 attended: Tensor) -> list[tuple[Row, Tensor, Tensor]]:
        """Causal attention of the prompts in the batch, over all groups whose weights are here.

        Returns:
            Prompts some of whose cache is to leave, with their keys and values of all groups.
        """
        at, leaving = 0, []
        for row in batch.rows:
            here = slice(at, at + row.new_tokens)
            at = here.stop
            if not row.prefill:
                continue
            if batch.prompts is None:
                keys, values = self._prompt(layer, row, k[here].swapaxes(0, 1), v[here].swapaxes(0, 1))
                attended[here] = self.kernels.causal(q[here], keys, values)
            elif row.push_tag < 0 and not row.onward:
                continue
            elif row.position == 0:
                keys, values = k[here].swapaxes(0, 1), v[here].swapaxes(0, 1)
            else:
                keys, values = self.cache.pool.read(row.request_id, self.place.stage, self.shard.groups,
                                                    layer, 0, row.position + row.new_tokens)
            if row.push_tag >= 0 or row.onward:
                leaving.append((row, keys, values))
        return leaving

    def _store_prompts(self, batch: Batch, layer: int, k: Tensor, v: Tensor) -> None:
        """New tokens of prompts go where they belong: with the dense modules, as the cost model has it."""
        at = 0
        for row in batch.rows:
            tokens = slice(at, at + row.new_tokens)
            at = tokens.stop
            if row.prefill:
                self._store_prompt(batch, layer, row, k[tokens].swapaxes(0, 1), v[tokens].swapaxes(0, 1))

    def _store_prompt(self, batch: Batch, layer: int, row: Row, k: Tensor, v: Tensor) -> None:
        stage, own, pool = self.place.stage, self.shard.groups, self.cache.pool
        keys = [TableKey(row.request_id, stage, g) for g in own]
        here = [n for n, key in enumerate(keys) if key in pool.tables]
        if not here:
            return
        stored = self._stored(batch, row, [keys[n] for n in here])
        parts = (k, v) if len(here) == len(own) else (k[here], v[here])
        if len(stored.tokens) < row.new_tokens:
            parts = tuple(x[:, stored.at[0]] for x in parts)
        if len(stored.tokens):
            pool.write_groups(stored.spots, layer, *parts)

    def _prompt(self, layer: int, row: Row, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (groups, tokens, d) of a prompt so far, those of its new tokens given.

        Raises:
            CacheError: the prompt came in pieces, and no room was booked for those before.
        """
        if row.position == 0:
            return k, v
        stage, own, pool = self.place.stage, self.shard.groups, self.cache.pool
        missing = [g for g in own if TableKey(row.request_id, stage, g) not in pool.tables]
        if missing:
            raise CacheError(f"device {self.device} has no room for the first {row.position} tokens of "
                             f"request {row.request_id} in KV groups {missing}: no staging copy was booked")
        return pool.read(row.request_id, stage, own, layer, 0, row.position + row.new_tokens)

    def _stored(self, batch: Batch, row: Row, keys: Sequence[TableKey]) -> Stored:
        """Which of a prompt's new tokens belong here, and where; the same in every layer."""
        found = batch.stored.get(row.request_id)
        if found is None:
            pool, first = self.cache.pool, row.position
            tokens = pool.tokens_here(keys[0], first, first + row.new_tokens)
            at = self.kernels.index((tokens - first).tolist()) if len(tokens) < row.new_tokens else ()
            found = batch.stored[row.request_id] = Stored(tokens, at, pool.spots_of(keys, tokens))
        return found
