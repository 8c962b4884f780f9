"""Attention and cache in torch, compared with attention written down plainly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="real models need the extra exec")

from exec_parts import joined_parts  # noqa: E402

from hetis_exec.kernels import cpu  # noqa: E402
from hetis_exec.kernels.cpu import TOUCHED_BYTES, CpuKernels  # noqa: E402
from hetis_exec.kernels.reference import attention  # noqa: E402
from hetis_exec.kvcache import KvPool, TableKey  # noqa: E402

D, BLOCK, LAYERS = 16, 4, 2
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class World:
    """A pool with some requests of random lengths, and what its tables ought to hold.

    Blocks of different requests lie mixed, since tables grow in turns.
    """

    def __init__(self, lengths: list[int], groups: int, chunk_bytes: int, seed: int = 0,
                 dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.rng = np.random.default_rng(seed)
        self.lengths = lengths
        self.groups = groups
        self.kernels = CpuKernels(1000, BLOCK, D, poison=1e4, chunk_bytes=chunk_bytes, dtype=dtype)
        self.pool = KvPool(1000, BLOCK, self.kernels)
        self.pool.open(TableKey(-1, 0, 0), LAYERS, 100, 0)
        self.pool.close(TableKey(-1, 0, 0))
        self.keys = [self.random(LAYERS, groups, n + 1, D) for n in lengths]
        self.values = [self.random(LAYERS, groups, n + 1, D) for n in lengths]
        for blocks in range(1, max(lengths) // BLOCK + 2):
            for request, length in enumerate(lengths):
                for g in range(groups):
                    self._grow(TableKey(request, 0, g), min(blocks, length // BLOCK + 1))
        for request, length in enumerate(lengths):
            for g in range(groups):
                for layer in range(LAYERS):
                    self.pool.write(TableKey(request, 0, g), layer, 0, self.keys[request][layer, g, :length],
                                    self.values[request][layer, g, :length])

    def _grow(self, key: TableKey, blocks: int) -> None:
        if key in self.pool.tables:
            self.pool.grow(key, blocks)
        else:
            self.pool.open(key, LAYERS, blocks, 0)

    def random(self, *shape: int) -> torch.Tensor:
        """Standard normal."""
        return torch.from_numpy(self.rng.standard_normal(shape).astype(np.float32)).to(self.dtype)

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(request, group) of all rows."""
        return [(request, g) for request in range(len(self.lengths)) for g in range(self.groups)]

    def decode(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """All rows at once, with the last key and value of each as the new token's."""
        tables = [self.pool.table(TableKey(request, 0, g)) for request, g in self.rows]
        plan = self.kernels.plan(tables, [self.lengths[request] for request, _ in self.rows])
        new = [torch.stack([data[request][layer, g, -1] for request, g in self.rows])
               for data in (self.keys, self.values)]
        return self.kernels.decode(plan, layer, queries, *new)

    def wanted(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """Row by row."""
        return torch.cat([attention(queries[n][None, None], self.keys[request][layer, g][None],
                                    self.values[request][layer, g][None])[0]
                          for n, (request, g) in enumerate(self.rows)])


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 20])
@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("lengths", [[0], [3, 3, 3], [7], [8], [1, 30, 4, 0, 17, 3, 29], [5, 9, 13, 40]])
def test_decode_attention_is_that_of_the_reference(lengths: list[int], r: int, chunk_bytes: int) -> None:
    """For any mix of lengths, in one piece or in many, at block edges and with one token only."""
    world = World(lengths, 2, chunk_bytes)
    for layer in range(LAYERS):
        queries = world.random(len(world.rows), r, D)
        assert torch.allclose(world.decode(layer, queries), world.wanted(layer, queries), **CLOSE)


@pytest.mark.parametrize("lengths", [[3, 3, 3], [5, 9, 13]])
def test_decode_attention_takes_a_part_of_larger_tensors(lengths: list[int]) -> None:
    """Rows on two axes, of any strides, as a share of a batch's heads is."""
    world = World(lengths, 2, 1 << 20)
    tables = [world.pool.table(TableKey(request, 0, g)) for request, g in world.rows]
    plan = world.kernels.plan(tables, [world.lengths[request] for request, _ in world.rows])
    queries = world.random(len(lengths), 5, 3, D)[:, 2:4]
    keys, values = (torch.stack([data[request][0, :, -1] for request in range(len(lengths))])
                    for data in (world.keys, world.values))
    found = world.kernels.decode(plan, 0, queries, *(torch.nn.functional.pad(x, (0, 0, 1, 1))[:, 1:-1]
                                                     for x in (keys, values)))
    assert torch.allclose(found, world.wanted(0, queries.flatten(0, 1)), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_decode_attention_over_narrow_caches_is_computed_in_float32(dtype: torch.dtype,
                                                                    chunk_bytes: int) -> None:
    """Only what is stored and what is given back is of the cache's type."""
    world = World([9, 14, 3], 2, chunk_bytes, dtype=dtype)
    for layer in range(LAYERS):
        queries = world.random(len(world.rows), 3, D)
        found = world.decode(layer, queries)
        assert found.dtype == dtype
        torch.testing.assert_close(found, world.wanted(layer, queries), rtol=torch.finfo(dtype).eps,
                                   atol=1e-4)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
@pytest.mark.parametrize("lengths", [[9], [16, 30, 13, 12]])
def test_parts_join_to_attention_of_the_whole(lengths: list[int], chunk_bytes: int) -> None:
    """Tokens are divided over three tables, of which one stores the new token."""
    world = World(lengths, 2, chunk_bytes)
    keys = [TableKey(request, 0, g) for request, g in world.rows]
    for layer in range(LAYERS):
        queries = world.random(len(keys), 3, D)
        found = joined_parts(
            world.kernels, world.pool, keys, [lengths[key.request_id] for key in keys], queries,
            lambda key: tuple(data[key.request_id][layer, key.group, -1]  # noqa: B023 - called at once
                              for data in (world.keys, world.values)), layer)
        assert torch.allclose(found, world.wanted(layer, queries), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "runs"), [([9, 9, 9, 9], [(0, 8)]), ([9, 9, 14, 14], [(0, 4), (4, 8)]),
                                               ([9, 5, 3], [])])
def test_equal_rows_that_lie_in_line_are_read_where_they_are(
        lengths: list[int], runs: list[tuple[int, int]], dtype: torch.dtype,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that have grown in turns, in runs of any number of rows; small ones are gathered."""
    monkeypatch.setattr(cpu, "RUN_BYTES", 4 * 2 * 9 * D * dtype.itemsize)
    world = World(lengths, 2, 1 << 20, dtype=dtype)
    tables = [world.pool.table(TableKey(request, 0, g)) for request, g in world.rows]
    plan = world.kernels.plan(tables, [lengths[request] for request, _ in world.rows])
    assert [(c.rows.start, c.rows.stop) for c in plan.chunks if c.units is None] == runs
    close = CLOSE if dtype == torch.float32 else {"rtol": torch.finfo(dtype).eps, "atol": 1e-4}
    for layer in range(LAYERS):
        queries = world.random(len(world.rows), 3, D)
        torch.testing.assert_close(world.decode(layer, queries), world.wanted(layer, queries), **close)


def test_rows_that_have_grown_where_there_was_room_are_gathered() -> None:
    """Others have taken the places that they were to grow into."""
    world, other = World([14, 14], 2, 1 << 20), TableKey(9, 0, 0)
    world.pool.open(other, 1, world.pool.capacity_units - world.pool.used_units, 0)
    world.pool.close(other)
    keys = [TableKey(request, 0, g) for request, g in world.rows]
    for key in keys:
        world.pool.grow(key, 5)
    plan = world.kernels.plan([world.pool.table(key) for key in keys], [14] * 4)
    assert [chunk.units is None for chunk in plan.chunks] == [False]
    queries = world.random(4, 3, D)
    assert torch.allclose(world.decode(1, queries), world.wanted(1, queries), **CLOSE)


def test_gathers_take_no_new_memory() -> None:
    """Once the buffers are as large as a batch needs, they stay where they are."""
    world = World([9, 3, 14], 2, 1 << 20)
    places = []
    for _ in range(3):
        world.decode(0, world.random(6, 2, D))
        places.append(world.kernels._buffer.data_ptr())
    assert places[0] == places[1] == places[2]


@pytest.mark.parametrize(("new", "context"), [(1, 0), (7, 0), (1, 9), (5, 9), (16, 1)])
@pytest.mark.parametrize(("groups", "r"), [(1, 1), (3, 3), (2, 8)])
def test_prefill_attention_is_that_of_the_reference(new: int, context: int, groups: int, r: int) -> None:
    """Whole prompts and pieces after a cached context."""
    world = World([1], 1, 1)
    queries = world.random(new, groups, r, D)
    keys, values = world.random(groups, context + new, D), world.random(groups, context + new, D)
    out = world.kernels.causal(queries, keys, values)
    assert out.shape == queries.shape
    assert torch.allclose(out, attention(queries, keys, values), **CLOSE)


def test_what_is_written_is_read() -> None:
    """Any range of tokens of all layers, across blocks."""
    world = World([11, 6], 2, 1)
    for first, last in ((0, 11), (0, 4), (3, 9), (8, 11), (5, 5)):
        keys, values = world.pool.read_layers(0, 0, (1, 0), first, last)
        assert torch.equal(keys, world.keys[0][:, [1, 0], first:last])
        assert torch.equal(values, world.values[0][:, [1, 0], first:last])


def test_freed_cache_is_poisoned() -> None:
    """Whoever reads what a request has left behind gets nothing that it could use."""
    world = World([6], 1, 1)
    units = world.pool.table(TableKey(0, 0, 0)).units
    world.pool.close(TableKey(0, 0, 0))
    keys, values = world.kernels.read(units)
    assert (keys == 1e4).all()
    assert (values == 1e4).all()


def test_messages_share_memory_with_tensors() -> None:
    """No copies on the way into and out of messages."""
    kernels = CpuKernels(1, BLOCK, D)
    tensor = torch.zeros(3)
    kernels.to_wire(tensor)[1] = 5.0
    assert tensor.tolist() == [0.0, 5.0, 0.0]
    array = np.zeros(2, dtype=np.float32)
    kernels.from_wire(array)[0] = 7.0
    assert array.tolist() == [7.0, 0.0]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_of_the_first_units_is_taken_beforehand() -> None:
    """It holds what it held, and what lies behind it is left to the system."""
    kernels = CpuKernels(50_000, BLOCK, D * 16)
    pools = kernels._keys, kernels._values
    of_pools = sum(pool.numel() * 4 for pool in pools)
    assert of_pools > 1.5 * TOUCHED_BYTES
    pools[0][0], pools[1][7, 0, 3] = 2.0, 3.0
    before = resident_bytes()
    kernels.touch()
    taken = resident_bytes() - before
    assert 0.9 * TOUCHED_BYTES < taken < 1.1 * TOUCHED_BYTES
    assert (pools[0][0] == 2.0).all()
    assert float(pools[1].sum()) == 3.0


def resident_bytes() -> int:
    """Memory of this process that is in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
