"""The bound: no run exceeds it, it moves the right way with the hardware, and it is not idle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import BENT, TINY, ConstantCost, ScaledCost
from support_policies import LocalPolicy
from support_runs import SLOW_WORKERS, Scenario, scenarios
from support_study import reached

from hetis_sim.config import RunConfig, compose
from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.cost.host import HostOverhead
from hetis_sim.cost.load import load_cost_model
from hetis_sim.cost.model import AttentionCost, CostModel
from hetis_sim.cost.roofline import RooflineSettings
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.policies.base import EngineLimits
from hetis_sim.policies.registry import policy_names
from hetis_sim.run import prepare, run_prepared
from hetis_sim.sim.simulation import Simulation
from hetis_sim.spec.architectures import model as catalogued
from hetis_sim.spec.cluster import ClusterSpec, HostSpec
from hetis_sim.spec.errors import InfeasibleError, SpecError
from hetis_sim.spec.gpus import gpu as card
from hetis_sim.spec.links import link
from hetis_sim.spec.request import Request
from hetis_sim.study.bound import bound_of, upper_bound
from hetis_sim.study.bound.demand import Ints

LENGTHS = (np.array([40, 300, 900, 120]), np.array([200, 20, 90, 400]))
# The search for the rate ends where it falls by less than 0.05 %.
CLOSE = 2e-3
LLAMA = catalogued("llama2-13b")
COST = load_cost_model("roofline", host=HostOverhead(1e-3, 1e-5))
OVERLOAD = ("rate=1000", "requests=150")
DIVIDED = ({"name": "hetis", "granularity": "request"}, {"name": "hetis", "granularity": "sequence"},
           {"name": "infinite"})


def cluster(*hosts: tuple[str, ...], network: str = "ethernet-100g") -> ClusterSpec:
    """Hosts with the named cards, joined by PCIe inside."""
    boxes = tuple(HostSpec(tuple(card(name) for name in host), link("pcie4x16")) for host in hosts)
    return ClusterSpec("tests", boxes, link(network))


def rate(where: ClusterSpec, cost: CostModel = COST, chunked: bool = False,
         lengths: tuple[Ints, Ints] = LENGTHS) -> float:
    """The bound in requests per second."""
    engine = SchedulerSettings(chunked_prefill=chunked)
    return upper_bound(where, LLAMA, cost, engine, [lengths]).requests_per_s


# -- no run exceeds it -----------------------------------------------------------------------


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(scenarios(rate=st.sampled_from([12.0, 60.0, 1e6]), prompt_max=st.sampled_from([3, 40]),
                 output_max=st.sampled_from([1, 2, 30])))
def test_no_tiny_system_exceeds_the_bound(scenario: Scenario) -> None:
    """Random shapes, batching and cache, random placements and moves: none is faster than the bound."""
    found = reached(scenario)
    assert found is None or found.share <= 1.0


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(scenarios(rate=st.sampled_from([12.0, 1e6]), output_max=st.sampled_from([2, 30]),
                 cost=ConstantCost(attention=BENT, slow=SLOW_WORKERS)))
def test_attention_below_its_line_is_bounded_as_well(scenario: Scenario) -> None:
    """The bound goes by what no batch is faster than."""
    found = reached(scenario)
    assert found is None or found.share <= 1.0


@pytest.mark.slow
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(scenarios(rate=st.sampled_from([12.0, 60.0, 1e6]), prompt_max=st.sampled_from([1, 3, 40]),
                 output_max=st.sampled_from([1, 2, 30]), requests=st.sampled_from([3, 24, 80])))
def test_no_tiny_system_exceeds_the_bound_at_length(scenario: Scenario) -> None:
    """The same, more often."""
    found = reached(scenario)
    assert found is None or found.share <= 1.0


def configured(policy: dict[str, str], *words: str) -> RunConfig:
    """A configuration with a policy, whether or not there is a file for it."""
    return replace(compose("policy=vllm", *words), policy=dict(policy))


def assert_within(policy: dict[str, str], *words: str) -> None:
    """A run under overload finishes no more requests per second than the bound for them."""
    try:
        ready = prepare(configured(policy, *OVERLOAD, *words))
    except (InfeasibleError, SpecError) as error:
        if isinstance(error, SpecError) and "chunked_prefill" not in str(error):
            raise
        pytest.skip(f"{policy} cannot serve this: {error}")
    result = run_prepared(ready)
    prepared, requests = result.prepared, result.recorder.records().requests
    finished = requests.rows(requests["status"] == 0)
    assert len(finished) > 50
    lengths = (finished["prompt_tokens"], finished["output_tokens"])
    bound = upper_bound(prepared.cluster, prepared.model, prepared.cost, prepared.settings, [lengths])
    throughput = len(finished) / (finished["finish_s"].max() - requests["arrival_s"].min())
    assert 0 < throughput <= bound.requests_per_s


@pytest.mark.parametrize("policy", policy_names())
def test_no_policy_exceeds_the_bound(policy: str) -> None:
    """Every policy there is, on cards of two kinds, all requests at once."""
    assert_within({"name": policy}, "cluster=a100-t4", "model=llama2-13b", "requests=80")


@pytest.mark.parametrize("policy", DIVIDED, ids=str)
def test_no_unit_of_division_exceeds_the_bound(policy: dict[str, str]) -> None:
    """Nor does it matter what of a request is divided; on so little cache that much of it has to be."""
    assert_within(policy, "cluster=a100-t4", "model=llama2-13b", "requests=80",
                  "scheduler.memory_utilization=0.5")


@pytest.mark.slow
@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("words", [
    (), ("workload=humaneval",), ("workload=longbench",), ("cluster=helix24",),
    ("cluster=a100-t4", "model=llama2-13b"), ("cluster=a100-l4", "model=opt-30b"),
    ("cluster=h200-a30", "model=mixtral-8x7b"),
    ("cluster=rtx4090", "model=llama3-8b", "scheduler.chunked_prefill=true"),
    ("cluster=single-a100", "model=llama3-8b", "scheduler.max_batch_requests=1"),
    ("model=llama2-13b", "workload.table=fixed", "workload.prompt_tokens=1", "workload.output_tokens=300"),
    ("cluster=h100x8", "model=llama3-70b", "scheduler.chunked_prefill=true"),
])
def test_no_policy_exceeds_the_bound_anywhere(policy: str, words: tuple[str, ...]) -> None:
    """The same over clusters, models, workloads and ways to batch."""
    assert_within({"name": policy}, *words)


# -- it is not idle ----------------------------------------------------------------------------


ONE_CARD = Scenario(batch_requests=16, batch_tokens=640, blocks=4000, policy=LocalPolicy(),
                    cost=ConstantCost(prefill_s_per_token=0.0))
WAVES = [Request(number, 0.0, 40, 200) for number in range(320)]


def run_waves(scenario: Scenario) -> Recorder:
    """A run of equal requests, all there at the start: full batches from beginning to end."""
    return Simulation(replace(scenario.given(), workload=WAVES)).run()


def test_one_card_that_only_decodes_comes_close() -> None:
    """Where nothing but full batches of decode is to be done, the bound is what happens, nearly."""
    found = reached(ONE_CARD, run_waves(ONE_CARD))
    assert found is not None
    assert 0.95 < found.share <= 1.0


def test_cache_for_half_as_many_requests_lowers_the_bound() -> None:
    """Batches are bounded by what the cache holds as well as by the engine."""
    eight = reached(replace(ONE_CARD, batch_requests=8), run_waves(replace(ONE_CARD, batch_requests=8)))
    # Cache for eight requests at their longest, which is for about sixteen of all ages.
    scarce = reached(replace(ONE_CARD, batch_requests=64, blocks=8 * 60), run_waves(ONE_CARD))
    ample = reached(replace(ONE_CARD, batch_requests=64), run_waves(ONE_CARD))
    assert eight is not None
    assert scarce is not None
    assert ample is not None
    assert eight.throughput_rps < scarce.bound.requests_per_s < 0.75 * ample.bound.requests_per_s
    assert any(name.startswith("memory") for name in scarce.bound.limits)


def test_a_faster_machine_than_was_bounded_exceeds_the_bound() -> None:
    """Runs do come to the bound: with durations 10 % shorter than it was told, one passes it."""
    found = reached(replace(ONE_CARD, cost=ScaledCost(ONE_CARD.cost, 1.1)), run_waves(ONE_CARD))
    assert found is not None
    assert found.share > 1.0


def test_the_bound_of_one_batch_size_is_arithmetic() -> None:
    """One card, one request at a time: a request takes its prefill and its iterations, to the digit."""
    cost = ConstantCost(dense_s=1e-3, dense_s_per_token=1e-4, last_s=5e-4, prefill_s_per_token=2e-5,
                        attention=AttentionCost(1e-6, 3e-9, 1e-4), host_s=1.5e-3)
    scenario = Scenario(cost=cost, batch_requests=1, batch_tokens=1, blocks=4000)
    prompt, output = 40, 30
    layer_bytes = TINY.kv_heads * TINY.kv_bytes_per_token_per_layer_per_group
    contexts = sum(prompt + m for m in range(1, output))
    # A step may be as long as the longest request, and a prompt token has its share of such a step.
    prefill = TINY.layers * (1e-3 + 1e-4 * 70) * prompt / 70 + TINY.layers * 2e-5 * prompt + 1.5e-3
    decode = (output - 1) * (TINY.layers * (1.1e-3 + 1e-4 + TINY.query_heads * 1e-6) + 1.5e-3)
    seconds = prefill + decode + output * 5e-4 + TINY.layers * contexts * layer_bytes * 3e-9
    lengths = (np.full(7, prompt), np.full(7, output))
    found = upper_bound(scenario.cluster(), TINY, cost, scenario.settings(), [lengths])
    assert found.requests_per_s == pytest.approx(1.0 / seconds, rel=CLOSE)
    assert list(found.limits) == ["time of card0"]


# -- how it moves ------------------------------------------------------------------------------


GROWTH = [
    (cluster(("a100-80gb",)), cluster(("a100-80gb",), ("p100-12gb",))),
    (cluster(("a100-80gb",)), cluster(("a100-80gb", "t4"))),
    (cluster(("a100-40gb",) * 2, ("rtx3090",)), cluster(("a100-40gb",) * 2, ("rtx3090",) * 2)),
    (cluster(("rtx3090",), ("rtx3090",)), cluster(("rtx3090", "l4"), ("rtx3090",))),
    (cluster(("a100-80gb",), ("t4",), network="ethernet-1g"),
     cluster(("a100-80gb",), ("t4",), ("t4",), network="ethernet-1g")),
    (cluster(("l4",) * 8), cluster(("l4",) * 9)),
    (cluster(("l4",) * 4, ("l4",) * 4), cluster(("l4",) * 4, ("l4",) * 5)),
]


@pytest.mark.parametrize(("small", "large"), GROWTH)
def test_another_device_never_lowers_the_bound(small: ClusterSpec, large: ClusterSpec) -> None:
    """Whatever it is and wherever it stands: a policy may leave it alone."""
    assert rate(large) >= rate(small) * (1 - CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(("small", "large"), GROWTH)
def test_another_device_never_lowers_the_bound_of_mixed_steps(small: ClusterSpec, large: ClusterSpec) -> None:
    """The same where prompts and decoding share steps."""
    assert rate(large, chunked=True) >= rate(small, chunked=True) * (1 - CLOSE)


def test_durations_scaled_by_k_scale_the_bound_by_its_inverse() -> None:
    """All durations three times as long: a third of the rate."""
    where = cluster(("a100-80gb",), ("t4",), network="ethernet-1g")
    assert rate(where, ScaledCost(COST, 3.0)) == pytest.approx(rate(where) / 3.0, rel=CLOSE)


def test_cards_of_twice_the_speed_serve_twice_as_many() -> None:
    """Twice the FLOPs and bandwidths, with nothing else that takes time: twice the rate."""
    cost = load_cost_model("roofline", host=HostOverhead(0.0, 0.0), roofline=RooflineSettings(kernel_s=0.0))
    slow = cluster(("a100-80gb",))
    gpu = slow.devices[0].gpu
    fast = replace(slow, hosts=(replace(slow.hosts[0], gpus=(replace(
        gpu, memory_bandwidth_bytes_per_s=2 * gpu.memory_bandwidth_bytes_per_s,
        fp16_flops_per_s=2 * gpu.fp16_flops_per_s),)),))
    assert rate(fast, cost) == pytest.approx(2 * rate(slow, cost), rel=CLOSE)


def test_the_order_of_hosts_and_cards_does_not_matter() -> None:
    """The same cards, listed the other way round."""
    one = cluster(("a100-80gb", "t4"), ("l4",))
    other = cluster(("l4",), ("t4", "a100-80gb"))
    assert rate(one) == pytest.approx(rate(other), rel=CLOSE)


def test_a_slower_network_lowers_the_bound_where_heads_must_cross_it() -> None:
    """A card without room for cache beside its weights leans on the network; it cannot gain by a slow one."""
    prompts, outputs = np.full(10, 1500), np.full(10, 2000)
    names = (("rtx3090",), ("p100-12gb",) * 4)
    rates = [rate(cluster(*names, network=network), lengths=(prompts, outputs))
             for network in ("ethernet-400g", "ethernet-1g")]
    assert rates[1] < 0.9 * rates[0]


def test_more_memory_and_larger_batches_never_lower_the_bound() -> None:
    """Limits that are loosened only allow more."""
    where = cluster(("a100-40gb",))

    def limited(**limits: float) -> float:
        engine = SchedulerSettings(EngineLimits(**limits))  # type: ignore[arg-type]
        return upper_bound(where, LLAMA, COST, engine, [LENGTHS]).requests_per_s

    assert limited(memory_utilization=0.95) > limited(memory_utilization=0.75)
    assert limited(max_batch_requests=64) > limited(max_batch_requests=8)


def test_longer_requests_are_fewer() -> None:
    """Twice the output of every request: less than the rate, more than half of it without prompts."""
    prompts, outputs = LENGTHS
    where = cluster(("a100-80gb",))
    assert 0.3 * rate(where) < rate(where, lengths=(prompts, 2 * outputs)) < rate(where)


# -- input -------------------------------------------------------------------------------------


def test_the_bound_of_a_checked_combination_goes_by_its_workload() -> None:
    """Tokens per second are requests per second times the mean lengths, and the parts add up."""
    prepared = prepare(compose("cluster=single-a100", "model=llama3-8b", "policy=vllm", "requests=200"))
    found = bound_of(prepared)
    about = prepared.workload.describe()
    assert found.requests == 200
    assert found.output_tokens_per_s == pytest.approx(found.requests_per_s * about["output_tokens"]["mean"])
    assert sum(found.limits.values()) == pytest.approx(1.0, abs=0.05)
    (kind,) = found.kinds
    assert sum(kind.busy.values()) <= 1.0 + 1e-6
    assert kind.weights_gb + kind.cache_gb <= kind.memory_gb + 1e-6
    assert kind.weights_gb >= prepared.model.weight_bytes_total / 1e9 * (1 - CLOSE)
    assert "for want of time of a100-80gb" in found.sentence()


def test_requests_that_every_policy_turns_away_do_not_count() -> None:
    """A request beyond the model's context leaves the bound as it is."""
    prompts, outputs = LENGTHS
    longer = (np.append(prompts, 9000), np.append(outputs, 5))
    assert rate(cluster(("a100-80gb",)), lengths=longer) == rate(cluster(("a100-80gb",)))
    with pytest.raises(SpecError, match="at least one"):
        rate(cluster(("a100-80gb",)), lengths=(np.array([9000]), np.array([5])))


def test_a_model_that_fits_nowhere_has_no_bound() -> None:
    """Weights beyond the memory of all devices together are an error that says so."""
    with pytest.raises(InfeasibleError, match="does not fit"):
        rate(cluster(("t4",)))
