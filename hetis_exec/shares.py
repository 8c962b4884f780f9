"""Who computes what of a batch's decode attention, as one rank divides it.

Most requests have all tokens of a KV group at one device. Where a request's tokens are divided, every
device that has some of them attends to these, and the rank joins the parts by their softmax sums.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from hetis_exec.backend import Kernels, Tensor
from hetis_exec.messages import AttentionItem, Row

Place = tuple[int, int]
"""Of a group: its token's row in the batch, and its column among the rank's groups."""

Pick = Callable[[Tensor], Tensor]

ELSEWHERE = -1
"""Position of a new token that is stored at another device."""


@dataclass(slots=True)
class Share:
    """The part of a batch's decode attention that one device computes.

    Rows of queries are those of whole contexts, then those of parts with the new token, then all others.

    Attributes:
        items: its requests and groups with whole contexts.
        parts: the others, those with the new token first.
        plain, fresh: rows of whole contexts, and rows with a new token.
        at, at_plain, at_fresh: the places of all rows, and of these, as an index.
        joined: the rows of the batch's joined parts that those of ``parts`` belong to, as an index.
        whole: the rows are those of the batch, in order, and none is a part.
        block: consecutive rows and columns of the batch that they all are, where none is a part and they are
            not the whole batch: a view takes less time than places that are picked one by one.
    """

    items: list[AttentionItem] = field(default_factory=list)
    parts: list[AttentionItem] = field(default_factory=list)
    plain: int = 0
    fresh: int = 0
    at: tuple[Tensor, ...] = ()
    at_plain: tuple[Tensor, ...] = ()
    at_fresh: tuple[Tensor, ...] = ()
    joined: tuple[Tensor, ...] = ()
    whole: bool = False
    block: tuple[slice, slice] | None = None

    @property
    def is_view(self) -> bool:
        """Whether its part of values is a view of them."""
        return self.whole or self.block is not None

    def queries(self, values: Tensor) -> Tensor:
        """Its part of values of all rows and columns: (rows, ...), or a view (requests, groups, ...)."""
        if self.block is not None:
            return values[self.block]
        return values if self.whole else values[self.at]

    def new(self, values: Tensor) -> Tensor:
        """The same for its rows with a new token."""
        if self.block is not None:
            return values[self.block]
        return values if self.whole else values[self.at_fresh]

    @property
    def picks(self) -> tuple[Pick, Pick, Pick]:
        """What takes its part of queries, keys and values."""
        return self.queries, self.new, self.new

    def put(self, attended: Tensor, found: Tensor) -> Tensor:
        """All that has been attended, with what was found for whole contexts."""
        if self.whole:
            return found.reshape(attended.shape)
        if self.block is not None:
            place = attended[self.block]
            place[...] = found.reshape(place.shape)
        elif self.items:
            attended[self.at_plain] = found
        return attended


@dataclass(slots=True)
class Shares:
    """The division of a batch.

    Attributes:
        by_device: the share of each.
        divided: places of groups whose tokens are divided; None where there are none.
        number: of these places.
    """

    by_device: dict[int, Share]
    divided: tuple[Tensor, ...] | None
    number: int


@dataclass(slots=True)
class _Draft:
    """A share in the making, of one kind: items and the places of their groups."""

    items: list[AttentionItem] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    joined: list[int] = field(default_factory=list)

    def add(self, item: AttentionItem, row: int, columns: Sequence[int], joined: Sequence[int] = ()) -> None:
        """Take in some groups of a request."""
        self.items.append(item)
        self.places += [(row, column) for column in columns]
        self.joined += joined


Drafts = defaultdict[int, tuple[_Draft, _Draft, _Draft]]
"""By device: whole contexts, parts with the new token, other parts."""


def columns_of(holders: Sequence[int], groups: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """(device, places among a rank's groups) for every device that holds any of them."""
    mine = [holders[g] for g in groups]
    for device in dict.fromkeys(mine):
        yield device, [n for n, holder in enumerate(mine) if holder == device]


def divide(rows: Sequence[Row], groups: Sequence[int], kernels: Kernels) -> Shares:
    """Divide the decode attention of a batch over the devices that hold its cache.

    Args:
        rows: of the batch; prompts are left out.
        groups: whose weights the rank holds.
    """
    drafts: Drafts = defaultdict(lambda: (_Draft(), _Draft(), _Draft()))
    divided: list[Place] = []
    at = 0
    for row in rows:
        if not row.prefill:
            _add(row, at, groups, drafts, divided)
        at += row.new_tokens
    shares = {device: _share(draft, at * len(groups), kernels) for device, draft in drafts.items()}
    return Shares(shares, _index(divided, kernels) if divided else None, len(divided))


def _add(row: Row, at: int, groups: Sequence[int], drafts: Drafts, divided: list[Place]) -> None:
    """Take in one request, whose new token is row ``at`` of the batch."""
    first = len(divided)
    for device, columns in columns_of(row.holders, groups):
        item = AttentionItem(row.request_id, row.position, tuple([groups[n] for n in columns]))
        whole, tail, _ = drafts[device]
        if row.older:
            tail.add(item, at, columns, [first + n for n in columns])
        else:
            whole.add(item, at, columns)
    if not row.older:
        return
    divided += [(at, n) for n in range(len(groups))]
    elsewhere: dict[int, dict[int, None]] = {}
    for span in row.older:
        for n, g in enumerate(groups):
            if span.holders[g] != row.holders[g]:
                elsewhere.setdefault(span.holders[g], {})[n] = None
    for device, found in elsewhere.items():
        columns = sorted(found)
        item = AttentionItem(row.request_id, ELSEWHERE, tuple([groups[n] for n in columns]))
        drafts[device][2].add(item, at, columns, [first + n for n in columns])


def _share(drafts: tuple[_Draft, _Draft, _Draft], all_rows: int, kernels: Kernels) -> Share:
    whole, tail, still = drafts
    plain, fresh = len(whole.places), len(whole.places) + len(tail.places)
    places = whole.places + tail.places + still.places
    share = Share(whole.items, tail.items + still.items, plain, fresh, whole=plain == all_rows)
    if share.whole:
        return share
    share.block = _block(places) if not share.parts else None
    if share.block is not None:
        return share
    share.at = _index(places, kernels)
    share.at_plain = share.at if plain == len(places) else _index(places[:plain], kernels)
    share.at_fresh = share.at if fresh == len(places) else _index(places[:fresh], kernels)
    if share.parts:
        share.joined = kernels.index(tail.joined + still.joined)
    return share


def _block(places: Sequence[Place]) -> tuple[slice, slice] | None:
    """The rows and columns that places one after the other fill, if they do so."""
    (first, begin), (last, end) = places[0], places[-1]
    rows, columns = range(first, last + 1), range(begin, end + 1)
    if len(places) != len(rows) * len(columns):
        return None
    if any(place != filled for place, filled in zip(places, product(rows, columns), strict=True)):
        return None
    return slice(rows.start, rows.stop), slice(columns.start, columns.stop)


def _index(places: Sequence[Place], kernels: Kernels) -> tuple[Tensor, ...]:
    return kernels.index([row for row, _ in places], [column for _, column in places])
