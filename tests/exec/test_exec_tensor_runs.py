"""Runs whose tensors stay on their devices on the way to another worker.

Links of NCCL need cards; gloo's for tensors of processors are used in the same way.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from exec_like_cuda import LikeCuda
from exec_meshes import OVERLAP, meshed
from exec_models import POISON, folder, given_for, wrong
from exec_scenarios import POOL_SCENARIOS, SCENARIOS, SPREAD, run_until_it_happens
from exec_toys import Fixed, given, workload

from hetis_exec.crew import ThreadCrew
from hetis_exec.distributed import DistributedCrew
from hetis_exec.driver import ExecutionResult, Executor, ExecutorInput
from hetis_exec.errors import WorkerError
from hetis_exec.joining import NetSettings
from hetis_exec.messages import (
    AttentionRequest,
    AttentionResult,
    CacheData,
    Hidden,
    Message,
    Partial,
    Passing,
)
from hetis_exec.models.architecture import read_architecture
from hetis_exec.replay import replay
from hetis_exec.resident import Resident
from hetis_exec.transport import InProcessTransport

SOON_S = 20.0
WIRED = NetSettings(device_links="gloo")
ALL_SCENARIOS = {**SCENARIOS, **POOL_SCENARIOS}

QUICK = {"spread": "llama", "moves_stages": "qwen2", "parts_ranks": "opt", "streamed": "llama"}
SLOW = {"uneven_ranks": "mistral", "moves_ranks": "llama", "moves_swap_tight": "qwen2", "parts_move": "llama",
        "chunked_stages": "qwen2"}


def check(name: str, what: ExecutorInput, settings: NetSettings = WIRED) -> tuple[Executor, Any]:
    """Run on ranks of this host; tokens are those of transformers, decisions those of the simulator."""
    executor = Executor(what, lambda specs: DistributedCrew(specs, settings))
    result = executor.run()
    assert wrong(name, what, result.tokens) == []
    replay(what, result.record)
    assert {process.exitcode for process in executor.crew.processes.values()} == {0}
    return executor, result


@pytest.mark.parametrize(("scenario", "name"), [
    *QUICK.items(), *[pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW.items()]])
def test_tokens_are_those_of_transformers(scenario: str, name: str) -> None:
    """Queries, results, activations, partial sums and cache on links for tensors."""
    found = ALL_SCENARIOS[scenario]
    more = {**given_for(name), "timeout_s": 60.0}
    run_until_it_happens(found, lambda: check(name, found.make(**more)))


def test_activations_of_meshes_go_from_node_to_node() -> None:
    """Requests that join in the middle of a node, some with activations, some with their tokens."""
    check("qwen2", meshed(OVERLAP, workload(6), timeout_s=60.0, **given_for("qwen2")))


def test_sums_by_a_library_beside_links_for_tensors() -> None:
    """Each has process groups of its own."""
    settings = NetSettings(collectives="all_reduce", device_links="gloo")
    found = ALL_SCENARIOS["uneven_ranks"]
    check("llama", found.make(**{**given_for("llama"), "timeout_s": 60.0}), settings)


@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, "exit code -9"),
                                              (signal.SIGSTOP, "no sign of life for 2 s")])
def test_a_worker_that_is_lost_on_a_link_ends_the_run(number: signal.Signals, said: str) -> None:
    """Soon, by its name; what had finished is kept, and no process is left."""

    def lose(ended: int) -> None:
        if ended == 2:
            os.kill(executor.crew.processes[2].pid, number)

    what = given(SPREAD, Fixed((1, 2, 1)), workload(12, output=(8, 12), gap_s=0.02),
                 **{**given_for("llama"), "timeout_s": 2.0})
    executor = Executor(what, lambda specs: DistributedCrew(specs, WIRED), progress=lose)
    begun_s = time.monotonic()
    with pytest.raises(WorkerError, match=said) as caught:
        executor.run()
    assert caught.value.device == 2
    assert caught.value.result is not None
    assert caught.value.result.tokens
    assert time.monotonic() - begun_s < SOON_S
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("worker-")]


@dataclass(frozen=True)
class OnCards(LikeCuda):
    """Workers that say that they have cards; what they compute is on the CPU all the same."""

    without: tuple[int, ...] = ()

    def place(self, device: int) -> str:
        return "cpu" if device in self.without else "cuda:0"

    def check(self, engines: Any, here: Any = None) -> None:
        """There is room."""


@pytest.mark.parametrize(("scenario", "without", "links"), [
    *[(name, without, True) for name in ("spread", "moves_stages", "parts_ranks") for without in ((), (1,))],
    ("spread", (), False)])
def test_threads_with_cards_pass_tensors_on(scenario: str, without: tuple[int, ...], *, links: bool) -> None:
    """Messages between them hold tensors; those from or for a worker without a card hold arrays."""
    seen: dict[tuple[int, int], set[bool]] = defaultdict(set)
    found = ALL_SCENARIOS[scenario]

    def look(sender: int, target: int, message: Message) -> float:
        if isinstance(message, Hidden | Partial | AttentionRequest | AttentionResult | CacheData | Passing):
            seen[sender, target] |= {isinstance(part, Resident) for part in message
                                     if isinstance(part, Resident | np.ndarray)}
        return found.delay(sender, target, message) if found.delay is not None else 0.0

    backend = OnCards(read_architecture(folder("llama")), folder("llama"), poison=POISON, warm=False,
                      without=without)

    def once() -> tuple[Executor, ExecutionResult]:
        what = found.make(model=backend.architecture.spec, backend=backend, timeout_s=60.0)
        executor = Executor(what, lambda specs: ThreadCrew(specs, InProcessTransport(look),
                                                           device_links=links))
        result = executor.run()
        assert wrong("llama", what, result.tokens) == []
        replay(what, result.record)
        return executor, result

    run_until_it_happens(found, once)
    assert seen
    for ends, kinds in seen.items():
        assert kinds == {links and not set(ends) & set(without)}, ends
