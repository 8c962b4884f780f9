"""Activations between nodes: each message has the wires of its way to itself, first come first served.

A message leaves when all wires on the sender's side are free, and is taken in when those on the
receiver's side are (ours). It is not cut up: a wire is held for its bytes over that wire's
bandwidth, and the last byte is there no sooner than the slowest wire and the latency allow.
"""

from __future__ import annotations

from collections.abc import Callable

from hetis_sim.sim.clock import Clock
from hetis_sim.sim.network import Network, Wire

Way = tuple[tuple[tuple[Wire, float], ...], tuple[tuple[Wire, float], ...], float, float, float]
"""Wires out and in with their seconds per byte, the slowest seconds per byte of each side, latency."""


class MessageLinks:
    """When messages between devices arrive.

    Args:
        network: knows the wires; its cache transfers do not share them with messages, as a plan
            with a mesh has none.
    """

    def __init__(self, clock: Clock, network: Network) -> None:
        self._clock = clock
        self._network = network
        self._free_s: dict[Wire, float] = {}
        self._ways: dict[tuple[int, int], Way] = {}

    def send(self, source: int, target: int, size_bytes: float, arrived: Callable[[float], None]) -> None:
        """Send a message now. ``arrived`` is called when it is there, with its seconds on idle wires."""
        out, into, slowest_out, slowest_in, latency = self._way(source, target)
        begin = self._hold(out, self._clock.now, size_bytes)
        last_out = begin + latency + slowest_out * size_bytes
        alone_s = latency + max(slowest_out, slowest_in) * size_bytes

        def take_in() -> None:
            begun = self._hold(into, self._clock.now, size_bytes)
            self._clock.call(max(last_out, begun + slowest_in * size_bytes), lambda: arrived(alone_s), 1)

        self._clock.call(begin + latency, take_in, 1)

    def _hold(self, wires: tuple[tuple[Wire, float], ...], now_s: float, size_bytes: float) -> float:
        """Begin at the first moment when all of them are free."""
        free = self._free_s
        begin = max([free.get(wire, 0.0) for wire, _ in wires], default=now_s)
        begin = max(begin, now_s)
        for wire, gamma in wires:
            free[wire] = begin + gamma * size_bytes
        return begin

    def _way(self, source: int, target: int) -> Way:
        way = self._ways.get((source, target))
        if way is None:
            wires, latency = self._network.path(source, target)
            gammas = [(wire, 1.0 / self._network.bandwidth(wire)) for wire in wires]
            out = tuple(item for item in gammas if "out" in item[0][0])
            into = tuple(item for item in gammas if "out" not in item[0][0])
            way = self._ways[source, target] = (out, into, max(gamma for _, gamma in out),
                                                max(gamma for _, gamma in into), latency)
        return way
