"""Links as shared resources: cache transfers as fluid flows over the wires they cross.

Flows of cache have low priority: decode's head traffic takes what it needs first, and the
flows of a wire share the rest evenly. A flow runs at the rate of its tightest wire.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from hetis_sim.control.step import Transfer
from hetis_sim.cost.model import CostModel
from hetis_sim.sim.clock import Clock
from hetis_sim.spec.cluster import ClusterSpec, LinkSpec

Wire = tuple[str, int]
"""(kind, device or host id); the two directions of a link are two wires."""

# However busy decode keeps a wire, transfers get this share: they must end.
BACKGROUND_SHARE = 0.05


@dataclass(slots=True, eq=False)
class _Pending:
    """A transfer and the number of its flows that have not ended."""

    transfer: Transfer
    flows_left: int
    begun_s: float
    latency_s: float = 0.0
    not_before_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Route:
    """The flows that cross the same wires, which therefore all run at the same rate.

    Attributes:
        given_bytes: what a flow has got that was there from the first.
        ends: of each flow what ``given_bytes`` will be at its end, its number, and its transfer; a heap.
        rate: of each flow, bytes per second.
    """

    wires: tuple[Wire, ...]
    latency_s: float
    given_bytes: float = 0.0
    ends: list[tuple[float, int, _Pending]] = field(default_factory=list)
    rate: float = 0.0

    def next_end_s(self, now: float) -> float:
        """When the first flow will have ended."""
        return now + max(0.0, self.ends[0][0] - self.given_bytes) / self.rate

    def is_over(self, now: float) -> bool:
        """Whether nothing of the first flow is left but rounding: a byte, or less than the clock can tell."""
        left_bytes = self.ends[0][0] - self.given_bytes
        return left_bytes <= 1.0 or now + left_bytes / self.rate <= now


class Network:
    """Carries out transfers.

    Args:
        foreground: bytes per second that decode puts on each wire at the moment.
        arrived: called with each transfer, and when it began, once its last flow has ended.

    Attributes:
        under_way: transfers that have not ended.
    """

    def __init__(self, clock: Clock, cluster: ClusterSpec, cost: CostModel,
                 foreground: Callable[[], dict[Wire, float]],
                 arrived: Callable[[Transfer, float], None]) -> None:
        self._clock = clock
        self._cluster = cluster
        self._cost = cost
        self._foreground = foreground
        self._arrived = arrived
        self._routes: dict[tuple[int, int], _Route] = {}
        self._flows = 0
        self.under_way = 0
        self._updated_s = 0.0
        self._generation = 0
        self._paths: dict[tuple[int, int], tuple[tuple[Wire, ...], float]] = {}
        self._bandwidth: dict[Wire, float] = {}

    def start(self, transfer: Transfer, step_ends_s: float = 0.0) -> None:
        """Begin a transfer now.

        One that streams with a step ends no sooner than the step's end and the time that its
        tail takes on idle wires.
        """
        self._progress()
        self.under_way += 1
        pending = _Pending(transfer, len(transfer.flows), self._clock.now)
        for flow in transfer.flows:
            wires, latency = self.path(flow.source, flow.target)
            tail_s = max([flow.tail_bytes / self._bandwidth[wire] for wire in wires])
            pending.not_before_s = max(pending.not_before_s, step_ends_s + tail_s)
            route = self._routes.setdefault((flow.source, flow.target), _Route(wires, latency))
            self._flows += 1
            heappush(route.ends, (route.given_bytes + flow.size_bytes, self._flows, pending))
        self.update_rates()

    def update_rates(self) -> None:
        """Share the wires anew; called when flows begin or end and when decode's traffic changes."""
        if not self._routes:
            return
        self._progress()
        flows: dict[Wire, int] = {}
        for route in self._routes.values():
            for wire in route.wires:
                flows[wire] = flows.get(wire, 0) + len(route.ends)
        taken = self._foreground()
        share = {wire: self._residual(wire, taken.get(wire, 0.0)) / count for wire, count in flows.items()}
        for route in self._routes.values():
            route.rate = min([share[wire] for wire in route.wires])
        self._schedule()

    def _residual(self, wire: Wire, taken: float) -> float:
        bandwidth = self._bandwidth[wire]
        return max(bandwidth - taken, BACKGROUND_SHARE * bandwidth)

    def _progress(self) -> None:
        elapsed = self._clock.now - self._updated_s
        self._updated_s = self._clock.now
        if elapsed > 0:
            for route in self._routes.values():
                route.given_bytes += route.rate * elapsed

    def _schedule(self) -> None:
        self._generation += 1
        generation, now = self._generation, self._clock.now
        first = min([route.next_end_s(now) for route in self._routes.values()])
        self._clock.call(first, lambda: self._end_flows(generation), priority=1)

    def _end_flows(self, generation: int) -> None:
        if generation != self._generation:
            return
        self._progress()
        ended: list[tuple[int, _Pending, float]] = []
        for route in self._routes.values():
            while route.ends and route.is_over(self._clock.now):
                _, number, pending = heappop(route.ends)
                ended.append((number, pending, route.latency_s))
        self._routes = {key: route for key, route in self._routes.items() if route.ends}
        for _, pending, latency_s in sorted(ended, key=lambda flow: flow[0]):
            self._flow_ended(pending, latency_s)
        self.update_rates()

    def _flow_ended(self, pending: _Pending, latency_s: float) -> None:
        pending.flows_left -= 1
        pending.latency_s = max(pending.latency_s, latency_s)
        if pending.flows_left == 0:
            self._clock.call(max(self._clock.now, pending.not_before_s) + pending.latency_s,
                             lambda: self._transfer_arrived(pending), priority=1)

    def _transfer_arrived(self, pending: _Pending) -> None:
        self.under_way -= 1
        self._arrived(pending.transfer, pending.begun_s)

    # -- wires -----------------------------------------------------------------------------

    def bandwidth(self, wire: Wire) -> float:
        """Bytes per second of a wire that some path crosses."""
        return self._bandwidth[wire]

    def path(self, source: int, target: int) -> tuple[tuple[Wire, ...], float]:
        """Wires that a flow crosses, and the latency of its last byte."""
        key = (source, target)
        if key not in self._paths:
            self._paths[key] = self._make_path(source, target)
        return self._paths[key]

    def _make_path(self, source: int, target: int) -> tuple[tuple[Wire, ...], float]:
        devices, hosts = self._cluster.devices, self._cluster.hosts
        source_host = -1 - source if source < 0 else devices[source].host_id
        target_host = -1 - target if target < 0 else devices[target].host_id
        if source_host == target_host and source >= 0 and target >= 0:
            link = hosts[source_host].link
            return ((self._wire("peer_out", source, link), self._wire("peer_in", target, link)),
                    self._cost.transfer(link).beta_s)
        wires: list[Wire] = []
        latency = 0.0
        if source >= 0:
            wires.append(self._host_wire("out", source))
        if source_host != target_host:
            link = self._cluster.host_link(source_host, target_host)
            if link is self._cluster.network:
                wires += [self._wire("nic_out", source_host, link), self._wire("nic_in", target_host, link)]
            else:
                # A link of two hosts is none of the others' business.
                wires.append(self._wire("pair", source_host * len(hosts) + target_host, link))
            latency = self._cost.transfer(link).beta_s
        elif source < 0 or target < 0:
            latency = self._cost.host_copy(devices[max(source, target)].gpu).beta_s
        if target >= 0:
            wires.append(self._host_wire("in", target))
        return tuple(wires), latency

    def _wire(self, kind: str, index: int, link: LinkSpec) -> Wire:
        wire = (kind, index)
        gamma_s_per_byte = self._cost.transfer(link).gamma_s_per_byte
        self._bandwidth[wire] = 1.0 / gamma_s_per_byte if gamma_s_per_byte > 0.0 else math.inf
        return wire

    def _host_wire(self, direction: str, device: int) -> Wire:
        """The wire between a GPU and its host; the peer wire itself where peers talk over PCIe."""
        spec = self._cluster.devices[device]
        link = self._cluster.hosts[spec.host_id].link
        if link.name.startswith("pcie"):
            return self._wire(f"peer_{direction}", device, link)
        wire = (f"host_{direction}", device)
        gamma_s_per_byte = self._cost.host_copy(spec.gpu).gamma_s_per_byte
        self._bandwidth[wire] = 1.0 / gamma_s_per_byte if gamma_s_per_byte > 0.0 else math.inf
        return wire
