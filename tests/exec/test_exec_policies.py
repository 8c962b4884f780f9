"""Policies run on real models unchanged, and decide what they decide in the simulator."""

from __future__ import annotations

import pytest
from exec_models import folder, wrong
from exec_toys import Dividing, given, pipeline, pools, workload

import hetis_exec.run
from hetis_exec.config import compose_execution
from hetis_exec.driver import ExecutorInput
from hetis_exec.errors import ReplayError
from hetis_exec.records import RunRecord
from hetis_exec.replay import replay
from hetis_exec.run import Measured, execute, prepare_execution
from hetis_sim.spec.errors import SpecError

WORDS = ("rate=200", "requests=8", "workload.prompt_scale=0.05", "workload.output_scale=0.03",
         "executor.workers=threads", "scheduler.max_batch_tokens=64", "scheduler.max_batch_requests=16")
POLICIES = ("hetis", "hexgen", "lamina", "vllm", "vllm_all", "splitwise", "distserve")
POOLS = ("splitwise", "distserve")
"""They prefill and decode on different instances."""


def measured(*words: str) -> Measured:
    """A run of the tiny Llama on threads."""
    return execute(prepare_execution(compose_execution(*WORDS, *words)))


def llama() -> str:
    """The word for its folder."""
    return f"model.path={folder('llama')}"


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_run_unchanged(policy: str) -> None:
    """Tokens are those of transformers, and the simulator repeats all decisions of the run."""
    done = measured(llama(), f"policy={policy}", *(["policy.delta=0.9"] if policy == "hetis" else []))
    assert done.error is None
    assert done.checked is not None
    assert done.checked > 8
    assert wrong("llama", done.execution.given, done.result.tokens) == []
    if policy == "hetis":
        assert any(instance.attention_workers for instance in done.execution.given.plan.instances)
    if policy in POOLS:
        assert {"prefill", "decode"} == {instance.role for instance in done.execution.given.plan.instances}
        assert "handoff" in {kind for _, kind, _ in done.result.record.arrivals}


NODES = ("policy=helix", "policy.placement=given", "policy.tp_max=1",
         "policy.ranges=[[0,2],[1,3],[0,3],[2,2]]")
"""Layers of four nodes: two paths, on each of which the second node has layers that the first had passed."""


@pytest.mark.parametrize("words", [("policy=helix",), NODES])
def test_requests_take_paths_of_their_own(words: tuple[str, ...]) -> None:
    """Through nodes with ranks, and through nodes whose layers overlap."""
    done = measured(llama(), *words)
    assert done.error is None
    assert done.checked == 8
    assert wrong("llama", done.execution.given, done.result.tokens) == []
    assert {step.instance for step in done.result.record.steps} == set(range(4 if words is NODES else 2))


LENDING = ("policy=infinite", "workload.table=fixed", "workload.prompt_scale=1", "workload.output_scale=1",
           "workload.prompt_tokens=60", "workload.output_tokens=24",
           "cluster.gpu_types.cpu-core.memory_gib=0.556",
           "cluster.hosts=[{gpus:{cpu-core:1},memory_gib:4},{gpus:{weak-core:1},memory_gib:4}]",
           "cluster.gpu_types.weak-core.memory_gib=0.5557")
"""A card with little cache, and one that has room for cache only."""


def test_tokens_are_lent_to_a_creditor() -> None:
    """Prompts that find no room at home are lent in part, or lend while they run."""
    done = measured(llama(), *LENDING)
    assert done.error is None
    assert done.checked
    assert wrong("llama", done.execution.given, done.result.tokens) == []
    assert [instance.attention_workers for instance in done.execution.given.plan.instances] == [(1,)]
    assert {"push", "move"} & {kind for _, kind, _ in done.result.record.arrivals}


def test_divided_tokens_are_not_handed_over() -> None:
    """A policy that divides tokens and has pools is refused before anything starts."""
    plan = pools(("prefill", pipeline([[0]], [4])), ("decode", pipeline([[1]], [4])))
    with pytest.raises(SpecError, match="not handed from pool to pool"):
        given(plan, Dividing([((4,), (0,))]), workload(1))


def test_a_run_that_the_simulator_does_not_repeat_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured comes with the difference."""
    def differ(given: ExecutorInput, record: RunRecord) -> None:
        record.decisions[0] += " "
        replay(given, record)

    monkeypatch.setattr(hetis_exec.run, "replay", differ)
    done = measured(llama(), "policy=vllm", "requests=3")
    assert isinstance(done.error, ReplayError)
    assert "decision 0 differs" in str(done.error)
    assert done.checked is None
    assert len(done.result.tokens) == 3


def test_sampling_is_repeatable() -> None:
    """The same seed gives the same tokens, another one others."""
    words = (llama(), "policy=vllm", "executor.temperature=0.7", "executor.top_p=0.95", "requests=4")
    first, again, other = (measured(*words, f"executor.seed={seed}").result.tokens for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_any_architecture_runs_on_random_weights() -> None:
    """Without a folder of weights they are drawn from the seed, for the sizes that are named."""
    words = ("policy=vllm", f"model.config={folder('qwen3') / 'config.json'}", "requests=3")
    first, again, other = (measured(*words, f"executor.seed={seed}") for seed in (1, 1, 2))
    assert first.execution.given.model.qk_norm
    assert len(first.result.tokens) == 3
    assert first.result.tokens == again.result.tokens != other.result.tokens
