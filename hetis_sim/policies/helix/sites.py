"""Candidate nodes, and the rate of tokens that each could compute for any number of layers.

The rate follows the source: memory that weights leave holds so many requests; of the time of a round
trip a node has the share of its own layers, so that share of the requests is in its batch; with
the time of that batch, and of the prompts that come with it, the tokens per second follow. A request
brings P prompt and O output tokens, so one decoded token brings P/O prompt tokens along. Durations
are those of the cost model (there, measured layers); the LM head is left out of the rate (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.bundles import cluster_parts, longest_context
from hetis_sim.policies.estimate import Estimator
from hetis_sim.policies.memory import stage_cache_bytes, stage_weight_bytes
from hetis_sim.policies.plan import StagePlan, even_groups
from hetis_sim.policies.shape import StageShape, instance_shape
from hetis_sim.spec.errors import InfeasibleError

ROUNDS = 10
"""Iterations of the estimate of a round trip; the source takes as many."""

SHARE_STEP = 0.1


@dataclass(frozen=True, slots=True)
class SiteKind:
    """Nodes that are alike.

    Attributes:
        name: for people.
        groups: devices of each of them.
        rates: tokens per second with 1, 2, ... layers, as many as they may hold.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]
    rates: tuple[float, ...]

    @property
    def layers_most(self) -> int:
        """Layers that a node may hold."""
        return len(self.rates)


def rate_bound(kinds: Sequence[SiteKind], layers: int) -> float:
    """Tokens per second that no placement exceeds: all nodes at their best, nothing lost to links or fit.

    The source stops its search near this bound, too.
    """
    return sum(len(kind.groups) * max(rate * (k + 1) for k, rate in enumerate(kind.rates))
               for kind in kinds) / layers


def site_kinds(problem: PlanningProblem, high_water: float, weights_share: float,
               tp_max: int) -> tuple[SiteKind, ...]:
    """All kinds of candidate nodes, high-end first, that together hold the model.

    Raises:
        InfeasibleError: they do not, whatever share of the memory weights take.
    """
    groups = _groups(problem, tp_max)
    share = weights_share
    while True:
        rater = _Rater(problem, groups, high_water, share)
        kinds = rater.kinds()
        if sum(kind.layers_most * len(kind.groups) for kind in kinds) >= problem.model.layers:
            return kinds
        if share >= 1.0:
            raise InfeasibleError(f"the {problem.model.layers} layers of {problem.model.name} do not fit on "
                                  f"{problem.cluster.name}, or leave no cache there")
        share = min(1.0, share + SHARE_STEP)


def _groups(problem: PlanningProblem, tp_max: int) -> dict[tuple[str, int, str], list[tuple[int, ...]]]:
    """Groups of devices by kind: all cards of a kind in a host together, as far as heads can be split."""
    heads = problem.model.kv_heads
    degrees = [d for d in range(1, min(tp_max, heads) + 1)
               if heads % d == 0 and problem.model.query_heads % d == 0]
    found: dict[tuple[str, int, str], list[tuple[int, ...]]] = {}
    for part in cluster_parts(problem):
        left = part.devices
        while left:
            size = max(d for d in degrees if d <= len(left))
            link = problem.cluster.slowest_link(left[:size])
            key = (part.gpu.name, size, link.name if link is not None else "")
            found.setdefault(key, []).append(left[:size])
            left = left[size:]
    return found


class _Rater:
    """Rates for one share of memory that weights may take."""

    def __init__(self, problem: PlanningProblem, groups: dict[tuple[str, int, str], list[tuple[int, ...]]],
                 high_water: float, weights_share: float) -> None:
        self.problem = problem
        self._estimator = Estimator(problem)
        self._high_water = high_water
        self._share = weights_share
        self._names = [f"{name} TP{size}" if size > 1 else name for name, size, _ in groups]
        self._groups = [tuple(found) for found in groups.values()]
        self._shapes = [instance_shape(problem, [found[0]]).stages[0] for found in self._groups]
        self._tokens = [self._cached_tokens(shape) for shape in self._shapes]
        # The largest activations of a token go through the slowest link of the network interface.
        activation = problem.model.hidden * problem.model.activation_bytes
        self._wire_rate = 1.0 / (problem.cost.transfer(problem.cluster.network).gamma_s_per_byte * activation)

    def _cached_tokens(self, shape: StageShape) -> list[float]:
        """Tokens that the cache holds with 1, 2, ... layers, as far as weights may go."""
        problem, model = self.problem, self.problem.model
        memory = shape.gpu.memory_bytes
        least = longest_context(problem)
        found: list[float] = []
        for layers in range(1, model.layers + 1):
            stage = StagePlan(shape.devices, layers, even_groups(model.kv_heads, shape.tp))
            # A node with all layers is both ends of the model.
            ends = layers == model.layers
            weights = max(stage_weight_bytes(model, stage, rank, ends, ends) for rank in range(shape.tp))
            left = stage_cache_bytes(problem.cluster, model, problem.limits, stage, ends, ends)
            tokens = min(left[device] / (layers * owned * model.kv_bytes_per_token_per_layer_per_group)
                         for device, owned in zip(stage.devices, stage.owned_groups, strict=True))
            if weights > self._share * memory or tokens < least:
                break
            found.append(tokens)
        return found

    def kinds(self) -> tuple[SiteKind, ...]:
        """Kinds that can hold a layer at all."""
        able = [n for n, tokens in enumerate(self._tokens) if tokens]
        layer_s = self._layer_times(able)
        mean = self._mean_layer_s(able, layer_s)
        rates = [tuple(self._rate(n, k, self._batch(n, k, layer_s[n], mean))
                       for k in range(1, len(self._tokens[n]) + 1)) for n in able]
        return tuple(SiteKind(self._names[n], self._groups[n], row)
                     for n, row in zip(able, rates, strict=True))

    def _layer_times(self, able: Sequence[int]) -> dict[int, float]:
        """Seconds that a round trip spends in a layer of each kind, with all the layers it may hold."""
        times = {n: self._step_s(n, 1, 1) for n in able}
        for _ in range(ROUNDS):
            mean = self._mean_layer_s(able, times)
            for n in able:
                most = len(self._tokens[n])
                times[n] = self._step_s(n, most, self._batch(n, most, times[n], mean)) / most
        return times

    def _mean_layer_s(self, able: Sequence[int], times: dict[int, float]) -> float:
        weights = {n: len(self._groups[n]) * len(self._tokens[n]) for n in able}
        return sum(weights[n] * times[n] for n in able) / max(1, sum(weights.values()))

    def _batch(self, n: int, layers: int, layer_s: float, mean_s: float) -> int:
        """Requests in a node's batch: of all that its cache holds, those that are not elsewhere."""
        problem = self.problem
        request = problem.prompt_tokens + problem.output_tokens
        held = self._high_water * self._tokens[n][layers - 1] / request
        own = layers * layer_s
        share = own / (own + (problem.model.layers - layers) * mean_s)
        return max(1, min(problem.limits.max_batch_requests, round(held * share)))

    def _step_s(self, n: int, layers: int, batch: int) -> float:
        """A decode batch, with its share of prompts."""
        shape, estimator, cost = self._shapes[n], self._estimator, self.problem.cost
        home = max(shape.owned) * batch
        prompts = batch / estimator.output
        layer = estimator.decode_layer_s(shape, batch) + shape.home.seconds(home, home * estimator.context)
        layer += prompts * estimator.prefill_layer_s(shape)
        return layers * layer + cost.host_overhead_s(batch) + prompts * cost.host_overhead_s(1, 1)

    def _rate(self, n: int, layers: int, batch: int) -> float:
        tokens = batch * (1.0 + self._estimator.prompt / self._estimator.output)
        return min(self._wire_rate, tokens / self._step_s(n, layers, batch))
