"""Helix: placements against brute force, flows against another algorithm, paths by weight and by mark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_worlds import cluster, paper, problem
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from support import TINY

from hetis_sim.cost import RooflineCost
from hetis_sim.cost.host import HostOverhead
from hetis_sim.policies.base import EngineLimits, PlanningProblem
from hetis_sim.policies.check import check_policy
from hetis_sim.policies.helix.chain import chain
from hetis_sim.policies.helix.flow import Placed, connections, largest_flow
from hetis_sim.policies.helix.heuristics import HEURISTICS, Ranges, even_split
from hetis_sim.policies.helix.milp import Budget
from hetis_sim.policies.helix.policy import HelixPolicy
from hetis_sim.policies.helix.program import LinkedProgram, PlacementProgram
from hetis_sim.policies.helix.settings import HelixSettings
from hetis_sim.policies.helix.sites import SiteKind
from hetis_sim.policies.memory import stage_weight_bytes
from hetis_sim.policies.plan import SINK, SOURCE, MeshEdge, MeshNode, MeshPlan, StagePlan
from hetis_sim.policies.registry import make_policy
from hetis_sim.policies.view import MeshView, RequestView
from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.gpus import gpu

TOLERANCE = 1e-4  # HiGHS takes 0.999999 for whole
EXACT = Budget(nodes=1 << 20, gap=0.0, time_s=60.0)


def kinds_of(*given_: tuple[int, Sequence[float]]) -> list[SiteKind]:
    """Kinds as (number of nodes, rates with 1, 2, ... layers)."""
    first = 0
    made = []
    for number, (count, rates) in enumerate(given_):
        made.append(SiteKind(f"kind{number}", tuple((first + n,) for n in range(count)), tuple(rates)))
        first += count
    return made


@st.composite
def small_clusters(draw: st.DrawFn) -> tuple[list[SiteKind], int]:
    """Up to four nodes of two kinds for a model of up to four layers; rates fall with layers."""
    layers = draw(st.integers(2, 4))
    kinds = []
    for _ in range(draw(st.integers(1, 2))):
        most = draw(st.integers(1, layers))
        rate = draw(st.integers(20, 100))
        rates = [float(rate // k + draw(st.integers(0, 5))) for k in range(1, most + 1)]
        kinds.append((draw(st.integers(1, 2)), rates))
    return kinds_of(*kinds), layers


def flow_of(kinds: Sequence[SiteKind], ranges: Ranges, layers: int, partial: bool,
            link_rate: Callable[[int, int], float] = lambda i, j: inf) -> float:
    """Flow of a placement, by default without limits on links."""
    sites = [kind for kind in kinds for _ in kind.groups]
    nodes = [Placed(n, item[0], item[1], sites[n].rates[item[1] - 1])
             for n, item in enumerate(ranges) if item is not None]
    rate = link_rate
    return largest_flow(nodes, connections(nodes, layers, partial),
                        lambda i, j: rate(nodes[i].site, nodes[j].site))[0]


def all_ranges(kinds: Sequence[SiteKind], layers: int) -> Iterator[Ranges]:
    """Every placement."""
    options = [[None, *((first, k) for k in range(1, kind.layers_most + 1)
                        for first in range(layers - k + 1))] for kind in kinds for _ in kind.groups]
    yield from product(*options)


@settings(max_examples=25)
@given(small_clusters(), st.booleans())
def test_the_program_finds_what_brute_force_finds(case: tuple[list[SiteKind], int], partial: bool) -> None:
    """Its optimum, its bound and the flow of its placement are the best flow of all placements."""
    kinds, layers = case
    best = max(flow_of(kinds, ranges, layers, partial) for ranges in all_ranges(kinds, layers))
    program = PlacementProgram(kinds, layers, partial)
    assert program.columns(kinds, layers, partial) == program._milp.columns
    found = program.solve(EXACT)
    assert found.stopped == "optimal"
    assert found.bound == pytest.approx(best, rel=TOLERANCE, abs=TOLERANCE)
    assert found.ranges is not None
    assert flow_of(kinds, found.ranges, layers, partial) == pytest.approx(best, rel=TOLERANCE, abs=TOLERANCE)


@settings(max_examples=15)
@given(small_clusters(), st.booleans(), st.lists(st.integers(1, 40), min_size=16, max_size=16))
def test_the_program_with_links_finds_what_brute_force_finds(case: tuple[list[SiteKind], int], partial: bool,
                                                             links: list[int]) -> None:
    """The same where links of every strength lie between the nodes."""
    kinds, layers = case

    def rate(i: int, j: int) -> float:
        return float(links[4 * i + j])

    best = max(flow_of(kinds, ranges, layers, partial, rate) for ranges in all_ranges(kinds, layers))
    program = LinkedProgram(kinds, layers, partial, rate)
    assert program.columns(kinds, layers) == program._milp.columns
    found = program.solve(EXACT)
    assert found.stopped == "optimal"
    assert found.bound == pytest.approx(best, rel=TOLERANCE, abs=TOLERANCE)
    assert found.ranges is not None
    flow = flow_of(kinds, found.ranges, layers, partial, rate)
    assert flow == pytest.approx(best, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("slow", [True, False])
def test_links_count_where_they_are_slow(slow: bool) -> None:
    """Three cards that hold half the model each; where two of them have a slow link, the third one helps."""
    stage = StagePlan((0,), 1, (TINY.kv_heads,))
    share = 3.5 * stage_weight_bytes(TINY, stage, 0, False, False) / gpu("l4").memory_bytes
    spec = cluster(("l4", 1), ("l4", 1), ("l4", 1))
    if slow:
        spec = replace(spec, host_links=((0, 1, LinkSpec("wire", 1e5, 1e-4)),))
    cost = RooflineCost(host=HostOverhead(2e-3, 2e-5))
    given_ = PlanningProblem(spec, TINY, cost, EngineLimits(), 100, 100)
    plan = HelixPolicy(HelixSettings(weights_share=share, milp_gap=0.0)).plan(given_)
    assert plan.search["solver"] == "optimal"
    assert plan.search["bound"] == pytest.approx(plan.search["flow"], rel=TOLERANCE)
    if slow:
        assert plan.search["placement"] == "milp"
        assert plan.search["flow"] > 2 * plan.search["chain"]


@settings(max_examples=40)
@given(small_clusters())
def test_chains_are_the_best_of_their_form(case: tuple[list[SiteKind], int]) -> None:
    """No chain of stages in which all nodes of a stage hold the same layers has a larger flow."""
    kinds, layers = case
    best = max(chain_flow(kinds, ranges, layers) for ranges in all_ranges(kinds, layers))
    found = [chain_flow(kinds, ranges, layers) for ranges in chain(kinds, layers)]
    assert (found[0] if found else 0.0) == pytest.approx(best)


def chain_flow(kinds: Sequence[SiteKind], ranges: Ranges, layers: int) -> float:
    """The lowest rate of a stage; 0 for what is no chain."""
    sites = [kind for kind in kinds for _ in kind.groups]
    rates: dict[tuple[int, int], float] = {}
    for n, item in enumerate(ranges):
        if item is not None:
            rates[item] = rates.get(item, 0.0) + sites[n].rates[item[1] - 1]
    passed = 0
    for first, count in sorted(rates):
        if first != passed:
            return 0.0
        passed += count
    return min(rates.values()) if passed == layers else 0.0


@given(st.integers(0, 10**6))
def test_flows_equal_those_of_another_algorithm(seed: int) -> None:
    """On random placements with random links; what flows in flows out, within every limit."""
    rng = np.random.default_rng(seed)
    layers, nodes = int(rng.integers(2, 9)), []
    for n in range(int(rng.integers(1, 9))):
        first = int(rng.integers(0, layers))
        nodes.append(Placed(n, first, int(rng.integers(1, layers - first + 1)), float(rng.integers(1, 100))))
    links = rng.integers(1, 60, size=(len(nodes), len(nodes)))
    pairs = connections(nodes, layers, partial=True)
    value, flows = largest_flow(nodes, pairs, lambda i, j: float(links[i, j]))
    size = 2 * len(nodes) + 2
    matrix = np.zeros((size, size), dtype=np.int32)
    for n, node in enumerate(nodes):
        matrix[2 * n, 2 * n + 1] = node.tokens_per_s
    for i, j in pairs:
        tail, head = (size - 2 if i == SOURCE else 2 * i + 1), (size - 1 if j == SINK else 2 * j)
        matrix[tail, head] = links[i, j] if i >= 0 and j >= 0 else 10**6
    assert value == pytest.approx(maximum_flow(csr_array(matrix), size - 2, size - 1).flow_value)
    for n, node in enumerate(nodes):
        came = sum(flow for (_, j), flow in flows.items() if j == n)
        went = sum(flow for (i, _), flow in flows.items() if i == n)
        assert came == pytest.approx(went)
        assert came <= node.tokens_per_s + 1e-6
    assert all(flow <= links[i, j] + 1e-6 for (i, j), flow in flows.items() if i >= 0 and j >= 0)


def test_partial_inference_connects_what_exact_ranges_do_not() -> None:
    """Two nodes that overlap pass the model only if the second may begin in its middle."""
    kinds = kinds_of((1, [9.0, 6.0, 4.0]), (1, [8.0, 5.0, 3.0]))
    ranges: Ranges = ((0, 3), (2, 3))
    assert flow_of(kinds, ranges, 5, partial=False) == 0.0
    assert flow_of(kinds, ranges, 5, partial=True) == 3.0


@pytest.mark.parametrize("name", sorted(HEURISTICS))
def test_heuristics_cover_the_model(name: str) -> None:
    """On a pool of three kinds each passes every layer."""
    kinds = kinds_of((4, [80 / k for k in range(1, 13)]), (8, [30 / k for k in range(1, 8)]),
                     (12, [20 / k for k in range(1, 6)]))
    for ranges in HEURISTICS[name](kinds, 40):
        assert flow_of(kinds, ranges, 40, partial=True) > 0
    assert even_split(7, 3) == [(0, 3), (3, 2), (5, 2)]


@pytest.mark.parametrize("placement", ["milp", "swarm", "petals", "separate"])
def test_the_plan_is_never_worse_than_a_heuristic(placement: str) -> None:
    """All placements of the paper's testbed, with one node a card."""
    plan = HelixPolicy(HelixSettings(placement=placement, tp_max=1)).plan(problem(paper(), "llama2-13b"))
    best = HelixPolicy(HelixSettings(tp_max=1)).plan(problem(paper(), "llama2-13b"))
    assert 0 < plan.search["flow"] <= best.search["flow"] <= best.search["bound"] * (1 + 1e-9)
    assert plan.mesh is not None
    into_sink = sum(edge.tokens_per_s for edge in plan.mesh.edges if edge.target == SINK)
    assert into_sink == pytest.approx(plan.search["flow"], rel=0.1)  # edges of little flow are left out


@pytest.mark.parametrize(("spec", "model"), [
    (paper(), "llama2-70b"), (cluster(("l4", 4), ("t4", 2)), "qwen2.5-7b"),
    (cluster(("a100-80gb", 1)), "llama2-13b"),
    (cluster(*[("t4", 1)] * 6, network="ethernet-10g"), "llama2-13b"),
], ids=["paper", "mixed", "one card", "weak hosts"])
def test_helix_conforms(spec: object, model: str) -> None:
    """Plans are sound and repeatable, decisions pure, whatever the state."""
    for words in ({}, {"scheduling": "random", "placement": "swarm"}):
        report = check_policy(make_policy({"name": "helix", **words}), problem(spec, model), rounds=12)  # type: ignore[arg-type]
        assert report.plan.mesh is not None
        assert 0 < report.placed <= report.dispatched


# -- paths --------------------------------------------------------------------------------------


def fork(*weights: float) -> MeshPlan:
    """Equal nodes side by side between source and sink."""
    nodes = tuple(MeshNode((n,), 4, (4,), 0, 100.0) for n in range(len(weights)))
    edges = [MeshEdge(SOURCE, n, weight) for n, weight in enumerate(weights)]
    return MeshPlan(nodes, (*edges, *(MeshEdge(n, SINK, weight) for n, weight in enumerate(weights))), 20.0)


def view_of(plan: MeshPlan, **given_: object) -> MeshView:
    """An empty mesh of 4,000 entries a node, but for what is given."""
    zeros = [0] * len(plan.nodes)
    view = MeshView(plan, [4000] * len(zeros), [4000] * len(zeros), zeros, zeros, zeros, zeros,
                    [0] * len(plan.edges), 0, 0, 16)
    return replace(view, **given_)  # type: ignore[arg-type]


def test_tokens_are_shared_out_by_the_flow() -> None:
    """Each edge is sent its share of the tokens, to within the longest request."""
    plan, policy = fork(5.0, 3.0, 1.0), HelixPolicy()
    rng = np.random.default_rng(3)
    sent = [0] * len(plan.edges)
    lengths = rng.integers(1, 400, size=500).tolist()
    for n, tokens in enumerate(lengths):
        request = RequestView(n, 0.0, tokens, tokens)
        sent[policy.next_edge(request, view_of(plan, sent_tokens=sent), [0, 1, 2])] += tokens
    for edge, weight in enumerate((5.0, 3.0, 1.0)):
        assert abs(sent[edge] - sum(lengths) * weight / 9.0) <= 400


def test_equal_requests_are_interleaved() -> None:
    """5 : 1 comes as a a a a a b, not in runs of the round's length times weight."""
    plan, policy, sent, order = fork(5.0, 1.0), HelixPolicy(), [0] * 4, []
    for n in range(12):
        order.append(policy.next_edge(RequestView(n, 0.0, 10, 10), view_of(plan, sent_tokens=sent), [0, 1]))
        sent[order[-1]] += 10
    assert Counter(order[:6]) == Counter(order[6:]) == {0: 5, 1: 1}


def test_nodes_above_the_mark_are_masked() -> None:
    """Expected cache: what is there, the prompt and the share of the mean output, in all layers of a node."""
    plan, policy = fork(1.0, 1.0), HelixPolicy(HelixSettings(high_water=0.5, output_share=0.5))
    request = RequestView(0, 0.0, 90, 90)  # expects 100 tokens, 400 entries of at most 2,000
    held = {"requests": [3, 3], "request_layers": [12, 12]}  # which expect 120 entries beside their prompts
    assert policy.open_nodes(request, view_of(plan, prompt_entries=[1480, 1481], **held)) == [True, False]
    alone = view_of(plan, prompt_entries=[1480, 1481], requests=[0, 0], request_layers=[12, 12])
    assert policy.open_nodes(request, alone) == [True, True]


def test_other_schedules() -> None:
    """The shortest queue by the time that it takes; random choices spread and repeat."""
    plan = fork(1.0, 1.0)
    plan = replace(plan, nodes=(replace(plan.nodes[0], tokens_per_s=10.0), plan.nodes[1]))
    shortest, drawn = (HelixPolicy(HelixSettings(scheduling=name)) for name in ("shortest_queue", "random"))
    request = RequestView(0, 0.0, 9, 9)
    assert shortest.next_edge(request, view_of(plan, queued_tokens=[20, 100]), [0, 1]) == 1
    assert shortest.next_edge(request, view_of(plan, queued_tokens=[5, 100]), [0, 1]) == 0
    chosen = [drawn.next_edge(RequestView(n, 0.0, 9, 9), view_of(plan), [0, 1]) for n in range(400)]
    assert 160 < sum(chosen) < 240
    assert chosen == [drawn.next_edge(RequestView(n, 0.0, 9, 9), view_of(plan), [0, 1]) for n in range(400)]


@pytest.mark.parametrize(("key", "value"), [
    ("placement", "best"), ("scheduling", "fifo"), ("high_water", 0.0), ("high_water", float("nan")),
    ("weights_share", 1.5), ("tp_max", 0), ("milp_gap", -0.1), ("partial_inference", "maybe"),
])
def test_bad_settings_are_refused(key: str, value: object) -> None:
    """The error names the key."""
    with pytest.raises(SpecError, match=rf"policy\.{key}"):
        make_policy({"name": "helix", key: value})


def test_bad_meshes_are_refused() -> None:
    """An edge has to lead to a node that holds the next layer, and each device belongs to one node."""
    a, b = MeshNode((0,), 2, (4,), 0), MeshNode((1,), 2, (4,), 2)
    with pytest.raises(SpecError, match="holds layer 2"):
        MeshPlan((a, replace(b, first_layer=3)), (MeshEdge(0, 1, 1.0),))
    with pytest.raises(SpecError, match="each device in one node"):
        MeshPlan((a, replace(b, devices=(0,))), ())
    with pytest.raises(SpecError, match="from a node that ends at 4"):
        MeshPlan((a, b), (MeshEdge(0, SINK, 1.0),))
