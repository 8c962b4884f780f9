"""A machine that runs at another pace than when its profile was measured."""

from __future__ import annotations

import pytest
from support import TINY, ConstantCost, gpu

from hetis_sim.cost.model import TransferCost
from hetis_sim.cost.paced import PacedCost, Slowdown
from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.gpu import GpuSpec

SLOW = Slowdown(2.0, 3.0, 4.0, 5.0)
LINK = LinkSpec("wire", 1.0, 1.0)
SENDING = TransferCost(1e-9, 1e-5)


class Sending(ConstantCost):
    """A rank that is busy with cache that it sends."""

    def cache_packing(self, gpu: GpuSpec) -> TransferCost:
        return SENDING


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
    assert PacedCost(whole, {"slow": Slowdown(2.0, 3.0)}).prefill_attention_layer_s(
        card, TINY, 4, 64, 0) == pytest.approx(3 * whole.prefill_attention_layer_s(card, TINY, 4, 64, 0))


@pytest.mark.parametrize("part", ["dense", "prompt"])
def test_a_pace_is_a_positive_number(part: str) -> None:
    """Nothing takes no time."""
    with pytest.raises(SpecError, match=f"slowdown.{part}"):
        Slowdown(**{part: 0.0})
