"""Carries out cache operations on one worker, and the journeys of cache between workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetis_exec.backend import Leaving, Tensor
from hetis_exec.errors import CacheError
from hetis_exec.kvcache import KvPool, TableKey
from hetis_exec.messages import (
    DRIVER,
    Array,
    Arrived,
    AttentionItem,
    Await,
    CacheData,
    Close,
    Control,
    Drop,
    Expect,
    Forget,
    Grow,
    Join,
    Message,
    Op,
    Open,
    Park,
    Send,
    Shed,
)


@dataclass(slots=True)
class Parked:
    """Cache of one group in host memory, shapes (layers, tokens, head_dim), of some blocks of its text."""

    keys: Array
    values: Array
    blocks: NDArray[np.int64]

    def piece(self, first: int, last: int, block_tokens: int) -> tuple[Array, Array]:
        """Tokens ``first .. last - 1``, whose blocks are all here."""
        begin = int(np.searchsorted(self.blocks, first // block_tokens)) * block_tokens + first % block_tokens
        here = slice(begin, begin + last - first)
        return self.keys[:, here], self.values[:, here]


class CacheKeeper:
    """The cache of one device.

    Args:
        send: hands a message to a worker.
        keeps: whether cache for a worker may stay on the device, see
            :meth:`hetis_exec.transport.Endpoint.keeps`; without it none does.

    Attributes:
        seq: number of the driver's latest message that has been carried out.
        pool: the tables.
        parked: cache in host memory.
    """

    def __init__(self, device: int, pool: KvPool, send: Callable[[int, Message], None],
                 keeps: Callable[[int, bool], bool] | None = None) -> None:
        self._keeps = keeps
        self.device = device
        self.pool = pool
        self.seq = 0
        self.parked: dict[TableKey, Parked] = {}
        self._send = send
        self._early: list[CacheData] = []
        self._copies: list[Send | Park] = []
        self._leaving: deque[tuple[Leaving, Callable[[Array, Array], None]]] = deque()
        self._expected: dict[int, int] = {}

    def may_apply(self, control: Control) -> bool:
        """Whether what a message sends away for good has come here.

        It has been on its way since an earlier message, so waiting for it comes to an end.
        """
        return all(self._complete(op) for op in control.ops if isinstance(op, Send) and op.final)

    def apply(self, control: Control) -> None:
        """Carry out the operations of a message.

        Raises:
            CacheError: afterwards the pool does not hold what the ledger says.
        """
        self.seq = control.seq
        for op in control.ops:
            self._carry_out(op)
        if self.pool.used_units != control.used_units:
            raise CacheError(f"device {self.device} holds {self.pool.used_units} units of cache, the ledger "
                             f"says {control.used_units}, after message {control.seq}: {control.ops}")
        due = [data for data in self._early if data.after <= self.seq]
        self._early = [data for data in self._early if data.after > self.seq]
        for data in due:
            self._store(data)
        self._settle()

    def take(self, data: CacheData) -> None:
        """Store a piece of cache, or put it aside until there is room for it."""
        if data.after > self.seq:
            self._early.append(data)
        else:
            self._store(data)
            self._settle()

    @property
    def all_ready(self) -> bool:
        """Whether nothing is on its way to any table."""
        return all(table.ready for table in self.pool.tables.values())

    def ready(self, request_id: int, stage: int, groups: Sequence[int]) -> bool:
        """Whether all of the groups' tokens are here."""
        return all(self.pool.table(TableKey(request_id, stage, g)).ready for g in groups)

    @property
    def copying(self) -> bool:
        """Whether copies are on their way out of the device's memory."""
        return bool(self._leaving)

    def send_copies(self) -> None:
        """Pass on the copies that have left the device, in order."""
        while self._leaving and self._leaving[0][0].done():
            leaving, then = self._leaving.popleft()
            then(*leaving.arrays())

    # -- operations --------------------------------------------------------------------------------

    def _carry_out(self, op: Op) -> None:
        match op:
            case Open() | Join() | Grow() | Close() | Shed() | Await():
                for g in op.groups:
                    self._change_table(op, TableKey(op.request_id, op.stage, g))
            case Drop(request_id):
                for key in self.pool.keys_of(request_id):
                    self.pool.close(key)
            case Forget(request_id):
                self.parked = {key: data for key, data in self.parked.items() if key.request_id != request_id}
            case Expect(tag, pieces):
                self._count(tag, pieces)
            case Send(final=True) | Send(parked=True):
                # What comes next may close its table, or forget it.
                self._copy(op)
            case Send() | Park():
                self._copies.append(op)

    def _change_table(self, op: Open | Join | Grow | Close | Shed | Await, key: TableKey) -> None:
        match op:
            case Open():
                self.pool.open(key._replace(aside=op.aside), op.layers, op.blocks, op.tag, op.absent,
                               op.skipped)
            case Join():
                self.pool.join(key, op.layers, op.blocks, op.tag, op.absent)
            case Grow():
                self.pool.grow(key, op.blocks)
            case Close():
                self.pool.close(key._replace(aside=op.aside))
            case Shed():
                self.pool.shed(key, op.blocks)
            case Await():
                self.pool.table(key).awaited += 1

    # -- journeys ----------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Make the copies whose data is complete."""
        waiting: list[Send | Park] = []
        for op in self._copies:
            if self._complete(op):
                self._copy(op)
            else:
                waiting.append(op)
        self._copies = waiting

    def _complete(self, op: Send | Park) -> bool:
        """Whether what is to be copied is here, or never will be because its table has been closed."""
        tables = [self.pool.tables.get(TableKey(op.request_id, op.stage, g)) for g in op.groups]
        return all(table is None or table.ready for table in tables)

    def _copy(self, op: Send | Park) -> None:
        keys = [TableKey(op.request_id, op.stage, g) for g in op.groups]
        if isinstance(op, Park):
            leaving, blocks = self.pool.leave_all(op.request_id, op.stage, op.groups, op.tokens)
            self._leaving.append((leaving, partial(self._park, op, keys, blocks)))
            self.send_copies()
            return
        deliver, abroad = partial(self._deliver, op, self.seq), op.abroad
        if op.parked:
            k, v = zip(*[self.parked[key].piece(op.first, op.last, self.pool.block_tokens) for key in keys],
                       strict=True)
            deliver(np.stack(k, 1), np.stack(v, 1))
        elif all(key in self.pool.tables for key in keys):
            whole = slice(None) if abroad is None else slice(abroad.first, abroad.first + abroad.layers)
            self._leave(op, op.first, op.last, whole, deliver)
        else:
            # The request has given this cache up: its target only counts the piece.
            nothing = np.empty((0, 0, 0, 0))
            self._deliver(op._replace(groups=()), self.seq, nothing, nothing)

    def _leave(self, op: Send, first: int, last: int, layers: slice,
               then: Callable[[Array, Array], None]) -> None:
        """Have keys and values copied, shapes (layers, groups, tokens, head_dim), and go on with other work.

        Final pieces are waited for: a step may wait for them elsewhere.
        """
        stay = self._keeps is not None and self._keeps(op.target, True)
        leaving = self.pool.leave(op.request_id, op.stage, op.groups, first, last, layers, stay)
        self._leaving.append((leaving, then))
        if op.final:
            leaving.arrays()
        self.send_copies()

    def _park(self, op: Park, keys: Sequence[TableKey], blocks: NDArray[np.int64], k: Array,
              v: Array) -> None:
        for n, key in enumerate(keys):
            self.parked[key] = Parked(k[:, n], v[:, n], blocks)
        self._count(op.tag, -1)

    def _deliver(self, op: Send, after: int, k: Array, v: Array) -> None:
        stage, at = op.stage, 0
        if op.abroad is not None:
            after, stage, at = op.abroad.after, op.abroad.stage, op.abroad.at
        layers = tuple(range(at, at + k.shape[0]))
        self._send(op.target, CacheData(after, op.tag, op.request_id, stage, layers, op.groups, op.first, k,
                                        v, op.final))

    def _store(self, data: CacheData) -> None:
        """Write a piece of cache, unless its table has been closed meanwhile, and count it."""
        keys, values = self.pool.kernels.from_wire(data.keys), self.pool.kernels.from_wire(data.values)
        tables = self.pool.tables
        found = {n: key for n, g in enumerate(data.groups) for aside in (False, True)
                 if (key := TableKey(data.request_id, data.stage, g, aside)) in tables
                 and tables[key].takes(data.tag)}
        if found:
            here = list(found)
            spots = self.pool.spots(list(found.values()), data.start, keys.shape[2], data.layers)
            if len(here) < len(data.groups):
                keys, values = keys[:, here], values[:, here]
            self.pool.write_groups(spots, slice(None), keys, values)
        for key in found.values():
            tables[key].awaited -= data.final
        if not data.final:
            self._count(data.tag, -1)

    def _count(self, tag: int, change: int) -> None:
        """Keep count of the pieces that are still to come; at zero all have."""
        left = self._expected[tag] = self._expected.get(tag, 0) + change
        if left == 0:
            del self._expected[tag]
            self._send(DRIVER, Arrived(self.device, tag))

    # -- attention ---------------------------------------------------------------------------------

    def plan(self, stage: int, items: Sequence[AttentionItem]) -> Any:
        """Decode attention of a batch, for all layers of a stage; the groups of an item lie side by side.

        It holds until a table of one of the requests is opened or closed.
        """
        tables, positions = [], []
        for request_id, position, groups in items:
            tables += [self.pool.table(TableKey(request_id, stage, g)) for g in groups]
            positions += [position] * len(groups)
        return self.pool.kernels.plan(tables, positions)

    def plan_parts(self, stage: int, items: Sequence[AttentionItem]) -> Any:
        """The same for groups of which only some tokens are here."""
        tables = [self.pool.table(TableKey(item.request_id, stage, g)) for item in items for g in item.groups]
        positions = [item.position for item in items for _ in item.groups]
        return self.pool.kernels.plan_parts(
            tables, [self.pool.position_in(*pair) for pair in zip(tables, positions, strict=True)])

    def decode_parts(self, plan: Any, layer: int, queries: Tensor, keys: Tensor,
                     values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens that belong here and attend to what is here, row by row of the plan.

        The result is what :meth:`hetis_exec.backend.Kernels.decode_parts` gives.
        """
        found: tuple[Tensor, Tensor] = self.pool.kernels.decode_parts(plan, layer, queries, keys, values)
        return found

    def decode_attention(self, plan: Any, layer: int, queries: Tensor, keys: Tensor,
                         values: Tensor) -> Tensor:
        """Store the new token's keys and values and attend to all tokens, row by row of the plan.

        Shapes as in :class:`AttentionRequest`.
        """
        return self.pool.kernels.decode(plan, layer, queries, keys, values)
