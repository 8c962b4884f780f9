"""Divides a cluster into instances that prefill and such that decode, or into such that do both.

Requests pass through a prefill and a decode instance, so the two pools together serve the smaller of
their rates; the caches that travel between them must fit through the hosts' network interfaces:

    rate = min(prefill pool, decode pool, network)

The rates are those of :mod:`hetis_sim.policies.phases` and :mod:`hetis_sim.policies.estimate`, and the
division is searched by :mod:`hetis_sim.policies.evolve`.

A rate counts up to :data:`HEADROOM` times the load at hand, if that is known: a division that serves
more is no better, one with shorter latencies is. So latencies, as shares of their limits, are taken off the
score with the small weight :data:`LATENCY`, and what the pools have to spare, as a share of theirs, is
added with the weight :data:`SPARE`. All of this is ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.bundles import Bundle, Part, Pipeline, longest_context, pipeline_table
from hetis_sim.policies.evolve import Division, Effort, Evolution, Found, normal, starting_divisions
from hetis_sim.policies.memory import RUNTIME_BYTES
from hetis_sim.policies.plan import Plan, Role
from hetis_sim.spec.errors import InfeasibleError
from hetis_sim.spec.gpu import GB

HEADROOM = 1.5
LATENCY = 0.05
SPARE = 1e-3
MOST_BUSY = 0.95
CUTS_MOST = 16
LAST_RESORT = 1e-3
NAMES: dict[Role, str] = {"prefill": "prefill pool", "decode": "decode pool", "both": "primary"}


@dataclass(frozen=True)
class PoolRules:
    """What a system allows.

    Attributes:
        phases: whether there are prefill and decode pools; without them all instances do both.
        high_end_bias: what a division must serve more, as a share, to be taken although a decode instance
            has a card of a higher-end kind than some prefill instance.
        share_kinds: whether prefill and decode instances may have cards of one kind; if not, they do
            where nothing else serves the model.
    """

    phases: bool
    high_end_bias: float = 0.0
    share_kinds: bool = True


@dataclass(frozen=True, slots=True)
class Rates:
    """Requests per second of the pools and of the network between them; without pools, twice the whole."""

    prefill: float
    decode: float
    network: float

    @property
    def served(self) -> float:
        """Of the whole cluster."""
        return min(self.prefill, self.decode, self.network)


class PoolSearch:
    """Searches the best division under some rules."""

    def __init__(self, problem: PlanningProblem, rules: PoolRules, effort: Effort,
                 longest_tokens: int) -> None:
        self.problem = problem
        self.rules = rules
        self.table = pipeline_table(problem, longest_tokens)
        self._effort = effort

    def run(self) -> Found:
        """The best division; its score is not positive where nothing fits."""
        roles: tuple[Role, ...] = ("prefill", "decode") if self.rules.phases else ("both",)
        seeds = starting_divisions(self.table.parts)
        if self.rules.phases:
            seeds = list(_cuts(self.table.parts, seeds))
        return Evolution(self.table.parts, roles, self._score, self._effort).run(seeds)

    def pipelines(self, division: Division) -> list[Pipeline]:
        """Those to be used; of each role the strongest first.

        Pipelines that break the SLO when they are alone are left out where others of their role keep it.
        """
        found = [p for use, bundle in division
                 if use != "idle" and (p := self.table.best(use, bundle)) is not None]
        able = {p.role for p in found if p.estimate.penalty <= 1.0}
        used = [p for p in found if p.estimate.penalty <= 1.0 or p.role not in able]
        return sorted(used, key=lambda p: (p.role != "prefill", p.role != "decode", -p.strength))

    def rates(self, pipelines: Sequence[Pipeline]) -> Rates:
        """What the pools serve."""
        of: dict[Role, float] = {"prefill": 0.0, "decode": 0.0, "both": 0.0}
        for pipeline in pipelines:
            of[pipeline.role] += pipeline.value
        if not self.rules.phases:
            return Rates(of["both"], of["both"], math.inf)
        network = self._network_rate(pipelines) if of["prefill"] and of["decode"] else math.inf
        return Rates(of["prefill"], of["decode"], network)

    def _score(self, division: Division) -> float:
        pipelines = self.pipelines(division)
        rates = self.rates(pipelines)
        if not rates.served:
            return 0.0
        wanted = HEADROOM * self.problem.rate_per_s if self.problem.rate_per_s else math.inf
        counted = min(rates.served, wanted)
        if self._upside_down(pipelines):
            counted /= 1.0 + self.rules.high_end_bias
        if not self.rules.share_kinds and self._kinds_meet(pipelines):
            counted *= LAST_RESORT
        spare = 1.0 - 2.0 * counted / (rates.prefill + rates.decode)
        return counted * (1.0 - LATENCY * self._latency(pipelines, rates) + SPARE * spare)

    def _latency(self, pipelines: Sequence[Pipeline], rates: Rates) -> float:
        """Mean latencies at the load at hand as shares of their limits, at most 1.

        Time to first token with the wait of an M/D/1 queue, time per output token between that of a lone
        request and that of a full batch.
        """
        slo, limits = self.problem.slo, (rates.prefill, rates.decode)
        load = self.problem.rate_per_s or rates.served / 2
        first, second = (min(load / limit, MOST_BUSY) if limit else 0.0 for limit in limits)
        ttft = _mean([(p.value, p.lone_ttft_s) for p in pipelines if p.role != "decode"])
        tpot = _mean([(p.value, p.lone_tpot_s + second * (p.estimate.tpot_s - p.lone_tpot_s))
                      for p in pipelines if p.role != "prefill"])
        return min(1.0, ttft * (1.0 + first / (2.0 * (1.0 - first))) / slo.ttft_s + tpot / slo.tpot_s)

    def _ranks(self, pipelines: Sequence[Pipeline]) -> dict[Role, list[int]]:
        """Ranks of the kinds of card in each pool."""
        ranks: dict[Role, list[int]] = {"prefill": [], "decode": [], "both": []}
        for pipeline in pipelines:
            ranks[pipeline.role] += [self.table.parts[p].rank for p, _ in pipeline.split]
        return ranks

    def _kinds_meet(self, pipelines: Sequence[Pipeline]) -> bool:
        """Whether a kind of card both prefills and decodes."""
        ranks = self._ranks(pipelines)
        return bool(ranks["both"] or set(ranks["prefill"]) & set(ranks["decode"]))

    def _upside_down(self, pipelines: Sequence[Pipeline]) -> bool:
        """Whether decoding has a higher-end card than prefill."""
        ranks = self._ranks(pipelines)
        return max(ranks["prefill"], default=0) > min(ranks["decode"], default=len(self.table.parts))

    def _network_rate(self, pipelines: Sequence[Pipeline]) -> float:
        """Requests per second whose caches the hosts can send and receive.

        Every prefill instance hands its requests to the decode instances in proportion to their rates, and a
        cache lies on the hosts in proportion to their layers.
        """
        out = self._shares([p for p in pipelines if p.role == "prefill"])
        into = self._shares([p for p in pipelines if p.role == "decode"])
        size = self.problem.prompt_tokens * self.problem.model.kv_bytes_per_token
        per_byte_s = self.problem.cost.transfer(self.problem.cluster.network).gamma_s_per_byte
        busiest = max(share * (1.0 - other.get(host, 0.0))
                      for here, other in ((out, into), (into, out)) for host, share in here.items())
        return 1.0 / (per_byte_s * size * busiest) if per_byte_s * busiest > 0.0 else math.inf

    def _shares(self, pipelines: Sequence[Pipeline]) -> dict[int, float]:
        """Share of all cache that each host holds."""
        total = sum(p.estimate.requests_per_s for p in pipelines) * self.problem.model.layers
        shares: dict[int, float] = {}
        for p in pipelines:
            for (part, _), layers in zip(p.split, p.estimate.layers, strict=True):
                host = self.table.parts[part].host
                shares[host] = shares.get(host, 0.0) + p.estimate.requests_per_s * layers / total
        return shares


def _mean(weighted: Sequence[tuple[float, float]]) -> float:
    return sum(w * x for w, x in weighted) / sum(w for w, _ in weighted) if weighted else 0.0


def plan_pools(problem: PlanningProblem, rules: PoolRules, effort: Effort, system: str) -> Plan:
    """The best division under the rules, as a plan.

    Where no division has two pools, because the model does not fit twice, instances do both (ours).

    Raises:
        InfeasibleError: the model fits nowhere.
    """
    started = time.perf_counter()
    whole = PoolRules(phases=False)
    attempts = [(rules, longest_context(problem)), (rules, 1), (whole, longest_context(problem)), (whole, 1)]
    candidates = 0
    for attempt, longest in dict.fromkeys(attempts if rules.phases else attempts[:2]):
        search = PoolSearch(problem, attempt, effort, longest)
        found = search.run()
        candidates += found.candidates
        if found.score > 0.0:
            figures = {"seconds": round(time.perf_counter() - started, 4), "candidates": candidates}
            return _plan(search, found, figures, system, alone=rules.phases and not attempt.phases)
    raise InfeasibleError(does_not_fit(problem))


def _plan(search: PoolSearch, found: Found, figures: dict[str, Any], system: str, *, alone: bool) -> Plan:
    pipelines = search.pipelines(found.division)
    rates = search.rates(pipelines)
    figures["requests_per_s"] = rates.served
    if search.rules.phases:
        figures |= {"prefill_per_s": rates.prefill, "decode_per_s": rates.decode}
    if math.isfinite(rates.network):
        figures["network_per_s"] = rates.network
    figures["best"] = [f"{NAMES[p.role]}: {search.table.describe(p)}: {p.value:.4g} requests/s"
                       for p in pipelines]
    if alone:
        figures["note"] = f"no two pools can be made that hold {search.problem.model.name} each"
    instances = tuple(search.table.instances(pipelines))
    reasons = {card.device_id: f"not used: no division of the cluster that {system} can make gains by it"
               for card in search.problem.cluster.devices}
    for i, (instance, pipeline) in enumerate(zip(instances, pipelines, strict=True)):
        name = NAMES[pipeline.role]
        for s, stage in enumerate(instance.stages):
            text = (f"{name} (instance {i}, stage {s}, {stage.layers} of {instance.layers} layers): "
                    f"{search.table.describe(pipeline)} can serve {pipeline.value:.4g} requests/s, "
                    f"the cluster {rates.served:.4g}")
            reasons |= dict.fromkeys(stage.devices, text)
    return Plan(instances, reasons, figures)


def _cuts(parts: Sequence[Part], divisions: Sequence[Division]) -> Iterator[Division]:
    """Divisions to start from: the pipelines with higher-end cards prefill, the others decode.

    Besides, two pipelines take all cards, cut at every place in the order of the parts.
    """
    def end(bundle: Bundle) -> tuple[float, Bundle]:
        return sum(n * part.rank for n, part in zip(bundle, parts, strict=True)) / sum(bundle), bundle

    for division in divisions:
        ordered = sorted((bundle for _, bundle in division), key=end)
        for cut in range(1, len(ordered), -(-len(ordered) // CUTS_MOST)):
            yield normal((*(("prefill", bundle) for bundle in ordered[:cut]),
                          *(("decode", bundle) for bundle in ordered[cut:])))
    sizes = [len(part.devices) for part in parts]
    for p, size in enumerate(sizes):
        for taken in range(1, size + 1):
            first = (*sizes[:p], taken, *[0] * (len(sizes) - p - 1))
            rest = tuple(n - m for n, m in zip(sizes, first, strict=True))
            yield normal((("prefill", first), ("decode", rest)))


def does_not_fit(problem: PlanningProblem) -> str:
    """How much memory the model needs, and how much there is."""
    cluster, model, share = problem.cluster, problem.model, problem.limits.memory_utilization
    usable = sum(max(0.0, device.gpu.memory_bytes * share - RUNTIME_BYTES) for device in cluster.devices)
    return (f"{model.name} does not fit on {cluster.name}: one copy of its weights needs "
            f"{model.weight_bytes_total / GB:.1f} GB besides activations and cache, "
            f"{len(cluster.devices)} GPUs offer {usable / GB:.1f} GB "
            f"(scheduler.memory_utilization={share:g}, less the runtime); "
            "use more or larger GPUs, or a smaller model")
