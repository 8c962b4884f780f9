"""The primary worker: one tensor-parallel rank of one pipeline stage."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from hetis_exec.attention import attend_causal
from hetis_exec.errors import CacheError, ExecutorError
from hetis_exec.kvcache import KvPool, TableKey
from hetis_exec.messages import (
    DRIVER,
    Array,
    AttentionItem,
    AttentionRequest,
    AttentionResult,
    CacheData,
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
from hetis_exec.transport import Endpoint
from hetis_exec.workers import Stopped, Worker
from hetis_sim.policies.plan import InstancePlan


class Shard(Protocol):
    """The dense modules of one rank; :class:`hetis_exec.toy_model.ToyShard` says what each method does."""

    groups: tuple[int, ...]
    layers: int

    def embed(self, tokens: Tokens) -> Array:
        """Token ids to activations."""

    def qkv(self, layer: int, hidden: Array, positions: Tokens) -> tuple[Array, Array, Array]:
        """Queries, keys and values of its groups."""

    def project(self, layer: int, attended: Array) -> Array:
        """Its part of the output projection."""

    def mlp(self, layer: int, hidden: Array) -> Array:
        """Its part of the MLP."""

    def sample(self, hidden: Array) -> Tokens:
        """Next tokens."""


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
    """

    items: list[AttentionItem] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Spent:
    """Seconds spent in the parts of a stage."""

    dense_s: float = 0.0
    attention_s: float = 0.0
    head_transfer_s: float = 0.0
    collective_s: float = 0.0
    worker_busy_s: dict[int, float] = field(default_factory=dict)


@dataclass(slots=True)
class Batch:
    """A step as one rank computes it."""

    seq: int
    rows: tuple[Row, ...]
    positions: Tokens
    local: Share
    remote: dict[int, Share]
    spent: Spent = field(default_factory=Spent)


class PrimaryWorker(Worker):
    """Dense modules, prefill attention, and decode attention of the heads that stay here."""

    def __init__(self, device: int, endpoint: Endpoint, pool: KvPool, timeout_s: float, place: Rank,
                 shard: Shard) -> None:
        super().__init__(device, endpoint, pool, timeout_s)
        self._place = place
        self._shard = shard
        self._controls: deque[Control | Stop] = deque()
        self._box: dict[tuple[object, ...], Message] = {}
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
        hidden, sent_s, begun_s = self._input(seq, task)
        batch = self._batch(seq, task.rows)
        stage, items = self._place.stage, batch.local.items
        self.wait_until(lambda: all(self.cache.ready(i.request_id, stage, i.groups) for i in items),
                        "heads on their way here")
        for layer in range(self._shard.layers):
            hidden = hidden + self._sum(batch, 2 * layer, self._attention_block(batch, layer, hidden))
            hidden = hidden + self._sum(batch, 2 * layer + 1, self._mlp(batch, layer, hidden))
        self._hand_over(batch, hidden, sent_s, begun_s)

    def _input(self, seq: int, task: Task) -> tuple[Array, float, float]:
        """Activations, when they were sent, and when work on them begins."""
        begun_s = time.perf_counter()
        if task.tokens is not None:
            return self._shard.embed(task.tokens), begun_s, begun_s
        message = self._fetch((Hidden, seq), f"activations of step {seq}")
        assert isinstance(message, Hidden)
        return message.values, message.sent_s, time.perf_counter()

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
        return Batch(seq, rows, positions, shares.pop(self.device), shares)

    def _columns(self, row: Row) -> Iterator[tuple[int, list[int]]]:
        """(device, places among this rank's groups) for every device that holds any of them."""
        holders = [row.holders[g] for g in self._shard.groups]
        for device in dict.fromkeys(holders):
            yield device, [n for n, holder in enumerate(holders) if holder == device]

    def _hand_over(self, batch: Batch, hidden: Array, sent_s: float, begun_s: float) -> None:
        place, spent = self._place, batch.spent
        tokens: Tokens | None = None
        if not place.next_devices and place.rank == 0:
            at_s = time.perf_counter()
            ends = np.cumsum([row.new_tokens for row in batch.rows]) - 1
            tokens = self._shard.sample(hidden[ends[[row.samples for row in batch.rows]]])
            spent.dense_s += time.perf_counter() - at_s
        ended_s = time.perf_counter()
        times = StageTimes(sent_s, self._free_s, begun_s, ended_s, spent.dense_s, spent.attention_s,
                           spent.head_transfer_s, spent.collective_s)
        self._free_s = ended_s
        # The driver hears that this stage is free before the next one can hear of its work.
        self.send(DRIVER, StageDone(batch.seq, self.device, place.stage, place.rank, times,
                                    tuple(spent.worker_busy_s.items()), tokens))
        for device in place.next_devices if place.rank == 0 else ():
            self.send(device, Hidden(batch.seq, hidden, ended_s))

    def _sum(self, batch: Batch, number: int, values: Array) -> Array:
        """Sum of all ranks' values, added up in the same order everywhere."""
        peers, rank = self._place.peers, self._place.rank
        if len(peers) == 1:
            return values
        begun_s = time.perf_counter()
        for device in peers:
            if device != self.device:
                self.send(device, Partial(batch.seq, number, rank, values))
        total = np.zeros_like(values)
        for other, device in enumerate(peers):
            if other == rank:
                total = total + values
            else:
                message = self._fetch((Partial, batch.seq, number, other), f"a sum from device {device}")
                assert isinstance(message, Partial)
                total = total + message.values
        batch.spent.collective_s += time.perf_counter() - begun_s
        return total

    def _mlp(self, batch: Batch, layer: int, hidden: Array) -> Array:
        begun_s = time.perf_counter()
        values = self._shard.mlp(layer, hidden)
        batch.spent.dense_s += time.perf_counter() - begun_s
        return values

    # -- attention ---------------------------------------------------------------------------------

    def _attention_block(self, batch: Batch, layer: int, hidden: Array) -> Array:
        """Remote heads are sent off first and gathered last."""
        stage, spent, clock = self._place.stage, batch.spent, time.perf_counter
        t0 = clock()
        q, k, v = self._shard.qkv(layer, hidden, batch.positions)
        attended = np.empty_like(q)
        t1 = clock()
        for device, share in batch.remote.items():
            at = share.rows, share.columns
            self.send(device, AttentionRequest(batch.seq, self.device, stage, layer, tuple(share.items),
                                               q[at], k[at], v[at]))
        t2 = clock()
        at = batch.local.rows, batch.local.columns
        if batch.local.items:
            attended[at] = self.cache.decode_attention(stage, layer, batch.local.items, q[at], k[at], v[at])
        self._prefill(batch, layer, q, k, v, attended)
        t3 = clock()
        for device, share in batch.remote.items():
            key = AttentionResult, batch.seq, layer, device
            result = self._fetch(key, f"heads from device {device}")
            assert isinstance(result, AttentionResult)
            attended[share.rows, share.columns] = result.values
            spent.worker_busy_s[device] = spent.worker_busy_s.get(device, 0.0) + result.busy_s
        t4 = clock()
        projected = self._shard.project(layer, attended)
        spent.dense_s += t1 - t0 + clock() - t4
        spent.head_transfer_s += t2 - t1 + t4 - t3
        spent.attention_s += t3 - t2
        return projected

    def _prefill(self, batch: Batch, layer: int, q: Array, k: Array, v: Array, attended: Array) -> None:
        """Causal attention of the prompts in the batch, over all groups whose weights are here."""
        at = 0
        for row in batch.rows:
            here = slice(at, at + row.new_tokens)
            at = here.stop
            if not row.prefill:
                continue
            keys, values = self._prompt(layer, row, k[here].transpose(1, 0, 2), v[here].transpose(1, 0, 2))
            out = attend_causal(q[here].transpose(1, 2, 0, 3), keys, values)
            attended[here] = out.transpose(2, 0, 1, 3)
            if row.push_tag >= 0:
                self._push(batch.seq, layer, row, keys, values)

    def _prompt(self, layer: int, row: Row, k: Array, v: Array) -> tuple[Array, Array]:
        """Keys and values (groups, tokens, d) of a prompt so far; new tokens are stored where they belong.

        Raises:
            CacheError: the prompt came in pieces, and no room was booked for those before.
        """
        stage, own, pool = self._place.stage, self._shard.groups, self.cache.pool
        missing = [g for g in own if TableKey(row.request_id, stage, g) not in pool.tables]
        for n, g in enumerate(own):
            if g not in missing:
                pool.write(TableKey(row.request_id, stage, g), layer, row.position, k[n], v[n])
        if row.position == 0:
            return k, v
        if missing:
            raise CacheError(f"device {self.device} has no room for the first {row.position} tokens of "
                             f"request {row.request_id} in KV groups {missing}: no staging copy was booked")
        return pool.read(row.request_id, stage, own, layer, 0, row.position + row.new_tokens)

    def _push(self, seq: int, layer: int, row: Row, keys: Array, values: Array) -> None:
        """Send the groups of a complete prompt that will live elsewhere, as soon as a layer has them."""
        for device, columns in self._columns(row):
            if device != self.device:
                groups = tuple(self._shard.groups[n] for n in columns)
                self.send(device, CacheData(seq, row.push_tag, row.request_id, self._place.stage, (layer,),
                                            groups, 0, keys[None, columns], values[None, columns], False))
