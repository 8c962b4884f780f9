"""The pace of a machine within a run, and steps held against it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("torch", reason="real models need the extra exec")

from hetis_exec.validate.moments import Moments, scaled_steps
from hetis_sim.cost.paced import Slowdown


def moment(at_s: float, pace: float) -> dict[str, Any]:
    """The pace at a moment: dense modules at this, everything else at its square."""
    return {"at_s": at_s, "slowdown": {"cpu-core": {"dense": pace, "attention": pace**2, "prompt": pace**2,
                                                    "prompt_attention": pace**3}}}


def test_steps_are_scaled_by_the_pace_of_their_moment() -> None:
    """That of the glances about it; prompts have one of their own, and host time none."""
    frame = pd.DataFrame({"start_s": [0.0, 10.0, 10.0], "instance": 0, "requests": [8, 8, 0],
                          "prefill_tokens": [0, 0, 64], "dense_s": 1.0, "attention_s": 1.0, "host_s": 1.0})
    moments = [moment(0.1 * n, 1.0) for n in range(10)] + [moment(9.5 + 0.1 * n, 2.0) for n in range(10)]
    found = scaled_steps(frame, moments, ["cpu-core"])
    assert found["dense_s"].tolist() == pytest.approx([1.0, 2.0, 4.0])
    assert found["attention_s"].tolist() == pytest.approx([1.0, 4.0, 8.0])
    assert found["host_s"].tolist() == [1.0, 1.0, 1.0]
    assert scaled_steps(frame, moments[:1], ["cpu-core"])["dense_s"].tolist() == [1.0, 1.0, 1.0]


def test_glances_take_a_share_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before it counts, half of its time at most, and a slow one less often."""
    clock = [0.0]

    def glance() -> dict[str, dict[str, float]]:
        clock[0] += 0.2
        return {"cpu-core": {"dense": 1.0}}

    monkeypatch.setattr("hetis_exec.validate.moments.time.perf_counter", lambda: clock[0])
    moments = Moments(glance, begin_s=4.0)
    for now_s in np.arange(0.0, 14.0, 0.01):
        moments(float(now_s))
    assert moments.found[0][0] == pytest.approx(4.0)
    assert len(moments.found) == pytest.approx(10.0 / 0.4, abs=1)
    assert moments.enough


def test_products_slow_down_between_few_tokens_and_a_prompt() -> None:
    """At the sizes that were measured as measured, and evenly in between."""
    slow = Slowdown(2.0, 1.0, 8.0)
    assert [slow.of_tokens(tokens) for tokens in (1, 8, 64, 1000)] == pytest.approx([2.0, 2.0, 8.0, 8.0])
    assert 2.0 < slow.of_tokens(12) < slow.of_tokens(40) < 8.0
    assert Slowdown(2.0).of_tokens(64) == 2.0
