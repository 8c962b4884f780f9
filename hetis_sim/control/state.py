"""The life of a request inside the control plane."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from hetis_sim.control.placement import PlacementShape
from hetis_sim.control.step import Transfer
from hetis_sim.policies.view import RequestView
from hetis_sim.spec.errors import require
from hetis_sim.spec.request import Request


class Status(IntEnum):
    """Stations of a request; see ``docs/structure.md`` for the moves between them."""

    WAITING = 0
    PREFILL = 1
    TRANSFER = 2
    DECODE = 3
    SWAPPED = 4
    FINISHED = 5
    REJECTED = 6


Ending = Literal["stop", "aborted"]
"""Why a request ends early: its text is complete, or nobody waits for it any more."""

ENDINGS: tuple[Ending, ...] = ("stop", "aborted")


@dataclass(frozen=True, slots=True, eq=False)
class PendingMove:
    """A move under way: where it leads, what is reserved for it, what it gives back, blocks at its begin."""

    shape: PlacementShape
    gained_units: tuple[tuple[int, int], ...]
    lost_units: tuple[tuple[int, int], ...]
    blocks: int
    transfer: Transfer


@dataclass(frozen=True, slots=True, eq=False)
class SwappedCache:
    """Cache parked in host memory: the placement it had and the bytes in each host."""

    shape: PlacementShape
    host_bytes: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, eq=False)
class HeldCache:
    """Cache held for a request: blocks of every group of a shape, for so many tokens."""

    shape: PlacementShape
    blocks: int
    tokens: int


@dataclass(slots=True, eq=False)
class Landing:
    """A handoff under way: where the request will decode, and what is held for it there."""

    instance: int
    held: HeldCache
    arrived: bool = False


@dataclass(slots=True, eq=False)
class RequestState:
    """One request as the controller keeps it.

    While it decodes, its cached tokens are ``offset`` plus the iterations its lane has
    issued, so that an iteration costs nothing per request.

    Attributes:
        request: as submitted.
        status: where it is.
        context_tokens: tokens to prefill before it can decode: the prompt, after a
            recompute also the tokens generated so far.
        prefilled_tokens: of those, computed in this attempt.
        generated_base: tokens generated when it last joined a lane (or now, outside one).
        offset: cached tokens minus iterations issued by its lane, at joining.
        shape: its placement and what follows from it.
        held_blocks: blocks of every group that the ledger holds for it, outside a lane.
        staged_blocks: blocks held at primaries until a chunked prompt has been pushed.
        in_flight_transfers: transfers it waits for before it decodes.
        move: the move under way, if any.
        whole: its prompt has to be computed in one piece.
        swap: its cache in host memory, if any.
        landing: its handoff to another instance, if one is under way.
        ending: why it ends, or has ended, before it has all its tokens.
        unseen_before: steps that its instance makes before it is looked at (asynchronous scheduling).
    """

    request: Request
    status: Status = Status.WAITING
    instance: int = -1
    lane: int = -1
    context_tokens: int = 0
    prefilled_tokens: int = 0
    generated_base: int = 0
    joined_at: int = 0
    offset: int = 0
    cached_tokens: int = 0
    shape: PlacementShape | None = None
    in_flight_transfers: int = 0
    held_blocks: int = 0
    staged_blocks: int = 0
    move: PendingMove | None = None
    whole: bool = False
    swap: SwappedCache | None = None
    landing: Landing | None = None
    ending: Ending | None = None
    unseen_before: int = 0
    first_scheduled_s: float = math.nan
    first_token_s: float = math.nan
    finish_s: float = math.nan
    last_token_s: float = math.nan
    preemptions: int = 0
    moves: int = 0
    moved_bytes: float = 0.0
    reason: str = ""
    remote_share: float = 0.0

    @property
    def request_id(self) -> int:
        """Id of the request."""
        return self.request.request_id

    @property
    def output_tokens(self) -> int:
        """Tokens of a request whose text was complete early; those asked for of any other."""
        early = self.status == Status.FINISHED and self.ending is not None
        return self.generated_base if early else self.request.output_tokens

    def view(self, generated: int, movable: bool = False) -> RequestView:
        """What a policy may see of it."""
        request = self.request
        context = self.context_tokens if self.status != Status.DECODE else request.prompt_tokens + generated
        shape = self.shape
        return RequestView(request.request_id, request.arrival_s, request.prompt_tokens, context, generated,
                           shape.placement if shape else None, self.preemptions, movable,
                           shape.ranges.blocks if shape and shape.ranges else ())


def rejected(state: RequestState, reason: str, now_s: float) -> RequestState:
    """Turn a request away that holds no cache."""
    state.status, state.reason, state.finish_s = Status.REJECTED, reason, now_s
    return state


def close(state: RequestState, now_s: float) -> bool:
    """Give a request that holds nothing any more its last station; whether it counts as finished.

    It does with all its tokens, or with a complete text. One that was given up, or that has no token yet,
    counts among the rejected.
    """
    whole = state.generated_base >= state.request.output_tokens
    if state.ending is None or whole or (state.ending == "stop" and state.generated_base > 0):
        state.status, state.finish_s = Status.FINISHED, now_s
        state.reason = "stop" if state.ending == "stop" else ""
        return True
    rejected(state, state.ending, now_s)
    return False


def known_request(states: Mapping[int, RequestState], request_id: int, reason: str) -> RequestState:
    """The request that is to end.

    Raises:
        SpecError: there is none of this id, or it cannot end for this reason.
    """
    require(reason in ENDINGS, "reason", reason, f"one of {', '.join(ENDINGS)}")
    require(request_id in states, "request_id", request_id, "that of a request that has been submitted")
    return states[request_id]


def stations(states: Collection[RequestState], running: int, waiting: int) -> dict[str, int]:
    """All requests of a run by station."""
    ended = [state.status for state in states if state.status >= Status.FINISHED]
    finished = sum(status == Status.FINISHED for status in ended)
    return {"submitted": len(states), "running": running, "waiting": waiting, "finished": finished,
            "rejected": len(ended) - finished}
