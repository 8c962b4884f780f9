"""What workers compute with: the interface between the machinery and a library of arrays.

The machinery (drivers, workers, tables, messages) is the same for all backends. Messages carry
NumPy arrays; a worker turns them into its backend's arrays and back.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from hetis_exec.messages import Array, Sample, Tokens
from hetis_exec.places import AnyEngine, TeamPlan
from hetis_exec.stopwatch import Stopwatch

Tensor = Any
"""An array of the backend, NumPy's or torch's."""

Units = Any
"""Unit numbers of a pool, an integer array of NumPy."""

Spots = Any
"""Where tokens lie in a pool, in every layer, as kernels see it."""


class Wanted(NamedTuple):
    """A token that is to be sampled; see :class:`hetis_exec.messages.Row`."""

    request_id: int
    position: int
    sample: Sample | None = None


Asked = Sequence[Wanted]
"""Tokens that are to be sampled."""


class CacheTable(Protocol):
    """Where the cache of one KV group of one request lies.

    Attributes:
        units: shape (layers, blocks).
        slot: a number that kernels may give it for as long as it is open; -1 at first.
    """

    units: Units
    slot: int


class Shard(Protocol):
    """The dense modules of one rank of one stage.

    Attributes:
        groups: ids of the KV groups whose weights it holds, G of them with r query heads each.
        layers: number of its layers.
        heads_per_group: r.
    """

    groups: tuple[int, ...]
    layers: int

    @property
    def heads_per_group(self) -> int: ...

    def prepare(self, positions: Tokens) -> Any:
        """What all layers need to know of the positions of a batch's tokens."""

    def embed(self, tokens: Tokens, prepared: Any) -> Tensor:
        """Activations of tokens, shape (tokens, hidden)."""

    def qkv(self, layer: int, hidden: Tensor, prepared: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (tokens, G, r, d), keys and values (tokens, G, d) of its groups."""

    def project(self, layer: int, attended: Tensor) -> Tensor:
        """Its part of the attention block's output; the ranks' parts sum up."""

    def mlp(self, layer: int, hidden: Tensor) -> Tensor:
        """Its part of the MLP's output; the ranks' parts sum up."""

    def sample(self, hidden: Tensor, asked: Asked) -> Tokens:
        """The next token after each row of activations."""


class Leaving(Protocol):
    """Keys and values on their way out of a device's cache, while it goes on with other work."""

    def done(self) -> bool:
        """Whether they are there."""

    def arrays(self) -> list[Array]:
        """Keys and values; waits until they are there."""


class Arrived(NamedTuple):
    """What was there at once."""

    found: list[Array]

    def done(self) -> bool:
        return True

    def arrays(self) -> list[Array]:
        return self.found


Part = tuple[Tensor, Tensor]
"""Attention to some of the tokens, row by row, and the logarithm of each softmax sum, (rows, r)."""


class Joining(Protocol):
    """Rows of attention whose tokens have been attended to in parts."""

    def add(self, at: tuple[Tensor, ...], part: Part) -> None:
        """Take in the parts of some of the rows, each at most once, by an index of one axis."""

    def result(self) -> Tensor:
        """Attention to all tokens."""


class Kernels(Protocol):
    """One worker's memory for cache, in units, and what is computed on it.

    A unit holds block_tokens of one KV group in one layer.
    """

    def from_wire(self, array: Array) -> Tensor:
        """An array of a message, wherever it is, without a copy where that is possible."""

    def to_wire(self, tensor: Tensor) -> Array:
        """An array for a message, without a copy where that is possible."""

    def index(self, *axes: Sequence[int]) -> tuple[Tensor, ...]:
        """An index that picks, or writes to, one place for each of the numbers."""

    def pack(self, tensors: Sequence[Tensor]) -> list[Array]:
        """Arrays for one message: as :meth:`to_wire`, but the device is waited for only once."""

    def host(self, tensors: Sequence[Tensor]) -> list[Array] | None:
        """Tensors as arrays of the same memory, where they lie in that of the host; else None."""

    def keep(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The same without a wait, as :class:`hetis_exec.resident.Resident` where that is of any use."""

    def concatenate(self, tensors: Sequence[Tensor]) -> Tensor:
        """One after the other, along their first axis."""

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Room for as much."""

    def stopwatch(self) -> Stopwatch:
        """Times what is asked of the device."""

    def enter(self) -> None:
        """To be called by the thread that will ask for all work from now on."""

    def working(self) -> AbstractContextManager[object]:
        """To be entered by that thread around its work, a single step or all of them."""

    def synchronize(self) -> None:
        """Wait until the device has done all that it has been asked to do."""

    def wait(self) -> None:
        """The same, but for what this thread has asked it to do."""

    def clear(self, table: CacheTable) -> None:
        """A table is closed: what its units hold is of no use any more."""

    def spots(self, units: Units, offsets: Units) -> Spots:
        """Where tokens are to be stored: units (layers, tokens), and offsets in them, shape (tokens,)."""

    def write(self, spots: Spots, layer: int | slice, keys: Tensor, values: Tensor) -> None:
        """Store tokens of one of the layers, or of several one after the other, shape (all tokens, d)."""

    def read(self, units: Units) -> tuple[Tensor, Tensor]:
        """Copies of keys and values; units (..., blocks) give (..., blocks * block_tokens, d)."""

    def leave(self, units: Units, tokens: slice, stay: bool = False) -> Leaving:
        """The same as arrays of messages, of some of the tokens; what is read may be freed meanwhile.

        Args:
            stay: they may be tensors on the device.
        """

    def plan(self, tables: Sequence[CacheTable], positions: Sequence[int]) -> Any:
        """Decode attention to come in every layer.

        For each row its table, and the position of its new token.
        """

    def decode(self, plan: Any, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store the new tokens' keys and values and attend to all tokens of each row, shape (rows, r, d).

        Shapes: queries (rows, r, d), keys and values (rows, d), of any strides; rows may be on two axes.
        """

    def plan_parts(self, tables: Sequence[CacheTable], positions: Sequence[int]) -> Any:
        """The same for rows of which only some tokens are here.

        ``positions`` are places in the tables; ``-1 - n`` is that of a row of n tokens without a new one.
        Those come last.
        """

    def decode_parts(self, plan: Any, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Part:
        """Store the new tokens' keys and values, of as many rows as have one, and attend to what is here."""

    def joining(self, number: int, queries: Tensor) -> Joining:
        """Begin to join parts of so many rows; queries are of their shape and type but for their number."""

    def plan_prompts(self, tables: Sequence[CacheTable | None], begins: Sequence[int], news: Sequence[int],
                     contexts: Sequence[int], heads: int) -> Any:
        """Attention of all prompts of a batch to come in every layer.

        None where they are to be computed one by one: stored, read and attended to by :meth:`causal`.

        Args:
            tables: of the groups of each prompt, prompt by prompt; None where a group is not stored here.
            begins: row of the first new token of each prompt in the batch.
            news, contexts: new tokens of each prompt, and those before them.
            heads: query heads of a group.
        """

    def attend_prompts(self, plan: Any, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store the new tokens of prompts and attend to all of each prompt's tokens up to themselves.

        Shapes: queries (tokens, G, r, d), keys and values (tokens, G, d) of the whole batch; the result is
        shaped like the queries, and of no meaning for tokens that are of no prompt.
        """

    def causal(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Prefill attention: the queries belong to the last of the tokens.

        Shapes: queries (new tokens, G, r, d), keys and values (G, tokens, d); the result is shaped
        like the queries.
        """


class WholeSteps(Protocol):
    """Steps of a worker that holds a whole model and all of its batch's cache, in one piece."""

    @property
    def rows_max(self) -> int:
        """Largest batch."""

    def run(self, request_ids: Sequence[int], positions: Sequence[int], tokens: Tokens,
            asked: Asked) -> Tokens:
        """The next token of each request, after one new token each at the given positions."""

    @property
    def computed_s(self) -> float:
        """Seconds that the device took for the last step."""

    def takes_prompts(self, request_ids: Sequence[int], news: Sequence[int]) -> bool:
        """Whether a step of prompts with so many new tokens each can be computed in one piece."""

    def run_prompts(self, request_ids: Sequence[int], positions: Sequence[int], news: Sequence[int],
                    tokens: Tokens, sampled: Sequence[int], asked: Asked) -> Tokens:
        """The next token of some of the prompts, by their places, after new tokens from some positions on."""


class Backend(Protocol):
    """Makes the parts of workers. It travels to wherever a worker lives."""

    @property
    def modules(self) -> tuple[str, ...]:
        """What is worth importing once for all worker processes."""

    @property
    def start_s(self) -> float:
        """How long workers may take to start."""

    def place(self, device: int) -> str:
        """The torch device of a device of the cluster, on its host."""

    def check(self, engines: Sequence[AnyEngine], here: Container[int] | None = None) -> None:
        """Look whether workers of this kind can serve.

        Args:
            here: devices whose workers are to live on this host; None for all.

        Raises:
            HetisError: they cannot, or not with so much cache.
        """

    def kernels(self, device: int, capacity_units: int, block_tokens: int) -> Kernels:
        """Memory and kernels of one worker, for a device of the cluster."""

    def shard(self, device: int, plan: TeamPlan, stage: int, rank: int) -> Shard:
        """The weights of one rank, on a device of the cluster."""

    def whole_steps(self, device: int, plan: TeamPlan, shard: Shard, pool: Any) -> WholeSteps | None:
        """Steps in one piece on a worker's pool, where that is worth while."""

    def warm_up(self, kernels: Kernels, shard: Shard | None, steps: WholeSteps | None, rows_max: int,
                tokens_max: int) -> Callable[[], None] | None:
        """What a worker is to do once before it says that it is there; None for nothing.

        Args:
            shard: None for an attention worker.
            rows_max, tokens_max: requests and tokens of the largest step.
        """
