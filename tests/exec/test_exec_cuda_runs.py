"""What runs on CUDA devices, on CPU tensors: the kernels of CUDA devices, and whole steps without graphs."""

from __future__ import annotations

from typing import Any

import pytest
from exec_like_cuda import like_cuda
from exec_models import backend, wrong
from exec_scenarios import ONE, SCENARIOS, SHORT, SPREAD, run_until_it_happens
from exec_toys import Dividing, Fixed, given, run, workload

from hetis_exec.models.sampling import Sampling
from hetis_exec.replay import replay
from hetis_exec.whole_steps import WholeSteps


def check(name: str, what: Any, delay: Any = None) -> Any:
    """Run, and hold tokens and decisions against what they must be."""
    executor, result = run(what, delay)
    assert wrong(name, what, result.tokens) == []
    replay(what, result.record)
    assert all(worker.cache.pool.used_units == 0 for worker in executor.crew.workers.values())
    return executor, result


@pytest.mark.parametrize(("scenario", "name"), [
    ("all_local", "llama3"), ("recompute", "opt"), ("chunked", "qwen3"), ("moves_stages", "llama"),
    ("swap", "qwen2"), ("relief", "mistral"), ("parts_move_stages", "qwen2"),
    ("uneven_ranks", "llama-biases")])
def test_tokens_are_those_of_transformers(scenario: str, name: str) -> None:
    """With blocks gathered by torch; some of these steps are whole, others in layers."""
    what = SCENARIOS[scenario]
    run_until_it_happens(what, lambda: check(name, what.make(**like_cuda(name)), what.delay))


@pytest.mark.parametrize("name", ["qwen3", "opt"])
def test_tokens_of_triton_are_those_of_transformers(name: str) -> None:
    """Whole steps with fused kernels and paged attention."""
    check(name, given(ONE, Fixed(), workload(2, (3, 8), (3, 5)), **like_cuda(name, triton=True)))


def test_triton_joins_parts_of_tokens() -> None:
    """Tokens divided over a card and two others."""
    policy = Dividing([((4, 0, 0), (0, 4, 4)), ((0, 4, 0), (4, 0, 4))])
    check("llama", given(SPREAD, policy, workload(1, (13, 13), (2, 2)), **like_cuda("llama", triton=True)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen3", "mistral", "opt"])
@pytest.mark.parametrize("scenario", ["all_local", "spread", "recompute"])
def test_tokens_of_triton_are_those_of_transformers_however_split(scenario: str, name: str) -> None:
    """Families and splits."""
    what = SCENARIOS[scenario]
    check(name, what.make(**like_cuda(name, triton=True)), what.delay)


def test_whole_steps_are_taken_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """For batches of any size, and never for prompts or with remote heads."""
    sizes: list[int] = []
    step = WholeSteps.run

    def counting(self: WholeSteps, request_ids: Any, *rest: Any) -> Any:
        sizes.append(len(request_ids))
        return step(self, request_ids, *rest)

    monkeypatch.setattr(WholeSteps, "run", counting)
    what = given(ONE, Fixed(), SHORT, **like_cuda("llama"))
    _, result = run(what)
    decoded = [record.decoding for record in result.record.steps if record.decoding and not record.chunks]
    assert sorted(sizes) == sorted(decoded)
    assert max(sizes) > 2
    sizes.clear()
    run(SCENARIOS["all_remote"].make(**like_cuda("llama")))
    assert sizes == []


def test_sampled_tokens_are_those_of_steps_in_layers() -> None:
    """Whole or not, each token is drawn by its request and position."""
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=3)
    found = [run(given(ONE, Fixed(), SHORT[:4], **like_cuda("llama", sampling=sampling,
                                                            whole=whole)))[1].tokens
             for whole in (True, False)]
    assert found[0] == found[1]
    plain = given(ONE, Fixed(), SHORT[:4], model=backend("llama").architecture.spec,
                  backend=backend("llama", sampling=sampling))
    assert run(plain)[1].tokens == found[0]
