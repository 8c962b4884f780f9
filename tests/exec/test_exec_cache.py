"""Physical cache: tables, journeys between workers, and which groups live where."""

from __future__ import annotations

import numpy as np
import pytest
from exec_toys import MODEL, Fixed, given, pipeline, run, workload

from hetis_exec.cachekeeper import CacheKeeper
from hetis_exec.errors import CacheError, WorkerError
from hetis_exec.handoff import routes
from hetis_exec.kvcache import KvPool, TableKey
from hetis_exec.messages import (
    Abroad,
    Arrived,
    Await,
    CacheData,
    Close,
    Control,
    Drop,
    Expect,
    Forget,
    Grow,
    Join,
    Message,
    Op,
    Open,
    Park,
    Send,
    Shed,
)
from hetis_exec.mirror import Mirror
from hetis_exec.toy_backend import ToyKernels
from hetis_sim.spec.errors import InfeasibleError

D = 6


def filled(tokens: int, seed: int = 0) -> np.ndarray:
    """Made-up keys or values, shape (tokens, D)."""
    return np.random.default_rng(seed).standard_normal((tokens, D))


def pool_of(units: int, block_tokens: int = 4) -> KvPool:
    """An empty pool."""
    return KvPool(units, block_tokens, ToyKernels(units, block_tokens, D))


# -- the pool --------------------------------------------------------------------------------------------


def test_pool_gives_back_what_was_written_across_blocks() -> None:
    """Tokens written in pieces are read as one, whatever blocks and layers they lie in."""
    pool = pool_of(40)
    key, other = TableKey(7, 1, 2), TableKey(7, 1, 3)
    for table in (key, other):
        pool.open(table, layers=3, blocks=1, tag=1)
    keys, values = filled(10, 1), filled(10, 2)
    pool.write(key, 2, 0, keys[:3], values[:3])
    pool.grow(key, 3)
    pool.write(key, 2, 3, keys[3:], values[3:])
    pool.grow(other, 3)
    pool.write(other, 2, 0, values, keys)
    read_keys, read_values = pool.read(7, 1, (3, 2), 2, 1, 9)
    assert np.array_equal(read_keys, [values[1:9], keys[1:9]])
    assert np.array_equal(read_values, [keys[1:9], values[1:9]])


def test_pool_counts_units_and_refuses_what_does_not_fit() -> None:
    """A table takes blocks times layers units; a full pool raises and changes nothing."""
    pool = pool_of(10)
    pool.open(TableKey(0, 0, 0), layers=3, blocks=2, tag=1)
    assert pool.used_units == 6
    with pytest.raises(CacheError, match="6 units are asked for, 4 of 10 are free"):
        pool.open(TableKey(0, 0, 1), layers=3, blocks=2, tag=1)
    pool.open(TableKey(0, 1, 0), layers=1, blocks=4, tag=1)
    assert pool.used_units == 10
    with pytest.raises(CacheError, match="open already"):
        pool.open(TableKey(0, 1, 0), layers=1, blocks=1, tag=1)
    with pytest.raises(CacheError, match="shrink"):
        pool.grow(TableKey(0, 1, 0), 3)
    pool.close(TableKey(0, 0, 0))
    assert pool.used_units == 4
    with pytest.raises(CacheError, match="holds no cache"):
        pool.close(TableKey(0, 0, 0))


def test_freed_memory_cannot_be_read_as_cache() -> None:
    """What was freed and taken anew is nan until somebody writes it."""
    pool = pool_of(2, 2)
    pool.open(TableKey(0, 0, 0), layers=1, blocks=2, tag=1)
    pool.write(TableKey(0, 0, 0), 0, 0, filled(4), filled(4))
    pool.close(TableKey(0, 0, 0))
    pool.open(TableKey(1, 0, 0), layers=1, blocks=2, tag=2)
    assert np.isnan(pool.read(1, 0, (0,), 0, 0, 4)[0]).all()


def test_too_large_a_pool_is_refused_before_work_starts() -> None:
    """A device with more cache than a worker of this host may take is an error of the input."""
    what = given(pipeline([[0]], [4]), Fixed(), workload(1), units=20_000_000)
    with pytest.raises(InfeasibleError, match="at most"):
        run(what)


# -- journeys --------------------------------------------------------------------------------------------


class Pair:
    """Two keepers with tables of two layers; what they send is delivered by hand."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, Message]] = []
        self.keepers = [CacheKeeper(device, pool_of(100), self._send) for device in (0, 1)]

    def _send(self, target: int, message: Message) -> None:
        self.sent.append((target, message))

    def tell(self, seq: int, device: int, used_units: int, *ops: Op) -> None:
        """A message of the driver for one of them."""
        self.keepers[device].apply(Control(seq, ops, used_units, None))

    def deliver(self) -> list[Message]:
        """Hand cache over; returns what was meant for the driver."""
        others: list[Message] = []
        while self.sent:
            target, message = self.sent.pop(0)
            if isinstance(message, CacheData):
                self.keepers[target].take(message)
            else:
                others.append(message)
        return others

    def begin(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Message 1 fills request 5 at keeper 0; returns layer 0, and layer 1 is larger by one."""
        self.tell(1, 0, 4, Open(5, 0, (0,), 2, 2, tag=1))
        self.tell(1, 1, 0)
        keys, values = filled(tokens, 3), filled(tokens, 4)
        for layer in range(2):
            self.keepers[0].pool.write(KEY, layer, 0, keys + layer, values + layer)
        return keys, values


KEY = TableKey(5, 0, 0)


def test_cache_that_comes_before_its_table_waits_for_it() -> None:
    """Links of any speed: data is put aside until the message that makes room has been carried out."""
    pair = Pair()
    keys, _ = pair.begin(6)
    pair.tell(2, 0, 4, Send(5, 0, (0,), 0, 6, 1, tag=2))
    assert pair.deliver() == []
    pair.tell(2, 1, 4, Open(5, 0, (0,), 2, 2, tag=2), Expect(2, 1))
    assert pair.deliver() == [Arrived(1, 2)]
    assert np.array_equal(pair.keepers[1].pool.read(5, 0, (0,), 1, 0, 6)[0][0], keys + 1)


def test_cache_for_a_table_that_was_given_up_is_dropped_but_counted() -> None:
    """A move that is cancelled while under way writes nothing, and the driver still hears of its end."""
    pair = Pair()
    pair.begin(6)
    pair.tell(2, 0, 4, Send(5, 0, (0,), 0, 6, 1, tag=2))
    pair.tell(2, 1, 4, Open(5, 0, (0,), 2, 2, tag=2), Expect(2, 1))
    pair.tell(3, 1, 4, Close(5, 0, (0,)), Open(5, 0, (0,), 2, 2, tag=3))
    assert pair.deliver() == [Arrived(1, 2)]
    assert np.isnan(pair.keepers[1].pool.read(5, 0, (0,), 1, 0, 6)[0]).all()


def test_switch_sends_what_was_added_and_frees_the_source() -> None:
    """The last piece makes the table ready; before it, attention has to wait."""
    pair = Pair()
    keys, values = pair.begin(8)
    pair.tell(2, 0, 4, Send(5, 0, (0,), 0, 6, 1, tag=2))
    pair.tell(2, 1, 4, Open(5, 0, (0,), 2, 2, tag=2), Expect(2, 1))
    pair.deliver()
    pair.tell(3, 0, 0, Send(5, 0, (0,), 6, 8, 1, tag=2, final=True), Close(5, 0, (0,)))
    pair.tell(3, 1, 6, Grow(5, 0, (0,), 3), Await(5, 0, (0,)))
    assert not pair.keepers[1].ready(5, 0, (0,))
    pair.deliver()
    assert pair.keepers[1].ready(5, 0, (0,))
    got_keys, got_values = pair.keepers[1].pool.read(5, 0, (0,), 0, 0, 8)
    assert np.array_equal(got_keys[0], keys)
    assert np.array_equal(got_values[0], values)


def test_a_copy_waits_until_its_source_is_complete() -> None:
    """Heads whose last piece is still to come are parked in host memory only after it."""
    pair = Pair()
    keys, _ = pair.begin(8)
    pair.tell(2, 0, 0, Send(5, 0, (0,), 0, 8, 1, tag=2, final=True), Close(5, 0, (0,)))
    pair.tell(2, 1, 4, Open(5, 0, (0,), 2, 2, tag=2), Await(5, 0, (0,)), Expect(3, 1),
              Park(5, 0, (0,), 8, tag=3))
    assert pair.keepers[1].parked == {}
    assert pair.deliver() == [Arrived(1, 3)]
    assert np.array_equal(pair.keepers[1].parked[KEY].keys[1], keys + 1)


def test_parked_cache_comes_back_once() -> None:
    """Swapping in takes the data out of host memory, to another device or to the same one."""
    pair = Pair()
    keys, _ = pair.begin(8)
    pair.tell(2, 0, 4, Expect(2, 1), Park(5, 0, (0,), 8, tag=2))
    assert pair.deliver() == [Arrived(0, 2)]
    pair.tell(3, 0, 0, Drop(5))
    pair.tell(3, 1, 4, Open(5, 0, (0,), 2, 2, tag=4), Expect(4, 1))
    pair.tell(4, 0, 0, Send(5, 0, (0,), 0, 8, 1, tag=4, parked=True), Forget(5))
    pair.tell(4, 1, 4)
    assert pair.deliver() == [Arrived(1, 4)]
    assert np.array_equal(pair.keepers[1].pool.read(5, 0, (0,), 1, 0, 8)[0][0], keys + 1)
    assert pair.keepers[0].parked == {}


def test_cache_goes_to_another_instance_that_counts_its_own_messages() -> None:
    """One layer of two becomes layer 2 of another stage, once the other's message 7 has made room."""
    pair = Pair()
    keys, _ = pair.begin(6)
    abroad = Abroad(stage=3, first=1, layers=1, at=2, after=7)
    pair.tell(2, 0, 4, Send(5, 0, (0,), 0, 6, 1, tag=9, abroad=abroad))
    assert pair.deliver() == []
    pair.tell(7, 1, 6, Open(5, 3, (0,), 3, 2, tag=9), Expect(9, 1))
    assert pair.deliver() == [Arrived(1, 9)]
    got = pair.keepers[1].pool
    assert np.array_equal(got.read(5, 3, (0,), 2, 0, 6)[0][0], keys + 1)
    assert np.isnan(got.read(5, 3, (0,), 1, 0, 6)[0]).all()


def test_every_group_of_every_layer_has_one_route() -> None:
    """Three stages with ranks of their own give, two others take: nothing is missing, nothing comes twice."""
    source = pipeline([[0], [1, 2], [3]], [2, 3, 1], owned=[[4], [3, 1], [4]]).instances[0]
    target = pipeline([[4, 5], [6]], [4, 2], [7], owned=[[2, 2], [4]]).instances[0]
    given_, taken = ((0,) * 4, (1, 1, 1, 2), (3,) * 4), ((0, 2, 1, 2), (3, 4, 4, 3))
    found = list(routes(source, given_, target, taken))
    starts, others = (0, 2, 5), (0, 4)
    carried = {(starts[r.stage] + r.first + n, others[r.target_stage] + r.at + n, g, r.source, r.target)
               for r in found for n in range(r.layers) for g in r.groups}
    assert len(carried) == sum(r.layers * len(r.groups) for r in found) == 6 * 4
    wanted = {(layer, g) for layer in range(6) for g in range(4)}
    assert {(layer, g) for layer, _, g, _, _ in carried} == wanted
    for layer, there, g, a, b in carried:
        assert layer == there
        assert a == given_[0 if layer < 2 else 1 if layer < 5 else 2][g]
        assert b == taken[0 if layer < 4 else 1][g]


def test_the_ledger_has_the_last_word() -> None:
    """A worker that holds more or less than is booked stops."""
    with pytest.raises(CacheError, match="holds 4 units of cache, the ledger says 3"):
        Pair().tell(1, 0, 3, Open(5, 0, (0,), 2, 2, tag=1))


def test_a_worker_whose_cache_differs_from_the_ledger_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """If tables were not grown with the books, the run would stop at the first message that shows it."""
    monkeypatch.setattr(Mirror, "_grow", lambda self, held, state: None)
    with pytest.raises(WorkerError, match="the ledger says"):
        run(given(pipeline([[0]], [4]), Fixed(), workload(3, (3, 3), (6, 6))))


# -- some blocks of a text -------------------------------------------------------------------------------


def test_a_table_of_some_blocks_gives_back_what_was_written() -> None:
    """Blocks leave and come, and the others keep what they hold, wherever they lie."""
    pool = pool_of(20)
    pool.open(KEY, layers=1, blocks=4, tag=1)
    keys, values = filled(16, 1), filled(16, 2)
    pool.write(KEY, 0, 0, keys, values)
    pool.shed(KEY, (0, 2))
    assert pool.used_units == 2
    assert pool.tokens_here(KEY, 2, 15).tolist() == [4, 5, 6, 7, 12, 13, 14]
    assert np.array_equal(pool.read(5, 0, (0,), 0, 5, 8)[0][0], keys[5:8])
    with pytest.raises(CacheError, match=r"blocks \[2\] are not here"):
        pool.read(5, 0, (0,), 0, 5, 9)
    assert [pool.position_in(pool.table(KEY), n) for n in (4, 13, -1)] == [0, 5, -9]
    pool.grow(KEY, 5)
    pool.open(KEY._replace(aside=True), layers=1, blocks=3, tag=2, absent=(0, 1))
    pool.write(KEY._replace(aside=True), 0, 8, keys[8:12], values[8:12])
    pool.join(KEY, layers=1, blocks=6, tag=2, absent=(0,))
    assert pool.used_units == 5
    assert list(pool.tables) == [KEY]
    pool.write(KEY, 0, 16, keys[:8], values[:8])
    assert np.array_equal(pool.read(5, 0, (0,), 0, 4, 24)[1][0], np.concatenate((values[4:], values[:8])))
    with pytest.raises(CacheError, match="to be absent"):
        pool.join(KEY, layers=1, blocks=6, tag=3, absent=(0, 5))


def test_parked_blocks_are_sent_wherever_they_are_wanted() -> None:
    """Of a table with some blocks, each piece finds its place in host memory."""
    pair = Pair()
    keys, _ = pair.begin(8)
    pair.tell(2, 0, 6, Grow(5, 0, (0,), 3))
    pair.keepers[0].pool.write(KEY, 1, 8, keys[:3], keys[:3])
    pair.tell(3, 0, 4, Shed(5, 0, (0,), (1,)), Expect(2, 1), Park(5, 0, (0,), 11, tag=2))
    assert pair.deliver() == [Arrived(0, 2)]
    pair.tell(2, 1, 4, Open(5, 0, (0,), 2, 3, tag=4, absent=(1,)), Expect(4, 2))
    pair.tell(4, 0, 0, Drop(5), Send(5, 0, (0,), 8, 11, 1, tag=4, parked=True),
              Send(5, 0, (0,), 0, 4, 1, tag=4, parked=True), Forget(5))
    pair.tell(4, 1, 4)
    assert pair.deliver() == [Arrived(1, 4)]
    got = pair.keepers[1].pool
    assert np.array_equal(got.read(5, 0, (0,), 1, 8, 11)[0][0], keys[:3])
    assert np.array_equal(got.read(5, 0, (0,), 1, 0, 4)[0][0], keys[:4] + 1)


def test_a_final_piece_finds_its_table_after_a_second_move() -> None:
    """Between two moves there may be a step without decoding, and the first one's last piece on its way."""
    pair = Pair()
    keys, _ = pair.begin(8)
    pair.tell(2, 1, 2, Open(5, 0, (0,), 2, 1, tag=2, aside=True))
    pair.tell(3, 1, 4, Join(5, 0, (0,), 2, 2, tag=2, absent=()), Await(5, 0, (0,)))
    pair.tell(4, 1, 6, Join(5, 0, (0,), 2, 3, tag=3, absent=()))
    pair.tell(3, 0, 0, Send(5, 0, (0,), 4, 8, 1, tag=2, final=True), Close(5, 0, (0,)))
    away = Control(5, (Send(5, 0, (0,), 4, 8, 0, tag=5, final=True),), 6, None)
    assert not pair.keepers[1].may_apply(away)
    pair.deliver()
    assert pair.keepers[1].may_apply(away)
    assert np.array_equal(pair.keepers[1].pool.read(5, 0, (0,), 1, 4, 8)[0][0], keys[4:] + 1)


def test_reference_and_split_models_are_the_same_model() -> None:
    """Another seed is another model: equal tokens in the other tests are no accident."""
    from hetis_exec.toy_model import ToyModel

    prompt = np.arange(12)
    assert ToyModel(MODEL, 0).generate(prompt, 8) != ToyModel(MODEL, 1).generate(prompt, 8)
    assert ToyModel(MODEL, 0).generate(prompt, 8) != ToyModel(MODEL, 0).generate(prompt[::-1], 8)
