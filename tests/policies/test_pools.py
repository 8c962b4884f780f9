"""How clusters are divided into pools: the search against brute force, and what the scores are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import pytest
from peer_runs import one_card, requests, serve
from policy_worlds import cluster, paper, problem
from support_runs import assert_sound

from hetis_sim.control.state import Status
from hetis_sim.policies.base import PlanningProblem
from hetis_sim.policies.bundles import Bundle, PipelineTable, cluster_parts, pipeline_table
from hetis_sim.policies.check import check_policy
from hetis_sim.policies.evolve import Division, Effort, Use, moved, normal, starting_divisions
from hetis_sim.policies.plan import Plan
from hetis_sim.policies.pools import PoolRules, PoolSearch
from hetis_sim.policies.registry import make_policy
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.errors import InfeasibleError, SpecError
from hetis_sim.spec.links import link

PEERS = ("splitwise", "distserve", "hexgen", "vllm_all")
SEARCHED = ("splitwise", "distserve", "hexgen")
QUICK = {"evaluations": 100}
TINY: dict[str, tuple[ClusterSpec, str]] = {
    "two kinds in two hosts": (cluster(("a100-40gb", 2), ("l4", 2)), "llama2-7b"),
    "three kinds": (cluster(("a100-40gb", 1), ("rtx3090", 2), ("t4", 1)), "llama2-7b"),
    "equal hosts": (cluster(("rtx3090", 2), ("rtx3090", 2)), "llama2-13b"),
    "mixed host": (cluster(("a100-40gb", 3), ("l40s", 1)), "llama2-13b"),
}


def quick(name: str, **settings: object) -> object:
    """A policy whose search is short."""
    return make_policy({"name": name, **(QUICK if name in SEARCHED else {}), **settings})


def all_divisions(sizes: Sequence[int], uses: Sequence[Use]) -> Iterator[Division]:
    """Every way to form pipelines of some of the cards, in any use; cards left over stand idle."""
    bundles = [bundle for bundle in product(*(range(n + 1) for n in sizes)) if any(bundle)]
    pairs = sorted(product(uses, bundles))

    def extend(left: Bundle, first: int) -> Iterator[Division]:
        yield ()
        for at in range(first, len(pairs)):
            rest = tuple(n - m for n, m in zip(left, pairs[at][1], strict=True))
            if min(rest) >= 0:
                yield from ((pairs[at], *more) for more in extend(rest, at))

    yield from extend(tuple(sizes), 0)


def best_by_brute_force(search: PoolSearch, phases: bool) -> float:
    """The highest score of all divisions."""
    uses: tuple[Use, ...] = ("prefill", "decode") if phases else ("both",)
    sizes = [len(part.devices) for part in search.table.parts]
    return max(search._score(division) for division in all_divisions(sizes, uses) if division)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("phases", [False, True])
@pytest.mark.parametrize("rate", [None, 1.0])
def test_the_search_finds_the_best_of_all_divisions(name: str, phases: bool, rate: float | None) -> None:
    """By its own score, on clusters small enough to try everything, with and without a known load."""
    spec, model = TINY[name]
    given = replace(problem(spec, model), rate_per_s=rate)
    search = PoolSearch(given, PoolRules(phases, 0.25), Effort(), 2000)
    assert search.run().score == pytest.approx(best_by_brute_force(search, phases), rel=1e-12)


@pytest.mark.parametrize("name", ["three kinds"])
def test_another_seed_finds_as_good_a_division(name: str) -> None:
    """And the same seed the same one."""
    spec, model = TINY[name]
    found = [PoolSearch(problem(spec, model), PoolRules(True), Effort(seed=seed), 2000).run()
             for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[2].score == pytest.approx(found[0].score)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("world", ["three kinds", "equal hosts"])
def test_peers_keep_the_rules_of_the_interface(name: str, world: str) -> None:
    """Plans, host order, placements and routes."""
    spec, model = TINY[world]
    report = check_policy(quick(name), problem(spec, model), rounds=10)  # type: ignore[arg-type]
    assert 0 < report.placed < report.dispatched


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("model", ["llama2-13b", "opt-30b", "llama2-70b"])
@pytest.mark.parametrize("world", [
    paper(), cluster(("a100-80gb", 4)),
    cluster(*[("a100-40gb", 1)] * 4, *[("l4", 1)] * 8, *[("t4", 1)] * 12, network="ethernet-10g")],
    ids=["paper", "homogeneous", "helix24"])
def test_peers_keep_the_rules_on_the_clusters_of_papers(world: ClusterSpec, model: str, name: str) -> None:
    """With three models each."""
    check_policy(quick(name), problem(world, model), rounds=10)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("rate", [1.0, 200.0])
def test_whole_runs_lose_nobody(name: str, chunked: bool, rate: float) -> None:
    """Under light load and in overload, with all invariants checked after every event."""
    spec, model = TINY["two kinds in two hosts"]
    given = problem(spec, model, prompt=300, output=40)
    simulation = serve(quick(name), given, requests(40, rate, 300, 40), chunked=chunked)  # type: ignore[arg-type]
    assert_sound(simulation.recorder.records(), 40)
    assert all(state.status == Status.FINISHED for state in simulation.controller.states.values())


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_whole_runs_lose_nobody_where_cache_is_short(name: str, preemption: str) -> None:
    """With preemptions, in either mode."""
    given = problem(cluster(("rtx3090", 2)), "llama2-7b")
    given = replace(given, limits=replace(given.limits, memory_utilization=0.66))
    policy = quick(name, preemption=preemption, reserve_fraction=0.0)
    roles = ("both", "both") if name == "hexgen" else ("prefill", "decode")
    plan = Plan(tuple(one_card(n, 32, 32, role) for n, role in enumerate(roles)))
    workload = requests(40, 50.0, 200, 300)
    simulation = serve(policy, given, workload, plan=plan)  # type: ignore[arg-type]
    assert_sound(simulation.recorder.records(), 40)
    states = simulation.controller.states.values()
    assert all(state.status == Status.FINISHED for state in states)
    assert any(state.preemptions for state in states)


@pytest.mark.parametrize("name", SEARCHED)
def test_one_card_serves_by_itself(name: str) -> None:
    """Where there is no second copy of the weights, the instance does both phases."""
    plan = quick(name).plan(problem(cluster(("a100-80gb", 1)), "llama2-7b"))  # type: ignore[attr-defined]
    assert [instance.role for instance in plan.instances] == ["both"]
    assert ("note" in plan.search) == (name != "hexgen")


@pytest.mark.parametrize("name", ["splitwise", "distserve"])
def test_a_model_that_fits_once_is_not_divided(name: str) -> None:
    """All cards together hold it, half of them do not."""
    plan = quick(name).plan(problem(cluster(("a100-40gb", 4)), "llama2-70b"))  # type: ignore[attr-defined]
    assert [instance.role for instance in plan.instances] == ["both"]
    assert "no two pools" in plan.search["note"]


@pytest.mark.parametrize("name", PEERS)
def test_a_model_that_fits_nowhere_is_refused_with_figures(name: str) -> None:
    """What it needs and what there is."""
    with pytest.raises(InfeasibleError, match=r"needs 138\.0 GB .*4 GPUs offer"):
        quick(name).plan(problem(cluster(("rtx3090", 4))))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "key", "value"), [
    *[(name, *bad) for name in PEERS for bad in (("reserve_fraction", 0.95), ("preemption", "drop"))],
    *[(name, *bad) for name in SEARCHED for bad in (("evaluations", 0), ("seed", -1), ("seed", 0.5))],
    ("hexgen", "population", 0), ("hexgen", "islands", True),
])
def test_settings_out_of_range_are_refused_by_name(name: str, key: str, value: object) -> None:
    """With what is allowed."""
    with pytest.raises(SpecError, match=rf"policy\.{key}=.* is not allowed: must be"):
        make_policy({"name": name, key: value})


def test_two_pools_serve_the_smaller_of_their_rates() -> None:
    """And no more than the network carries between them."""
    fast = problem(cluster(("a100-40gb", 2), ("l4", 2)), "llama2-7b")
    slow = replace(fast, cluster=replace(fast.cluster, network=link("ethernet-1g")))
    division: Division = (("decode", (0, 2)), ("prefill", (2, 0)))
    rates = [search.rates(search.pipelines(division)) for given in (fast, slow)
             for search in [PoolSearch(given, PoolRules(True), Effort(), 2000)]]
    assert rates[0].served == min(rates[0].prefill, rates[0].decode) < rates[0].network
    size = fast.prompt_tokens * fast.model.kv_bytes_per_token
    per_byte_s = slow.cost.transfer(slow.cluster.network).gamma_s_per_byte  # as the simulator sends it
    assert rates[1].network == pytest.approx(1.0 / (per_byte_s * size))
    assert math.isinf(PoolSearch(fast, PoolRules(False), Effort(), 2000).rates([]).network)


def test_caches_that_stay_in_a_host_do_not_cross_the_network() -> None:
    """Two pools inside one host are not bound by it."""
    given = problem(cluster(("a100-40gb", 4)), "llama2-7b")
    search = PoolSearch(given, PoolRules(True), Effort(), 2000)
    rates = search.rates(search.pipelines((("decode", (2,)), ("prefill", (2,)))))
    assert math.isinf(rates.network)


def test_more_than_the_load_asks_for_counts_little() -> None:
    """Four cards are four times as good as one for an unknown load, and hardly better for a small one."""
    given = problem(cluster(("a100-80gb", 4)), "llama2-13b")
    one: Division = (("both", (1,)),)
    for rate, more in ((None, 4.0), (0.5, 1.0)):
        search = PoolSearch(replace(given, rate_per_s=rate), PoolRules(False), Effort(), 2000)
        assert search._score(one * 4) / search._score(one) == pytest.approx(more, rel=0.01)


def test_of_divisions_that_serve_the_load_the_quicker_is_better() -> None:
    """One pipeline of four cards serves it too, with longer ways."""
    given = replace(problem(cluster(("a100-80gb", 4)), "llama2-13b"), rate_per_s=0.5)
    search = PoolSearch(given, PoolRules(False), Effort(), 2000)
    assert search._score((("both", (1,)),) * 4) > search._score((("both", (4,)),))


def test_decoding_on_higher_end_cards_must_serve_more() -> None:
    """The bias marks such a division down, and no other."""
    given = problem(cluster(("a100-40gb", 2), ("l4", 2)), "llama2-7b")
    plain, biased = (PoolSearch(given, PoolRules(True, bias), Effort(), 2000) for bias in (0.0, 0.25))
    upright: Division = (("decode", (0, 2)), ("prefill", (2, 0)))
    upside_down: Division = (("decode", (2, 0)), ("prefill", (0, 2)))
    assert biased._score(upright) == plain._score(upright)
    assert biased._score(upside_down) == pytest.approx(plain._score(upside_down) / 1.25, rel=1e-3)


def test_a_bundle_gets_its_best_degrees() -> None:
    """Of all tensor-parallel degrees that divide the heads, by the estimate; remembered for equal hosts."""
    given = problem(cluster(("rtx3090", 2), ("rtx3090", 2)), "llama2-7b")
    table = PipelineTable(given, 2000)
    best = table.best("both", (2, 2))
    assert best is not None
    options = [table._pipeline("both", table._split((2, 2), {0: degree})) for degree in (1, 2)]
    assert best.value == max(option.value for option in options if option is not None)
    assert table.best("both", (2, 0)) is not None
    one, other = table.best("decode", (2, 0)), table.best("decode", (0, 2))
    assert one is not None
    assert other is not None
    assert one.estimate == other.estimate
    assert {part for part, _ in one.split} != {part for part, _ in other.split}


def test_pipelines_are_worked_out_once_for_all_rates() -> None:
    """Problems that differ in the rate share the table; other lengths, or another cost model, do not."""
    given = problem(cluster(("rtx3090", 2)), "llama2-7b")
    table = pipeline_table(replace(given, rate_per_s=1.0), 2000)
    assert pipeline_table(replace(given, rate_per_s=3.0), 2000) is table
    assert pipeline_table(given, 1) is not table
    assert pipeline_table(replace(given, prompt_tokens=given.prompt_tokens + 1), 2000) is not table
    assert pipeline_table(problem(cluster(("rtx3090", 2)), "llama2-7b"), 2000) is not table


def test_every_card_is_in_one_part_high_end_first() -> None:
    """Whatever the order of the hosts."""
    spec = cluster(("t4", 2), ("a100-40gb", 1), ("t4", 1))
    parts = cluster_parts(problem(spec, "llama2-7b"))
    assert [(part.gpu.name, len(part.devices)) for part in parts] == [
        ("a100-40gb", 1), ("t4", 2), ("t4", 1)]
    assert sorted(d for part in parts for d in part.devices) == [0, 1, 2, 3]


def test_moves_keep_the_cards() -> None:
    """No card is lost or doubled, and divisions have one form."""
    division: Division = (("both", (2, 1)), ("both", (0, 3)))
    changed = normal(moved(division, 0, 0, 2, 1, "both"))
    assert changed == (("both", (0, 1)), ("both", (2, 3)))
    fresh = normal(moved(division, 1, 1, 3, 2, "idle"))
    assert fresh == (("both", (2, 1)), ("idle", (0, 3)))
    parts = cluster_parts(PROBLEM)
    for start in starting_divisions(parts):
        assert [sum(b[p] for _, b in start) for p in range(len(parts))] == [len(p.devices) for p in parts]


PROBLEM: PlanningProblem = problem(paper(), "llama2-13b")
