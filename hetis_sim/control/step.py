"""What the controller hands to a driver: steps to execute and transfers to carry out."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from hetis_sim.control.mesh.walk import Message
    from hetis_sim.control.state import RequestState


class StepKind(IntEnum):
    """Phases that a step computes."""

    PREFILL = 0
    DECODE = 1
    MIXED = 2


class Chunk(NamedTuple):
    """A piece of one request's prefill: ``new_tokens`` after ``context_tokens`` cached ones."""

    state: RequestState
    new_tokens: int
    context_tokens: int
    last: bool


class Flow(NamedTuple):
    """Bytes from one place to another. Places are device ids; host h's memory is ``-1 - h``.

    ``tail_bytes`` of them exist only at the end of the step that the flow streams with.
    """

    source: int
    target: int
    size_bytes: float
    tail_bytes: float = 0.0


TransferKind = Literal["push", "move", "swap_out", "swap_in", "handoff"]


@dataclass(slots=True, eq=False)
class Transfer:
    """Cache of one request on its way. The driver reports it once all its flows have ended.

    ``target`` is the instance that it leads to where that is another one, else -1.
    """

    request_id: int
    instance: int
    kind: TransferKind
    flows: tuple[Flow, ...]
    target: int = -1

    @property
    def size_bytes(self) -> float:
        """Bytes over all flows."""
        return sum(flow.size_bytes for flow in self.flows)


@dataclass(slots=True, eq=False)
class Step:
    """Work for one micro-batch, through all stages of its instance.

    A decode step may stand for several iterations. The controller guarantees that nothing
    it knows of could change a decision before ``limit`` of them; it may lower the limit
    while the step is under way, and then the driver stops at the next iteration boundary.

    Attributes:
        instance, lane: which micro-batch.
        kind: prefill, decode, or both together (chunked prefill).
        chunks: pieces of prompts to prefill.
        decoding: requests that get a token in every iteration.
        limit: iterations at most.
        issued: iterations begun, counted by the driver.
        accounted: of those, the ones whose cache the controller has booked.
        transfers: cache pushes that stream alongside, layer by layer.
    """

    instance: int
    lane: int
    kind: StepKind
    chunks: tuple[Chunk, ...] = ()
    decoding: int = 0
    limit: int = 1
    issued: int = 0
    accounted: int = 0
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens computed in this step."""
        return sum(chunk.new_tokens for chunk in self.chunks)


@dataclass(slots=True)
class Outcome:
    """What happened at the end of a step or a transfer, for the driver to act on and record.

    ``gaps_s`` are times between two tokens of requests that had lost their cache meanwhile.
    ``prefilled`` and ``evicted`` requests are to go on in another instance; the controller sees
    to it and names the instances it has ``touched``, for the driver to look at again.
    ``messages`` are to be sent between the nodes of a mesh.
    """

    finished: list[RequestState] = field(default_factory=list)
    rejected: list[RequestState] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    prefilled: list[RequestState] = field(default_factory=list)
    evicted: list[RequestState] = field(default_factory=list)
    touched: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether nothing has happened."""
        return not (self.finished or self.rejected or self.gaps_s or self.transfers or self.prefilled
                    or self.evicted or self.touched or self.messages)


NOTHING = Outcome()
"""Shared by all callers to whom nothing has happened; not to be added to."""
