"""The linear program: the highest rate at which the work fits the devices' time, memory and links.

Everything is per second. "Tokens" of dense work stand for a token's way through all layers.
The rows are numbered as in ``docs/bound.md``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetis_sim.spec.errors import HetisError
from hetis_sim.spec.model import ModelSpec
from hetis_sim.study.bound.demand import Demand
from hetis_sim.study.bound.supply import Supply

GB = 1e9
STEPS_MAX = 25
Ints = NDArray[np.int64]
Term = tuple[Any, Any]
"""Indices of variables, and their coefficients (an array or one number)."""


@dataclass(frozen=True, slots=True)
class Solution:
    """An optimum.

    Attributes:
        rate: requests per second.
        values: of all variables.
        limits: share of each named limit in holding the rate down; they sum to about 1.
    """

    rate: float
    values: NDArray[np.float64]
    limits: dict[str, float]


class _Row(NamedTuple):
    columns: Ints
    coefficients: NDArray[np.float64]
    limit: float
    name: str


class Program:
    """Variables and rows for one workload on one cluster.

    The weights that a kind of GPU holds bound its share of the dense work of *all* requests; that
    is a product with the rate itself, so the rate in it is given (:meth:`solve`) and the
    highest rate that reproduces itself is sought (:meth:`highest`).
    """

    def __init__(self, model: ModelSpec, demand: Demand, supply: Supply, block_tokens: int) -> None:
        self.model, self.demand, self.supply = model, demand, supply
        self.block_tokens = block_tokens
        self.size = 0
        kinds, bins, cells = len(supply.kinds), len(demand.bins), len(demand.cells)
        self.rate = self._block(1)
        self.rounds = self._block(len(supply.batches))  # z: rank iterations
        self.decode = self._block(bins, len(supply.batches))  # u: decoded tokens by batch
        self.mixed_prefill = self._block(len(supply.batches))  # q: prompt tokens in batches
        self.prefill = self._block(kinds)  # p: prompt tokens in steps of their own
        self.prompts = self._block(len(demand.prompts), kinds)  # f: prefill attention
        self.heads = self._block(kinds)  # h: tokens through the LM head
        self.host = self._block(kinds)  # o: seconds of the host
        self.launches = self._block(kinds)  # e: of decode attention
        self.attended = self._block(cells, kinds)  # v: tokens whose heads are attended to
        self.contexts = self._block(cells, kinds)  # g: tokens of cache that are read
        self.generated = self._block(cells, kinds)  # the part of it that was generated
        self.again = self._block(cells)  # r: tokens made by computing their whole context again
        self.again_at = self._block(kinds)  # prompt tokens of that
        self.weights = self._block(kinds)  # w: GB of layers
        self.ends = self._block(kinds)  # GB of embedding and LM head
        self.cache = self._block(kinds)  # m: GB of cache
        self.ways = self._block(kinds, kinds)  # x: tokens with dense work here, attention there
        self.pushes = self._block(kinds, kinds)  # y: prompt tokens whose cache goes from here to there
        self.rows: list[_Row] = []
        self.equalities: list[_Row] = []

    def _block(self, *shape: int) -> Ints:
        count = int(np.prod(shape))
        block = np.arange(self.size, self.size + count).reshape(shape)
        self.size += count
        return block

    def _at_most(self, terms: Iterable[Term], limit: float = 0.0, name: str = "") -> None:
        self.rows.append(_row(terms, limit, name))

    def _equal(self, terms: Iterable[Term]) -> None:
        self.equalities.append(_row(terms, 0.0, ""))

    # -- rows ------------------------------------------------------------------------------

    def build(self) -> Program:
        """All rows but those that hold the rate in a product."""
        self._work()
        self._decoding()
        self._time()
        self._memory()
        self._links()
        return self

    def _work(self) -> None:
        """(1) All the work of the requests is done."""
        demand, supply, rate = self.demand, self.supply, self.rate
        lows = [cell.low for cell in demand.cells]
        done = self.mixed_prefill if supply.mixed else self.prefill
        self._at_most([(rate, demand.prompt_tokens), (self.again, lows), (done, -1.0)])
        for i, (share, _) in enumerate(demand.prompts):
            self._at_most([(rate, share), (self.prompts[i], -1.0)])
        self._at_most([(rate, demand.output_tokens), (self.heads, -1.0)])
        host = [batch.host_s for batch in supply.batches]
        self._at_most([(rate, supply.prompt_host_s), (self.rounds, host), (self.host, -1.0)])
        # A batch without a decoded token launches no decode attention.
        launches = np.array([batch.launches / batch.decode_share for batch in supply.batches])
        each = np.broadcast_to(launches, self.decode.shape)
        self._at_most([(self.decode, each), (self.launches, -1.0)])
        self._at_most([(self.again_at, 1.0), (self.again, [-low for low in lows])])

    def _decoding(self) -> None:
        """(2) Every decoded token has a place in a batch, and its context is read somewhere."""
        demand, supply = self.demand, self.supply
        for k, found in enumerate(demand.bins):
            mine = [c for c, cell in enumerate(demand.cells) if cell.bin == k]
            self._equal([(self.rate, -found.tokens), (self.decode[k], 1.0), (self.again[mine], 1.0)])
        for j, batch in enumerate(supply.batches):
            held = [(self.decode[:, j], 1.0), (self.mixed_prefill[j:j + 1], 1.0)]
            self._at_most([*held, (self.rounds[j:j + 1], -batch.share)])
            self._at_most([held[0], (self.rounds[j:j + 1], -batch.decode_share)])
        for c, cell in enumerate(demand.cells):
            again = self.again[c:c + 1]
            self._equal([(self.rate, -cell.tokens), (self.attended[c], 1.0), (again, 1.0)])
            self._at_most([(self.rate, cell.context_tokens), (self.contexts[c], -1.0), (again, -cell.high)])
            self._at_most([(self.generated[c], 1.0), (self.rate, -cell.generated_tokens)])
            for k in range(len(supply.kinds)):
                one = slice(k, k + 1)
                self._at_most([(self.contexts[c, one], 1.0), (self.attended[c, one], -cell.high)])
                self._at_most([(self.contexts[c, one], -1.0), (self.attended[c, one], cell.low)])
                self._at_most([(self.generated[c, one], 1.0), (self.contexts[c, one], -1.0)])

    def _time(self) -> None:
        """(3) No device works more than a second in a second."""
        model = self.model
        layer_bytes = model.kv_heads * model.kv_bytes_per_token_per_layer_per_group
        for k, kind in enumerate(self.supply.kinds):
            mine = self._batches_of(k)
            cost = kind.attention
            self._at_most([
                (self.rounds[mine], [self.supply.batches[j].busy_s for j in mine]),
                (self.prefill[k], kind.prefill_s or 0.0), (self.prompts[:, k], kind.prompt_s),
                (self.heads[k], kind.head_s), (self.host[k], 1.0), (self.launches[k], cost.c_s),
                (self.attended[:, k], model.layers * model.query_heads * cost.a_s_per_head),
                (self.contexts[:, k], model.layers * layer_bytes * cost.b_s_per_byte)],
                kind.count, f"time of {kind.gpu.name}")

    def _memory(self) -> None:
        """(4) Weights and cache fit."""
        model, supply, demand = self.model, self.supply, self.demand
        ends = (model.embedding_weights + model.lm_head_weights) * model.weight_bytes / GB
        self._at_most([(self.ends, -1.0)], -ends, "")
        for k, kind in enumerate(supply.kinds):
            self._at_most([(self.weights[k], 1.0), (self.ends[k], 1.0), (self.cache[k], 1.0)],
                          kind.memory_bytes / GB, f"memory of {kind.gpu.name}")
            # What is read in an iteration is there for the whole of it.
            read = supply.iteration_s * model.kv_bytes_per_token / GB
            self._at_most([(self.contexts[:, k], read), (self.cache[k], -1.0)])
        held = np.array([batch.held_s for batch in supply.batches])
        sizes = np.array([-(-b.low // self.block_tokens) * self.block_tokens for b in demand.bins])
        gigabytes = np.outer(sizes, held) * (model.kv_bytes_per_token / GB)
        self._at_most([(self.decode, gigabytes), (self.cache, -1.0)])

    def _links(self) -> None:
        """(5) Heads and prompts that are attended to away from their dense work cross the network."""
        model, kinds, cells = self.model, self.supply.kinds, self.demand.cells
        shares = np.array([1.0 / cell.decoded_most for cell in cells])
        for k in range(len(kinds)):
            self._equal([(self.ways[k], 1.0), (self.decode[:, self._batches_of(k)], -1.0)])
            self._equal([(self.ways[:, k], 1.0), (self.attended[:, k], -1.0)])
            self._at_most([(self.pushes[k], 1.0), *self._prefilled_at(k, -1.0)])
            prompts_read = [(self.contexts[:, k], shares), (self.generated[:, k], -shares)]
            self._at_most([*prompts_read, (self.pushes[:, k], -1.0)])
        way = model.layers * model.query_heads * model.head_dim * model.activation_bytes / GB
        push = model.kv_bytes_per_token / GB
        for k, kind in enumerate(kinds):
            away = [n for n, other in enumerate(kinds) if not kind.hosts & other.hosts]
            both = [(self.ways[k, away], way), (self.ways[away, k], way)]
            limit = kind.wire_bytes_per_s / GB
            self._at_most([*both, (self.pushes[k, away], push)], limit, f"network of {kind.gpu.name}")
            self._at_most([*both, (self.pushes[away, k], push)], limit, f"network of {kind.gpu.name}")

    def _residency(self, rate: float) -> list[_Row]:
        """(6) A kind of GPU does no more of the dense work than it holds of the weights."""
        model, demand = self.model, self.demand
        layers = model.layers * model.layer_bytes / GB
        rows: list[_Row] = []
        for k in range(len(self.supply.kinds)):
            mine = self._batches_of(k)
            rows.append(_row([(self.decode[:, mine], 1.0),
                              (self.weights[k], -rate * demand.decoded_tokens / layers)], 0.0, ""))
            rows.append(_row([*self._prefilled_at(k, 1.0), (self.again_at[k], -1.0),
                              (self.weights[k], -rate * demand.prompt_tokens / layers)], 0.0, ""))
        return rows

    def _batches_of(self, kind: int) -> list[int]:
        return [j for j, batch in enumerate(self.supply.batches) if batch.kind == kind]

    def _prefilled_at(self, kind: int, sign: float) -> list[Term]:
        """Prompt tokens whose dense work a kind of GPU does."""
        if self.supply.mixed:
            return [(self.mixed_prefill[self._batches_of(kind)], sign)]
        return [(self.prefill[kind], sign)]

    # -- solving ---------------------------------------------------------------------------

    def solve(self, rate: float | None = None) -> Solution:
        """The highest rate, with ``rate`` in the rows of residency; without it they are left out.

        Raises:
            HetisError: the solver gives up.
        """
        from scipy.optimize import linprog

        rows = [*self.rows, *([] if rate is None else self._residency(rate))]
        objective = np.zeros(self.size)
        objective[self.rate] = -1.0
        bounds = np.zeros((self.size, 2))
        bounds[:, 1] = np.inf
        unused = self.prefill if self.supply.mixed else self.mixed_prefill
        bounds[unused, 1] = 0.0
        limits = np.array([row.limit for row in rows])
        found = linprog(objective, A_ub=self._matrix(rows), b_ub=limits, A_eq=self._matrix(self.equalities),
                        b_eq=np.zeros(len(self.equalities)), bounds=bounds, method="highs")
        if found.status != 0:
            raise HetisError(f"the linear program of the bound was not solved: {found.message}")
        reached = -float(found.fun)
        pressure: dict[str, float] = {}
        for row, dual in zip(rows, found.ineqlin.marginals, strict=True):
            if row.name and reached > 0:
                share = -float(dual) * row.limit / reached
                pressure[row.name] = pressure.get(row.name, 0.0) + share
        return Solution(reached, found.x, pressure)

    def _matrix(self, rows: list[_Row]) -> Any:
        from scipy.sparse import csr_array

        starts = np.cumsum([0, *(len(row.columns) for row in rows)])
        coefficients = np.concatenate([row.coefficients for row in rows])
        columns = np.concatenate([row.columns for row in rows])
        return csr_array((coefficients, columns, starts), shape=(len(rows), self.size))

    def highest(self, tolerance: float) -> Solution:
        """The highest rate that is feasible with itself in the rows of residency, from above.

        More than the highest rate allows less than itself; and what it allows is a bound again, since
        those rows only loosen with the rate in them. So every step gives a bound; the last one falls by
        less than ``tolerance``.
        """
        best = self.solve()
        for _ in range(STEPS_MAX):
            found = self.solve(best.rate)
            fell = best.rate - found.rate
            best = found
            if fell <= tolerance * found.rate:
                break
        return best


def _row(terms: Iterable[Term], limit: float, name: str) -> _Row:
    columns, coefficients = [], []
    for where, what in terms:
        indices = np.atleast_1d(where).ravel()
        columns.append(indices)
        coefficients.append(np.broadcast_to(np.asarray(what, np.float64).ravel(), indices.shape))
    return _Row(np.concatenate(columns), np.concatenate(coefficients), limit, name)
