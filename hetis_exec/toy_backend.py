"""The toy model's backend: NumPy, float64."""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetis_exec.backend import Arrived, CacheTable, Kernels, Shard, WholeSteps
from hetis_exec.messages import Array
from hetis_exec.places import CPU, AnyEngine, TeamPlan, units_of
from hetis_exec.rows import in_rows
from hetis_exec.stopwatch import HostStopwatch
from hetis_exec.toy_model import ToyModel, ToyShard, softmax
from hetis_sim.spec.errors import InfeasibleError
from hetis_sim.spec.model import ModelSpec

POOL_BYTES_MAX = 1 << 30

Units = NDArray[np.int64]


@dataclass(frozen=True)
class ToyBackend:
    """Workers that compute a :class:`ToyModel`.

    Raises:
        SpecError: an architecture that the toy does not compute.
    """

    model: ModelSpec
    seed: int
    start_s: float = 30.0

    @property
    def modules(self) -> tuple[str, ...]:
        """What is worth importing once for all worker processes."""
        return (__name__,)

    def __post_init__(self) -> None:
        ToyModel(self.model, self.seed)

    def place(self, device: int) -> str:
        """All devices are this host's cores."""
        return CPU

    def check(self, engines: Sequence[AnyEngine], here: Container[int] | None = None) -> None:
        """Look whether the pools fit in the memory that a worker may take.

        Raises:
            InfeasibleError: one does not.
        """
        for engine in engines:
            unit_bytes = 2 * 8 * engine.settings.limits.block_tokens * self.model.head_dim
            size_bytes = unit_bytes * max(units_of(engine).values())
            if size_bytes > POOL_BYTES_MAX:
                raise InfeasibleError(f"a worker would take {size_bytes} bytes of this host for its cache, "
                                      f"at most {POOL_BYTES_MAX} are allowed; use devices with less memory")

    def kernels(self, device: int, capacity_units: int, block_tokens: int) -> ToyKernels:
        """Memory and kernels of one worker; all devices are this host's cores."""
        return ToyKernels(capacity_units, block_tokens, self.model.head_dim)

    def shard(self, device: int, plan: TeamPlan, stage: int, rank: int) -> ToyShard:
        """The weights of one rank."""
        return ToyShard(ToyModel(self.model, self.seed), plan, stage, rank)

    def whole_steps(self, device: int, plan: TeamPlan, shard: Shard, pool: Any) -> None:
        """The toy computes all steps layer by layer."""

    def warm_up(self, kernels: Kernels, shard: Shard | None, steps: WholeSteps | None, rows_max: int,
                tokens_max: int) -> None:
        """The toy is as fast at first as it ever is."""


@dataclass(frozen=True, slots=True)
class ToyDecode:
    """Tables and positions of decode attention to come."""

    tables: Sequence[CacheTable]
    positions: Sequence[int]


class ToyJoining:
    """See :class:`hetis_exec.backend.Joining`."""

    def __init__(self, number: int, queries: Array) -> None:
        self._values = np.zeros((number, *queries.shape[-2:]))
        self._sums = np.full((number, queries.shape[-2]), -np.inf)

    def add(self, at: tuple[Units, ...], part: tuple[Array, Array]) -> None:
        values, sums = part
        before = self._sums[at]
        after = np.logaddexp(before, sums)
        old, new = np.exp(before - after)[..., None], np.exp(sums - after)[..., None]
        self._values[at] = self._values[at] * old + values * new
        self._sums[at] = after

    def result(self) -> Array:
        return self._values


class ToyKernels:
    """See :class:`hetis_exec.backend.Kernels`.

    Freed memory is filled with nan, so that whoever reads what was never written is found out.
    """

    def __init__(self, capacity_units: int, block_tokens: int, head_dim: int) -> None:
        self._block_tokens = block_tokens
        self._keys = np.full((capacity_units, block_tokens, head_dim), np.nan)
        self._values = np.full((capacity_units, block_tokens, head_dim), np.nan)

    def from_wire(self, array: Array) -> Array:
        return array

    def to_wire(self, tensor: Array) -> Array:
        return tensor

    def index(self, *axes: Sequence[int]) -> tuple[Units, ...]:
        return tuple(np.array(axis, dtype=np.int64) for axis in axes)

    def empty_like(self, tensor: Array) -> Array:
        return np.empty_like(tensor)

    def pack(self, tensors: Sequence[Array]) -> list[Array]:
        return list(tensors)

    def host(self, tensors: Sequence[Array]) -> list[Array]:
        return list(tensors)

    def keep(self, tensors: Sequence[Array]) -> list[Array]:
        return list(tensors)

    def concatenate(self, tensors: Sequence[Array]) -> Array:
        return np.concatenate(tensors)

    def stopwatch(self) -> HostStopwatch:
        return HostStopwatch()

    def enter(self) -> None:
        """Any thread will do."""

    def working(self) -> AbstractContextManager[object]:
        """Nothing is to be prepared."""
        return nullcontext()

    def synchronize(self) -> None:
        """Nothing is ever left to be done."""

    def wait(self) -> None:
        """Nor by this thread."""

    def clear(self, table: CacheTable) -> None:
        self._keys[table.units] = np.nan
        self._values[table.units] = np.nan

    def spots(self, units: Units, offsets: Units) -> tuple[Units, Units]:
        return units, offsets

    def write(self, spots: tuple[Units, Units], layer: int | slice, keys: Array, values: Array) -> None:
        units, offsets = spots[0][layer], spots[1]
        self._keys[units, offsets] = keys.reshape(*units.shape, keys.shape[-1])
        self._values[units, offsets] = values.reshape(*units.shape, values.shape[-1])

    def read(self, units: Units) -> tuple[Array, Array]:
        shape = (*units.shape[:-1], units.shape[-1] * self._block_tokens, self._keys.shape[-1])
        return self._keys[units].reshape(shape), self._values[units].reshape(shape)

    def leave(self, units: Units, tokens: slice, stay: bool = False) -> Arrived:
        keys, values = self.read(units)
        return Arrived([keys[..., tokens, :], values[..., tokens, :]])

    def plan(self, tables: Sequence[CacheTable], positions: Sequence[int]) -> ToyDecode:
        return ToyDecode(tables, positions)

    def decode(self, plan: ToyDecode, layer: int, queries: Array, keys: Array, values: Array) -> Array:
        queries, keys, values = in_rows(queries, 2), in_rows(keys, 1), in_rows(values, 1)
        out = np.empty_like(queries)
        for n, (table, position) in enumerate(zip(plan.tables, plan.positions, strict=True)):
            block, offset = divmod(position, self._block_tokens)
            units = table.units[layer, :block + 1]
            self._keys[units[-1], offset], self._values[units[-1], offset] = keys[n], values[n]
            k, v = self.read(units)
            out[n] = softmax(queries[n] @ k[:position + 1].T / np.sqrt(k.shape[-1])) @ v[:position + 1]
        return out

    def plan_parts(self, tables: Sequence[CacheTable], positions: Sequence[int]) -> ToyDecode:
        return ToyDecode(tables, positions)

    def decode_parts(self, plan: ToyDecode, layer: int, queries: Array, keys: Array,
                     values: Array) -> tuple[Array, Array]:
        out, sums = np.empty_like(queries), np.empty(queries.shape[:2])
        for n, (table, position) in enumerate(zip(plan.tables, plan.positions, strict=True)):
            units, tokens = table.units[layer], position + 1 if position >= 0 else -1 - position
            if position >= 0:
                at = units[position // self._block_tokens], position % self._block_tokens
                self._keys[at], self._values[at] = keys[n], values[n]
            k, v = self.read(units)
            scores = queries[n] @ k[:tokens].T / np.sqrt(k.shape[-1])
            sums[n] = np.logaddexp.reduce(scores, axis=-1)
            out[n] = softmax(scores) @ v[:tokens]
        return out, sums

    def joining(self, number: int, queries: Array) -> ToyJoining:
        return ToyJoining(number, queries)

    def plan_prompts(self, tables: Sequence[CacheTable | None], begins: Sequence[int], news: Sequence[int],
                     contexts: Sequence[int], heads: int) -> None:
        return None

    def attend_prompts(self, plan: Any, layer: int, queries: Array, keys: Array, values: Array) -> Array:
        raise NotImplementedError("plan_prompts has said that prompts are computed one by one")

    def causal(self, queries: Array, keys: Array, values: Array) -> Array:
        new, total = len(queries), keys.shape[1]
        scores = np.einsum("ngrd,gtd->grnt", queries, keys) / np.sqrt(queries.shape[-1])
        future = np.arange(total)[None, :] > np.arange(total - new, total)[:, None]
        result: Array = np.einsum("grnt,gtd->ngrd", softmax(np.where(future, -np.inf, scores)), values)
        return result
