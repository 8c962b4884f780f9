"""Invariant 8: what is recorded depends on the input alone."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from support_policies import LocalPolicy
from support_runs import Scenario, event_hash

from hetis_sim import simulate

SCENARIOS = (
    Scenario(layers=(1, 2, 3), workers=2, interval=3, blocks=22, worker_blocks=30, rate=60.0),
    Scenario(instances=2, preemption="swap", blocks=20, prompt_max=30, rate=60.0, chunked=True),
    Scenario(users=5, rate=4.0, workers=1, tp=2),
    Scenario(roles=("prefill", "decode", "decode"), rate=30.0),
)

HASHES = """
import test_determinism as t
print(" ".join([*t.hashes(), *t.folder_hashes()]))
"""
WORDS = ("model=llama3-8b", "cluster=a100-t4", "requests=25", "cost.kind=roofline", "sim.log_decisions=true",
         "sim.timeline=true")


def hashes() -> list[str]:
    """Hashes over all rows of every record, and of the decisions."""
    found = []
    for scenario in SCENARIOS:
        simulation = scenario.simulation(log=True)
        found.append(event_hash(simulation.run().records()))
        found.append(str(hash_of(simulation.controller.log.lines)))
    return found


def folder_hashes() -> list[str]:
    """Hashes of every file of a run folder, each after its name."""
    with TemporaryDirectory() as folder:
        simulate(*WORDS, output=folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return [f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]


def hash_of(lines: list[str]) -> str:
    """One word for many lines."""
    assert lines
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hashes_elsewhere(project_root: Path, hash_seed: str) -> list[str]:
    """The same from a process of its own whose sets and dictionaries hash otherwise."""
    folders = (project_root, project_root / "tests", Path(__file__).parent)
    path = os.pathsep.join(map(str, folders))
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", HASHES], env=environment, text=True, capture_output=True,
                            check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_every_process_records_the_same_bytes(project_root: Path) -> None:
    """Events, decisions and all files of a run folder are equal under any hash seed."""
    first = [*hashes(), *folder_hashes()]
    assert len(set(first)) == len(first) >= 2 * len(SCENARIOS) + 8
    assert [*hashes(), *folder_hashes()] == first
    assert hashes_elsewhere(project_root, "1") == first
    assert hashes_elsewhere(project_root, "4711") == first


def test_another_seed_records_other_bytes() -> None:
    """The hash sees a difference when there is one."""
    scenario = SCENARIOS[0]
    other = replace(scenario, seed=scenario.seed + 1)
    assert event_hash(scenario.run().records()) != event_hash(other.run().records())


def test_arrivals_do_not_depend_on_the_policy() -> None:
    """Two policies are asked for the same requests at the same times."""
    rows = [replace(SCENARIOS[0], policy=policy).run().records().requests for policy in (None, LocalPolicy())]
    for name in ("request_id", "arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(rows[0][name], rows[1][name])
    assert not np.array_equal(rows[0]["finish_s"], rows[1]["finish_s"])


def test_configured_arrivals_do_not_depend_on_the_policy() -> None:
    """Two policies by name see the same workload, to the last bit."""
    rows = [simulate(*WORDS, f"policy={name}").recorder.records().requests for name in ("hetis", "vllm")]
    for name in ("request_id", "arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(rows[0][name], rows[1][name])


def test_users_ask_the_same_whatever_the_policy() -> None:
    """In a closed loop, each user's questions and thinking times are its own, not the policy's."""
    asked = []
    for policy in (None, LocalPolicy()):
        scenario = replace(SCENARIOS[2], policy=policy, requests=20)
        simulation = scenario.simulation()
        simulation.run()
        by_user: dict[int, list[tuple[int, int]]] = {}
        for state in simulation.controller.states.values():
            by_user.setdefault(state.request.session, []).append(
                (state.request.prompt_tokens, state.request.output_tokens))
        asked.append(by_user)
    for user, questions in asked[0].items():
        both = min(len(questions), len(asked[1][user]))
        assert both >= 2
        assert questions[:both] == asked[1][user][:both]
