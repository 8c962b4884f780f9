"""Bad input stops before work starts, or is counted request by request; nothing hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hetis_sim import simulate
from hetis_sim.cli import main
from hetis_sim.config import compose
from hetis_sim.metrics import load_run, summary_markdown
from hetis_sim.run import IncompleteRunError, event_budget, prepare
from hetis_sim.sim.clock import EventBudgetError
from hetis_sim.spec.errors import HetisError, InfeasibleError, SpecError

SMALL = ("model=llama3-8b", "cluster=single-a100", "workload=sharegpt", "cost.kind=roofline")

# Words of a command line, and what the error must hold: key, value and what is allowed.
REFUSED = {
    "policy=hetos": ("policy/hetos", "hetis", "vllm"),
    "policy.name=hetos": ("policy.name='hetos'", "hetis", "did you mean"),
    "cluster=nowhere": ("cluster/nowhere", "paper", "helix24"),
    "model=llama9": ("model/llama9", "llama2-70b"),
    "model.name=llama2-7": ("model.name='llama2-7'", "llama2-7b"),
    "workload.rat=3": ("workload.rat='3'", "did you mean rate"),
    "rat=3": ("rat='3'", "workload"),
    "scheduler.chunk=3": ("scheduler.chunk='3'", "chunk_tokens"),
    "+policy.thetaa=1": ("policy.thetaa", "theta"),
    "rate=0": ("workload.rate=0.0", "a finite number in"),
    "rate=-1": ("workload.rate=-1.0", "a finite number in"),
    "rate=nan": ("workload.rate=nan", "a finite number in"),
    "rate=inf": ("workload.rate=inf", "a finite number in"),
    "rate=fast": ("workload.rate=fast", "could not be converted to Float"),
    "requests=0": ("workload.requests=0", ">= 1"),
    "requests=1.5": ("workload.requests=1.5", "could not be converted to Integer"),
    "seed=-1": ("workload.seed=-1", ">= 0"),
    "scheduler.block_tokens=0": ("scheduler.block_tokens=0", ">= 1"),
    "scheduler.memory_utilization=nan": ("scheduler.memory_utilization=nan", "in (0, 1]"),
    "scheduler.memory_utilization=1.5": ("scheduler.memory_utilization=1.5", "in (0, 1]"),
    "sim.event_budget=0": ("sim.event_budget=0", ">= 1"),
    "slo.ttft_s=nan": ("slo.ttft_s=nan", "a finite number"),
    "cost.kind=magic": ("cost.kind='magic'", "profile, roofline"),
    "cost.profiles=[/nope.json]": ("/nope.json", "empty with cost.kind=roofline"),
    "workload.path=/nope.csv": ("workload.table", "null"),
    "model.config=/nope/config.json": ("model.config='/nope/config.json'", "a readable file"),
    "cluster.hosts=[]": ("cluster.hosts=[]", "at least one host"),
    "cluster.hosts=[{gpus:{gtx1:2}}]": ("gtx1", "a100-80gb"),
    "workload.arrivals=sometimes": ("workload.arrivals='sometimes'", "poisson"),
    "output=xml": ("output='xml'", "json"),
}


@pytest.mark.parametrize("word", REFUSED)
def test_a_bad_word_is_named_with_what_is_allowed(word: str) -> None:
    """The error of a configuration names the key, the value and what would do."""
    with pytest.raises(HetisError) as caught:
        prepare(compose(*SMALL, word))
    for part in REFUSED[word]:
        assert part in str(caught.value)


@pytest.mark.parametrize("words", [
    ("model=llama2-70b", "cluster=single-a100"),
    ("model=llama2-70b", "cluster=single-a100", "policy=vllm"),
    ("model=llama2-70b", "cluster.hosts=[{gpus:{p100-12gb:4}}]"),
    ("model=llama3-8b", "cluster.hosts=[{gpus:{p100-12gb:1}}]"),
])
def test_a_model_that_cannot_fit_is_refused_before_the_run(words: tuple[str, ...]) -> None:
    """Too little memory for the weights, or no card that can be primary, is said with the figures."""
    with pytest.raises(InfeasibleError, match=r"does not fit|no .* GPU") as caught:
        prepare(compose(*SMALL, *words))
    assert "llama" in str(caught.value)
    assert "GB" in str(caught.value)


def ends(tmp_path: Path, lengths: list[tuple[int, int]], *words: str) -> list[str]:
    """How the requests of a trace end: ``finished``, or the reason of the rejection."""
    rows = [f"{second},{prompt},{output}" for second, (prompt, output) in enumerate(lengths)]
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n")
    result = simulate("model=llama3-8b", "cluster=single-a100", "cost.kind=roofline", "workload=trace",
                      f"workload.path={trace}", "sim.debug=true", *words)
    ended = result.requests
    assert result.summary.to_dict()["requests"]["rejected"] == (ended["status"] == "rejected").sum()
    return [reason or status for status, reason in zip(ended["status"], ended["reason"], strict=True)]


def test_requests_beyond_the_context_are_counted_as_rejected(tmp_path: Path) -> None:
    """A prompt with its output that is longer than the model allows is turned away with that reason."""
    found = ends(tmp_path, [(100, 10), (8000, 193), (8000, 192), (9000, 1), (100, 10)])
    assert found == ["finished", "context_limit", "finished", "context_limit", "finished"]


def test_requests_beyond_the_cache_are_counted_as_rejected(tmp_path: Path) -> None:
    """A request that the empty cluster cannot hold is turned away on arrival, and the others are served."""
    found = ends(tmp_path, [(100, 10), (600_000, 10), (2000, 10)], "model.context_limit_tokens=1000000")
    assert found == ["finished", "cache_capacity", "finished"]


def test_an_exhausted_event_budget_ends_the_run() -> None:
    """The error names the budget and the setting to raise."""
    with pytest.raises(EventBudgetError, match=r"event_budget=10 is used up .* raise sim.event_budget"):
        simulate(*SMALL, "requests=20", "sim.event_budget=10")


@pytest.mark.parametrize("budget", [1, 60])
def test_an_exhausted_event_budget_leaves_what_had_ended(tmp_path: Path, budget: int) -> None:
    """The folder can be read, says that it is incomplete, and agrees with the whole run as far as it goes."""
    with pytest.raises(IncompleteRunError) as stopped:
        simulate(*SMALL, "requests=40", f"sim.event_budget={budget}", output=tmp_path)
    run = load_run(tmp_path)
    assert "is used up" in run.summary["incomplete"]
    assert run.manifest["incomplete"] == run.summary["incomplete"] == str(stopped.value)
    counts, ended = run.summary["requests"], len(run.requests)
    assert counts["submitted"] == ended + counts["unfinished"]
    assert 0 < counts["unfinished"] < 40 if budget > 1 else ended == 0
    whole = simulate(*SMALL, "requests=40").requests.set_index("request_id")
    for request in run.requests.itertuples():
        assert request.finish_s == whole.loc[request.request_id, "finish_s"]
    assert "the run is incomplete" in summary_markdown(run.summary)


def test_the_command_line_says_that_a_run_is_incomplete(tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    """Status, error and table say so; the folder is there."""
    with pytest.raises(SystemExit) as ended:
        main(["run", *SMALL, "requests=40", "sim.event_budget=60", f"hydra.run.dir={tmp_path / 'run'}"])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "error: event_budget=60 is used up" in said.err
    assert "warning: the run is incomplete" in said.out
    assert load_run(tmp_path / "run").summary["incomplete"]


def test_the_budget_that_is_derived_is_never_short() -> None:
    """A run without collapsed steps, the most eventful there is, stays far within its budget."""
    result = simulate(*SMALL, "requests=40", "scheduler.collapse=false")
    assert result.events < event_budget(result.prepared) / 10


def command_line(project_root: Path, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(project_root)}
    command = [sys.executable, "-m", "hetis_sim", *words]
    return subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)


@pytest.mark.parametrize(("words", "parts"), [
    (("run", "rate=nan"), ("workload.rate=nan", "a finite number in")),
    (("run", "policy=hetos"), ("policy/hetos", "vllm")),
    (("validate", "cluster=single-a100"), ("llama2-70b does not fit on single-a100",)),
    (("fly",), ("command='fly'", "run, plan, validate")),
])
def test_the_command_line_ends_with_status_2(words: tuple[str, ...], parts: tuple[str, ...],
                                             project_root: Path, tmp_path: Path) -> None:
    """Bad input ends with status 2 and one clear message on standard error: no traceback, no run folder."""
    result = command_line(project_root, tmp_path, *words)
    assert result.returncode == 2, result.stderr
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_errors_carry_key_value_and_what_is_allowed() -> None:
    """Programs can read the parts of an error that people read as a sentence."""
    with pytest.raises(SpecError) as caught:
        compose(*SMALL, "rate=0")
    assert (caught.value.key, caught.value.value) == ("workload.rate", 0.0)
    assert "a finite number" in caught.value.allowed
