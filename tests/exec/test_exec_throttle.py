"""Throttles and pins: what is refused, how long sections take, and where workers run."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from exec_toys import Fixed, given, pipeline, threads, workload

from hetis_exec.config import compose_execution
from hetis_exec.crew import worker_specs
from hetis_exec.driver import Executor
from hetis_exec.run import prepare_execution
from hetis_exec.throttle import Throttle, by_device, cores, described, have_cores, read_throttles
from hetis_sim.spec.cluster import ClusterSpec, HostSpec, LinkSpec
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.gpu import GpuSpec

LINK = LinkSpec("pipe", 1e9, 1e-4)
STRONG, WEAK = (GpuSpec(name, 1 << 30, 1e9, 1e9, 1e9, 1e9) for name in ("strong", "weak"))
CLUSTER = ClusterSpec("two", (HostSpec((STRONG, WEAK, WEAK), LINK),), LINK)


def test_a_section_takes_a_multiple_of_its_time() -> None:
    """At least the factor times what was computed, and only for the kind of work that is throttled."""
    throttle = Throttle(dense=5.0)
    begun_s = time.perf_counter()
    while time.perf_counter() < begun_s + 0.004:
        pass
    throttle.after_dense(begun_s, lambda: None)
    took_s = time.perf_counter() - begun_s
    assert took_s >= 0.02
    again_s = time.perf_counter()
    throttle.after_attention(begun_s, lambda: None)
    assert time.perf_counter() - again_s < took_s


def test_the_device_is_waited_for_before_its_time_is_multiplied() -> None:
    """Work that a device does behind the host's back counts; without a throttle nobody waits."""
    waited: list[str] = []
    Throttle(dense=2.0).after_dense(time.perf_counter(), lambda: waited.append("dense"))
    Throttle(attention=2.0).after_attention(time.perf_counter(), lambda: waited.append("attention"))
    Throttle().after_dense(time.perf_counter(), lambda: waited.append("never"))
    Throttle().after_attention(time.perf_counter(), lambda: waited.append("never"))
    assert waited == ["dense", "attention"]


def test_a_worker_with_a_core_of_its_own_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short wait is spun away altogether, of a long one the end is; without a core a worker sleeps."""
    slept_s: list[float] = []
    now_s = [10.0]

    def later(seconds: float) -> None:
        slept_s.append(seconds)
        now_s[0] += seconds

    def tick() -> float:
        now_s[0] += 1e-5
        return now_s[0]

    monkeypatch.setattr(time, "sleep", later)
    monkeypatch.setattr(time, "perf_counter", tick)
    for throttle in (Throttle(attention=3.0).with_core, Throttle(attention=3.0)):
        for took_s in (1e-3, 1e-2):
            begun_s = now_s[0]
            now_s[0] += took_s
            throttle.after_attention(begun_s, lambda: None)
            assert now_s[0] - begun_s == pytest.approx(3.0 * took_s, rel=0.05)
    assert slept_s == pytest.approx([0.016, 0.0018, 0.0198], rel=0.02)
    assert Throttle(2.0).with_core == Throttle(2.0)
    assert described({"weak": Throttle(2.0).with_core}) == {"weak": {"dense": 2.0, "attention": 1.0}}


def test_workers_have_cores_if_there_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that they were given, where they were; else those that this process may use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert have_cores(3, [])
    assert have_cores(3, [None, None, None])
    assert have_cores(2, [0, 1])
    assert not have_cores(4, [])
    assert not have_cores(3, [0, 1, 0])


@pytest.mark.parametrize(("words", "kept"), [
    ((), True), (("executor.workers=threads",), False), (("executor.pin=[0,0]",), False)])
def test_throttled_workers_keep_cores_where_each_device_has_one(
        words: tuple[str, ...], kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processes alone, and whether or not the plan has all devices, so that calibrations do the same."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    config = compose_execution("cluster=cpu-pair", "policy=vllm", "requests=2",
                               "executor.throttle={weak-core: 2.0}", *words)
    throttle = prepare_execution(config).given.throttles[1]
    assert (throttle.spin_s > Throttle().spin_s) is kept
    assert throttle == Throttle(2.0, 2.0)


def test_throttles_are_given_by_type_of_device() -> None:
    """A number for all work, or one for each kind; every device of the type gets it."""
    found = read_throttles({"weak": 4.0}, CLUSTER)
    assert found == {"weak": Throttle(4.0, 4.0)}
    assert by_device(found, CLUSTER) == {1: Throttle(4.0, 4.0), 2: Throttle(4.0, 4.0)}
    assert read_throttles({"weak": {"dense": 3}}, CLUSTER) == {"weak": Throttle(3.0, 1.0)}
    assert described(found) == {"weak": {"dense": 4.0, "attention": 4.0}}
    assert read_throttles(None, CLUSTER) == {}


@pytest.mark.parametrize(("raw", "text"), [
    ({"other": 2.0}, r"executor\.throttle='other'.*strong, weak"),
    ({"weak": 0.5}, r"throttle\.weak\.dense=0\.5"), ({"weak": {"atention": 2.0}}, "atention"),
    ({"weak": "fast"}, "fast"), ({"weak": 1e9}, r"\[1\.0, 1000"),
])
def test_bad_throttles_are_refused(raw: Any, text: str) -> None:
    """The text names the type, the value and what is allowed."""
    with pytest.raises(SpecError, match=text):
        read_throttles(raw, CLUSTER)


def test_workers_get_cores() -> None:
    """One after the other, those of a list, or none; a core that is not there is refused."""
    assert cores("none", (0, 3), (0, 1)) == {}
    assert cores("auto", (4, 2, 7), (0, 1)) == {4: 0, 2: 1, 7: 0}
    assert cores([1, 0, 1], (0, 2), (0, 1)) == {0: 1, 2: 1}
    for wish in ("always", [0], [0, 1, 9]):
        with pytest.raises(SpecError, match=r"executor\.pin"):
            cores(wish, (0, 2), (0, 1))


def test_throttled_workers_serve_the_same_tokens() -> None:
    """Throttles reach the workers of their devices, and change nothing but time."""
    what = given(pipeline([[0]], [4], [1]), Fixed((2, 2)), workload(4, (3, 8), (2, 4)))
    slow = given(pipeline([[0]], [4], [1]), Fixed((2, 2)), workload(4, (3, 8), (2, 4)),
                 throttles={1: Throttle(attention=3.0)}, cores={0: 0})
    executors = [Executor(one, threads()) for one in (what, slow)]
    engine, backend = executors[1].controller.engines[0], executors[1]._backend
    specs = {spec.device: spec for spec in worker_specs(engine, backend, 1.0, slow.throttles, slow.cores)}
    assert specs[1].throttle == Throttle(attention=3.0)
    assert specs[0].throttle == Throttle()
    assert (specs[0].core, specs[1].core) == (0, None)
    results = [executor.run() for executor in executors]
    assert results[0].tokens == results[1].tokens


def test_a_pinned_process_stays_on_its_core() -> None:
    """A worker process may run on its own core alone."""
    from hetis_exec.calibrate.tasks import Work, _in_child

    core = min(os.sched_getaffinity(0))
    found = _in_child(Work("where", _where, apart=True, core=core), lambda: None)
    assert found == [core]


def _where(tick: Any) -> Any:
    return sorted(os.sched_getaffinity(0))
