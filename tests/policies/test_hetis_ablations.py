"""Ablations of Hetis: each leaves out the decision that its name says, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from policy_worlds import cluster, paper, problem, request

from analysis.figures.naming import names_of
from hetis_sim import load_run, simulate
from hetis_sim.config import compose
from hetis_sim.policies.check import _Bench, check_policy
from hetis_sim.policies.hetis import joint
from hetis_sim.policies.hetis.policy import HetisPolicy
from hetis_sim.policies.plan import Placement, Plan
from hetis_sim.policies.registry import make_policy, policy_names, settings_class
from hetis_sim.policies.view import InstanceView, RequestView
from hetis_sim.spec.errors import SpecError
from hetis_sim.study.runs import cases_of

ABLATIONS: dict[str, dict[str, object]] = {
    "hetis-static": {"dispatch": "static", "redispatch": False},
    "hetis-greedy": {"dispatch": "greedy"},
    "hetis-no-redispatch": {"redispatch": False},
    "hetis-lifo": {"eviction": "lifo"},
    "hetis-delta0": {"delta": 0.0},
}
DECISIONS = {
    "hetis-static": {"dispatch", "rebalance", "relieve"},
    "hetis-greedy": {"dispatch"},
    "hetis-no-redispatch": {"rebalance", "relieve"},
    "hetis-lifo": {"relieve", "victim"},
    "hetis-delta0": set(),
}
"""The decisions about running instances in which an ablation may differ."""



def hetis(**settings: object) -> HetisPolicy:
    """Hetis with some settings."""
    made = make_policy({"name": "hetis", **settings})
    assert isinstance(made, HetisPolicy)
    return made


def test_every_ablation_is_in_the_table() -> None:
    """Those of this file are all that there are."""
    assert {name for name in policy_names() if name.startswith("hetis-")} == set(ABLATIONS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_hetis_but_for_the_settings_it_fixes(name: str) -> None:
    """Which cannot be changed; all others can."""
    kind, fixed = settings_class(name), ABLATIONS[name]
    usual = settings_class("hetis")()
    assert {f.name: getattr(kind(), f.name) for f in fields(kind)} == {
        f.name: fixed.get(f.name, getattr(usual, f.name)) for f in fields(usual)}
    assert make_policy({"name": name, "theta": 0.1}).settings.theta == 0.1  # type: ignore[attr-defined]
    for key in fixed:
        with pytest.raises(SpecError, match=rf"policy\.{key}=.* what the ablation stands for"):
            make_policy({"name": name, key: getattr(usual, key)})


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_conform(name: str) -> None:
    """As every policy has to."""
    check_policy(make_policy(name), problem(cluster(("a100-80gb", 2), ("rtx3090", 2)), "opt-30b"), rounds=10)


# -- decisions ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Hetis's plan for the paper's testbed."""
    return HetisPolicy().plan(problem(paper()))


def states(plan: Plan) -> Iterator[tuple[InstanceView, list[RequestView], random.Random]]:
    """Random states of an instance, roomy and tight."""
    (instance, *_) = plan.instances
    bench = _Bench(HetisPolicy(), problem(paper()), instance, 0, random.Random(5))
    for share in (1, 20, 60) * 12:
        bench.capacity = {device: units // share for device, units in bench.full.items()}
        bench.empty = bench._view(0, [])
        running = bench._random_load()
        yield bench._view(0, running), running, random.Random(share)


def decisions(policy: HetisPolicy, view: InstanceView, running: Sequence[RequestView],
              rng: random.Random) -> dict[str, Any]:
    """What a policy decides in a state, by kind of decision."""
    new = [request(1000 + n, rng.randint(10, 3000)) for n in range(20)]
    full = rng.choice(view.plan.devices)
    short = replace(view, free_units={**view.free_units, full: 0})
    lost = [replace(r, preemptions=n % 3) for n, r in zip(count(), running, strict=False)]
    return {"dispatch": policy.dispatch(new, view), "rebalance": policy.rebalance(view, running),
            "relieve": policy.relieve(short, full, running),
            "victim": policy.victim(full, lost) if lost else None}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_decides_as_hetis_does_but_for_one_thing(name: str, plan: Plan) -> None:
    """Over many states: only the decisions named differ, and each of them somewhere."""
    usual, ablated = hetis(theta=0.05), make_policy({"name": name, "theta": 0.05})
    assert isinstance(ablated, HetisPolicy)
    differ: set[str] = set()
    for view, running, rng in states(plan):
        seed = rng.getrandbits(32)
        one = decisions(usual, view, running, random.Random(seed))
        other = decisions(ablated, view, running, random.Random(seed))
        differ |= {kind for kind in one if one[kind] != other[kind]}
        if name in ("hetis-static", "hetis-no-redispatch"):
            assert (other["rebalance"], other["relieve"]) == (None, None)
    assert differ == DECISIONS[name]


@pytest.mark.parametrize("name", ["hetis", *ABLATIONS])
def test_who_solves_the_linear_program(name: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many arrive together: neither the greedy nor the static one."""
    asked = []
    solve = joint.solve
    monkeypatch.setattr(joint, "solve", lambda *given: asked.append(1) or solve(*given))
    for view, running, rng in states(plan):
        decisions(make_policy(name), view, running, rng)  # type: ignore[arg-type]
    assert bool(asked) == (name not in ("hetis-greedy", "hetis-static"))


def test_static_heads_are_split_alike(plan: Plan) -> None:
    """Whatever is loaded, every request gets the same placement, which uses primaries and workers."""
    policy = make_policy("hetis-static")
    placed: set[Placement] = set()
    for view, _, _ in states(plan):
        room = dict.fromkeys(view.plan.devices, 10**6)
        roomy = replace(view, capacity_units=room, free_units=room)
        placed |= set(policy.dispatch([request(n, 100 * n) for n in range(1, 9)], roomy))
    (split,) = placed
    positions = plan.instances[0].positions
    assert 0 < sum(n for n, position in zip(split, positions, strict=True) if position.remote) < sum(split)


def test_lifo_moves_and_preempts_the_latest_arrival(plan: Plan) -> None:
    """Of those that have cache on the full device and may move."""
    policy = make_policy("hetis-lifo")
    seen = 0
    for view, running, rng in states(plan):
        device = rng.choice(view.plan.devices)
        here = [p.index for p in view.plan.positions if p.device == device]
        move = policy.relieve(replace(view, free_units={**view.free_units, device: 0}), device, running)
        if move is not None:
            seen += 1
            there = [r for r in running if r.movable and r.placement and any(r.placement[p] for p in here)]
            assert move.request_id == max(there, key=lambda r: (r.arrival_s, r.request_id)).request_id
        if running:
            lost = [replace(r, preemptions=r.request_id) for r in running]
            assert policy.victim(device, lost).request_id == max(r.request_id for r in running)
    assert seen > 5


def test_delta_0_takes_every_type_that_improves_the_cost() -> None:
    """An L4 beside four A100s: 2 % are too little for Hetis, and enough without the margin."""
    given = problem(cluster(("a100-80gb", 4), ("l4", 1)), "llama2-7b")
    with_margin, without = hetis().plan(given), make_policy("hetis-delta0").plan(given)
    assert dense(with_margin, given.cluster.devices) == {"a100-80gb"}
    assert dense(without, given.cluster.devices) == {"a100-80gb", "l4"}
    costs = without.search["sets"]
    assert costs["a100-80gb + l4"] < costs["a100-80gb"] <= 1.05 * costs["a100-80gb + l4"]


def test_delta_0_leaves_out_what_makes_the_cost_worse() -> None:
    """P100s in dense work slow everybody down."""
    plan = make_policy("hetis-delta0").plan(problem(paper()))
    assert "p100-12gb" not in dense(plan, paper().devices)
    costs = plan.search["sets"]
    assert costs["a100-80gb + rtx3090 + p100-12gb"] >= min(costs.values())


# -- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_go_by_their_names_everywhere(name: str, tmp_path: Path) -> None:
    """In a run and its folder, in studies, and in reports beside Hetis."""
    config = compose(f"policy={name}", f"policies=[hetis,{name}]", "cluster=a100-t4", "model=llama2-7b",
                     "requests=5", "rate=50")
    assert [case.label for case in cases_of(config, config.study.policies)] == ["hetis", name]
    assert [case.label for case in cases_of(config)] == [name]
    result = simulate(config, output=tmp_path)
    assert result.prepared.policy.name == name
    kept = load_run(tmp_path).config
    assert kept is not None
    assert kept["policy"]["name"] == name
    usual = asdict(compose("policy=hetis", "cluster=a100-t4", "model=llama2-7b", "requests=5", "rate=50"))
    assert names_of([usual, kept], ["a", "b"], ["simulated"] * 2) == [("hetis",) * 2, (name,) * 2]


def dense(plan: Plan, devices: Sequence[Any]) -> set[str]:
    """Kinds of GPU that do dense work."""
    return {devices[d].gpu.name for i in plan.instances for stage in i.stages for d in stage.devices}
