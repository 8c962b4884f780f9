"""The interface of a policy: a handful of decisions, each a pure function of what it sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hetis_sim.cost.model import CostModel
from hetis_sim.policies.plan import Placement, Plan
from hetis_sim.policies.ranges import AnyPlacement
from hetis_sim.policies.view import InstanceLoad, InstanceView, MeshView, Move, RequestView
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.model import ModelSpec
from hetis_sim.spec.slo import Slo

PreemptionMode = Literal["recompute", "swap"]


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Settings of the serving engine that bound a batch and its memory.

    Attributes:
        block_tokens: tokens of one cache block.
        max_batch_requests: running requests in one micro-batch.
        max_batch_tokens: tokens of one prefill step.
        memory_utilization: share of device memory that the engine may use.
        cache_tokens: tokens that the cache of an instance holds, whatever its memory; 0 for as many as
            memory allows. A measured number of blocks times their size (vLLM: ``num_gpu_blocks_override``).
    """

    block_tokens: int = 16
    max_batch_requests: int = 256
    max_batch_tokens: int = 4096
    memory_utilization: float = 0.9
    cache_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PlanningProblem:
    """All that a policy may use to place a model on a cluster.

    ``prompt_tokens`` and ``output_tokens`` are the workload's mean lengths,
    ``rate_per_s`` its mean rate (None when unknown) and ``slo`` what users are promised: what
    an operator would know. ``chunk_tokens`` is the token budget of a step that mixes pieces of
    prompts with decoding, 0 where whole prompts go first. ``prompt_parts`` are lengths of prompts that are
    equally likely, and ``context_tokens`` is the mean context of the requests that decode at a time, among
    which long outputs are more frequent than among arrivals; without them all have the mean lengths.
    """

    cluster: ClusterSpec
    model: ModelSpec
    cost: CostModel
    limits: EngineLimits
    prompt_tokens: float
    output_tokens: float
    rate_per_s: float | None = None
    slo: Slo = field(default_factory=Slo)
    chunk_tokens: int = 0
    prompt_parts: tuple[float, ...] = ()
    context_tokens: float | None = None


class Policy(ABC):
    """A serving system's decisions.

    Implementations keep no state between calls that would make a decision depend on
    anything but its arguments; they read no clock and draw no random numbers.

    Attributes:
        preemption: what becomes of the cache of a preempted request.
        streams_handoff: the cache is sent to the decoding instance while the prompt is computed.
        splits_tokens: it gives out placements with token ranges.
        plans_for_rate: whether :meth:`plan` goes by the rate of the problem; where it does not, one plan is
            that of all rates.
        mixes_pools: instances do the other pool's work when it has too much: :meth:`route` may
            choose one that otherwise only decodes, and a request for which no decoding instance has
            room decodes where its prompt was computed, if :meth:`dispatch` would place it there.
    """

    name: ClassVar[str]
    preemption: PreemptionMode = "recompute"
    streams_handoff: bool = False
    splits_tokens: bool = False
    plans_for_rate: ClassVar[bool] = True
    mixes_pools: bool = False

    @abstractmethod
    def plan(self, problem: PlanningProblem) -> Plan:
        """Place the model on the cluster.

        Raises:
            InfeasibleError: no placement exists; the text says why.
        """

    def route(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        """Index (into ``instances``) of the replica that serves the request.

        The default joins the replica with the least outstanding tokens per unit of cache.
        """
        return min(range(len(instances)), key=lambda i: (_pressure(instances[i]), i))

    def handoff(self, request: RequestView, instances: Sequence[InstanceLoad]) -> int:
        """Index (into ``instances``) of the decoding replica for a prefilled request.

        With ``streams_handoff`` it is asked, and the cache sent, while the prompt is computed.
        Where :meth:`dispatch` finds no room in the chosen one, it is asked again without it.
        The default joins the replica with the least outstanding tokens per unit of cache.
        """
        return min(range(len(instances)), key=lambda i: (_pressure(instances[i]), i))

    def dispatch(self, requests: Sequence[RequestView], view: InstanceView) -> Sequence[AnyPlacement]:
        """Placements for the longest prefix of ``requests`` that fits now, in order.

        Token ranges leave the last token of a request's context to its tail. The default keeps
        every head at the rank that holds its weights.
        """
        placed: list[Placement] = []
        free = dict(view.free_units)
        placement = view.plan.local_placement
        for request in requests:
            need = view.units_needed(placement, request.context_tokens + 1)
            if any(units > free[device] for device, units in need.items()):
                break
            for device, units in need.items():
                free[device] -= units
            placed.append(placement)
        return placed

    def open_nodes(self, request: RequestView, view: MeshView) -> Sequence[bool]:
        """For each node of a mesh, whether the request may be sent there now; the default opens all."""
        return [True] * len(view.plan.nodes)

    def next_edge(self, request: RequestView, view: MeshView, edges: Sequence[int]) -> int:
        """The edge that a request takes, of those that lead on from where it is to open nodes.

        The default takes the one that has been sent the least for its weight.
        """
        return min(edges, key=lambda e: (view.sent_tokens[e] / view.plan.edges[e].tokens_per_s, e))

    def rebalance(self, view: InstanceView, running: Sequence[RequestView]) -> Move | None:
        """A move that shortens decode attention, or None. Asked at intervals."""
        return None

    def relieve(self, view: InstanceView, device: int, running: Sequence[RequestView]) -> Move | None:
        """A move that frees cache on ``device``, which is about to run out, or None."""
        return None

    def victim(self, device: int, candidates: Sequence[RequestView]) -> RequestView:
        """The request to preempt when ``device`` is full, of those with cache there: the latest arrival."""
        return max(candidates, key=lambda r: (r.arrival_s, r.request_id))


def _pressure(load: InstanceLoad) -> float:
    capacity = sum(load.capacity_units.values())
    return (load.context_tokens + load.waiting_tokens) / max(capacity, 1)
