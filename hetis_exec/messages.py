"""What the driver and the workers tell each other.

The driver numbers its messages; every worker of an instance gets each of them, in order. A
message between workers that touches cache carries in ``after`` the number of the driver's
message that made room for it; whoever is not that far yet puts it aside. So no link has to
be faster than another one. Arrays belong to the receiver once they are sent.

Every instance has numbers of its own. Cache that goes to another instance carries a number of
that one, which whoever tells the sender to send it passes on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DRIVER = -1
"""Address of the driver; workers have their device ids."""

Array = NDArray[np.floating[Any]]
Tokens = NDArray[np.int64]


# -- what is to be done with the cache -------------------------------------------------


class Open(NamedTuple):
    """Allocate all blocks before ``blocks`` for each of the groups, but for those that are ``absent``.

    ``tag`` marks the data meant for them. ``aside``: they are not attended to until they are joined
    with what is here already. ``skipped``: layers of the stage before the first of ``layers``, which the
    request does not pass.
    """

    request_id: int
    stage: int
    groups: tuple[int, ...]
    layers: int
    blocks: int
    tag: int
    absent: tuple[int, ...] = ()
    aside: bool = False
    skipped: int = 0


class Join(NamedTuple):
    """Have all blocks before ``blocks`` of the groups, but for those that are ``absent``.

    What has been copied aside is taken in, and whatever else is lacking is allocated; data with ``tag`` is
    meant for it.
    """

    request_id: int
    stage: int
    groups: tuple[int, ...]
    layers: int
    blocks: int
    tag: int
    absent: tuple[int, ...]


class Grow(NamedTuple):
    """Have ``blocks`` for each of the groups."""

    request_id: int
    stage: int
    groups: tuple[int, ...]
    blocks: int


class Close(NamedTuple):
    """Free the blocks of the groups, or what has been copied aside for them."""

    request_id: int
    stage: int
    groups: tuple[int, ...]
    aside: bool = False


class Shed(NamedTuple):
    """Free some blocks of the groups; the others stay."""

    request_id: int
    stage: int
    groups: tuple[int, ...]
    blocks: tuple[int, ...]


class Drop(NamedTuple):
    """Free everything the request holds on this device; what is parked in host memory stays."""

    request_id: int


class Forget(NamedTuple):
    """Discard what is parked of the request in host memory."""

    request_id: int


class Abroad(NamedTuple):
    """Where some layers of a stage go in another instance, whose stages are cut elsewhere.

    Attributes:
        stage: of the other instance.
        first, layers: the first of them, as the sender's stage counts, and how many.
        at: the first of them, as the other stage counts.
        after: number of the message that makes room for them there.
    """

    stage: int
    first: int
    layers: int
    at: int
    after: int


class Send(NamedTuple):
    """Copy tokens ``first .. last - 1`` of the groups to another worker.

    ``final`` pieces make the tables at their target ready for attention. ``parked`` takes the
    data from host memory, where it stays until it is forgotten. ``abroad`` is None within an instance.
    """

    request_id: int
    stage: int
    groups: tuple[int, ...]
    first: int
    last: int
    target: int
    tag: int
    final: bool = False
    parked: bool = False
    abroad: Abroad | None = None


class Await(NamedTuple):
    """The groups are not to be read until one more final piece has come."""

    request_id: int
    stage: int
    groups: tuple[int, ...]


class Park(NamedTuple):
    """Copy the first ``tokens`` of the groups to host memory, then report the tag."""

    request_id: int
    stage: int
    groups: tuple[int, ...]
    tokens: int
    tag: int


class Expect(NamedTuple):
    """Report the tag once ``pieces`` of it have come."""

    tag: int
    pieces: int


Op = Open | Join | Grow | Close | Shed | Drop | Forget | Send | Await | Park | Expect


# -- from the driver to the workers ------------------------------------------------------


class Onward(NamedTuple):
    """Groups of a prompt that one rank sends to another instance, layer by layer as they are computed."""

    source: int
    target: int
    groups: tuple[int, ...]
    tag: int
    abroad: Abroad


class Sample(NamedTuple):
    """How the tokens of one request are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: only the likeliest tokens are drawn from, as few as have this probability together.
        top_k: and no more than so many of them; 0 for any number.
        seed: requests with equal prompts and seeds draw equal numbers; None draws others for each request.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


class Span(NamedTuple):
    """Older tokens of a request, from the end of the span before up to ``last``, and who holds each group."""

    last: int
    holders: tuple[int, ...]


class Row(NamedTuple):
    """One request in one step, as one stage sees it.

    Attributes:
        position: of its first new token.
        new_tokens: 1 when it decodes.
        samples: whether a token is sampled from its last position.
        prefill: its attention is computed where its weights are, over the whole prompt so far.
        holders: device that holds each KV group of the stage, or the newest tokens where these are divided.
        push_tag: with the last piece of a prompt, remote groups go to their holders under
            this tag; -1 otherwise.
        sample: how its token is chosen where that is not as the run's settings say.
        onward: with the last piece of a prompt, what of this stage goes to another instance.
        older: who holds the older tokens, where they are not all with the holders.
    """

    request_id: int
    position: int
    new_tokens: int
    samples: bool
    prefill: bool
    holders: tuple[int, ...]
    push_tag: int
    sample: Sample | None = None
    onward: tuple[Onward, ...] = ()
    older: tuple[Span, ...] = ()


class Leg(NamedTuple):
    """How a request passes a node of a mesh.

    Attributes:
        first: the first layer that it passes there, as the node counts.
        starts: it begins there with its tokens; otherwise its activations have come from another node.
        targets: devices of the node that it goes to next; none at the end.
        tag: of its activations on their way there.
    """

    first: int
    starts: bool
    targets: tuple[int, ...]
    tag: int


class Task(NamedTuple):
    """A step for one stage or node.

    Attributes:
        tokens: the new token ids of all rows that begin here, packed; None where none do.
        legs: of the rows, at a node of a mesh.
    """

    rows: tuple[Row, ...]
    tokens: Tokens | None
    legs: tuple[Leg, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        # Columns of plain tuples take a fraction of the time of rows that are objects.
        return task_of_columns, (tuple(zip(*self.rows, strict=True)), self.tokens, self.legs)


def task_of_columns(columns: tuple[tuple[Any, ...], ...], tokens: Tokens | None,
                    legs: tuple[Leg, ...]) -> Task:
    """A task whose rows come column by column."""
    return Task(tuple(map(Row._make, zip(*columns, strict=True))), tokens, legs)


class Control(NamedTuple):
    """What to do with the cache, then what to compute.

    ``used_units`` is what the ledger says this device holds after the operations.
    """

    seq: int
    ops: tuple[Op, ...]
    used_units: int
    task: Task | None


class Stop(NamedTuple):
    """End: after everything that was said before, or at once."""

    at_once: bool


# -- between workers -----------------------------------------------------------------------


class Hidden(NamedTuple):
    """Activations for the next stage, shape (tokens, hidden)."""

    seq: int
    values: Array
    sent_s: float


class Passing(NamedTuple):
    """Activations of some requests for another node of a mesh, shape (tokens, hidden), request by request."""

    tag: int
    request_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    values: Array
    sent_s: float


class Partial(NamedTuple):
    """One rank's share of the ``number``-th sum of a step, shape (tokens, hidden)."""

    seq: int
    number: int
    rank: int
    values: Array


class AttentionItem(NamedTuple):
    """Groups of one request, and the position of its new token; -1 where it is stored elsewhere."""

    request_id: int
    position: int
    groups: tuple[int, ...]


class AttentionBatch(NamedTuple):
    """What a step is about to ask of an attention worker in every layer.

    ``parts`` follow the items: of each there is a part of the tokens here, the newest of those with a
    position, which come first.
    """

    after: int
    sender: int
    stage: int
    items: tuple[AttentionItem, ...]
    parts: tuple[AttentionItem, ...] = ()


class AttentionRequest(NamedTuple):
    """Decode attention of one layer of the sender's batch, in the order of the items' groups.

    Shapes: queries (groups, heads per group, head_dim), keys and values (groups, head_dim), of the new
    tokens that are stored here. Where all items have as many groups the first axis may be two: items, groups.
    """

    after: int
    sender: int
    layer: int
    queries: Array
    keys: Array
    values: Array


class AttentionResult(NamedTuple):
    """Its answer, shape (groups, heads per group, head_dim), and the time it took.

    ``sums``: of parts, the logarithm of the sum of exponents, shape (groups of parts, heads per group).
    """

    seq: int
    layer: int
    sender: int
    values: Array
    busy_s: float
    sums: Array | None = None


class CacheData(NamedTuple):
    """A piece of cache on its way. Shapes: keys and values (layers, groups, tokens, head_dim)."""

    after: int
    tag: int
    request_id: int
    stage: int
    layers: tuple[int, ...]
    groups: tuple[int, ...]
    start: int
    keys: Array
    values: Array
    final: bool


# -- from the workers to the driver ----------------------------------------------------------


class StageTimes(NamedTuple):
    """Where the time of a stage went, in seconds; points in time are on the clock of the host.

    Attributes:
        sent_s: when its input was sent by the stage before; of the first stage, ``begun_s``.
        free_s: when the worker was done with the step before.
        begun_s, ended_s: first and last moment of its own work.
        dense_s, attention_s: computing.
        head_transfer_s: packing for attention workers and waiting for them.
        collective_s: sums over the ranks.
        packing_s: of ``head_transfer_s``, what the rank itself was busy with.
    """

    sent_s: float
    free_s: float
    begun_s: float
    ended_s: float
    dense_s: float
    attention_s: float
    head_transfer_s: float
    collective_s: float
    packing_s: float = 0.0


class StageDone(NamedTuple):
    """A rank has computed its stage of a step; rank 0 of the last stage adds the sampled tokens."""

    seq: int
    device: int
    stage: int
    rank: int
    times: StageTimes
    worker_busy_s: tuple[tuple[int, float], ...]
    tokens: Tokens | None


class Arrived(NamedTuple):
    """A worker has all pieces of a tag."""

    device: int
    tag: int


class Beat(NamedTuple):
    """A worker is alive."""

    device: int


class Failed(NamedTuple):
    """A worker cannot go on."""

    device: int
    reason: str


Message = (Control | Stop | Hidden | Passing | Partial | AttentionBatch | AttentionRequest | AttentionResult
           | CacheData | StageDone | Arrived | Beat | Failed)

Report = StageDone | Arrived | Beat | Failed
"""What comes from workers to the driver."""
