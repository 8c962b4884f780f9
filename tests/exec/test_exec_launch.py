"""What launchers of ranks leave in the environment, and runs that torchrun starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="ranks need the extra exec")

from hetis_exec import crews
from hetis_exec.cli import main
from hetis_exec.config import ExecutionConfig, ExecutorConfig
from hetis_exec.launch import Launch, check_place, launched
from hetis_exec.shaping import NetworkConfig
from hetis_sim.spec.cluster import ClusterSpec, HostSpec, LinkSpec
from hetis_sim.spec.errors import HetisError, SpecError
from hetis_sim.spec.gpu import GpuSpec

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2"}
SLURM = {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
         "GLOO_SOCKET_IFNAME": "eth0,eth1"}


def cluster(*hosts: int) -> ClusterSpec:
    """So many devices on each host."""
    gpu = GpuSpec("toy", 1 << 30, 1e11, 1e13, 1e13, 5e12)
    link = LinkSpec("link", 1e9, 1e-6)
    return ClusterSpec("made-up", tuple(HostSpec((gpu,) * count, link) for count in hosts), link)


def test_variables_of_torchrun_are_understood() -> None:
    """Rank, place, store; each try of a run has keys of its own."""
    launch = launched(TORCHRUN)
    assert launch == Launch(3, 5, "10.0.0.1", 29500, 1, 3, agent_store=True, run="run/x/2")
    assert launch.ranks_here == range(2, 5)
    assert not launch.alone
    assert not launch.leads_node


def test_a_launcher_may_say_less() -> None:
    """srun says nothing of how many ranks a node has; the first of several interfaces is taken."""
    launch = launched(SLURM)
    assert launch is not None
    assert (launch.local_world_size, launch.interface, launch.agent_store) == (None, "eth0", False)
    assert launch.ranks_here == range(3, 4)
    assert launched({"MASTER_ADDR": "node1"}) is None


@pytest.mark.parametrize(("changes", "message"), [
    ({"MASTER_ADDR": ""}, "MASTER_ADDR=''.*set"), ({"RANK": "5"}, r"RANK=5.*in 0\.\.4"),
    ({"RANK": "one"}, "RANK='one'.*whole number"), ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999"), ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
    ({"LOCAL_WORLD_SIZE": "6"}, "LOCAL_WORLD_SIZE=6"),
])
def test_variables_that_make_no_sense_are_refused(changes: dict[str, str], message: str) -> None:
    """By name, with what is allowed."""
    with pytest.raises(SpecError, match=message):
        launched({**TORCHRUN, **changes})
    with pytest.raises(SpecError, match="RANK"):
        launched({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(("hosts", "place"), [
    ((2, 3), (3, 5, 1, 3)), ((2, 3), (0, 5, 0, 2)), ((2, 3), (4, 5, 4, 5)), ((1, 1, 3), (1, 5, 1, 2)),
    ((2, 3), (3, 5, 1, None)), ((2, 3), (3, 5, None, None)),
])
def test_ranks_that_run_where_their_devices_are_pass(hosts: tuple[int, ...],
                                                     place: tuple[int | None, ...]) -> None:
    """A node is a host of the cluster, or stands in for several whole ones."""
    check_place(Launch(place[0], place[1], "x", 1, place[2], place[3]), cluster(*hosts))  # type: ignore[arg-type]


@pytest.mark.parametrize(("place", "message"), [
    ((0, 4, 0, 4), r"rank 0: WORLD_SIZE=4.*must be 5, one rank for each device of cluster 'made-up' "
                   r"\(2 on host 0, 3 on host 1\)"),
    ((0, 6, 0, 6), "rank 0: WORLD_SIZE=6"),
    ((0, 5, 0, 3), "rank 0: LOCAL_WORLD_SIZE=3"),
    ((3, 5, 0, 2), "rank 3: LOCAL_RANK=0"),
    ((3, 5, 0, None), "rank 3: LOCAL_RANK=0"),
])
def test_ranks_that_run_elsewhere_are_refused(place: tuple[int, ...], message: str) -> None:
    """With the counts of devices that the cluster has."""
    with pytest.raises(SpecError, match=message):
        check_place(Launch(place[0], place[1], "x", 1, place[2], place[3]), cluster(2, 3))


def test_everything_stays_on_loopback_unless_the_user_says_otherwise() -> None:
    """A name that stands for loopback on one node of several would lead the others astray."""
    launch = Launch(0, 2, "127.0.0.1", 29500, 0, 1)
    assert launch.bind() == "127.0.0.1"
    assert replace(launch, master_addr="localhost").bind() == "127.0.0.1"
    assert replace(launch, interface="lo").bind() == "127.0.0.1"
    with pytest.raises(HetisError, match="GLOO_SOCKET_IFNAME='nowhere0' has no IPv4 address"):
        replace(launch, interface="nowhere0").bind()
    with pytest.raises(HetisError, match=r"no way to MASTER_ADDR=no\.such\.host\.invalid"):
        replace(launch, master_addr="no.such.host.invalid").bind()


def test_a_name_that_means_loopback_here_and_another_host_elsewhere_is_refused(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the hosts file of many systems."""
    import socket

    monkeypatch.setattr("hetis_exec.launch.socket.getaddrinfo",
                        lambda *_, **__: [(socket.AF_INET, 0, 0, "", ("127.0.1.1", 29500))])
    with pytest.raises(HetisError, match="MASTER_ADDR=node1 is a loopback address on this node"):
        Launch(0, 2, "node1", 29500, 0, 1).bind()
    assert Launch(0, 2, "node1", 29500, 0, 2).bind() == "127.0.0.1"


def config(workers: str, network: NetworkConfig | None = None, **more: Any) -> ExecutionConfig:
    """That of a run with some kind of workers."""
    return ExecutionConfig(executor=ExecutorConfig(workers=workers, network=network or NetworkConfig(),
                                                   **more))


def test_sums_by_a_library_need_ranks() -> None:
    """Workers that pipes or queues join have no process group."""
    launch = Launch(0, 2, "10.0.0.1", 29500, 0, 1)
    for workers in ("auto", "processes", "threads"):
        with pytest.raises(SpecError, match=r"collectives='all_reduce'.*executor\.workers=distributed"):
            crews.workers_of(config(workers, collectives="all_reduce"), None)
    assert crews.workers_of(config("distributed", collectives="all_reduce"), None) == "distributed"
    assert crews.workers_of(config("auto", collectives="all_reduce"), launch) == "distributed"
    with pytest.raises(SpecError, match=r"executor\.collectives='ring'.*auto, ordered, all_reduce"):
        config("auto", collectives="ring")


def test_a_launcher_s_ranks_are_the_workers() -> None:
    """Nobody starts workers of his own in each of many ranks."""
    launch = Launch(0, 2, "10.0.0.1", 29500, 0, 1)
    assert crews.workers_of(config("auto"), None) == "processes"
    assert crews.workers_of(config("auto"), launch) == "distributed"
    for workers in ("processes", "threads"):
        assert crews.workers_of(config(workers), None) == workers
        with pytest.raises(SpecError, match=f"executor.workers='{workers}'.*auto or distributed"):
            crews.workers_of(config(workers), launch)
    with pytest.raises(SpecError, match=r"executor\.network.*several hosts"):
        crews.workers_of(config("auto", NetworkConfig(from_cluster=True)), launch)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_world_of_the_wrong_size_ends_with_status_2_on_every_rank(
        rank: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
        tmp_path: Path) -> None:
    """Before anything is planned or loaded; and no rank leaves a folder."""
    for name, value in {**TORCHRUN, "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(crews, "meeting_of", lambda *_: (_ for _ in ()).throw(HetisError("nobody is there")))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["replay", "+policy=hetis"])
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert f"rank {rank}: WORLD_SIZE=3 is not allowed: must be 4, one rank for each device" in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
