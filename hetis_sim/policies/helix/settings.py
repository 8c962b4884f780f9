"""Settings of the Helix policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetis_sim.spec.errors import require, require_finite
from hetis_sim.spec.lookup import require_int

PLACEMENTS = ("milp", "swarm", "petals", "separate", "given")
SCHEDULING = ("wrr", "shortest_queue", "random")


@dataclass(frozen=True)
class HelixSettings:
    """What a user may change.

    Attributes:
        placement: ``milp`` for the largest flow, one of the heuristics that the source compares with, or the
            ``given`` ranges.
        ranges: for ``given``, per device its first layer and how many it holds, nothing where it is not used.
        scheduling: how a request's next node is chosen: ``wrr`` by the flow of the plan, the
            ``shortest_queue``, or at ``random``.
        partial_inference: a request may enter a node at any of its layers, and pass the rest.
        high_water: share of a node's cache, by expected lengths, above which no request is sent there;
            the source takes 0.9 online and 0.85 offline.
        output_share: share of the mean output that a request is expected to need on top of its prompt; the
            source takes 0.6 online and 1 offline.
        weights_share: share of a GPU's memory that weights may take, more only where the model does not fit
            otherwise; 0.5 in the source.
        tp_max: tensor-parallel degree of a node at most; all GPUs of one kind in a host form one node
            where their number allows.
        milp_columns: a program with more variables is not given to the solver, but left to its starts:
            HiGHS, which stands here for the source's Gurobi and its hours, spends minutes on its root.
        milp_nodes: nodes of the search tree that the solver looks at.
        milp_gap: distance from the bound at which it may stop, as a share.
        milp_time_s: time after which it is stopped in any case. Where this happens the plan depends on
            the speed of the machine; its ``search`` says so.
    """

    placement: str = "milp"
    scheduling: str = "wrr"
    partial_inference: bool = True
    high_water: float = 0.9
    output_share: float = 0.6
    weights_share: float = 0.5
    tp_max: int = 8
    milp_columns: int = 1000
    milp_nodes: int = 100
    milp_gap: float = 0.02
    milp_time_s: float = 60.0
    ranges: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        require(self.placement in PLACEMENTS, "policy.placement", self.placement,
                f"one of {', '.join(PLACEMENTS)}")
        require((self.placement == "given") == bool(self.ranges), "policy.ranges", self.ranges,
                "set with policy.placement=given, and only then")
        for held in self.ranges:
            require(len(held) in (0, 2) and all(isinstance(n, int) for n in held)
                    and (not held or (held[0] >= 0 and held[1] >= 1)), "policy.ranges", list(held),
                    "[first layer, layers] or []")
        require(self.scheduling in SCHEDULING, "policy.scheduling", self.scheduling,
                f"one of {', '.join(SCHEDULING)}")
        require(isinstance(self.partial_inference, bool), "policy.partial_inference", self.partial_inference,
                "true or false")
        require_finite("policy.high_water", self.high_water, 0.0, 1.0, open_low=True)
        require_finite("policy.output_share", self.output_share, 0.0, 10.0)
        require_finite("policy.weights_share", self.weights_share, 0.0, 1.0, open_low=True)
        require_int("policy.tp_max", self.tp_max, 1, 1 << 10)
        require_int("policy.milp_columns", self.milp_columns, 0, 1 << 30)
        require_int("policy.milp_nodes", self.milp_nodes, 0, 1 << 30)
        require_finite("policy.milp_gap", self.milp_gap, 0.0, 1.0)
        require_finite("policy.milp_time_s", self.milp_time_s, 0.0, open_low=True)
