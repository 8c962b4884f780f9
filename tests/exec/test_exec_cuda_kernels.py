"""The kernels of CUDA devices, in Triton and with torch alone; see :mod:`exec_kernels` for where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from exec_kernels import DEVICE, torch, triton_kernels
from exec_parts import cut, joined_parts

from hetis_exec.kernels.cuda import CudaKernels
from hetis_exec.kernels.reference import attention
from hetis_exec.kernels.tables import DeviceTables
from hetis_exec.kvcache import KvPool, Table, TableKey

LAYERS, BLOCK, UNITS = 2, 4, 600
CLOSE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
RAGGED = [0, 1, 22, 16, 5]


def reference(*tensors: torch.Tensor) -> torch.Tensor:
    """On the CPU."""
    return attention(*(tensor.cpu() for tensor in tensors)).to(DEVICE)


class World:
    """A pool with some requests, whose tables have grown in turns, and what they ought to hold."""

    def __init__(self, paged: Any, lengths: Sequence[int], groups: int, head_dim: int,
                 dtype: torch.dtype = torch.float32) -> None:
        self.rng = np.random.default_rng(1)
        self.lengths, self.groups, self.dtype = lengths, groups, dtype
        self.kernels = CudaKernels(DEVICE, UNITS, BLOCK, head_dim, dtype, poison=1e4, paged=paged)
        self.pool = KvPool(UNITS, BLOCK, self.kernels)
        self.pool.open(TableKey(-1, 0, 0), LAYERS, UNITS // LAYERS, 0)
        self.pool.close(TableKey(-1, 0, 0))
        self.data = [self.random(2, LAYERS, groups, n + 1, head_dim) for n in lengths]
        for key in self.rows():
            self.pool.open(key, LAYERS, 1, 0)
        for blocks in range(2, max(lengths) // BLOCK + 2):
            # Kernels hear of every stage of growth.
            self.kernels.plan([self.pool.table(key) for key in self.rows()], [0] * len(self.rows()))
            for key in self.rows():
                self.pool.grow(key, min(blocks, lengths[key.request_id] // BLOCK + 1))
        for request, length in enumerate(lengths):
            spots = self.pool.spots([TableKey(request, 0, g) for g in range(groups)], 0, length)
            for layer in range(LAYERS):
                k, v = self.data[request][:, layer, :, :length]
                self.pool.write_groups(spots, layer, k, v)

    def rows(self) -> list[TableKey]:
        """All rows."""
        return [TableKey(request, 0, g) for request in range(len(self.lengths)) for g in range(self.groups)]

    def random(self, *shape: int) -> torch.Tensor:
        """Standard normal."""
        return torch.from_numpy(self.rng.standard_normal(shape).astype(np.float32)).to(DEVICE, self.dtype)

    def check(self, heads: int, splits: int | None = None) -> None:
        """Decode attention of all rows in every layer, against the reference; twice stored is no harm."""
        plan = self.kernels.plan([self.pool.table(key) for key in self.rows()],
                                 [self.lengths[key.request_id] for key in self.rows()])
        plan = cut(self.kernels.paged, plan, splits)
        for layer in (*range(LAYERS), 0):
            q = self.random(len(self.rows()), heads, self.data[0].shape[-1])
            new = torch.stack([self.data[key.request_id][:, layer, key.group, -1] for key in self.rows()])
            out = self.kernels.decode(plan, layer, q, new[:, 0], new[:, 1])
            assert out.dtype == self.dtype
            for n, key in enumerate(self.rows()):
                k, v = self.data[key.request_id][:, layer, key.group, None].float()
                wanted = reference(q[n][None, None].float(), k, v)[0, 0]
                assert (out[n].float() - wanted).abs().max() < CLOSE[self.dtype], (key, layer)
        for key in self.rows():
            k, v = self.pool.read(key.request_id, 0, (key.group,), 1, 0, self.lengths[key.request_id] + 1)
            assert torch.equal(torch.stack((k, v)), self.data[key.request_id][:, 1, key.group, None])


    def check_parts(self, heads: int, splits: int | None = None) -> None:
        """The same for tokens that are divided over several tables."""
        lengths = [self.lengths[key.request_id] for key in self.rows()]
        for layer in range(LAYERS):
            q = self.random(len(lengths), heads, self.data[0].shape[-1])

            def new(key: TableKey) -> tuple[torch.Tensor, torch.Tensor]:
                k, v = self.data[key.request_id][:, layer, key.group, -1]  # noqa: B023 - called at once
                return k, v

            out = joined_parts(self.kernels, self.pool, self.rows(), lengths, q, new, layer,
                               splits)
            assert out.dtype == self.dtype
            for n, key in enumerate(self.rows()):
                k, v = self.data[key.request_id][:, layer, key.group, None].float()
                wanted = reference(q[n][None, None].float(), k, v)[0, 0]
                assert (out[n].float() - wanted).abs().max() < CLOSE[self.dtype], (key, layer)


@pytest.mark.parametrize("dtype", CLOSE)
def test_gathered_parts_join_to_the_whole(dtype: torch.dtype) -> None:
    """With torch alone, in one piece and row by row."""
    for chunk_bytes in (1, 1 << 20):
        world = World(None, RAGGED, 2, 24, dtype)
        world.kernels._gathered._chunk_bytes = chunk_bytes
        world.check_parts(3)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("dot", "heads", "dtype"), [(False, 3, torch.float32), (True, 4, torch.float16)])
def test_paged_parts_join_to_the_whole(dot: bool, heads: int, dtype: torch.dtype, splits: int,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """With matrix units and without, rows in one piece and in several, some of which are empty."""
    paged = with_tiles(triton_kernels("paged"), monkeypatch, dot, 16 if dot else 2)
    World(paged, [0, 9, 14], 1, 16, dtype).check_parts(heads, splits=splits)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 16), (3, 24), (8, 64)])
def test_gathered_decode_is_that_of_the_reference(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """With torch alone, in one piece and row by row."""
    World(None, RAGGED, 2, head_dim, dtype).check(heads)
    world = World(None, RAGGED, 2, head_dim, dtype)
    world.kernels._gathered._chunk_bytes = 1
    world.check(heads)


FEW = [0, 9, 4]


def with_tiles(paged: Any, monkeypatch: pytest.MonkeyPatch, dot: bool, tile: int) -> Any:
    """Have rows computed in small tiles."""
    monkeypatch.setattr(paged, "choose_launch", lambda *facts: paged.Launch(dot, tile, 4, 2))
    return paged


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("heads", "head_dim", "dtype"), [
    (1, 16, torch.float32), (3, 12, torch.float16), (4, 16, torch.bfloat16)])
def test_paged_decode_is_that_of_the_reference(heads: int, head_dim: int, dtype: torch.dtype, splits: int,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matrix units, for ragged lengths, at the edges of blocks and with no token cached."""
    paged = with_tiles(triton_kernels("paged"), monkeypatch, False, 2)
    World(paged, FEW, 2, head_dim, dtype).check(heads, splits=splits)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", CLOSE)
def test_paged_decode_by_matrix_units_is_that_of_the_reference(
        dtype: torch.dtype, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads padded to what matrix units take."""
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter does not multiply matrices of bfloat16")
    if DEVICE.type == "cuda" and dtype == torch.float32:
        pytest.skip("matrix units are for 16-bit types")
    paged = with_tiles(triton_kernels("paged"), monkeypatch, True, 16)
    World(paged, [0, 20], 1, 24, dtype).check(5, splits=splits)


def test_long_rows_take_more_programs_and_not_more_time() -> None:
    """Pieces fill waves of programs; there are no more of them than can be listed."""
    paged, resident = triton_kernels("paged"), 528
    launch = paged.Launch(True, 64, 4, 3)

    def share(lengths: list[int], groups: int = 8) -> int:
        cached = np.array(lengths)
        number = paged.pieces_max(len(cached), groups, resident)
        found: int = paged.choose_share(cached, groups, number, launch, resident)
        assert found % launch.tile == 0
        pieces, runs = paged.cut(cached, found, number)
        listed = [tuple(piece) for piece in pieces.tolist() if piece[0] >= 0]
        assert listed == [(token, first, min(tokens, first + found)) for token, tokens in enumerate(lengths)
                          for first in range(0, max(1, tokens), found)]
        assert all(pieces[begin:begin + count, 0].tolist() == [token] * count
                   for token, (begin, count) in enumerate(runs.tolist()))
        return found

    assert share([8192]) == 128  # as short as pieces are
    assert share([1024] * 32) == 512  # two of each row are all that there is room for at a time
    assert share([4000, *[200] * 15]) == 128  # the long row in many, the others in two
    assert share([4000, *[500] * 15]) == 192  # shorter ones would need a third wave
    assert share([0, 0]) == 128
    assert share([1 << 17] * 40) > 512


def test_pieces_of_uneven_rows_join_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of no, one and many pieces side by side, as they are chosen, more than are joined at a time."""
    paged = with_tiles(triton_kernels("paged"), monkeypatch, False, 1)
    lengths = [0, 2, 39, 4]
    world = World(paged, lengths, 1, 16)
    world.kernels._cut = paged.Launch(False, 1, 4, 2), 64
    plan = world.kernels.plan([world.pool.table(key) for key in world.rows()], lengths)
    assert plan.runs[:, 1].tolist() == [1, 1, 20, 2]
    world.check(3)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 4, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", CLOSE)
def test_paged_decode_as_it_is_launched(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """All shapes of real models, with the tiles and pieces that are chosen for them."""
    World(triton_kernels("paged"), [*RAGGED, 130], 1, head_dim, dtype).check(heads)


def test_rows_of_packed_projections_are_read_where_they_lie() -> None:
    """Queries, keys and values of all groups as slices of one matrix; rows without a table are left out."""
    paged = triton_kernels("paged")
    world = World(paged, [6, 9, 3], 2, 16)
    plan = world.kernels.plan([world.pool.table(key) for key in world.rows()], [6, 9, 3])
    positions = torch.tensor([6, 9, 3], device=DEVICE)
    plan = cut(paged, replace(plan, positions=positions), 2)
    plan.spans[2:4] = -1
    packed = world.random(3, 2 * (4 + 2) * 16)
    q, k, v = (part.view(3, 2, -1, 16) for part in packed.split((128, 32, 32), dim=1))
    for request in (0, 2):
        for g in range(2):
            k[request, g], v[request, g] = world.data[request][:, 1, g, -1]
    out = world.kernels.attend(plan, 1, q, k[:, :, 0], v[:, :, 0])
    for request in (0, 2):
        wanted = reference(q[request][None], *world.data[request][:, 1])[0]
        assert torch.allclose(out[request], wanted, atol=1e-5)


@pytest.mark.parametrize(("new", "context"), [(1, 0), (7, 0), (1, 9), (5, 9)])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("flash", [True, False])
def test_prefill_attention_is_that_of_the_reference(new: int, context: int, heads: int, flash: bool) -> None:
    """Whole prompts and pieces after a cached context, with grouped heads as they are or expanded."""
    world = World(None, [1], 1, 16)
    world.kernels._flash = flash
    queries = world.random(new, 2, heads, 16)
    keys, values = world.random(2, context + new, 16), world.random(2, context + new, 16)
    out = world.kernels.causal(queries, keys, values)
    assert torch.allclose(out, reference(queries, keys, values), atol=1e-5)


def test_freed_cache_is_poisoned() -> None:
    """Whoever reads what a request has left behind gets nothing that it could use."""
    world = World(None, [6], 1, 16)
    units = world.pool.table(TableKey(0, 0, 0)).units
    world.pool.close(TableKey(0, 0, 0))
    keys, values = world.kernels.read(units)
    assert (keys == 1e4).all()
    assert (values == 1e4).all()


# -- tables --------------------------------------------------------------------------------------------------


def held(tables: DeviceTables, table: Table) -> np.ndarray:
    """What the device knows of a table."""
    begin, room = tables.spans([table])[0].tolist()
    layers, blocks = table.units.shape
    segment = tables.arena[begin:begin + layers * room].view(layers, room)
    return segment[:, :blocks].cpu().numpy()


def test_tables_on_the_device_follow_those_of_the_host() -> None:
    """Through growth, ends and a larger array; only what is new is sent."""
    rng = np.random.default_rng(0)
    tables = DeviceTables(DEVICE, 64)
    open_tables: list[Table] = []
    for _ in range(400):
        kind = rng.integers(4)
        if kind == 0 or not open_tables:
            shape = (int(rng.integers(1, 4)), int(rng.integers(1, 12)))
            open_tables.append(Table(rng.integers(10_000, size=shape), 0))
        elif kind == 1:
            tables.forget(open_tables.pop(rng.integers(len(open_tables))))
        else:
            table = open_tables[rng.integers(len(open_tables))]
            more = rng.integers(10_000, size=(len(table.units), int(rng.integers(1, 3))))
            table.units = np.concatenate((table.units, more), axis=1)
        tables.spans(open_tables)
        for table in open_tables:
            assert np.array_equal(held(tables, table), table.units)
    assert tables.generation > 0
    spans = tables.spans(open_tables)
    ends = [(begin, begin + room * len(table.units))
            for (begin, room), table in zip(spans.tolist(), open_tables, strict=True)]
    assert all(a[1] <= b[0] for a, b in zip(sorted(ends), sorted(ends)[1:], strict=False))


def test_a_grown_table_sends_its_new_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in which no table changes send nothing."""
    sent: list[int] = []
    send = DeviceTables._send

    def counting(self: DeviceTables) -> None:
        sent.append(sum(len(at) for at, _ in self._changes))
        send(self)

    monkeypatch.setattr(DeviceTables, "_send", counting)
    tables, table = DeviceTables(DEVICE), Table(np.arange(12).reshape(3, 4), 0)
    tables.spans([table])
    tables.spans([table])
    table.units = np.concatenate((table.units, [[12], [13], [14]]), axis=1)
    tables.spans([table])
    assert sent == [12, 3]


class Prompts:
    """Prompts of one step, with and without tokens in the cache, beside each other."""

    def __init__(self, cases: Sequence[tuple[int, int]], heads: int, head_dim: int, dtype: torch.dtype,
                 launch: Any) -> None:
        self.world = World(None, [context for _, context in cases], 2, head_dim, dtype)
        self.kernels = self.world.kernels
        self.kernels._prompts = triton_kernels("prompts")
        self.cases, self.launch = cases, launch
        tokens = sum(new for new, _ in cases)
        self.q = self.world.random(tokens, 2, heads, head_dim)
        self.k, self.v = self.world.random(tokens, 2, head_dim), self.world.random(tokens, 2, head_dim)
        for request, (new, context) in enumerate(cases):
            for g in range(2):
                self.world.pool.grow(TableKey(request, 0, g), (context + new - 1) // BLOCK + 1)

    def attend(self, layer: int) -> torch.Tensor:
        """With the launch given."""
        tables = [self.world.pool.table(key) for key in self.world.rows()]
        news, contexts = zip(*self.cases, strict=True)
        self.kernels.prompt_launch = lambda heads: self.launch
        begins = np.cumsum([0, *news[:-1]])
        plan = self.kernels.plan_prompts(tables, begins, news, contexts, self.q.shape[2])
        return self.kernels.attend_prompts(plan, layer, self.q, self.k, self.v)

    def check(self) -> None:
        """Against the reference, and what is stored against what was given."""
        out, layer, at = self.attend(1), 1, 0
        for request, (new, context) in enumerate(self.cases):
            here = slice(at, at + new)
            at += new
            cached_k, cached_v = self.world.data[request][:, layer, :, :context]
            k = torch.cat((cached_k, self.k[here].swapaxes(0, 1)), dim=1)
            v = torch.cat((cached_v, self.v[here].swapaxes(0, 1)), dim=1)
            wanted = reference(self.q[here].float(), k.float(), v.float())
            assert (out[here].float() - wanted).abs().max() < CLOSE[self.q.dtype], request
            found_k, found_v = self.world.pool.read(request, 0, (0, 1), layer, 0, context + new)
            assert torch.equal(found_k, k)
            assert torch.equal(found_v, v)


@pytest.mark.parametrize(("heads", "head_dim", "dtype", "tokens"), [
    (1, 16, torch.float32, 16), (3, 12, torch.float16, 5), (4, 16, torch.float16, 4)])
def test_prompts_of_a_step_are_attended_to_in_one_kernel(heads: int, head_dim: int, dtype: torch.dtype,
                                                         tokens: int) -> None:
    """With tokens before them and without, shorter and longer than a block, in any number."""
    prompts = triton_kernels("prompts")
    launch = prompts.PromptLaunch(tokens, 16, 16, 4, 2)
    Prompts([(1, 0), (9, 0), (17, 6), (3, 21), (4, 4)], heads, head_dim, dtype, launch).check()


def test_blocks_cover_every_prompt() -> None:
    """Once, whole blocks first."""
    prompts = triton_kernels("prompts")
    launch = prompts.choose_prompt_launch(4, 128, torch.bfloat16, (9, 0))
    assert launch.tokens * 4 == launch.rows == 64
    found = prompts.blocks_of(launch, [1, 16, 40]).tolist()
    assert sorted(found) == [[0, 0], [1, 0], [2, 0], [2, 16], [2, 32]]
    assert found[0] == [2, 32]
    assert prompts.choose_prompt_launch(4, 128, torch.float32, (9, 0)) is None
    assert prompts.choose_prompt_launch(4, 128, torch.float16, (7, 5)) is None
