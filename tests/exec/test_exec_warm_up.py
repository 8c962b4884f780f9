"""What workers do before they say that they are there leaves nothing behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from exec_like_cuda import LikeCuda, like_cuda
from exec_models import torch, wrong
from exec_scenarios import ONE, SHORT, SPREAD
from exec_toys import Fixed, given, run

from hetis_exec.crew import build_worker, worker_specs
from hetis_exec.kernels.cuda import CudaKernels
from hetis_exec.messages import DRIVER, Beat
from hetis_exec.transport import InProcessTransport
from hetis_exec.warm_up import sizes_up_to
from hetis_exec.workers import Stopped, Worker
from hetis_sim.control.engine import Engine


def workers(plan: Any, backend: LikeCuda, engine: Engine) -> dict[int, Worker]:
    """Those of a plan."""
    transport = InProcessTransport()
    return {spec.device: build_worker(spec, transport.endpoint(spec.device))
            for spec in worker_specs(engine, backend, 10.0)}


@pytest.mark.parametrize("plan", [ONE, SPREAD])
def test_the_cache_is_as_it_was(plan: Any) -> None:
    """Every place of it, its tables, and what kernels know of them."""
    settings = like_cuda("llama", warm=True)
    what = given(plan, Fixed(None if plan is ONE else (1, 2, 1)), SHORT, **settings)
    executor, _ = run(what)
    engine = executor.controller.engines[0]
    for worker in workers(plan, settings["backend"], engine).values():
        pool = worker.cache.pool
        kernels = pool.kernels
        assert isinstance(kernels, CudaKernels)
        kernels.keys.copy_(torch.randn_like(kernels.keys))
        kernels.values.copy_(torch.randn_like(kernels.values))
        before = kernels.keys.clone(), kernels.values.clone(), kernels.tables.arena.clone()
        worker.prepare()
        after = kernels.keys, kernels.values, kernels.tables.arena
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert pool.used_units == 0
        assert pool.tables == {}
        assert kernels.tables._number == 0


@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tokens_are_the_same_with_and_without(triton: bool) -> None:
    """And the run is one that transformers agrees with."""
    made = {}
    for warm in (False, True):
        what = given(SPREAD, Fixed((1, 2, 1)), SHORT[:3], **like_cuda("llama", warm=warm, triton=triton))
        executor, result = run(what)
        assert wrong("llama", what, result.tokens) == []
        assert all(worker.cache.pool.used_units == 0 for worker in executor.crew.workers.values())
        made[warm] = result.tokens
    assert made[False] == made[True]


def test_nobody_is_there_before_it_has_prepared() -> None:
    """The first sign of life comes afterwards."""
    settings = like_cuda("llama")
    executor, _ = run(given(ONE, Fixed(), SHORT[:1], **settings))
    transport = InProcessTransport()
    driver = transport.endpoint(DRIVER)
    (spec,) = worker_specs(executor.controller.engines[0], settings["backend"], 10.0)
    worker = build_worker(spec, transport.endpoint(spec.device))
    heard: list[Any] = []
    worker._warm_up = lambda: heard.append(driver.receive(0.0))

    def turn() -> None:
        worker.beat()
        raise Stopped

    worker.turn = turn  # type: ignore[method-assign]
    worker.run()
    assert heard == [None]
    assert isinstance(driver.receive(0.0), Beat)


def test_sizes_come_from_large_to_small() -> None:
    """And reach both ends."""
    for most in (1, 5, 16, 17, 4096):
        sizes = list(sizes_up_to(most))
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] == most or most < 16
        assert sizes[-1] == 1
        assert np.all(np.array(sizes) <= most)
