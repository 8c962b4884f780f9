"""Slow links that are emulated on one host: how slow, between whom, and by every kind of crew."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe

import numpy as np
import pytest
from exec_toys import Fixed, expected_tokens, given, pipeline, workload

from hetis_exec import shaping
from hetis_exec.config import ExecutionConfig, ExecutorConfig
from hetis_exec.crew import Crew, ThreadCrew, WorkerSpec
from hetis_exec.crews import crew_maker
from hetis_exec.driver import Executor
from hetis_exec.messages import DRIVER, Beat, CacheData, Hidden
from hetis_exec.pipes import PipeEndpoint
from hetis_exec.processes import ProcessCrew
from hetis_exec.shaping import HEAD_BYTES, LinkShape, NetworkConfig, Shaper, Shapes
from hetis_exec.transport import InProcessTransport
from hetis_sim.spec.cluster import ClusterSpec, HostSpec, LinkSpec
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.gpu import GpuSpec

GPU = GpuSpec("toy", 1 << 30, 1e11, 1e13, 1e13, 5e12)
CLUSTER = ClusterSpec("toys", (HostSpec((GPU, GPU), LinkSpec("bus", 1e9, 1e-5)),
                               HostSpec((GPU,), LinkSpec("bus", 1e9, 1e-5))), LinkSpec("net", 1e8, 1e-3))
SLOW_S = 0.01


def hidden(values: int) -> Hidden:
    """A message of so many numbers."""
    return Hidden(0, np.zeros((1, values)), 0.0)


def cache(values: int) -> CacheData:
    """Cache of so many numbers."""
    return CacheData(0, 0, 0, 0, (0,), (0,), 0, np.zeros((1, 1, 1, values)), np.zeros((1, 1, 1, 0)), True)


def test_nothing_is_emulated_unless_it_is_asked_for() -> None:
    """Neither links nor delays."""
    assert not NetworkConfig().emulates
    assert NetworkConfig().shapes(CLUSTER) == {}
    assert Shaper(0, {}).due_s(1, hidden(1000)) == 0.0


def test_links_are_those_of_the_cluster_file() -> None:
    """Of each pair of devices, in each direction; what is said of the network goes before it."""
    shapes = NetworkConfig(from_cluster=True).shapes(CLUSTER)
    assert len(shapes) == 6
    assert shapes[0, 1] == LinkShape(1e-5, 1e9)
    assert shapes[0, 2] == shapes[2, 1] == LinkShape(1e-3, 1e8)
    both = NetworkConfig(from_cluster=True, latency_ms=5).shapes(CLUSTER)
    assert both[1, 0] == LinkShape(1e-5, 1e9)
    assert both[0, 2] == LinkShape(5e-3, 1e8)


def test_without_the_cluster_file_links_between_hosts_are_shaped() -> None:
    """Those within a host stay as they are."""
    shapes = NetworkConfig(latency_ms=2, bandwidth_gbps=8).shapes(CLUSTER)
    assert shapes == dict.fromkeys([(0, 2), (1, 2), (2, 0), (2, 1)], LinkShape(2e-3, 1e9))
    assert NetworkConfig(bandwidth_gbps=8).shapes(CLUSTER)[0, 2] == LinkShape(0.0, 1e9)


@pytest.mark.parametrize(("values", "message"), [
    ({"latency_ms": -1.0}, r"executor\.network\.latency_ms=-1\.0"),
    ({"latency_ms": float("nan")}, r"executor\.network\.latency_ms=nan"),
    ({"bandwidth_gbps": 0.0}, r"executor\.network\.bandwidth_gbps=0\.0"),
])
def test_links_that_cannot_be_are_refused(values: dict[str, float], message: str) -> None:
    """By their key."""
    with pytest.raises(SpecError, match=message):
        NetworkConfig(**values)  # type: ignore[arg-type]


def test_messages_take_turns_and_cache_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bandwidth is shared by what leaves through a link; latency is added to each."""
    monkeypatch.setattr(shaping.time, "monotonic", lambda: 100.0)
    shaper = Shaper(0, {(0, 1): LinkShape(1.0, 8.0)})
    second = (8 * 1000 + HEAD_BYTES) / 8
    assert shaper.due_s(1, hidden(1000)) == pytest.approx(100 + second + 1)
    assert shaper.due_s(1, cache(1000)) == pytest.approx(100 + 2 * second + 1)
    # Cache that is on its way holds up nothing but more cache.
    assert shaper.due_s(1, hidden(1000)) == pytest.approx(100 + 2 * second + 1)
    assert shaper.due_s(1, cache(1000)) == pytest.approx(100 + 3 * second + 1)
    assert shaper.due_s(1, cache(1000)) == pytest.approx(100 + 4 * second + 1)
    assert shaper.due_s(2, hidden(1000)) == 0.0


SHAPES: Shapes = {(0, 1): LinkShape(SLOW_S)}


def pipes() -> tuple[PipeEndpoint, PipeEndpoint]:
    """Both ends of a pipe."""
    a, b = Pipe()
    return PipeEndpoint(0, {1: a}, SHAPES), PipeEndpoint(1, {0: b}, SHAPES)


def queues() -> tuple[object, object]:
    """Both ends within a process."""
    transport = InProcessTransport(shapes=SHAPES)
    return transport.endpoint(0), transport.endpoint(1)


def connections() -> tuple[object, object]:
    """Both ends of a connection."""
    import socket

    from hetis_exec.net.endpoint import Channel, NetworkEndpoint
    from hetis_exec.net.frames import FrameSocket

    made = NetworkEndpoint(0, shapes=SHAPES), NetworkEndpoint(1, shapes=SHAPES)
    for end, (one, other) in zip(socket.socketpair(), (made, made[::-1]), strict=True):
        one.add(other.address, Channel.DATA, FrameSocket(end))
    return made


@pytest.mark.parametrize("ends", [queues, pipes, connections])
def test_messages_are_held_until_they_are_due(ends: Callable[[], tuple[PipeEndpoint, PipeEndpoint]]) -> None:
    """In order, in one direction only, and without keeping other messages from coming."""
    left, right = ends()
    begun_s = time.monotonic()
    for seq in range(3):
        left.send(1, hidden(1)._replace(seq=seq))
    right.send(1, Beat(1))
    assert right.receive(10.0) == Beat(1)
    got = [right.receive(10.0) for _ in range(3)]
    assert time.monotonic() - begun_s >= SLOW_S
    assert [message.seq for message in got if isinstance(message, Hidden)] == [0, 1, 2]
    assert right.receive(0.0) is None
    right.send(0, hidden(1))
    assert isinstance(left.receive(10.0), Hidden)


def threads(specs: Sequence[WorkerSpec], shapes: Shapes) -> Crew:
    """Workers of one process."""
    return ThreadCrew(specs, InProcessTransport(shapes=shapes))


def distributed(specs: Sequence[WorkerSpec], shapes: Shapes) -> Crew:
    """Ranks of this host."""
    pytest.importorskip("torch", reason="workers over torch.distributed need the extra exec")
    from hetis_exec.distributed import DistributedCrew
    from hetis_exec.joining import NetSettings

    return DistributedCrew(specs, NetSettings(shapes=shapes))


@pytest.mark.parametrize("crew", [distributed, ProcessCrew, threads])
def test_runs_wait_for_their_links(crew: Callable[..., Crew]) -> None:
    """A layer of decoding takes a way to the attention worker and back; the tokens stay the same."""
    what = given(pipeline([[0]], [4], [1]), Fixed((2, 2)), workload(2, output=(4, 4)))
    shapes = {(0, 1): LinkShape(SLOW_S), (1, 0): LinkShape(SLOW_S)}
    result = Executor(what, lambda specs: crew(specs, shapes)).run()
    assert result.tokens == expected_tokens(what)
    steps = result.recorder.steps()
    decoding = steps[steps["decode_tokens"] > 0]
    assert len(decoding) > 0
    assert (decoding["end_s"] - decoding["start_s"] >= what.model.layers * 2 * SLOW_S).all()
    assert (decoding["head_transfer_s"] > SLOW_S).all()


def test_the_configuration_reaches_the_crew() -> None:
    """Every kind of local crew emulates what it says; the driver's messages are left alone."""
    what = given(pipeline([[0]], [4], [1]), Fixed((2, 2)), workload(1), hosts=(1, 1))
    config = ExecutionConfig(executor=ExecutorConfig(workers="threads", network=NetworkConfig(latency_ms=3)))
    made: list[Crew] = []

    def keep(specs: Sequence[WorkerSpec]) -> Crew:
        made.append(crew_maker(config, what)(specs))
        return made[0]

    Executor(what, keep).run()
    assert isinstance(made[0], ThreadCrew)
    shaper = made[0].workers[0]._endpoint._shaper
    assert shaper.shapes == dict.fromkeys([(0, 1), (1, 0)], LinkShape(3e-3))
    assert shaper.due_s(DRIVER, Beat(0)) == 0.0
