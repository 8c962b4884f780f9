"""Settings of the Hetis policy."""

from __future__ import annotations

from dataclasses import dataclass

from hetis_sim.spec.errors import require, require_finite
from hetis_sim.spec.lookup import require_int

GRANULARITY = ("head", "request", "sequence")
DISPATCH = ("lp", "greedy", "static")
EVICTION = ("benefit", "lifo")
PREEMPTION = ("recompute", "swap")


@dataclass(frozen=True)
class HetisSettings:
    """What a user may change. Defaults without a source are ours.

    Attributes:
        delta: a type of GPU is left out of dense work when it improves the cost of the plan
            by no more than this share (0.05 in the paper).
        ideal_pipeline: plan as if prefills passed through a pipeline without holding up the other
            micro-batches. Off, since they do hold them up; on, deep pipelines look better than they are.
        theta: heads are moved when decode attention takes longer than (1 + theta) times the
            ideal (0.5 in the paper).
        reserve_fraction: share of each device's cache that admission leaves free, so that the
            running requests can grow. A request alone on its instance may use all.
        granularity: what of a request is divided over devices: its KV groups (``head``, as in the paper),
            nothing (``request``: all heads in one place, stage by stage), or its tokens (``sequence``:
            blocks with all heads). The last two are ours, for comparison; they place one request after
            the other.
        dispatch: ``lp`` (greedy for few requests, the linear program from ``lp_min_requests``
            on), ``greedy`` (one request after the other) or ``static`` (every request gets the
            same split, in proportion to the cache of the devices).
        lp_min_requests: requests admitted together from which the linear program is solved.
        redispatch: move heads of running requests at all.
        min_benefit: share of decode attention time that a move for speed must save.
        relief_blocks: a move for memory frees, if it can, this many blocks of growth for every
            request on the device.
        eviction: how the request to be moved off a full device is chosen: ``benefit`` (the
            move that leaves attention fastest) or ``lifo`` (the latest arrival).
        preemption: ``recompute`` or ``swap``, when no move helps.
    """

    delta: float = 0.05
    ideal_pipeline: bool = False
    theta: float = 0.5
    reserve_fraction: float = 0.05
    granularity: str = "head"
    dispatch: str = "lp"
    lp_min_requests: int = 8
    redispatch: bool = True
    min_benefit: float = 0.01
    relief_blocks: int = 4
    eviction: str = "benefit"
    preemption: str = "recompute"

    def __post_init__(self) -> None:
        require_finite("policy.delta", self.delta, 0.0)
        require_finite("policy.theta", self.theta, 0.0)
        require_finite("policy.reserve_fraction", self.reserve_fraction, 0.0, 0.9)
        require_finite("policy.min_benefit", self.min_benefit, 0.0, 1.0)
        require_int("policy.lp_min_requests", self.lp_min_requests, 1, 1 << 30)
        require_int("policy.relief_blocks", self.relief_blocks, 1, 1 << 20)
        for key in ("redispatch", "ideal_pipeline"):
            value = getattr(self, key)
            require(isinstance(value, bool), f"policy.{key}", value, "true or false")
        for key, allowed in (("granularity", GRANULARITY), ("dispatch", DISPATCH),
                             ("eviction", EVICTION), ("preemption", PREEMPTION)):
            value = getattr(self, key)
            require(value in allowed, f"policy.{key}", value, f"one of {', '.join(allowed)}")
        require(self.granularity == "head" or self.dispatch != "static", "policy.dispatch", self.dispatch,
                "lp or greedy where granularity is not head")
