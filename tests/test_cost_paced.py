"""A machine that runs at another pace than when its profile was measured."""

from __future__ import annotations

import pytest
from support import TINY, ConstantCost, gpu

from hetis_sim.cost.misjudged import MisjudgedCost
from hetis_sim.cost.model import TransferCost
from hetis_sim.cost.paced import PacedCost, Slowdown
from hetis_sim.policies.costs import position_costs
from hetis_sim.policies.plan import InstancePlan, StagePlan
from hetis_sim.spec.cluster import ClusterSpec, HostSpec, LinkSpec
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.gpu import GpuSpec
from traces import RngStreams

SLOW = Slowdown(2.0, 3.0, 4.0, 5.0)
LINK = LinkSpec("wire", 1.0, 1.0)
SENDING = TransferCost(1e-9, 1e-5)


class Sending(ConstantCost):
    """A rank that is busy with cache that it sends, and messages that depend on who waits for them."""

    def cache_packing(self, gpu: GpuSpec) -> TransferCost:
        return SENDING

    def head_transfer(self, link: LinkSpec, rank: GpuSpec, worker: GpuSpec) -> TransferCost:
        return TransferCost(1e-9, 1e-4 if worker.name == "slow" else 1e-5)


def test_each_module_is_scaled_by_its_part() -> None:
    """On the device that is slower; links are what they were."""
    whole, card, other = Sending(), gpu("slow", 1), gpu("other", 1)
    paced = PacedCost(whole, {"slow": SLOW})
    assert paced.dense_layer_s(card, TINY, 8, 1) == pytest.approx(2 * whole.dense_layer_s(card, TINY, 8, 1))
    assert paced.dense_layer_s(card, TINY, 64, 1) == pytest.approx(4 * whole.dense_layer_s(card, TINY, 64, 1))
    assert paced.dense_layer_s(other, TINY, 64, 1) == whole.dense_layer_s(other, TINY, 64, 1)
    for slow, fast in ((paced.decode_attention, whole.decode_attention),
                       (paced.remote_attention, whole.remote_attention)):
        assert slow(card, TINY).seconds(8, 1e6) == pytest.approx(3 * fast(card, TINY).seconds(8, 1e6))
    assert paced.prefill_attention_layer_s(card, TINY, 4, 64, 0) == pytest.approx(
        5 * whole.prefill_attention_layer_s(card, TINY, 4, 64, 0))
    assert paced.transfer(LINK) == whole.transfer(LINK)
    assert paced.host_overhead_s(4) == whole.host_s
    assert paced.cache_packing(card) == SENDING
    assert paced.head_transfer(LINK, other, card).beta_s == 1e-4
    assert paced.head_transfer(LINK, card, other).beta_s == 1e-5
    believed = believed_share(ConstantCost(), card, other)
    assert believed_share(Sending(), card, other) == pytest.approx(believed)
    assert PacedCost(whole, {"slow": Slowdown(2.0, 3.0)}).prefill_attention_layer_s(
        card, TINY, 4, 64, 0) == pytest.approx(3 * whole.prefill_attention_layer_s(card, TINY, 4, 64, 0))


def believed_share(truth: ConstantCost, rank: GpuSpec, worker: GpuSpec) -> float:
    """What a policy that is wrong takes a message with heads for, over what it is."""
    believed = MisjudgedCost(truth, 0.2, RngStreams(1).stream).head_transfer(LINK, rank, worker)
    return believed.beta_s / truth.head_transfer(LINK, rank, worker).beta_s


def test_positions_are_charged_for_messages_of_their_own() -> None:
    """Those between their rank and themselves."""
    link = LinkSpec("wire", 1e9, 1e-6)
    spec = ClusterSpec("three", (HostSpec((gpu("rank", 1), gpu("slow", 1), gpu("other", 1)), link),), link)
    plan = InstancePlan((StagePlan((0,), TINY.layers, (TINY.kv_heads,)),), (1, 2))
    fixed_s = [position.wire_fixed_s for position in position_costs(spec, TINY, Sending(), plan)[1:]]
    assert fixed_s == pytest.approx([2e-4, 2e-5])


@pytest.mark.parametrize("part", ["dense", "prompt"])
def test_a_pace_is_a_positive_number(part: str) -> None:
    """Nothing takes no time."""
    with pytest.raises(SpecError, match=f"slowdown.{part}"):
        Slowdown(**{part: 0.0})
