"""Requests on their way through a mesh, and what a driver is handed to carry them on."""

from __future__ import annotations

from dataclasses import dataclass

from hetis_sim.control.ledger import Units
from hetis_sim.control.state import RequestState
from hetis_sim.control.step import StepKind


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """A way from source to sink.

    Attributes:
        nodes: in order.
        first_layers: per node of the mesh, the first layer that is passed there; -1 off the path.
        layers: per node on the path, how many layers are passed there.
        after: per node on the path, the node (or ``SINK``) that comes next.
        edges: numbers of its edges, the one from the source first.
        block_units: (local device, units) that one block of tokens takes.
    """

    nodes: tuple[int, ...]
    first_layers: tuple[int, ...]
    layers: tuple[int, ...]
    after: dict[int, int]
    edges: tuple[int, ...]
    block_units: Units


@dataclass(slots=True, eq=False)
class Walk:
    """A request that holds cache along a path and goes round it, once for each token.

    Attributes:
        state: the request.
        path: the way that it takes.
        tokens: tokens of this round: its prompt, later one.
        context: tokens in cache when the round is over.
        blocks: blocks of tokens that it holds at every node of its path.
        prompt_tokens: tokens of its first round.
        doomed: its cache is to be taken from it when it is back.
    """

    state: RequestState
    path: Path
    tokens: int
    context: int
    blocks: int
    prompt_tokens: int
    doomed: bool = False


@dataclass(slots=True, eq=False)
class NodeStep:
    """Work for one batch at one node: whole prompts, or one token of each of some requests."""

    node: int
    kind: StepKind
    walks: list[Walk]
    tokens: int


@dataclass(slots=True, eq=False)
class Message:
    """Activations of some requests on their way between two nodes, or token ids from or to the source.

    ``source`` and ``target`` are nodes, ``SOURCE`` or ``SINK``. The driver reports it when it is there.
    """

    source: int
    target: int
    walks: list[Walk]
    tokens: int
    size_bytes: float
