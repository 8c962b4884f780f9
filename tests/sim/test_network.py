"""Links as shared resources: bytes are conserved, shares are even, decode goes first."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import NETWORK, PEER, ConstantCost, gpu

from hetis_sim.control.step import Flow, Transfer
from hetis_sim.cost.model import TransferCost
from hetis_sim.sim.clock import Clock
from hetis_sim.sim.network import BACKGROUND_SHARE, Network, Wire
from hetis_sim.spec.cluster import ClusterSpec, HostSpec, LinkSpec
from hetis_sim.spec.gpu import GpuSpec

RATE = 1e6
BETA_S = 1e-3
CLUSTER = ClusterSpec("wires", (HostSpec((gpu("a", 1), gpu("b", 1), gpu("c", 1)), PEER),
                                HostSpec((gpu("d", 1), gpu("e", 1)), PEER)), NETWORK)
COST = ConstantCost(wire=TransferCost(1 / RATE, BETA_S))


class Wires:
    """A network on its own, with arrivals written down."""

    def __init__(self, cluster: ClusterSpec = CLUSTER, cost: ConstantCost = COST) -> None:
        self.clock = Clock(100_000)
        self.taken: dict[Wire, float] = {}
        self.ended_s: dict[int, float] = {}
        self.network = Network(self.clock, cluster, cost, lambda: self.taken, self._arrived)

    def _arrived(self, transfer: Transfer, begun_s: float) -> None:
        self.ended_s[transfer.request_id] = self.clock.now

    def send(self, number: int, begin_s: float, *flows: Flow, step_ends_s: float = 0.0) -> None:
        """Have a transfer begin at a time."""
        transfer = Transfer(number, 0, "push", flows)
        self.clock.call(begin_s, lambda: self.network.start(transfer, step_ends_s), priority=1)

    def run(self) -> dict[int, float]:
        """When each transfer has ended."""
        self.clock.run()
        assert not self.network.under_way
        return self.ended_s


def approx(seconds: float) -> object:
    """Equal but for rounding and the byte that is not waited for."""
    return pytest.approx(seconds, rel=1e-9, abs=2 / RATE)


def test_a_flow_alone_has_its_wires_to_itself() -> None:
    """It takes its bytes over the bandwidth, and the time of an empty message once."""
    wires = Wires()
    wires.send(0, 1.0, Flow(0, 1, 2e6))
    wires.send(1, 1.0, Flow(2, 3, 5e5))
    assert wires.run() == {0: approx(3.0 + BETA_S), 1: approx(1.5 + BETA_S)}


def test_flows_on_one_wire_share_it_evenly() -> None:
    """Two flows from one card get half each; what one leaves, the other takes."""
    wires = Wires()
    wires.send(0, 0.0, Flow(0, 1, 1e6))
    wires.send(1, 0.0, Flow(0, 2, 3e6))
    assert wires.run() == {0: approx(2.0 + BETA_S), 1: approx(4.0 + BETA_S)}


def test_hosts_talk_through_one_interface() -> None:
    """Flows between different cards of two hosts share the wire between the hosts."""
    wires = Wires()
    wires.send(0, 0.0, Flow(0, 3, 1e6))
    wires.send(1, 0.0, Flow(1, 4, 1e6))
    assert wires.run() == {0: approx(2.0 + BETA_S), 1: approx(2.0 + BETA_S)}


def test_the_two_directions_of_a_link_are_apart() -> None:
    """Traffic one way does not slow traffic the other way."""
    wires = Wires()
    wires.send(0, 0.0, Flow(0, 3, 1e6))
    wires.send(1, 0.0, Flow(3, 0, 1e6))
    assert wires.run() == {0: approx(1.0 + BETA_S), 1: approx(1.0 + BETA_S)}


def test_a_transfer_ends_with_its_last_flow() -> None:
    """Heads that go to several cards have arrived when all have."""
    wires = Wires()
    wires.send(0, 0.0, Flow(0, 3, 1e6), Flow(1, 2, 1e5))
    assert wires.run() == {0: approx(1.0 + BETA_S)}


def test_what_streams_with_a_step_ends_after_it() -> None:
    """The tail exists only when the step has ended."""
    wires = Wires()
    wires.send(0, 0.0, Flow(0, 1, 1e6, 2e5), step_ends_s=3.0)
    wires.send(1, 0.0, Flow(2, 3, 1e6, 2e5), step_ends_s=0.5)
    assert wires.run() == {0: approx(3.2 + BETA_S), 1: approx(1.0 + BETA_S)}


def test_decode_traffic_goes_first() -> None:
    """Transfers get what decode leaves, and a small share where it leaves nothing."""
    wires = Wires()
    out = wires.network.path(0, 1)[0][0]
    wires.taken = {out: 0.75 * RATE}
    wires.send(0, 0.0, Flow(0, 1, 1e6))
    assert wires.run() == {0: approx(4.0 + BETA_S)}
    busy = Wires()
    busy.taken = {out: 5 * RATE}
    busy.send(0, 0.0, Flow(0, 1, 1e5))
    assert busy.run() == {0: approx(0.1 / BACKGROUND_SHARE + BETA_S)}


def test_changes_of_decode_traffic_change_rates_from_then_on() -> None:
    """What has been sent before stays sent."""
    wires = Wires()
    out = wires.network.path(0, 1)[0][0]
    wires.send(0, 0.0, Flow(0, 1, 2e6))

    def busier() -> None:
        wires.taken = {out: 0.5 * RATE}
        wires.network.update_rates()

    wires.clock.call(1.0, busier)
    assert wires.run() == {0: approx(3.0 + BETA_S)}


def test_host_memory_is_reached_over_pcie() -> None:
    """Swapping uses the card's own wire to its host, the peer wire where peers talk over PCIe."""
    nvlink = replace(CLUSTER, hosts=tuple(replace(h, link=replace(PEER, name="nvlink-of-tests"))
                                          for h in CLUSTER.hosts))
    apart, shared = Wires(nvlink), Wires()
    for wires in (apart, shared):
        wires.send(0, 0.0, Flow(0, -1, 1e6))
        wires.send(1, 0.0, Flow(0, 1, 1e6))
    assert shared.run() == {0: approx(2.0), 1: approx(2.0 + BETA_S)}
    assert apart.run() == {0: approx(1e6 / CLUSTER.devices[0].gpu.host_bandwidth_bytes_per_s),
                           1: approx(1.0 + BETA_S)}


def shared_ends(jobs: list[tuple[float, float]]) -> list[float]:
    """When jobs (begin, bytes) end that share one wire evenly (processor sharing)."""
    left = {n: size for n, (_, size) in enumerate(jobs)}
    ends = [math.inf] * len(jobs)
    now_s = 0.0
    while left:
        active = [n for n in left if jobs[n][0] <= now_s]
        coming = min([jobs[n][0] for n in left if jobs[n][0] > now_s], default=math.inf)
        if not active:
            now_s = coming
            continue
        share = RATE / len(active)
        first = min(active, key=lambda n: left[n])
        until = min(now_s + left[first] / share, coming)
        for n in active:
            left[n] -= share * (until - now_s)
        now_s = until
        for n in [n for n in active if left[n] <= 1.0]:
            ends[n] = now_s
            del left[n]
    return ends


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(10, 3_000_000)), min_size=1, max_size=8))
def test_one_wire_is_shared_like_a_processor(jobs: list[tuple[float, float]]) -> None:
    """Any flows on one wire end when processor sharing says, so no byte is lost or sent twice."""
    wires = Wires()
    for n, (begin_s, size) in enumerate(jobs):
        wires.send(n, begin_s, Flow(0, 1, float(size)))
    found = wires.run()
    for n, end_s in enumerate(shared_ends([(b, float(s)) for b, s in jobs])):
        assert found[n] == pytest.approx(end_s + BETA_S, abs=10 * len(jobs) / RATE)


@pytest.mark.parametrize(("begin_s", "rate"), [(1e6, 4.5e11), (1e9, 1e9), (1.0, 1e30)])
def test_what_the_clock_cannot_resolve_is_not_waited_for(begin_s: float, rate: float) -> None:
    """Late in a run, or on a very fast wire, more than a byte takes less than the clock's last bit."""
    wires = Wires(cost=ConstantCost(wire=TransferCost(1 / rate, 0.0)))
    for number in range(50):
        wires.send(number, begin_s, Flow(0, 1, 1e6 + 12345.6 * number), Flow(0, 2, 7e5 + 777.7 * number))
    assert len(wires.run()) == 50


def test_two_hosts_with_a_link_of_their_own_leave_the_network_to_others() -> None:
    """Cache between them takes that link at its rate, and shares no interface with a third host."""
    fast = LinkSpec("fast", 1e9, 0.0)

    class Fast(ConstantCost):
        def transfer(self, link: LinkSpec) -> TransferCost:
            return TransferCost(0.25 / RATE, BETA_S / 2) if link.name == "fast" else super().transfer(link)

    hosts = tuple(HostSpec((gpu(name, 1),), PEER) for name in "abc")
    spec = ClusterSpec("pairs", hosts, NETWORK, ((1, 0, fast),))
    wires = Wires(spec, Fast(wire=TransferCost(1 / RATE, BETA_S)))
    paths = [wires.network.path(*ends)[0] for ends in ((0, 1), (1, 0), (0, 2))]
    assert [wire for wire in paths[0] if wire in paths[1]] == []
    shared = [wire for wire in paths[0] if wire in paths[2]]
    assert all(kind.startswith(("peer", "host")) for kind, _ in shared)
    assert [wires.network.bandwidth(wire) for wire in paths[0] if wire[0] == "pair"] == [4 * RATE]
    assert wires.network.path(0, 1)[1] == BETA_S / 2
    assert wires.network.path(-1, -3)[0] == (("nic_out", 0), ("nic_in", 2))


class Copying(ConstantCost):
    """Copies to and from host memory were measured: 4 us, and 2 us for every byte."""

    def host_copy(self, gpu: GpuSpec) -> TransferCost:
        return TransferCost(2e-6, 4e-6)


def test_swaps_take_what_copies_were_measured_to_take() -> None:
    """Both ways at the measured rate, with what a copy costs besides; without it the datasheet's rate."""
    pipe = replace(CLUSTER, hosts=tuple(replace(h, link=replace(PEER, name="pipe")) for h in CLUSTER.hosts))
    wires = Wires(pipe, Copying(wire=TransferCost(1 / RATE, BETA_S)))
    wires.send(0, 1.0, Flow(0, -1, 1e6))
    wires.send(1, 5.0, Flow(-1, 0, 5e5))
    assert wires.run() == {0: approx(3.0 + 4e-6), 1: approx(6.0 + 4e-6)}
