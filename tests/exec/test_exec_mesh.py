"""Whole runs on a mesh of nodes: tokens, cache and decisions, whatever paths requests take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from exec_like_cuda import like_cuda
from exec_meshes import CHAIN, DIAMOND, FORK, LONG, OVERLAP, SHORT, WHOLE, meshed, slow_activations
from exec_models import given_for, wrong
from exec_texts import LONG_ON, continued, talking, tokenizer
from exec_toys import expected_tokens, run, threads, workload
from support_mesh import MeshPolicy, mesh_plan

from hetis_exec.cachekeeper import CacheKeeper
from hetis_exec.distributed import DistributedCrew
from hetis_exec.driver import ExecutionResult, Executor, ExecutorInput
from hetis_exec.errors import WorkerError
from hetis_exec.mesh.mirror import MeshMirror
from hetis_exec.mesh.worker import NodeWorker
from hetis_exec.messages import Control, Leg
from hetis_exec.processes import ProcessCrew
from hetis_exec.replay import replay
from hetis_exec.serving.engine import ServingEngine
from hetis_exec.transport import Delay
from hetis_sim.control.state import RequestState
from hetis_sim.metrics import record_violations
from hetis_sim.policies.plan import Plan
from hetis_sim.spec.errors import SpecError


@dataclass(frozen=True)
class Scene:
    """A run; ``joins``: somebody comes in the middle of a node; ``mixes``: while others are computed."""

    make: Callable[[], ExecutorInput]
    delay: Delay | None = None
    preempts: bool = False
    joins: bool = False
    mixes: bool = False


SCENES = {
    "whole": Scene(lambda: meshed(WHOLE)),
    "chain": Scene(lambda: meshed(CHAIN, tp=2)),
    "diamond": Scene(lambda: meshed(DIAMOND), slow_activations(0.002)),
    "overlap": Scene(lambda: meshed(OVERLAP, LONG), joins=True),
    "overlap_ranks": Scene(lambda: meshed(OVERLAP, LONG, tp=2), slow_activations(0.001), joins=True),
    "fork": Scene(lambda: meshed(FORK, LONG), joins=True, mixes=True),
    "fork_ranks": Scene(lambda: meshed(FORK, LONG, tp=2), joins=True, mixes=True),
    "tight": Scene(lambda: meshed(OVERLAP, LONG, blocks=16), preempts=True, joins=True),
    "tight_ranks": Scene(lambda: meshed(DIAMOND, LONG, blocks=20, tp=2), preempts=True),
}


@dataclass(frozen=True)
class Done:
    """A run that has been made; ``checks``: device, units that its tables have, units that are booked."""

    scene: Scene
    given: ExecutorInput
    executor: Executor
    result: ExecutionResult
    checks: list[tuple[int, int, int]]
    legs: list[tuple[Leg, ...]]


@pytest.fixture(scope="module", params=SCENES)
def done(request: pytest.FixtureRequest) -> Done:
    """Each scene, run once, with every worker's tables counted after every message."""
    scene = SCENES[request.param]
    checks: list[tuple[int, int, int]] = []
    legs: list[tuple[Leg, ...]] = []
    apply = CacheKeeper.apply

    def counting(self: CacheKeeper, control: Control) -> None:
        apply(self, control)
        units = np.concatenate([np.empty(0, dtype=int),
                                *[table.taken.ravel() for table in self.pool.tables.values()]])
        assert len(np.unique(units)) == len(units)
        checks.append((self.device, len(units), control.used_units))
        if control.task is not None:
            legs.append(control.task.legs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheKeeper, "apply", counting)
        inputs = scene.make()
        executor, result = run(inputs, scene.delay)
    return Done(scene, inputs, executor, result, checks, legs)


def test_tokens_are_those_of_one_process(done: Done) -> None:
    """Whatever nodes a request passes, and whoever it meets there."""
    assert done.result.tokens == expected_tokens(done.given)


def test_what_the_scene_is_about_has_happened(done: Done) -> None:
    """Preemptions, and requests that have passed some of a node's layers elsewhere."""
    states = done.executor.controller.states.values()
    assert (sum(state.preemptions for state in states) > 0) == done.scene.preempts
    assert any(leg.first for legs in done.legs for leg in legs) == done.scene.joins
    assert any(len({leg.first for leg in legs}) > 1 for legs in done.legs) >= done.scene.mixes


def test_physical_cache_is_booked_cache_at_every_message(done: Done) -> None:
    """Of the layers that a request passes, and of no others."""
    assert len(done.checks) >= len(done.result.record.steps)
    assert [held for _, held, _ in done.checks] == [booked for _, _, booked in done.checks]
    assert max(held for _, held, _ in done.checks) > 0
    assert all(worker.cache.pool.used_units == 0 for worker in done.executor.crew.workers.values())


def test_simulator_makes_the_same_decisions(done: Done) -> None:
    """A simulation fed with the measured times logs the same decisions and ends every request alike."""
    assert len(done.result.record.decisions) >= len(done.given.requests)
    simulation = replay(done.given, done.result.record)
    assert simulation.controller.log.lines == done.result.record.decisions
    simulated, measured = simulation.recorder, done.result.recorder
    assert simulated.requests().equals(measured.requests())
    columns = ["instance", "lane", "kind", "start_s", "end_s", "requests", "prefill_tokens", "decode_tokens"]
    assert simulated.steps()[columns].equals(measured.steps()[columns])


def test_records_hold(done: Done) -> None:
    """Measured records pass the checks of simulated ones, and the parts of a step make its time."""
    recorder = done.result.recorder
    assert record_violations(recorder.records()) == []
    steps = recorder.steps()
    parts = [name for name in steps if name.endswith("_s") and name not in ("start_s", "end_s")]
    assert np.allclose(steps[parts].sum(axis=1), steps["end_s"] - steps["start_s"], atol=1e-12)
    assert (steps["host_s"] > 0).all()


@pytest.mark.parametrize(("name", "tp"), [("llama3", 1), ("qwen3", 2), ("opt", 2)])
def test_tokens_are_those_of_transformers(name: str, tp: int) -> None:
    """Real architectures, with positions that are learned or rotated."""
    what = meshed(FORK, LONG, tp=tp, blocks=50, **given_for(name))
    _, result = run(what)
    assert wrong(name, what, result.tokens) == []
    replay(what, result.record)


def test_nodes_on_cards_compute_the_same() -> None:
    """With the cache of CUDA devices: layers that a request does not pass have no place in it."""
    what = meshed(OVERLAP, LONG, blocks=30, **like_cuda("qwen2"))
    executor, result = run(what)
    assert wrong("qwen2", what, result.tokens) == []
    assert all(worker.cache.pool.used_units == 0 for worker in executor.crew.workers.values())


@pytest.mark.parametrize("crew", [ProcessCrew, DistributedCrew])
def test_nodes_may_be_processes(crew: Callable[..., ProcessCrew | DistributedCrew]) -> None:
    """Joined by pipes, or by connections."""
    what = meshed(DIAMOND, SHORT)
    result = Executor(what, crew).run()
    assert result.tokens == expected_tokens(what)
    replay(what, result.record)


class Stopper:
    """Has requests end after some tokens."""

    def __init__(self) -> None:
        self.ended_ids: list[int] = []

    def began(self) -> None:
        """Nothing to do."""

    def token(self, request_id: int, token: int) -> bool:
        """Odd requests stop at a token that is a multiple of 3."""
        return bool(request_id % 2 and token % 3 == 0)

    def ended(self, state: RequestState) -> None:
        """Take note."""
        self.ended_ids.append(state.request_id)


def test_texts_may_end_early() -> None:
    """With the round that has made the last token; the simulator ends them at the same times."""
    what = meshed(OVERLAP, LONG, blocks=16)
    stopper = Stopper()
    executor = Executor(what, listener=stopper)
    result = executor.run()
    wanted = expected_tokens(what)
    for request_id, tokens in result.tokens.items():
        assert tokens == wanted[request_id][:len(tokens)]
        stops = [n for n, token in enumerate(tokens) if stopper.token(request_id, token)]
        assert stops in ([], [len(tokens) - 1])
    assert any(len(tokens) < len(wanted[n]) for n, tokens in result.tokens.items())
    assert sorted(stopper.ended_ids) == sorted(request.request_id for request in what.requests)
    assert replay(what, result.record).recorder.requests().equals(result.recorder.requests())


def test_an_engine_may_serve_by_a_mesh() -> None:
    """Requests that come at any time, of which nothing is kept when they are over."""
    mesh = Plan((), mesh=mesh_plan(OVERLAP, 1, 4))
    with ServingEngine(talking(mesh, MeshPolicy(1)), threads(), tokenizer(), 8) as engine:
        streams = [engine.submit(f"the quick brown {n}", LONG_ON) for n in range(4)]
        found = [[token for piece in stream for token in piece.tokens] for stream in streams]
        assert engine._executor.controller.states == {}
    for n, tokens in enumerate(found):
        assert tokens == continued(tokenizer().encode(f"the quick brown {n}"), 12)


def test_a_node_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with what had finished."""
    execute, ended = NodeWorker.execute, [0]

    def failing(self: NodeWorker, *step: object) -> None:
        if ended[0] >= 2:
            raise RuntimeError("the card has fallen out")
        execute(self, *step)  # type: ignore[arg-type]

    monkeypatch.setattr(NodeWorker, "execute", failing)
    what = meshed(DIAMOND, workload(12, output=(8, 12), gap_s=0.02))
    with pytest.raises(WorkerError, match="the card has fallen out") as caught:
        Executor(what, progress=lambda number: ended.__setitem__(0, number)).run()
    kept, wanted = caught.value.result, expected_tokens(what)
    assert kept is not None
    assert 2 <= len(kept.tokens) < 12
    assert kept.tokens == {n: wanted[n] for n in kept.tokens}


def test_tables_that_do_not_follow_the_books_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If nodes were not told of another block, the run would stop at the first message that shows it."""
    monkeypatch.setattr(MeshMirror, "_grow", lambda self, walk: None)
    with pytest.raises(WorkerError, match="the ledger says"):
        run(meshed(CHAIN, workload(3, (3, 3), (6, 6))))


def test_prompts_in_pieces_are_refused() -> None:
    """As in the simulator, before any worker starts."""
    with pytest.raises(SpecError, match="compute whole prompts"):
        run(meshed(CHAIN, chunked_prefill=True, chunk_tokens=12))
