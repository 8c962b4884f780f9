"""The data sets that the quantile tables are fitted to, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from traces.readers import read_trace
from traces.readers.columns import read_columns
from traces.readers.convert import token_counts
from traces.readers.files import open_trace
from traces.readers.options import BYTES_MAX, ReadOptions
from traces.table import IntArray, TraceTable

# Tokens of Llama 2 per unit in which LongBench states lengths. English and Chinese: over
# the benchmark's own reference answers (182,990 words, 277,642 tokens; 75,413 characters,
# 108,889 tokens). Code: the middle of its target lines (3.96 per word; code without
# comments) and of HumanEval's prompts and solutions (2.41; rich in comments).
TOKENS_PER_UNIT = {"en": 1.517, "zh": 1.444, "code": 3.2}
CHINESE = ("dureader", "lsht", "multifieldqa_zh", "passage_retrieval_zh", "vcsum")
CODE = ("lcc", "repobench-p")


@dataclass(frozen=True, slots=True, eq=False)
class DataSet:
    """Rows of a data set and its papers.

    Attributes:
        labels: index into ``components`` of every row.
        source: repository, commit, path, licence, units.
        arrivals: mean rate and coefficient of variation of the gaps, for traces with times.
    """

    name: str
    description: str
    prompt: IntArray
    output: IntArray
    labels: IntArray
    components: tuple[str, ...]
    source: Mapping[str, str]
    notes: tuple[str, ...]
    arrivals: Mapping[str, float]


def _from_trace(name: str, description: str, table: TraceTable, source: Mapping[str, str],
                notes: tuple[str, ...]) -> DataSet:
    arrivals: dict[str, float] = {}
    if table.arrival_s is not None and table.rate_rps is not None:
        gaps = np.diff(table.arrival_s)
        arrivals = {"rate_rps": round(table.rate_rps, 4),
                    "gap_cv": round(float(gaps.std(ddof=1) / gaps.mean()), 4)}
    return DataSet(name, description, table.prompt_tokens, table.output_tokens,
                   np.zeros(len(table), dtype=np.int64), (name,), source, (*notes, *table.notes), arrivals)


def sharegpt(folder: Path) -> DataSet:
    """ShareGPT, the first exchange, up to a context of 4096."""
    return _from_trace(
        "sharegpt", "ShareGPT conversations, one exchange per request",
        read_trace(folder / "lengths" / "vidur_opt_sharegpt_val_10k_llama2.csv.gz"),
        {"repository": "github.com/AKafakA/vidur_opt_scheduler",
         "commit": "20bdc49d6c1d23de84c9d4e7a8626ea33fe498f4",
         "path": "data/trace_data/sharegpt/sharegpt_val_10k_llama2.csv",
         "licence": "MIT", "units": "tokens (Llama 2 tokenizer)"},
        ("Outputs are the replies stored in ShareGPT, not replies of the served model.",
         "The largest prompt plus output is 4030 tokens, so every request fits a context of 4096."))


def sharegpt_short(folder: Path) -> DataSet:
    """ShareGPT with prompts cut off at 1023 tokens."""
    return _from_trace(
        "sharegpt_short", "ShareGPT, first exchange, prompts below 1024 tokens as in serving benchmarks",
        read_trace(folder / "lengths" / "helix_sharegpt_lengths.csv.gz"),
        {"repository": "github.com/Thesys-lab/Helix-ASPLOS25",
         "commit": "148b733080c0c5d3ddca0fe3c985b2e52a7f7b35",
         "path": "simulator/trace_generator/length_data/shared_gpt_{input,output}.pkl",
         "licence": "Apache-2.0", "units": "tokens"},
        ("Outputs are the replies stored in ShareGPT, not replies of the served model.",
         "Inputs and outputs come as two lists, taken to be pairs in the order given."))


def sharegpt_multiturn(folder: Path) -> DataSet:
    """ShareGPT with the whole conversation so far as prompt."""
    return _from_trace(
        "sharegpt_multiturn", "ShareGPT, every reply a request whose prompt is the conversation so far",
        read_trace(folder / "lengths" / "sarathi_sharegpt_8k_llama2.csv.gz"),
        {"repository": "github.com/microsoft/sarathi-serve",
         "commit": "72339db5b120614033b317880ad3a05a5e4c9415",
         "path": "data/processed_traces/sharegpt_8k_filtered_stats_llama2_tokenizer.csv",
         "licence": "Apache-2.0", "units": "tokens (Llama 2 tokenizer)"},
        ("Outputs are the replies stored in ShareGPT, not replies of the served model.",
         "Filtered by its source to 8192 tokens; much of it exceeds a context of 4096."))


def arxiv(folder: Path) -> DataSet:
    """Summaries of papers."""
    return _from_trace(
        "arxiv", "arXiv papers as prompts, summaries as outputs",
        read_trace(folder / "lengths" / "vidur_arxiv_summarization_llama2_4k.csv.gz"),
        {"repository": "github.com/microsoft/vidur", "commit": "7d47513363ec447a741ac5e47241580b47724fbf",
         "path": "data/processed_traces/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
         "licence": "MIT", "units": "tokens (Llama 2 tokenizer)"},
        ("Outputs are the abstracts stored with the papers, not replies of a model.",
         "Filtered by its source to 4096 tokens of prompt and output."))


def _azure(folder: Path, kind: str, description: str) -> DataSet:
    return _from_trace(
        f"azure_{kind}", description,
        read_trace(folder / "azure_llm_2023" / f"AzureLLMInferenceTrace_{kind}.csv.gz"),
        {"repository": "github.com/Azure/AzurePublicDataset",
         "commit": "b469a113cedca53ddc3bdea71a143dc4b7d8700c",
         "path": f"data/AzureLLMInferenceTrace_{kind}.csv", "licence": "CC-BY-4.0",
         "units": "tokens, as counted by the service",
         "attribution": "Patel et al., Splitwise: Efficient generative LLM inference using phase "
                        "splitting, ISCA 2024"},
        ("One hour of production in November 2023; outputs are what the service generated.",))


def azure_conv(folder: Path) -> DataSet:
    """Azure's conversation service."""
    return _azure(folder, "conv", "Azure LLM inference trace 2023, conversation")


def azure_code(folder: Path) -> DataSet:
    """Azure's code completion service."""
    return _azure(folder, "code", "Azure LLM inference trace 2023, code completion")


def mooncake_conv(folder: Path) -> DataSet:
    """Mooncake's long conversations."""
    return _from_trace(
        "mooncake_conv", "Mooncake conversation trace of 2025, long contexts",
        read_trace(folder / "mooncake" / "conversation_trace.jsonl.gz"),
        {"repository": "github.com/kvcache-ai/Mooncake",
         "commit": "3b5a594133958449a1feaf1c9e0fc1b553e34a28",
         "path": "FAST25-release/traces/conversation_trace.jsonl",
         "licence": "Apache-2.0", "units": "tokens"},
        ("Lengths only: the reuse of prefix blocks in the trace is not generated.",
         "Times of the trace come in steps of 3 s, which is why its gaps vary so much."))


def humaneval(folder: Path) -> DataSet:
    """HumanEval's prompts with the lengths of its canonical solutions."""
    return _from_trace(
        "humaneval", "HumanEval prompts with the lengths of the canonical solutions",
        read_trace(folder / "humaneval" / "humaneval_lengths_llama2.csv",
                   columns={"output": "canonical_solution_tokens"}),
        {"repository": "github.com/openai/human-eval", "commit": "6d43fb980f9fee3c892a914eda09951f772ad10d",
         "path": "data/HumanEval.jsonl.gz", "licence": "MIT",
         "units": "tokens (Llama tokenizer of 32,000 entries)"},
        ("Outputs are the benchmark's canonical solutions, not generations of a model: a chat model "
         "also explains, and a base model may run on to its limit. Scale with output_scale to study that.",
         "164 problems only: quantiles between them are interpolated."))


def longbench(folder: Path) -> DataSet:
    """LongBench's 21 tasks, each a component."""
    names_read = ("task", "context_length_words", "pred_tokens_llama2_7b_chat")
    file = open_trace(folder / "longbench" / "longbench_lengths.csv.gz", BYTES_MAX)
    task_column, units_column, output_column = read_columns(file, names_read, ReadOptions()).values()
    tasks = [task_column.at(row) for row in range(len(task_column))]
    names = tuple(dict.fromkeys(tasks))
    per = TOKENS_PER_UNIT
    per_unit = np.array([per[_language(task)] for task in tasks])
    return DataSet(
        "longbench", "LongBench, 21 tasks in their official proportions",
        np.rint(token_counts(units_column) * per_unit).astype(np.int64), token_counts(output_column),
        np.array([names.index(task) for task in tasks], dtype=np.int64), names,
        {"repository": "github.com/viridisGreen/LongBench",
         "commit": "eaae8054f84fddaf1a299836ce6763359f823ce8", "path": "pred/llama2-7b-chat-4k/*.jsonl",
         "licence": "derived numbers only; LongBench itself is MIT (github.com/THUDM/LongBench), the fork "
                    "states no licence",
         "units": "words (English, code) or characters (Chinese) of the context, tokens of the prediction"},
        ("Prompts are estimated: units of the context times tokens per unit of the Llama 2 tokenizer "
         f"({per['en']} per English word and {per['zh']} per Chinese character, measured on the "
         "benchmark's reference answers).",
         f"The {per['code']} per word of code (lcc, repobench-p) lies between 2.4 on HumanEval and 4.0 "
         "on single lines of the benchmark, so those prompts may be off by a quarter either way.",
         "Task instructions around the context (tens of tokens) are not counted.",
         "Outputs are what Llama-2-7B-chat generated, up to the benchmark's own limit per task, after "
         "contexts were cut to 3500 tokens. Reference answers are longer in summaries, shorter elsewhere."),
        {})


def _language(task: str) -> str:
    return "zh" if task in CHINESE else "code" if task in CODE else "en"


SOURCES: dict[str, Callable[[Path], DataSet]] = {
    source.__name__: source
    for source in (arxiv, azure_code, azure_conv, humaneval, longbench, mooncake_conv, sharegpt,
                   sharegpt_multiturn, sharegpt_short)
}
