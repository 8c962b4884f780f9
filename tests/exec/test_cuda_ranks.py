"""Workers with cards: NCCL adds up and carries tensors where each has one of its own.

    python -m pytest tests/exec/test_cuda_ranks.py

Tests of NCCL need two CUDA devices and a torch that has it. Where workers share a card gloo adds up, and
tensors pass through host memory.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import pytest
from exec_models import given_for, torch, wrong
from exec_scenarios import LONG, SHORT
from exec_toys import Fixed, Handing, Turning, given, pipeline, pools, workload

from hetis_exec.crew import ThreadCrew, WorkerSpec
from hetis_exec.distributed import DistributedCrew
from hetis_exec.driver import Executor, ExecutorInput
from hetis_exec.errors import WorkerError
from hetis_exec.joining import NetSettings
from hetis_exec.net.cards import card_at, have_own
from hetis_exec.replay import replay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

two_cards = pytest.mark.skipif(
    torch.cuda.device_count() < 2 or not torch.distributed.is_nccl_available(),
    reason="NCCL needs two CUDA devices and a torch that is built with it")

OWN, SHARED = ("cuda:0", "cuda:1"), ("cuda:0", "cuda:0")
SOON_S = 60.0
# Nine query heads with three KV heads.
RANKS = pipeline([[0, 1]], [4], owned=[[2, 1]])


def made(requests: Sequence[Any], places: Sequence[str], timeout_s: float = 120.0) -> ExecutorInput:
    """Two ranks on some cards."""
    return given(RANKS, Fixed((2, 1)), requests, timeout_s=timeout_s,
                 **given_for("smol", places=tuple(places), warm=False))


def crew(specs: Sequence[WorkerSpec], collectives: str) -> DistributedCrew:
    """Ranks of this host."""
    return DistributedCrew(specs, NetSettings(collectives=collectives))


@pytest.mark.parametrize(("places", "collectives"), [
    pytest.param(OWN, "auto", marks=two_cards), pytest.param(OWN, "ordered", marks=two_cards),
    (SHARED, "all_reduce"), (SHARED, "auto"), (("cuda:0", "cpu"), "all_reduce")])
def test_tokens_of_uneven_ranks_are_those_of_transformers(places: Sequence[str], collectives: str) -> None:
    """By NCCL on two cards (``auto``), by gloo through host memory, and by messages."""
    what = made(SHORT, places)
    result = Executor(what, lambda specs: crew(specs, collectives)).run()
    assert wrong("smol", what, result.tokens) == []
    replay(what, result.record)


# An attention worker, two stages, heads that move, and a prompt's cache that is handed on.
ONE_EACH = {
    "spread": (pipeline([[0]], [4], [1]), Fixed((2, 2))),
    "stages": (pipeline([[0], [1]], [2, 2]), Fixed()),
    "moves": (pipeline([[0]], [4], [1]), Turning([(4, 0), (1, 3), (2, 2)])),
    "streamed": (pools(("prefill", pipeline([[0]], [4])), ("decode", pipeline([[1]], [4]))),
                 Handing(streams=True)),
}


@pytest.mark.parametrize("links", ["auto", "host"])
@pytest.mark.parametrize("places", [pytest.param(OWN, marks=two_cards), SHARED])
@pytest.mark.parametrize("split", ONE_EACH)
def test_tensors_between_processes_with_cards(split: str, places: Sequence[str], links: str) -> None:
    """By NCCL on two cards (``auto``), and through host memory on a shared one."""
    plan, policy = ONE_EACH[split]
    what = given(plan, policy, LONG, **{**given_for("llama", places=tuple(places), warm=False),
                                        "timeout_s": 120.0})
    result = Executor(what, lambda specs: DistributedCrew(specs, NetSettings(device_links=links))).run()
    assert wrong("llama", what, result.tokens) == []
    replay(what, result.record)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("places", [pytest.param(OWN, marks=two_cards), SHARED])
@pytest.mark.parametrize("split", ONE_EACH)
def test_tensors_between_threads_with_cards(split: str, places: Sequence[str], *, links: bool) -> None:
    """As they are, on one card and from one to another; or through host memory."""
    plan, policy = ONE_EACH[split]
    what = given(plan, policy, LONG, **{**given_for("llama", places=tuple(places), warm=False),
                                        "timeout_s": 120.0})
    result = Executor(what, lambda specs: ThreadCrew(specs, device_links=links)).run()
    assert wrong("llama", what, result.tokens) == []
    replay(what, result.record)


@two_cards
def test_two_cards_are_known_for_two() -> None:
    """And one for one, whoever asks."""
    first, second = (card_at(place) for place in OWN)
    assert have_own([first, second])
    assert not have_own([first, first])


@two_cards
@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, "exit code -9|its connection has ended"),
                                              (signal.SIGSTOP, "no sign of life for 5 s")])
def test_a_rank_that_is_lost_in_a_sum_of_nccl_ends_the_run(number: signal.Signals, said: str) -> None:
    """Soon, with the requests that had finished, and no process is left."""

    def lose(ended: int) -> None:
        if ended == 2:
            os.kill(executor.crew.processes[1].pid, number)

    what = made(workload(12, output=(8, 12), gap_s=0.02), OWN, timeout_s=5.0)
    executor = Executor(what, lambda specs: crew(specs, "all_reduce"), progress=lose)
    begun_s = time.monotonic()
    with pytest.raises(WorkerError, match=said) as caught:
        executor.run()
    assert caught.value.device == 1
    assert caught.value.result is not None
    assert len(caught.value.result.tokens) >= 2
    assert time.monotonic() - begun_s < SOON_S
    assert not any(process.is_alive() for process in executor.crew.processes.values())
