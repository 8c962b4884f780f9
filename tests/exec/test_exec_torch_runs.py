"""Runs on real architectures generate the tokens that transformers does, however the work is split."""

from __future__ import annotations

import os
from itertools import cycle
from typing import Any

import pytest
from exec_models import given_for, reference, torch, wrong
from exec_scenarios import LONG, SCENARIOS, SHORT, run_until_it_happens
from exec_toys import Fixed, Turning, given, pipeline, run, slow_cache

from hetis_exec.replay import replay
from hetis_sim.metrics import record_violations

FAMILIES = ("llama", "qwen2", "mistral", "opt")
PAIRS = list(zip(SCENARIOS, cycle(FAMILIES), strict=False))


def check(name: str, what: Any, delay: Any = None) -> Any:
    """Run, and hold tokens, decisions, records and cache against what they must be."""
    executor, result = run(what, delay)
    assert wrong(name, what, result.tokens) == []
    simulation = replay(what, result.record)
    assert simulation.recorder.requests().equals(result.recorder.requests())
    assert record_violations(result.recorder.records()) == []
    assert all(worker.cache.pool.used_units == 0 for worker in executor.crew.workers.values())
    return executor, result


@pytest.mark.parametrize(("scenario", "name"), PAIRS)
def test_tokens_are_those_of_transformers(scenario: str, name: str) -> None:
    """With heads, layers and prompts split, requests preempted and heads moved in mid-decode."""
    what = SCENARIOS[scenario]
    run_until_it_happens(what, lambda: check(name, what.make(**given_for(name)), what.delay))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_tokens_are_those_of_transformers_in_every_family(scenario: str, name: str) -> None:
    """All families in all scenarios."""
    test_tokens_are_those_of_transformers(scenario, name)


# Nine query heads with three KV heads.
UNEVEN = {
    "one_worker": (pipeline([[0]], [4], [1], owned=[[3]]), (1, 2)),
    "all_remote": (pipeline([[0]], [4], [1, 2], owned=[[3]]), (0, 2, 1)),
    "each_elsewhere": (pipeline([[0]], [4], [1, 2], owned=[[3]]), (1, 1, 1)),
    "two_ranks": (pipeline([[0, 1]], [4], owned=[[2, 1]]), (2, 1)),
    "three_ranks": (pipeline([[0, 1, 2]], [4], owned=[[1, 1, 1]]), (1, 1, 1)),
    "ranks_and_worker": (pipeline([[0, 1]], [4], [2], owned=[[1, 2]]), (1, 0, 2)),
    "ranks_of_stages": (pipeline([[0, 1], [2]], [1, 3], [3], owned=[[2, 1], [3]]), (1, 1, 1, 2, 1)),
}


@pytest.mark.parametrize("split", UNEVEN)
def test_heads_that_divide_by_nothing_are_split(split: str) -> None:
    """Ranks and attention workers take unequal numbers of KV groups."""
    plan, placement = UNEVEN[split]
    check("smol", given(plan, Fixed(placement), SHORT, **given_for("smol")))


def test_heads_of_qk_norm_models_move() -> None:
    """Qwen3, with head_dim x heads other than the hidden size, and moves between uneven ranks."""
    plan = pipeline([[0, 1]], [4], [2, 3], owned=[[3, 1]])
    policy = Turning([(3, 1, 0, 0), (1, 0, 2, 1), (0, 1, 1, 2)])
    executor, _ = check("qwen3", given(plan, policy, LONG, rebalance_interval=1, **given_for("qwen3")),
                        slow_cache(0.003))
    assert sum(state.moves for state in executor.controller.states.values()) > 0


def test_the_batch_does_not_matter() -> None:
    """Sampled tokens depend on the seed, the request and its position: not on batches, nor on splits."""
    from hetis_exec.models.sampling import Sampling

    sampling = Sampling(temperature=0.8, top_p=0.9, seed=3)
    alone = [given(pipeline([[0]], [4]), Fixed(), [request], **given_for("llama", sampling=sampling))
             for request in SHORT[:4]]
    plan = pipeline([[0, 1], [2]], [2, 2], [3], owned=[[3, 1], [4]])
    split = given(plan, Fixed((1, 1, 2, 2, 2)), SHORT[:4], **given_for("llama", sampling=sampling))
    sampled = {key: tokens for what in alone for key, tokens in run(what)[1].tokens.items()}
    assert run(split)[1].tokens == sampled
    assert wrong("llama", split, sampled) != []


OWN = os.environ.get("HETIS_MODEL", "")


@pytest.mark.slow
@pytest.mark.skipif(not OWN, reason="HETIS_MODEL names no folder of a model")
@pytest.mark.parametrize("split", ["one", "workers", "ranks", "stages"])
def test_tokens_of_a_model_of_yours(split: str) -> None:
    """As in ``HETIS_MODEL=path/to/SmolLM2-135M ./test -m slow -k yours``."""
    more = given_for(OWN)
    layers, groups = more["model"].layers, more["model"].kv_heads
    some, rest = groups - groups // 2, groups // 2
    plan, placement = {
        "one": (pipeline([[0]], [layers], owned=[[groups]]), (groups,)),
        "workers": (pipeline([[0]], [layers], [1, 2], owned=[[groups]]), (groups - some, 1, some - 1)),
        "ranks": (pipeline([[0, 1]], [layers], owned=[[some, rest]]), (some, rest)),
        "stages": (pipeline([[0], [1]], [layers - 1, 1], [2], owned=[[groups]] * 2),
                   (some, rest, groups - 1, 1)),
    }[split]
    what = given(plan, Fixed(placement), SHORT[:4], units=50_000, timeout_s=120.0, **more)
    _, result = run(what)
    assert wrong(OWN, what, result.tokens) == []
    replay(what, result.record)


def test_greedy_means_what_generate_does() -> None:
    """The check by logits of the other tests agrees with transformers' own generation."""
    what = given(pipeline([[0]], [4]), Fixed(), SHORT[:3], **given_for("llama"))
    tokens = run(what)[1].tokens
    model = reference("llama")
    # Lengths are those of the trace: nothing ends a text early.
    model.generation_config.eos_token_id = None
    for request in what.requests:
        prompt = torch.from_numpy(what.prompt(request))[None]
        made = model.generate(prompt, max_new_tokens=request.output_tokens, do_sample=False, pad_token_id=0)
        assert made[0, prompt.shape[1]:].tolist() == tokens[request.request_id]
