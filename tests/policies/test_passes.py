"""The time between passes of a pipeline against passes that are carried out one by one."""

from __future__ import annotations

from math import exp

import numpy as np
import pytest

from hetis_sim.policies.passes import arrivals_per_pass, mean_pass_s

Kinds = list[np.ndarray]  # type: ignore[type-arg]


def carried_out(decode_s: list[float], hops_s: float, long_s: Kinds, shares: np.ndarray,  # type: ignore[type-arg]
                passes: int = 6000) -> float:
    """Mean time from pass to pass when as many micro-batches as stages keep their order."""
    random, stages = np.random.default_rng(1), len(decode_s)
    hop = hops_s / max(1, stages - 1)
    free, ready = [0.0] * stages, [0.0] * stages
    kinds = random.choice(len(shares) + 1, passes, p=[*shares, 1.0 - sum(shares)]).tolist()
    for n, kind in enumerate(kinds):
        at = ready[n % stages]
        for s in range(stages):
            free[s] = max(at, free[s]) + (decode_s[s] if kind == len(shares) else float(long_s[s][kind]))
            at = free[s] + (hop if s + 1 < stages else 0.0)
        ready[n % stages] = at
    return max(ready) / passes


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_equal_stages_and_one_kind_of_long_pass_come_close(stages: int, share: float) -> None:
    """Within 3 %, the noise of the passes drawn included."""
    long_s = [np.array([2.5])] * stages
    found = mean_pass_s([1.0] * stages, 0.0, long_s, 0.0, np.array([share]))
    assert found == pytest.approx(carried_out([1.0] * stages, 0.0, long_s, np.array([share])), rel=0.03)


def test_unequal_stages_and_lengths_come_close() -> None:
    """Some dozen pipelines: within 3 % on average and 15 % at most."""
    random = np.random.default_rng(2)
    errors = []
    for _ in range(40):
        stages = int(random.integers(1, 7))
        decode_s = random.uniform(0.5, 1.0, stages).tolist()
        hops_s = float(random.choice([0.0, 0.1, 0.5])) * (stages - 1)
        prompts = random.lognormal(0.3, 0.8, 5)
        long_s = [d * random.uniform(0.7, 1.5) * prompts for d in decode_s]
        shares = random.dirichlet(np.ones(5)) * random.uniform(0.0, 0.4)
        found = mean_pass_s(decode_s, hops_s, long_s, hops_s, shares)
        errors.append(found / carried_out(decode_s, hops_s, long_s, shares, 3000) - 1.0)
    assert abs(float(np.mean(errors))) < 0.03
    assert max(map(abs, errors)) < 0.15


def test_nothing_long_leaves_the_slowest_stage_or_the_way() -> None:
    """Passes of decoding alone follow each other at the pace of the slowest stage, or of a lone way."""
    none = np.zeros(1)
    assert mean_pass_s([1.0, 2.0], 0.0, [none, none], 0.0, none) == 2.0
    assert mean_pass_s([1.0, 1.0], 3.0, [none, none], 0.0, none) == 2.5


def test_short_prompts_do_not_hold_up_a_pipeline() -> None:
    """A prefill that takes no longer than decoding costs its micro-batch a turn, and nobody else anything."""
    decode_s, prompt = [1.0] * 4, [np.array([0.9])] * 4
    assert mean_pass_s(decode_s, 0.0, prompt, 0.0, np.array([0.3])) == 1.0


def test_who_waits_is_prefilled_together() -> None:
    """Requests that arrive in a pass end in passes that decode."""
    for per_decode in (1e-6, 0.1, 1.0, 8.0):
        arrivals = arrivals_per_pass(per_decode)
        assert arrivals == pytest.approx(per_decode * exp(-arrivals))
