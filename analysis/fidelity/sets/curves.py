"""vLLM of 2024 on RTX 3090 cards: throughput over time (LLMServingSim, IISWC '24)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis.fidelity.case import Case, DataSet, csv_rows, number
from analysis.fidelity.sets.names import hosts, model_name
from hetis_sim.spec.errors import HetisError

FOLDER = "llmservingsim_iiswc24"
REQUESTS = "share-gpt-req100-rate10.tsv"
STEP_S = 0.5
TOKEN_SHARE = 0.9
CARDS = {"gpt7b": 1, "llama7b": 1, "gpt30b": 4, "llama30b": 4}

SETTINGS = (
    ("cards",
     "1 for the 7B models, 4 with tensor parallelism for the 30B models",
     "evaluation1.sh of the artifact (npu_num)"),
    ("whole prompts first", "scheduler.chunked_prefill=false", "vLLM V0's default"),
    ("tokens of a prompt step, running requests", "2048, 256", "vLLM V0's defaults"),
    ("models", "opt-6.7b and opt-30b stand for gpt3-6.7b and gpt3-30b", "the same shapes; vLLM serves OPT"),
    ("host time of an iteration",
     "cost.host_base_s=5e-3",
     "vLLM RFC 6854 (July 2024): the device waits 5 to 13 ms in each iteration; the lower end, for small "
     "batches"),
    ("link between cards", "PCIe 4", "RTX 3090 boards; not stated"))

FINDINGS = (
    "The 30B models on four cards are 37 to 39 % too fast: GeForce cards cannot read each other's memory, "
    "so that collectives go through the host's, and vLLM of that time called the workers of other cards "
    "through Ray in every iteration. Neither is simulated: the link is PCIe 4 between cards that can.",
    "These runs are below capacity until the last requests have come after 9 seconds, so that throughput "
    "tests little besides the last seconds; and the first interval of the log has no stated begin.")


def early(made: Sequence[float], share: float) -> float:
    """Tokens per second until so many of all tokens are made, from tokens of consecutive intervals."""
    wanted, so_far = share * sum(made), 0.0
    for n, tokens in enumerate(made):
        if so_far + tokens >= wanted and tokens > 0.0:
            return wanted / (STEP_S * (n + (wanted - so_far) / tokens))
        so_far += tokens
    raise HetisError("a curve without any tokens")


def read(folder: Path) -> DataSet:
    """The four runs.

    Raises:
        HetisError: a file is missing or faulty.
    """
    path = folder / FOLDER / REQUESTS
    rows = [(number(row, "arrival_time_ns", path) / 1e9, int(number(row, "input_toks", path)),
             int(number(row, "output_toks", path)))
            for row in csv_rows(path, "input_toks", "output_toks", "arrival_time_ns", delimiter="\t")]
    cases = []
    for name, cards in CARDS.items():
        curve = folder / FOLDER / f"vllm-{name}.csv"
        made = [number(row, "generation throughput", curve) * STEP_S
                for row in csv_rows(curve, "time duration", "generation throughput")]
        words = [f"model={model_name(name)}", *hosts("rtx3090", cards, "pcie4x16" if cards > 1 else None),
                 "policy=vllm", f"policy.tp={cards}", "policy.pp=1", "policy.dp=1", "workload.requests=null",
                 "scheduler.max_batch_tokens=2048", "cost.host_base_s=5e-3"]
        cases.append(Case(f"{name} {cards} x RTX3090", words, rows,
                          {"output_throughput": early(made, TOKEN_SHARE)}, token_share=TOKEN_SHARE))
    about = (f"Throughput until {TOKEN_SHARE:.0%} of the tokens are made. 100 short ShareGPT requests (22 "
             "tokens in, 68 out on average) at 10 a second; the measured log has throughput every half "
             "second.")
    return DataSet("curves", "vLLM of 2024 on RTX 3090", about, SETTINGS, cases, (
        "the runs of the ISPASS '26 artifact on A6000 and H100, whose requests are not among the data",),
        FINDINGS)
