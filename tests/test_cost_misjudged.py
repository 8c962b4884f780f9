"""Wrong beliefs of a policy: every coefficient off by the share asked for, durations untouched."""

from __future__ import annotations

import pytest
from support import PEER, TINY, ConstantCost, gpu

from hetis_sim import compose, simulate
from hetis_sim.cost.misjudged import MisjudgedCost
from hetis_sim.run import prepare
from hetis_sim.spec.errors import SpecError
from traces import RngStreams

SMALL = ("model=llama3-8b", "cluster=a100-t4", "requests=60", "rate=6", "cost.kind=roofline")


def beliefs(seed: int, error: float = 0.2) -> MisjudgedCost:
    """What a policy believes of constant durations."""
    return MisjudgedCost(ConstantCost(), error, RngStreams(seed).stream)


def shares(believed: MisjudgedCost, *cards: str) -> list[float]:
    """Every coefficient as a share of the true one, card by card."""
    truth = ConstantCost()
    found: list[float] = []
    for name in cards:
        card = gpu(name, 1 << 30)
        found += [believed.dense_layer_s(card, TINY, 7, 1) / truth.dense_layer_s(card, TINY, 7, 1),
                  believed.head_s(card, TINY, 7, 1) / truth.head_s(card, TINY, 7, 1),
                  believed.prefill_attention_layer_s(card, TINY, 8, 7, 0)
                  / truth.prefill_attention_layer_s(card, TINY, 8, 7, 0),
                  believed.all_reduce_s(card, PEER, 64, 2) / truth.all_reduce_s(card, PEER, 64, 2)]
        mine, right = believed.decode_attention(card, TINY), truth.decode_attention(card, TINY)
        found += [mine.a_s_per_head / right.a_s_per_head, mine.b_s_per_byte / right.b_s_per_byte,
                  mine.c_s / right.c_s]
    wire, right_wire = believed.transfer(PEER), truth.transfer(PEER)
    return [*found, wire.gamma_s_per_byte / right_wire.gamma_s_per_byte, wire.beta_s / right_wire.beta_s]


def test_every_coefficient_is_off_by_the_share() -> None:
    """Up or down, some of each, and each card for itself."""
    found = shares(beliefs(1), "one", "two")
    assert all(share == pytest.approx(0.8) or share == pytest.approx(1.2) for share in found)
    assert 0 < sum(share > 1 for share in found) < len(found)
    assert found[:7] != found[7:14]
    assert beliefs(1).host_overhead_s(3) == ConstantCost().host_overhead_s(3)


@pytest.mark.parametrize(("modules", "wrong"), [
    (("attention", "transfer"), {4, 5, 6, 7, 8}), (("dense",), {0, 1}), (("prefill", "collectives"), {2, 3}),
    (("all",), set(range(9))), (("all", "dense"), set(range(9)))])
def test_only_the_named_modules_are_misjudged(modules: tuple[str, ...], wrong: set[int]) -> None:
    """In the order of ``shares``; what is wrong is as wrong as when all is."""
    given = shares(MisjudgedCost(ConstantCost(), 0.2, RngStreams(5).stream, modules), "one")
    everything = shares(beliefs(5), "one")
    assert {number for number, share in enumerate(given) if share != pytest.approx(1.0)} == wrong
    assert all(given[number] == everything[number] for number in wrong)


@pytest.mark.parametrize("modules", ["[attention,nothing]", "[]"])
def test_unknown_modules_are_refused(modules: str) -> None:
    """The text names the key and what is allowed, before anything is planned."""
    with pytest.raises(SpecError, match=r"cost\.policy_error_modules.*collectives"):
        prepare(compose(*SMALL, "cost.policy_error=0.1", f"cost.policy_error_modules={modules}"))


def test_directions_depend_on_the_seed_and_the_name_alone() -> None:
    """Not on what was asked before; another seed errs otherwise."""
    first, turned = shares(beliefs(5), "one", "two"), shares(beliefs(5), "two", "one")
    assert first == turned[7:14] + turned[:7] + turned[14:]
    assert first != shares(beliefs(6), "one", "two")


@pytest.mark.parametrize("error", ["-0.1", "0.95", "nan"])
def test_an_impossible_error_is_refused(error: str) -> None:
    """The text names the key."""
    with pytest.raises(SpecError, match=r"cost\.policy_error"):
        prepare(compose(*SMALL, f"cost.policy_error={error}"))


def test_durations_are_charged_by_the_truth() -> None:
    """A policy that goes by no coefficient takes exactly as long whatever it believes."""
    runs = [simulate(*SMALL, "policy=vllm", f"cost.policy_error={error}").requests for error in (0, 0.2)]
    assert runs[0].equals(runs[1])


def test_what_hetis_believes_changes_what_it_does() -> None:
    """Dispatch goes by the beliefs; the plan of the instance carries the true ones for the simulator."""
    right, wrong = (prepare(compose(*SMALL, "policy.delta=100", f"cost.policy_error={error}"))
                    for error in (0, 0.5))
    engines = [prepared.controller().engines[0] for prepared in (right, wrong)]
    assert engines[0].view().costs == engines[0].timer.costs
    assert engines[1].view().costs != engines[1].timer.costs
    if right.plan.instances == wrong.plan.instances:
        assert engines[1].timer.costs == engines[0].timer.costs
    assert not simulate(right.config).requests.equals(simulate(wrong.config).requests)
