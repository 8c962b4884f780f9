"""One tensor-parallel rank of a node of a mesh.

Requests come to a node with their tokens, or with the activations that another node has sent; all leave it
after its last layer. Whoever has passed some of its layers elsewhere joins the batch in the middle.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hetis_exec.backend import Tensor
from hetis_exec.batches import Batch
from hetis_exec.messages import DRIVER, Arrived, Leg, Message, Passing, Row, Task
from hetis_exec.primary import PrimaryWorker


class NodeWorker(PrimaryWorker):
    """See :class:`hetis_exec.primary.PrimaryWorker`, whose arguments it takes."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        # Activations that have come, and when they were sent; of each request there are some once at most.
        self._inputs: dict[int, tuple[Tensor, float]] = {}

    def take(self, message: Message) -> None:
        if not isinstance(message, Passing):
            super().take(message)
            return
        at, values = 0, self.kernels.from_wire(message.values)
        for request_id, tokens in zip(message.request_ids, message.tokens, strict=True):
            self._inputs[request_id] = (values[at:at + tokens], message.sent_s)
            at += tokens
        self.send(DRIVER, Arrived(self.device, message.tag))

    def execute(self, seq: int, task: Task) -> None:
        """All layers of a step: rows are in the order in which they come in."""
        begun_s = time.perf_counter()
        rows, legs = task.rows, task.legs
        everything, sent_s = self._input_of(task, begun_s)
        self.stopwatch.start()
        batch: Batch | None = None
        for number, layers in self._segments(legs):
            batch = self.batch(seq, rows[:number])
            self.make_ready(batch)
            here = slice(0, sum(row.new_tokens for row in rows[:number]))
            everything[here] = self.through(batch, layers, everything[here])
        assert batch is not None
        ends = not legs[0].targets and self.place.rank == 0
        ended_s = self.report(batch, self.sample(batch, everything) if ends else None, sent_s, begun_s)
        if self.place.rank == 0:
            self._send_on(rows, legs, everything, ended_s)

    def _segments(self, legs: Sequence[Leg]) -> Iterator[tuple[int, range]]:
        """How many of the rows pass some layers, and these."""
        firsts = sorted({leg.first for leg in legs})
        for first, after in zip(firsts, (*firsts[1:], self.shard.layers), strict=True):
            yield sum(leg.first <= first for leg in legs), range(first, after)

    def _input_of(self, task: Task, begun_s: float) -> tuple[Tensor, float]:
        """Embedded tokens and activations that have come, row by row; and when the last were sent."""
        parts: list[Tensor | None] = []
        sent_s = []
        for row, leg in zip(task.rows, task.legs, strict=True):
            values, at_s = (None, begun_s) if leg.starts else self._inputs.pop(row.request_id)
            parts.append(values)
            sent_s.append(at_s)
        starting = [row for row, leg in zip(task.rows, task.legs, strict=True) if leg.starts]
        if not starting:
            return self.kernels.concatenate(parts), max(sent_s)
        assert task.tokens is not None
        positions = np.concatenate([np.arange(row.position, row.position + row.new_tokens)
                                    for row in starting])
        embedded = self.shard.embed(task.tokens, self.shard.prepare(positions))
        if len(starting) == len(parts):
            return embedded, begun_s
        at = 0
        for n, row in enumerate(task.rows):
            if parts[n] is None:
                parts[n] = embedded[at:at + row.new_tokens]
                at += row.new_tokens
        return self.kernels.concatenate(parts), max(sent_s)

    def _send_on(self, rows: Sequence[Row], legs: Sequence[Leg], values: Tensor, ended_s: float) -> None:
        """Send activations to the nodes where their requests go next, one message to each."""
        if not any(leg.targets for leg in legs):
            return
        begins = np.cumsum([0, *(row.new_tokens for row in rows)]).tolist()
        for tag in dict.fromkeys(leg.tag for leg in legs if leg.targets):
            here = [n for n, leg in enumerate(legs) if leg.targets and leg.tag == tag]
            for device in legs[here[0]].targets:
                # Arrays belong to their receiver.
                part = self.kernels.concatenate([values[begins[n]:begins[n + 1]] for n in here])
                self.send(device, Passing(tag, tuple([rows[n].request_id for n in here]),
                                          tuple([rows[n].new_tokens for n in here]),
                                          self.packed(device, [part])[0], ended_s))
