"""Whole runs whose ranks torchrun or its like has started. They are slow: each rank imports torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from exec_commands import SOON_S, alive, children, wait_for, words
from exec_texts import continued, talker, tokenizer

from hetis_exec.launch import LOOPBACK
from hetis_sim.metrics import load_run

pytestmark = pytest.mark.slow

RANKS = 4
WIRED = "executor.eager_kib=0"
"""All arrays go over torch.distributed."""


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server((LOOPBACK, 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


REDUCED = ("policy.tp=2", "executor.collectives=all_reduce")
"""Two ranks of a stage, for vLLM's policy, whose sums gloo makes; the others wait for the end."""


def torchrun(options: Sequence[str], run: Path, *more: str, prefix: Sequence[str] = (),
             policy: str = "hetis") -> subprocess.Popen[str]:
    """An agent of torchrun and the ranks of its node."""
    line = [*prefix, sys.executable, "-m", "torch.distributed.run", *options, "-m", "hetis_exec",
            *words(f"+policy={policy}", *more, run=run)]
    return subprocess.Popen(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def node_of_two(node: int, address: str, port: str) -> list[str]:
    """Options of torchrun for one of two nodes with two ranks each."""
    return ["--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(node), "--master-addr", address,
            "--master-port", port]


def finish(*agents: subprocess.Popen[str]) -> list[str]:
    """Wait for all; what each has said on standard error."""
    said = [agent.communicate(timeout=SOON_S)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * len(agents), said
    return said


def check(run: Path, requests: int = 6) -> None:
    """All requests have been served, and the simulator has repeated every decision."""
    made = load_run(run)
    assert set(made.requests["status"]) == {"finished"}
    assert len(made.requests) == requests
    assert made.manifest["executor"]["checked_decisions"] > 0
    assert made.manifest["executor"]["error"] is None


def ranks(agent: subprocess.Popen[str]) -> dict[int, int]:
    """Process of each rank below an agent."""
    found: dict[int, int] = {}
    for pid in children(agent.pid):
        try:
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {int(entry[5:]): pid for entry in entries if entry.startswith(b"RANK=")}
    return found


def sockets(pid: int) -> int:
    """Open sockets of a process."""
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found += entry.readlink().name.startswith("socket:")
    return found


def below(pid: int) -> list[int]:
    """All processes below one."""
    return [found for child in children(pid) for found in (child, *below(child))]


def test_one_node(tmp_path: Path) -> None:
    """As people start it; all arrays over torch.distributed; one folder, that of rank 0."""
    finish(torchrun(["--nproc-per-node", str(RANKS)], tmp_path / "run", WIRED, "executor.record=true"))
    check(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "record.json").read_text())["requests"]


@pytest.mark.parametrize("collectives", ["all_reduce", "ordered"])
def test_texts_of_ranks_are_those_of_transformers(collectives: str, tmp_path: Path) -> None:
    """Two ranks of a stage add up by gloo, or exchange their parts; prompts and texts are real ones."""
    prompts = ["the quick brown", "die Möwe", "a text is", "hm?", "over the", "jumps over"]
    file, run = tmp_path / "prompts.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps({"prompt": prompt, "max_tokens": 9, "ignore_eos": True}) + "\n"
                            for prompt in prompts))
    finish(torchrun(["--nproc-per-node", str(RANKS)], run, *REDUCED, f"executor.collectives={collectives}",
                    f"model.path={talker()}", "workload=prompts", f"workload.path={file}", policy="vllm"))
    check(run, len(prompts))
    assert load_run(run).steps["collective_s"].min() > 0
    for row in map(json.loads, (run / "texts.jsonl").read_text().splitlines()):
        ids = tokenizer().encode(row["prompt"])
        wanted = tokenizer().decode([*ids, *continued(ids, 9)])
        assert row["text"] == wanted[len(row["prompt"]):]


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_nodes_of_one_host(rendezvous: str, tmp_path: Path) -> None:
    """Two agents that find each other in both ways that torchrun knows."""
    port = str(free_port())
    shared = ["--nnodes", "2", "--nproc-per-node", "2"]
    where = (["--master-addr", LOOPBACK, "--master-port", port] if rendezvous == "static" else
             ["--rdzv-backend", "c10d", "--rdzv-id", "x", "--rdzv-endpoint", f"{LOOPBACK}:{port}"])
    finish(*[torchrun([*shared, *where, *(["--node-rank", str(n)] if rendezvous == "static" else [])],
                      tmp_path / "run", WIRED) for n in range(2)])
    check(tmp_path / "run")


def test_ranks_that_something_else_has_started(tmp_path: Path) -> None:
    """As srun does, with the variables of torchrun but no agent: rank 0 opens the store."""
    port = str(free_port())
    line = [sys.executable, "-m", "hetis_exec", *words(run=tmp_path / "run")]
    finish(*[subprocess.Popen(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={
        **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(RANKS),
        "LOCAL_RANK": str(rank), "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}) for rank in range(RANKS)])
    check(tmp_path / "run")


def test_a_world_of_the_wrong_size(tmp_path: Path) -> None:
    """An error that says how many ranks there must be, and where; nothing is left."""
    agent = torchrun(["--nproc-per-node", "3"], tmp_path / "run")
    _, said = agent.communicate(timeout=SOON_S)
    assert agent.returncode != 0
    assert "WORLD_SIZE=3 is not allowed: must be 4, one rank for each device of cluster 'cpu-workers'" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("lost", "policy", "more"), [(1, "hetis", ()), (3, "hetis", ()),
                                                      (1, "vllm", REDUCED)])
def test_a_killed_rank_ends_the_run(lost: int, policy: str, more: Sequence[str], tmp_path: Path) -> None:
    """The driver says who is lost, keeps what had finished, and no process is left."""
    agent = torchrun(["--nproc-per-node", str(RANKS)], tmp_path / "run", "rate=2", "requests=200", *more,
                     policy=policy)
    wait_for(lambda: len(ranks(agent)) == RANKS, "ranks start")
    # To the store, to the driver, and two on each of its links.
    wait_for(lambda: sockets(ranks(agent)[lost]) >= 6, "the rank meets others")
    time.sleep(2.0)
    everyone = below(agent.pid)
    os.kill(ranks(agent)[lost], signal.SIGKILL)
    _, said = agent.communicate(timeout=SOON_S)
    assert agent.returncode != 0
    assert f"error: worker of device {lost} is lost: its connection has ended" in said
    assert "is lost" in load_run(tmp_path / "run").manifest["executor"]["error"]
    wait_for(lambda: not any(alive(pid) for pid in everyone), "all processes end")


def test_a_killed_driver_ends_all_ranks(tmp_path: Path) -> None:
    """Its own worker, the ranks of its node, and those of another node."""
    port = str(free_port())
    agents = [torchrun(node_of_two(n, LOOPBACK, port), tmp_path / "run", "rate=2", "requests=200")
              for n in range(2)]
    wait_for(lambda: 0 in ranks(agents[0]) and len(below(ranks(agents[0])[0])) >= 2, "the driver starts")
    time.sleep(6.0)
    everyone = [pid for agent in agents for pid in below(agent.pid)]
    os.kill(ranks(agents[0])[0], signal.SIGKILL)
    for agent in agents:
        agent.communicate(timeout=SOON_S)
    wait_for(lambda: not any(alive(pid) for pid in everyone), "all processes end")


# -- what serves ---------------------------------------------------------------------------------------------


def launched(*words_: str) -> subprocess.Popen[str]:
    """Another command than replay, on all ranks of a node."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "-m", "hetis_exec",
            *words_]
    return subprocess.Popen(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("end", ["interrupt", "loss"])
def test_a_server_answers_and_ends(end: str) -> None:
    """Rank 0 serves with the workers of all. An interrupt ends all in peace, a lost rank with its name."""
    pytest.importorskip("uvicorn", reason="the server needs the extra serve")
    agent = launched("serve", f"model.path={talker()}", "serve.port=0", "policy=hetis")
    assert agent.stdout is not None
    said = re.search(r" on (http://\S+/v1): policy hetis, 4 workers", agent.stdout.readline())
    assert said is not None
    ids = tokenizer().encode("the quick brown")
    asked = {"prompt": "the quick brown", "max_tokens": 9, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(f"{said[1]}/completions", json.dumps(asked).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SOON_S) as answer:
        text = json.load(answer)["choices"][0]["text"]
    assert text == tokenizer().decode([*ids, *continued(ids, 9)])[len("the quick brown"):]
    everyone, found = below(agent.pid), ranks(agent)
    assert sorted(found) == list(range(RANKS))
    os.kill(found[0], signal.SIGINT) if end == "interrupt" else os.kill(found[2], signal.SIGKILL)
    _, error = agent.communicate(timeout=SOON_S)
    assert (agent.returncode == 0) == (end == "interrupt")
    assert ("worker of device 2 is lost" in error) == (end == "loss")
    wait_for(lambda: not any(alive(pid) for pid in everyone), "all processes end")


def test_a_text_is_generated_by_ranks() -> None:
    """Rank 0 alone prints it."""
    prompt = "the quick brown"
    agent = launched("generate", f"model.path={talker()}", "executor.max_tokens=9",
                     "executor.ignore_eos=true", prompt)
    printed, _ = agent.communicate(timeout=SOON_S)
    ids = tokenizer().encode(prompt)
    assert agent.returncode == 0
    assert printed.strip() == tokenizer().decode([*ids, *continued(ids, 9)]).strip()


# -- two hosts, nearly ---------------------------------------------------------------------------------------


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces, joined by a cable with an address at each end."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"hetis{os.getpid()}{side}" for side in "ab"]
    cables = [f"ve{os.getpid() % 100_000}{side}" for side in "ab"]

    def ip(*arguments: str) -> int:
        return subprocess.run(["ip", *arguments], check=False, capture_output=True).returncode

    try:
        if any(ip("netns", "add", name) for name in names):
            pytest.skip("this host makes no network namespaces")
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for n, (name, cable) in enumerate(zip(names, cables, strict=True)):
            ip("link", "set", cable, "netns", name)
            for words_ in (("addr", "add", f"10.77.0.{n + 1}/24", "dev", cable), ("link", "set", cable, "up"),
                           ("link", "set", "lo", "up")):
                ip("-n", name, *words_)
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def test_two_hosts_nearly(namespaces: list[str], tmp_path: Path) -> None:
    """Each node has a network of its own; the address of the master leads from one to the other."""
    finish(*[torchrun(node_of_two(n, "10.77.0.1", "29500"), tmp_path / "run", WIRED,
                      prefix=["ip", "netns", "exec", name]) for n, name in enumerate(namespaces)])
    check(tmp_path / "run")
