"""What steps send over the wires besides cache: heads, collectives, activations between stages.

Only sums are kept while a run goes on: the tokens that an instance has computed, and the KV groups away
from home summed over iterations. The bytes on every wire follow from them at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hetis_sim.control.timing import DecodeLines, InstanceTimer
from hetis_sim.metrics.columns import WIRE_KINDS
from hetis_sim.policies.plan import InstancePlan
from hetis_sim.sim.network import Network, Wire
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.model import ModelSpec

RemoteWires = list[tuple[int, list[tuple[Wire, float]]]]

_NAMES = {"peer_out": "{} out", "peer_in": "{} in", "host_out": "{} to its host",
          "host_in": "{} from its host", "nic_out": "host{} out", "nic_in": "host{} in"}


class WireBytes:
    """Bytes by wire and by what they are for (``WIRE_KINDS``)."""

    def __init__(self) -> None:
        self._bytes: dict[Wire, dict[str, float]] = {}

    def add(self, kind: str, wires: Iterable[Wire], size_bytes: float) -> None:
        """So many bytes cross each of these wires."""
        if size_bytes:
            for wire in wires:
                row = self._bytes.setdefault(wire, dict.fromkeys(WIRE_KINDS, 0.0))
                row[kind] += size_bytes

    def add_all(self, other: WireBytes) -> None:
        """Add what another has."""
        for wire, row in other._bytes.items():
            for kind, size_bytes in row.items():
                self.add(kind, [wire], size_bytes)

    def rows(self, cluster: ClusterSpec) -> list[tuple[Wire, str, dict[str, float]]]:
        """Each wire that carried anything, its name for people, and its bytes, in a fixed order."""
        return [(wire, wire_name(wire, cluster), self._bytes[wire]) for wire in sorted(self._bytes)]


def wire_name(wire: Wire, cluster: ClusterSpec) -> str:
    """For people: ``host1 in``, ``3:a100-80gb@host0 out``, ``host0 to host2``."""
    kind, index = wire
    if kind == "pair":
        source, target = divmod(index, len(cluster.hosts))
        return f"host{source} to host{target}"
    return _NAMES[kind].format(index if kind.startswith("nic") else cluster.devices[index].label)


def collective_bytes(model: ModelSpec, layers: int, tokens: float, ranks: int) -> float:
    """What each rank sends in the all-reduces of some layers, two a layer, in a ring."""
    return 2 * layers * tokens * model.hidden * model.activation_bytes * 2 * (ranks - 1) / ranks


def add_ring(traffic: WireBytes, network: Network, devices: Sequence[int], size_bytes: float) -> None:
    """Every rank sends so many bytes to the next one of a ring."""
    if len(devices) > 1:
        for source, target in zip(devices, (*devices[1:], devices[0]), strict=True):
            traffic.add("collectives", network.path(source, target)[0], size_bytes)


class InstanceTraffic:
    """The sums of one instance.

    Attributes:
        tokens: prompt and decoded tokens that have passed the stages.
    """

    def __init__(self, timer: InstanceTimer) -> None:
        self._timer = timer
        self._remote = [position.remote for position in timer.plan.positions]
        self.tokens = 0
        # Per position: groups that grow with every token, groups in ranges, groups of tails beside ranges.
        self._groups = [[0, 0, 0] for _ in self._remote]

    def add(self, lines: DecodeLines, tokens: int, count: int) -> None:
        """A step of ``count`` iterations has computed ``tokens`` tokens."""
        self.tokens += tokens
        if lines.workers:
            for p, groups, _ in lines.held:
                if self._remote[p]:
                    self._groups[p][0] += groups * count
            for p, *held in lines.ranged:
                for n, groups in enumerate(held):
                    self._groups[p][n] += groups * count

    def add_to(self, traffic: WireBytes, network: Network, model: ModelSpec) -> None:
        """Add the bytes of all steps so far."""
        timer, plan = self._timer, self._timer.plan
        kinds = (timer.wire_bytes_per_group, timer.still_bytes_per_group, timer.merged_bytes_per_group)
        for n, (out_bytes, back_bytes) in enumerate(kinds):
            for p, wires in remote_wires(plan, network, out_bytes, back_bytes):
                for wire, size_bytes in wires:
                    traffic.add("heads", [wire], self._groups[p][n] * size_bytes)
        message = self.tokens * model.hidden * model.activation_bytes
        for stage, after in zip(plan.stages, plan.stages[1:], strict=False):
            traffic.add("activations", network.path(stage.devices[-1], after.devices[0])[0], message)
        for stage in plan.stages:
            add_ring(traffic, network, stage.devices,
                     collective_bytes(model, stage.layers, self.tokens, stage.tp))


def remote_wires(plan: InstancePlan, network: Network, out_bytes: int, back_bytes: int) -> RemoteWires:
    """Per remote position, the bytes that one group of one iteration puts on each wire."""
    found: RemoteWires = []
    for p in plan.positions:
        if p.remote:
            sender = plan.stages[p.stage].devices[0]
            out, back = network.path(sender, p.device)[0], network.path(p.device, sender)[0]
            wires = [(wire, float(p.layers * out_bytes)) for wire in out]
            wires += [(wire, float(p.layers * back_bytes)) for wire in back]
            found.append((p.index, wires))
    return found
