"""The primary worker: one tensor-parallel rank of one pipeline stage."""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate
from typing import Any

import numpy as np

from hetis_exec.backend import Shard, Spots, Tensor, Wanted, WholeSteps
from hetis_exec.errors import CacheError, ExecutorError
from hetis_exec.kvcache import KvPool, TableKey
from hetis_exec.messages import (
    DRIVER,
    AttentionItem,
    AttentionRequest,
    AttentionResult,
    CacheData,
    Control,
    Hidden,
    Message,
    Onward,
    Partial,
    Row,
    StageDone,
    StageTimes,
    Stop,
    Task,
    Tokens,
)
from hetis_exec.throttle import NONE, Throttle, throttled
from hetis_exec.transport import Endpoint
from hetis_exec.workers import Stopped, Worker
from hetis_sim.policies.plan import InstancePlan

DENSE, ATTENTION, HEAD_TRANSFER, COLLECTIVE, PACKING = PARTS = (
    "dense", "attention", "head_transfer", "collective", "packing")
"""Parts of a stage's time, in the order of :class:`StageTimes`, whose head transfer contains packing."""


@dataclass(frozen=True, slots=True)
class Rank:
    """The place of a primary worker in its instance."""

    plan: InstancePlan
    stage: int
    rank: int

    @property
    def peers(self) -> tuple[int, ...]:
        """Devices of the stage, in the order of their ranks."""
        return self.plan.stages[self.stage].devices

    @property
    def next_devices(self) -> tuple[int, ...]:
        """Devices of the next stage; none after the last."""
        after = self.plan.stages[self.stage + 1:self.stage + 2]
        return after[0].devices if after else ()


@dataclass(slots=True)
class Share:
    """The part of a batch's decode attention that one device computes.

    Attributes:
        items: its requests and groups.
        rows, columns: for each group, its token's row in the batch, its place among the rank's groups.
        at: the two as an index.
        whole: they are all rows and columns, in order.
    """

    items: list[AttentionItem] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    at: tuple[Tensor, ...] = ()
    whole: bool = False

    def of(self, values: Tensor) -> Tensor:
        """Its part of values of all rows and columns, shape (its groups, ...)."""
        return values.reshape(-1, *values.shape[2:]) if self.whole else values[self.at]


@dataclass(slots=True)
class Batch:
    """A step as one rank computes it.

    Attributes:
        prepared: what the weights need to know of the positions.
        local, remote: decode attention computed here and by attention workers.
        plan: where the cache of the local part is.
        prompts: attention of all of its prompts together; None where they are computed one by one.
        spots: where the new tokens of prompts are then stored, row by row.
        worker_busy_s: seconds that attention workers have computed.
    """

    seq: int
    rows: tuple[Row, ...]
    prepared: Any
    local: Share
    remote: dict[int, Share]
    plan: Any = None
    prompts: Any = None
    spots: dict[int, Spots] = field(default_factory=dict)
    worker_busy_s: dict[int, float] = field(default_factory=dict)


class PrimaryWorker(Worker):
    """Dense modules, prefill attention, and decode attention of the heads that stay here."""

    def __init__(self, device: int, endpoint: Endpoint, pool: KvPool, timeout_s: float, place: Rank,
                 shard: Shard, whole_steps: WholeSteps | None = None, throttle: Throttle = NONE,
                 warm_up: Callable[[], None] | None = None) -> None:
        super().__init__(device, endpoint, pool, timeout_s, throttle, warm_up)
        self._place = place
        self._shard = shard
        self._kernels = pool.kernels
        self._controls: deque[Control | Stop] = deque()
        self._box: dict[tuple[object, ...], Message] = {}
        self._whole_steps = whole_steps
        self._all_here = (device,) * len(shard.groups)
        self._stopwatch = throttled(pool.kernels.stopwatch(), throttle, pool.kernels.synchronize)
        self._free_s = 0.0

    def turn(self) -> None:
        self.pump()
        while self._controls:
            control = self._controls.popleft()
            if isinstance(control, Stop):
                raise Stopped
            self.cache.apply(control)
            if control.task is not None:
                self._execute(control.seq, control.task)

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

    def _fetch(self, key: tuple[object, ...], what: str) -> Message:
        self.wait_until(lambda: key in self._box, what)
        return self._box.pop(key)

    # -- a step ------------------------------------------------------------------------------------

    def _execute(self, seq: int, task: Task) -> None:
        """One stage of a step: attention and MLP of every layer, then on to the next stage."""
        if self._is_whole(task):
            self._execute_whole(seq, task)
            return
        batch = self._batch(seq, task.rows)
        hidden, sent_s, begun_s = self._input(batch, task)
        stage, items = self._place.stage, batch.local.items
        self.wait_until(lambda: all(self.cache.ready(i.request_id, stage, i.groups) for i in items),
                        "heads on their way here")
        batch.plan = self.cache.plan(stage, items) if items else None
        batch.prompts = self._plan_prompts(batch.rows)
        self._stopwatch.start()
        for layer in range(self._shard.layers):
            self.beat()
            hidden = hidden + self._sum(batch, 2 * layer, self._attention_block(batch, layer, hidden))
            hidden = hidden + self._sum(batch, 2 * layer + 1, self._mlp(layer, hidden))
        self._hand_over(batch, hidden, sent_s, begun_s)

    def _is_whole(self, task: Task) -> bool:
        """Whether a step can be done in one: of plain decoding or of prompts, whose cache is all here."""
        steps, rows = self._whole_steps, task.rows
        if steps is None or any(row.holders != self._all_here for row in rows) or not self.cache.all_ready:
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
            return self._shard.embed(task.tokens, batch.prepared), begun_s, begun_s
        message = self._fetch((Hidden, batch.seq), f"activations of step {batch.seq}")
        assert isinstance(message, Hidden)
        return self._kernels.from_wire(message.values), message.sent_s, time.perf_counter()

    def _batch(self, seq: int, rows: tuple[Row, ...]) -> Batch:
        positions = np.concatenate([np.arange(row.position, row.position + row.new_tokens) for row in rows])
        shares: dict[int, Share] = {self.device: Share()}
        at = 0
        for row in rows:
            for device, columns in self._columns(row) if not row.prefill else ():
                share = shares.setdefault(device, Share())
                groups = tuple(self._shard.groups[n] for n in columns)
                share.items.append(AttentionItem(row.request_id, row.position, groups))
                share.rows += [at] * len(columns)
                share.columns += columns
            at += row.new_tokens
        for share in shares.values():
            share.whole = len(share.rows) == at * len(self._shard.groups)
            share.at = () if share.whole else self._kernels.index(share.rows, share.columns)
        return Batch(seq, rows, self._shard.prepare(positions), shares.pop(self.device), shares)

    def _columns(self, row: Row) -> Iterator[tuple[int, list[int]]]:
        """(device, places among this rank's groups) for every device that holds any of them."""
        holders = [row.holders[g] for g in self._shard.groups]
        for device in dict.fromkeys(holders):
            yield device, [n for n, holder in enumerate(holders) if holder == device]

    def _hand_over(self, batch: Batch, hidden: Tensor, sent_s: float, begun_s: float) -> None:
        place = self._place
        tokens: Tokens | None = None
        if not place.next_devices and place.rank == 0:
            tokens = self._sample(batch, hidden)
        self._stopwatch.lap(DENSE)
        spent = self._stopwatch.read()
        spent[HEAD_TRANSFER] = spent.get(HEAD_TRANSFER, 0.0) + spent.get(PACKING, 0.0)
        ended_s = time.perf_counter()
        times = StageTimes(sent_s, self._free_s, begun_s, ended_s, *(spent.get(part, 0.0) for part in PARTS))
        self._free_s = ended_s
        # The driver hears that this stage is free before the next one can hear of its work.
        self.send(DRIVER, StageDone(batch.seq, self.device, place.stage, place.rank, times,
                                    tuple(batch.worker_busy_s.items()), tokens))
        for device in place.next_devices if place.rank == 0 else ():
            self.send(device, Hidden(batch.seq, self._kernels.to_wire(hidden), ended_s))

    def _sample(self, batch: Batch, hidden: Tensor) -> Tokens:
        ends, asked = [], []
        for row, end in zip(batch.rows, accumulate(row.new_tokens for row in batch.rows), strict=True):
            if row.samples:
                ends.append(end - 1)
                asked.append(Wanted(row.request_id, row.position + row.new_tokens, row.sample))
        return self._shard.sample(hidden[self._kernels.index(ends)], asked)

    def _sum(self, batch: Batch, number: int, values: Tensor) -> Tensor:
        """Sum of all ranks' values, added up in the same order everywhere."""
        peers, rank = self._place.peers, self._place.rank
        if len(peers) == 1:
            return values
        for device in peers:
            if device != self.device:
                self.send(device, Partial(batch.seq, number, rank, self._kernels.to_wire(values)))
        parts = [values if other == rank else self._part(batch.seq, number, other)
                 for other in range(len(peers))]
        total = reduce(operator.add, parts)
        self._stopwatch.lap(COLLECTIVE)
        return total

    def _part(self, seq: int, number: int, rank: int) -> Tensor:
        message = self._fetch((Partial, seq, number, rank), f"a sum from device {self._place.peers[rank]}")
        assert isinstance(message, Partial)
        return self._kernels.from_wire(message.values)

    def _mlp(self, layer: int, hidden: Tensor) -> Tensor:
        values = self._shard.mlp(layer, hidden)
        self._lap_before_sum()
        return values

    def _lap_before_sum(self) -> None:
        """Dense work of one layer and the next is one lap where no other rank is waited for in between."""
        if len(self._place.peers) > 1:
            self._stopwatch.lap(DENSE)

    # -- attention ---------------------------------------------------------------------------------

    def _attention_block(self, batch: Batch, layer: int, hidden: Tensor) -> Tensor:
        """Remote heads are sent off first and gathered last."""
        kernels, lap = self._kernels, self._stopwatch.lap
        q, k, v = self._shard.qkv(layer, hidden, batch.prepared)
        attended = kernels.empty_like(q) if batch.prompts is None else None
        lap(DENSE)
        for device, share in batch.remote.items():
            items = tuple(share.items) if layer == 0 else None
            parts = kernels.pack([share.of(x) for x in (q, k, v)])
            self.send(device, AttentionRequest(batch.seq, self.device, self._place.stage, layer, items,
                                               *parts))
        if batch.remote:
            lap(PACKING)
        local = batch.local
        if attended is None:
            attended = kernels.attend_prompts(batch.prompts, layer, q, k, v)
        if local.items:
            found = self.cache.decode_attention(batch.plan, layer, *(local.of(x) for x in (q, k, v)))
            if local.whole:
                attended = found.reshape(q.shape)
            else:
                attended[local.at] = found
        self._prefill(batch, layer, q, k, v, attended)
        lap(ATTENTION)
        for device, share in batch.remote.items():
            key = AttentionResult, batch.seq, layer, device
            result = self._fetch(key, f"heads from device {device}")
            assert isinstance(result, AttentionResult)
            lap(HEAD_TRANSFER)
            values = kernels.from_wire(result.values)
            if share.whole:
                attended = values.reshape(q.shape)
            else:
                attended[share.at] = values
            batch.worker_busy_s[device] = batch.worker_busy_s.get(device, 0.0) + result.busy_s
            lap(PACKING)
        projected = self._shard.project(layer, attended)
        self._lap_before_sum()
        return projected

    def _plan_prompts(self, rows: Sequence[Row]) -> Any:
        """Attention of the prompts of a batch together, if it can be computed so."""
        stage, own, pool = self._place.stage, self._shard.groups, self.cache.pool
        begins = list(accumulate((row.new_tokens for row in rows), initial=0))
        chosen = [(row, begin) for row, begin in zip(rows, begins, strict=False) if row.prefill]
        if not chosen:
            return None
        tables = [pool.tables.get(TableKey(row.request_id, stage, g)) for row, _ in chosen for g in own]
        if any(table is None for table in tables) and any(row.position for row, _ in chosen):
            return None
        return self._kernels.plan_prompts(
            tables, [begin for _, begin in chosen], [row.new_tokens for row, _ in chosen],
            [row.position for row, _ in chosen], self._shard.heads_per_group)

    def _prefill(self, batch: Batch, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        """Causal attention of the prompts in the batch, over all groups whose weights are here.

        Where it has been computed for all together, groups that live elsewhere are still to be sent.
        """
        at = 0
        for row in batch.rows:
            here = slice(at, at + row.new_tokens)
            at = here.stop
            if not row.prefill:
                continue
            if batch.prompts is None:
                keys, values = self._prompt(batch, layer, row, k[here].swapaxes(0, 1), v[here].swapaxes(0, 1))
                attended[here] = self._kernels.causal(q[here], keys, values)
            elif row.push_tag < 0 and not row.onward:
                continue
            elif row.position == 0:
                keys, values = k[here].swapaxes(0, 1), v[here].swapaxes(0, 1)
            else:
                keys, values = self.cache.pool.read(row.request_id, self._place.stage, self._shard.groups,
                                                    layer, 0, row.position + row.new_tokens)
            if row.push_tag >= 0:
                self._push(batch.seq, layer, row, keys, values)
            for onward in row.onward:
                self._send_onward(onward, layer, row.request_id, keys, values)

    def _prompt(self, batch: Batch, layer: int, row: Row, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (groups, tokens, d) of a prompt so far; new tokens are stored where they belong.

        Raises:
            CacheError: the prompt came in pieces, and no room was booked for those before.
        """
        stage, own, pool = self._place.stage, self._shard.groups, self.cache.pool
        missing = [g for g in own if TableKey(row.request_id, stage, g) not in pool.tables]
        here = [n for n, g in enumerate(own) if g not in missing]
        if here:
            if row.request_id not in batch.spots:
                batch.spots[row.request_id] = pool.spots(
                    [TableKey(row.request_id, stage, own[n]) for n in here], row.position, row.new_tokens)
            parts = (k, v) if not missing else (k[here], v[here])
            pool.write_groups(batch.spots[row.request_id], layer, *parts)
        if row.position == 0:
            return k, v
        if missing:
            raise CacheError(f"device {self.device} has no room for the first {row.position} tokens of "
                             f"request {row.request_id} in KV groups {missing}: no staging copy was booked")
        return pool.read(row.request_id, stage, own, layer, 0, row.position + row.new_tokens)

    def _push(self, seq: int, layer: int, row: Row, keys: Tensor, values: Tensor) -> None:
        """Send the groups of a complete prompt that will live elsewhere, as soon as a layer has them."""
        for device, columns in self._columns(row):
            if device != self.device:
                groups = tuple(self._shard.groups[n] for n in columns)
                k, v = self._kernels.pack([x[columns][None] for x in (keys, values)])
                self.send(device, CacheData(seq, row.push_tag, row.request_id, self._place.stage, (layer,),
                                            groups, 0, k, v, False))

    def _send_onward(self, onward: Onward, layer: int, request_id: int, keys: Tensor, values: Tensor) -> None:
        """Send a layer of a complete prompt to the instance that will decode it."""
        abroad = onward.abroad
        at = layer - abroad.first
        if onward.source != self.device or not 0 <= at < abroad.layers:
            return
        columns = [self._shard.groups.index(g) for g in onward.groups]
        k, v = self._kernels.pack([x[columns][None] for x in (keys, values)])
        self.send(onward.target, CacheData(abroad.after, onward.tag, request_id, abroad.stage,
                                           (abroad.at + at,), onward.groups, 0, k, v, False))
