"""What one request holds on the devices of an instance, what is on its way, and what devices are told."""

from __future__ import annotations

from dataclasses import dataclass, field

from hetis_exec.covers import Cover, Key
from hetis_exec.messages import Op, Span
from hetis_sim.control.placement import PlacementShape
from hetis_sim.control.state import HeldCache, PendingMove
from hetis_sim.control.step import Transfer, TransferKind


@dataclass(slots=True, eq=False)
class Shipment:
    """Cache on its way, as devices see it.

    Attributes:
        flows: (source, target, bytes); host h's memory is ``-1 - h``.
        pieces: pieces that devices have not got yet, by device.
        transfer: what the control plane calls it.
        begun_s: when it began.
    """

    tag: int
    kind: TransferKind
    request_id: int
    flows: list[tuple[int, int, float]] = field(default_factory=list)
    pieces: dict[int, int] = field(default_factory=dict)
    transfer: Transfer | None = None
    begun_s: float = 0.0

    def expect(self, device: int, pieces: int) -> None:
        """Count pieces for a device."""
        self.pieces[device] = self.pieces.get(device, 0) + pieces


@dataclass(slots=True, eq=False)
class Moving:
    """A move under way: ``copied`` tokens of what is ``early`` go ahead of the switch.

    Attributes:
        aside: (stage, position, groups) of tables that are filled at their targets until then.
    """

    pending: PendingMove
    cover: Cover
    early: frozenset[Key]
    copied: int
    tag: int
    aside: list[tuple[int, int, tuple[int, ...]]]


@dataclass(slots=True, eq=False)
class Holding:
    """What one request holds.

    Attributes:
        epoch: its preemptions when it got it.
        cover: the places of its blocks.
        blocks: of every group, over all places.
        staged: blocks held at the ranks until what belongs elsewhere has been pushed.
        tag: marks data that fills it for the first time.
        landing: how the control plane knows what is held for a request that is still elsewhere.
        spans: of its cover, by stage, as workers know them.
    """

    epoch: int
    shape: PlacementShape
    cover: Cover
    blocks: int
    staged: int
    tag: int
    move: Moving | None = None
    landing: HeldCache | None = None
    spans: dict[int, tuple[Span, ...]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Ops:
    """Operations of one message to one device, in the order in which they make room for each other."""

    last_pieces: list[Op] = field(default_factory=list)
    closes: list[Op] = field(default_factory=list)
    opens: list[Op] = field(default_factory=list)
    expects: list[Op] = field(default_factory=list)
    copies: list[Op] = field(default_factory=list)

    def in_order(self) -> tuple[Op, ...]:
        """All of them."""
        return (*self.last_pieces, *self.closes, *self.opens, *self.expects, *self.copies)
