"""The bound as users see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.cost.model import CostModel
from hetis_sim.run import Prepared
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.errors import InfeasibleError, SpecError
from hetis_sim.spec.model import ModelSpec
from hetis_sim.study.bound.demand import Ints, demand_of
from hetis_sim.study.bound.program import GB, Program, Solution
from hetis_sim.study.bound.supply import Kind, Supply, supply_of, usable_bytes
from traces import ClosedLoopWorkload, OpenWorkload

TOLERANCE = 5e-4
SHOWN = 0.02


@dataclass(frozen=True, slots=True)
class KindUse:
    """What the best case makes of one kind of GPU.

    Attributes:
        gpu, count: which, and how many.
        busy: share of the time in which it works, by part.
        weights_gb, cache_gb, memory_gb: of all devices of the kind together.
    """

    gpu: str
    count: int
    busy: dict[str, float]
    weights_gb: float
    cache_gb: float
    memory_gb: float


@dataclass(frozen=True, slots=True)
class Bound:
    """No policy serves requests of this mix faster; ``docs/bound.md`` says under which assumptions.

    Attributes:
        requests_per_s, output_tokens_per_s, total_tokens_per_s: the bound in three units.
        limits: what holds it down: names with their shares, largest first.
        kinds: how the devices are used in the best case.
        requests: lengths that it was worked out for.
    """

    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    limits: dict[str, float]
    kinds: tuple[KindUse, ...]
    requests: int

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)

    def share(self, requests_per_s: float) -> float:
        """A throughput as a share of the bound."""
        return requests_per_s / self.requests_per_s if self.requests_per_s > 0 else float("nan")

    def sentence(self) -> str:
        """The bound in words."""
        reasons = ", ".join(f"{name} ({100 * share:.0f} %)" for name, share in self.limits.items())
        return (f"no policy serves more than {self.requests_per_s:.3g} requests/s "
                f"({self.output_tokens_per_s:,.0f} output tokens/s) here, for want of {reasons}")


def bound_of(prepared: Prepared) -> Bound:
    """The bound for a checked combination: its cluster, model, engine settings and workload.

    Raises:
        SpecError: no request of the workload can be served.
    """
    lengths = workload_lengths(prepared.workload)
    return upper_bound(prepared.cluster, prepared.model, prepared.cost, prepared.settings, [lengths])


def workload_lengths(workload: OpenWorkload | ClosedLoopWorkload) -> tuple[Ints, Ints]:
    """Prompt and output tokens of the requests; of a closed loop, of those drawn so far."""
    lengths = workload.lengths if isinstance(workload, OpenWorkload) else workload.pool.lengths
    return lengths.prompt_tokens, lengths.output_tokens


def upper_bound(cluster: ClusterSpec, model: ModelSpec, cost: CostModel, settings: SchedulerSettings,
                lengths: Sequence[tuple[Ints, Ints]]) -> Bound:
    """The bound for requests of the given lengths, all samples taken together.

    Requests beyond the model's context limit, or whose cache the whole cluster cannot hold, are left
    out: every policy turns them away.

    Raises:
        SpecError: no request is left.
        InfeasibleError: the weights do not fit on all devices together.
    """
    prompts = np.concatenate([np.asarray(pair[0], np.int64) for pair in lengths])
    outputs = np.concatenate([np.asarray(pair[1], np.int64) for pair in lengths])
    room = sum(usable_bytes(device.gpu, model, settings.limits) for device in cluster.devices)
    if room < model.weight_bytes_total:
        raise InfeasibleError(f"{model.name} does not fit on {cluster.name}: its weights take "
                              f"{model.weight_bytes_total / GB:.1f} GB, of {room / GB:.1f} GB that are free")
    longest = min(model.context_limit_tokens, room // model.kv_bytes_per_token)
    fits = prompts + outputs <= longest
    if not fits.any():
        raise SpecError("workload: requests that the model and the cluster can hold", 0, "at least one")
    demand = demand_of(prompts[fits], outputs[fits])
    supply = supply_of(cluster, model, cost, settings, demand)
    program = Program(model, demand, supply, settings.limits.block_tokens).build()
    solution = program.highest(TOLERANCE)
    rate = solution.rate
    return Bound(rate, rate * demand.output_tokens, rate * (demand.prompt_tokens + demand.output_tokens),
                 _shown(solution.limits), _kinds(program, supply, solution), int(fits.sum()))


def _shown(limits: Mapping[str, float]) -> dict[str, float]:
    """The limits that matter, largest first, as shares of 1."""
    total = sum(limits.values()) or 1.0
    shares = sorted(((share / total, name) for name, share in limits.items()), reverse=True)
    return {name: share for share, name in shares if share >= SHOWN}


def _kinds(program: Program, supply: Supply, solution: Solution) -> tuple[KindUse, ...]:
    x = solution.values
    uses: list[KindUse] = []
    for k, kind in enumerate(supply.kinds):
        mine = [j for j, batch in enumerate(supply.batches) if batch.kind == k]
        rounds = sum(x[program.rounds[j]] * supply.batches[j].busy_s for j in mine)
        parts = {"dense": rounds + (kind.prefill_s or 0.0) * x[program.prefill[k]],
                 "prefill attention": np.dot(x[program.prompts[:, k]], kind.prompt_s),
                 "decode attention": _decode_attention(program, kind, x, k),
                 "head": kind.head_s * x[program.heads[k]], "host": x[program.host[k]]}
        busy = {name: float(seconds) / kind.count for name, seconds in parts.items()}
        weights = float(x[program.weights[k]] + x[program.ends[k]])
        uses.append(KindUse(kind.gpu.name, kind.count, busy, weights, float(x[program.cache[k]]),
                            kind.memory_bytes / GB))
    return tuple(uses)


def _decode_attention(program: Program, kind: Kind, x: NDArray[np.float64], k: int) -> float:
    """Seconds of decode attention of a kind of GPU, in a second."""
    model, cost = program.model, kind.attention
    layer_bytes = model.kv_heads * model.kv_bytes_per_token_per_layer_per_group
    heads = model.query_heads * cost.a_s_per_head * x[program.attended[:, k]].sum()
    reading = layer_bytes * cost.b_s_per_byte * x[program.contexts[:, k]].sum()
    return float(cost.c_s * x[program.launches[k]] + model.layers * (heads + reading))
