"""Every trace format is read, whatever its container, and gives the numbers in the file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hetis_sim.spec.errors import SpecError
from traces import TraceTable, read_trace

AZURE_2023 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:51.2224670,879,55"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n"
    "2024-05-10 00:00:01+00:00,2399,6\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,GPT-4,1087,230,1317,API log\n"
    "118,ChatGPT,417,0,417,Conversation log\n"
    "118,ChatGPT,10,20,30,Conversation log\n"
)
MOONCAKE = (
    '{"timestamp": 27000, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]}\n'
    '{"timestamp": 30500, "input_length": 600, "output_length": 26, "hash_ids": [46, 57]}\n'
)
SHAREGPT = [
    {"id": "a", "conversations": [
        {"from": "human", "value": "x" * 40}, {"from": "gpt", "value": "y" * 80},
        {"from": "human", "value": "z" * 8}, {"from": "gpt", "value": "w" * 4}]},
    {"id": "b", "conversations": [{"from": "human", "value": "nobody answers"}]},
    {"id": "c", "conversations": [
        {"from": "system", "tokens": 7}, {"from": "user", "tokens": 3}, {"from": "assistant", "tokens": 11}]},
]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file under a temporary folder, gzipped where the name says so."""
    def _write(name: str, text: str | bytes) -> Path:
        path = tmp_path / name
        data = text.encode() if isinstance(text, str) else text
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path
    return _write


def lengths(table: TraceTable) -> list[tuple[int, int]]:
    """Pairs of prompt and output tokens."""
    return list(zip(table.prompt_tokens.tolist(), table.output_tokens.tolist(), strict=True))


def times(table: TraceTable) -> list[float]:
    """Arrival times of a table that has them, seconds."""
    assert table.arrival_s is not None
    return table.arrival_s.tolist()


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_azure_2023(write: Write, name: str) -> None:
    """Azure 2023 rows have 100 ns times, carriage returns and no last newline."""
    table = read_trace(write(name, AZURE_2023))
    assert (table.format, lengths(table)) == ("azure", [(374, 44), (396, 109), (879, 55)])
    assert times(table) == [0.0, 4.314579, 4.541877]


def test_azure_2024(write: Write) -> None:
    """Azure 2024 times have an offset, and whole seconds without a fraction."""
    table = read_trace(write("a.csv", AZURE_2024))
    assert (table.format, times(table)) == ("azure", [0.0, 0.99007])


def test_burstgpt_drops_failed_requests_and_says_so(write: Write) -> None:
    """Rows without a response are dropped and counted; equal times are allowed."""
    table = read_trace(write("b.csv", BURSTGPT))
    assert (table.format, lengths(table)) == ("burstgpt", [(472, 18), (1087, 230), (10, 20)])
    assert times(table) == [0.0, 40.0, 113.0]
    assert (table.rows_read, table.rows_dropped) == (4, 1)
    assert table.notes == ("1 of 4 rows dropped: no prompt or no output",)


def test_where_keeps_matching_rows(write: Write) -> None:
    """A filter keeps one model, in CSV and in JSONL."""
    table = read_trace(write("b.csv", BURSTGPT), where={"Model": "GPT-4"})
    assert lengths(table) == [(1087, 230)]
    rows = '{"input_len": 1, "output_len": 2, "kind": "x"}\n{"input_len": 3, "output_len": 4, "kind": "y"}\n'
    assert lengths(read_trace(write("b.jsonl", rows), where={"kind": "y"})) == [(3, 4)]


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz"])
def test_mooncake(write: Write, name: str) -> None:
    """Mooncake times are ms and every row keeps its prefix blocks of 512 tokens."""
    table = read_trace(write(name, MOONCAKE))
    assert (table.format, lengths(table), times(table)) == ("mooncake", [(1100, 52), (600, 26)], [0.0, 3.5])
    assert table.prefix is not None
    assert [table.prefix.of(0), table.prefix.of(1)] == [(46, 47, 48), (46, 57)]
    assert table.prefix.block_tokens == 512


def test_traces_that_borrow_mooncake_names_keep_seconds(write: Write) -> None:
    """Further fields make it another trace, whose numeric times are seconds."""
    row = '{"timestamp": 2, "input_length": 5, "output_length": 6, "hash_ids": [1], "chat_id": 9}\n'
    table = read_trace(write("q.jsonl", row + row.replace('"timestamp": 2', '"timestamp": 4')))
    assert (table.format, times(table)) == ("jsonl", [0.0, 2.0])
    assert table.session is not None
    assert table.session.tolist() == [9, 9]
    assert times(read_trace(write("r.jsonl", row), format="mooncake")) == [0.0]


def test_sharegpt_first_exchange(write: Write) -> None:
    """One request a conversation, counted or estimated; unanswered ones are counted as dropped."""
    table = read_trace(write("s.json", json.dumps(SHAREGPT)))
    assert (table.format, lengths(table)) == ("sharegpt", [(10, 20), (10, 11)])
    assert (table.rows_read, table.rows_dropped, table.arrival_s) == (3, 1, None)
    assert table.notes[0] == "tokens counted by UTF-8 bytes / 4 (an estimate)"


def test_sharegpt_all_turns(write: Write) -> None:
    """With turns=all the prompt of a reply is everything before it, and sessions tell conversations."""
    text = "\n".join(json.dumps(item) for item in SHAREGPT)
    table = read_trace(write("s.jsonl.gz", text), turns="all", bytes_per_token=2.0)
    assert lengths(table) == [(20, 40), (64, 2), (10, 11)]
    assert table.session is not None
    assert table.session.tolist() == [0, 0, 2]


def test_sharegpt_with_a_tokenizer(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer file counts the texts when the optional package is there."""
    class Encoder:
        @staticmethod
        def from_file(path: str) -> Encoder:
            assert path == "tokenizer.json"
            return Encoder()

        def encode(self, text: str, add_special_tokens: bool) -> Any:
            assert not add_special_tokens
            return type("Encoding", (), {"ids": list(text)})()

    module = type("Module", (), {"Tokenizer": Encoder})
    monkeypatch.setattr("importlib.import_module", lambda name: module)
    table = read_trace(write("s.json", json.dumps(SHAREGPT)), tokenizer="tokenizer.json")
    assert lengths(table)[0] == (40, 80)
    assert table.notes[0] == "tokens counted by tokenizer tokenizer.json"


@pytest.mark.parametrize(("header", "unit", "expected"), [
    ("num_prefill_tokens,num_decode_tokens,arrived_at", "auto", [0.0, 1000.0]),
    ("input_len,output_len,timestamp_ms", "auto", [0.0, 1.0]),
    ("Prompt Tokens,Output Tokens,arrival_us", "auto", [0.0, 0.001]),
    ("prompt_tokens,completion_tokens,time", "ns", [0.0, 1e-6]),
    ("prompt_tokens,output_tokens,arrival_s", "auto", [500.0, 1500.0]),
])
def test_generic_names_and_units(write: Write, header: str, unit: str, expected: list[float]) -> None:
    """Known column names are found; only the project's own arrival_s keeps its origin."""
    table = read_trace(write("g.csv", f"{header}\n10,20,500\n30,40,1500\n"), time_unit=unit)
    assert lengths(table) == [(10, 20), (30, 40)]
    assert times(table) == pytest.approx(expected, rel=1e-12)


def test_columns_can_be_named(write: Write) -> None:
    """An explicit mapping reads columns of any name and leaves the rest to their aliases."""
    path = write("g.csv", "a;b;timestamp\n1;2;3\n4;5;6\n")
    table = read_trace(path, columns={"prompt": "b", "output": "a"})
    assert (lengths(table), times(table)) == ([(2, 1), (5, 4)], [0.0, 3.0])


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json", "t.parquet", "t.csv.gz", "t.json.gz"])
def test_containers_agree(tmp_path: Path, write: Write, name: str) -> None:
    """The same rows in every container give the same table; without times it has none."""
    rows = [{"input_tokens": 5, "output_tokens": 7}, {"input_tokens": 6, "output_tokens": 8}]
    if name == "t.parquet":
        path = tmp_path / name
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif "jsonl" in name:
        path = write(name, "\n".join(map(json.dumps, rows)))
    elif "json" in name:
        path = write(name, json.dumps({"version": 1, "data": rows}, indent=1))
    else:
        path = write(name, "input_tokens,output_tokens\n5,7\n6,8\n")
    table = read_trace(path)
    assert (lengths(table), table.arrival_s) == ([(5, 7), (6, 8)], None)


def test_parquet_with_timestamps(tmp_path: Path) -> None:
    """Arrow timestamps of any unit are dates; counts may be floats that are whole."""
    path = tmp_path / "t.parquet"
    stamps = pa.array([1_700_000_000_000_001, 1_700_000_000_500_001], pa.timestamp("us"))
    rows = {"timestamp": stamps, "prompt_tokens": [3.0, 4.0], "output_tokens": [1, 2]}
    pq.write_table(pa.table(rows), path)
    assert times(read_trace(path)) == [0.0, 0.5]


@pytest.mark.parametrize("text", [
    "\ufeffprompt_tokens,output_tokens\n1,2\n", '\ufeff{"prompt_tokens": 1, "output_tokens": 2}\n',
    '\ufeff[{"prompt_tokens": 1, "output_tokens": 2}]', "\n\nprompt_tokens,output_tokens\n\n1,2\n\n",
])
def test_byte_order_marks_and_blank_lines_do_no_harm(write: Write, text: str) -> None:
    """A byte-order mark is skipped in every text container, and so are blank lines."""
    assert lengths(read_trace(write("t.txt", text))) == [(1, 2)]


def test_start_and_limit(write: Write) -> None:
    """Rows are skipped and bounded; the first row that is read is the origin of time."""
    rows = "".join(f"{i},{i},1\n" for i in range(1, 9))
    path = write("t.csv", f"timestamp,prompt_tokens,output_tokens\n{rows}")
    table = read_trace(path, start=2, limit=3)
    assert (table.prompt_tokens.tolist(), times(table)) == ([3, 4, 5], [0.0, 1.0, 2.0])
    jsonl = write("t.jsonl", "".join(f'{{"prompt_tokens": {i}, "output_tokens": 1}}\n' for i in range(1, 9)))
    assert read_trace(jsonl, start=2, limit=3).prompt_tokens.tolist() == [3, 4, 5]


def test_sorting_is_stable_and_noted(write: Write) -> None:
    """With unsorted=sort rows go by time, and rows of equal time keep their order."""
    path = write("t.csv", "timestamp,prompt_tokens,output_tokens\n5,1,1\n3,2,1\n5,3,1\n3,4,1\n")
    table = read_trace(path, unsorted="sort")
    assert (table.prompt_tokens.tolist(), times(table)) == ([2, 4, 1, 3], [0.0, 0.0, 2.0, 2.0])
    assert table.notes == ("sorted by time: 2 rows came too late",)


def test_named_sessions_are_numbered_in_order(write: Write) -> None:
    """Texts become numbers by first appearance; an empty cell has no session."""
    path = write("t.csv", "prompt_tokens,output_tokens,user\n1,1,bob\n1,1,\n1,1,eve\n1,1,bob\n")
    table = read_trace(path)
    assert table.session is not None
    assert table.session.tolist() == [0, -1, 1, 0]


def test_large_files_are_read_over_block_borders(write: Write) -> None:
    """200,000 rows, more than a block, keep their number and their order."""
    rows = "".join(f"{i % 5000 + 1},{i % 300 + 1},{i}\n" for i in range(200_000))
    table = read_trace(write("t.csv.gz", "prompt_tokens,output_tokens,arrival_s\n" + rows))
    assert np.array_equal(table.prompt_tokens, np.arange(200_000) % 5000 + 1)
    assert times(table)[-1] == 199_999.0


REAL = [
    ("traces/azure_llm_2023/AzureLLMInferenceTrace_code.csv.gz", "azure", {}),
    ("traces/azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz", "azure", {}),
    ("traces/mooncake/conversation_trace.jsonl.gz", "mooncake", {}),
    ("traces/lengths/helix_sharegpt_lengths.csv.gz", "csv", {}),
    ("traces/lengths/sarathi_sharegpt_8k_llama2.csv.gz", "csv", {}),
    ("traces/lengths/vidur_arxiv_summarization_llama2_4k.csv.gz", "csv", {}),
    ("traces/lengths/vidur_opt_sharegpt_val_10k_llama2.csv.gz", "csv", {}),
    ("traces/humaneval/humaneval_lengths_llama2.csv", "csv", {"output": "canonical_solution_tokens"}),
]


@pytest.mark.parametrize(("name", "kind", "columns"), REAL)
def test_real_traces(shared_data: Path, name: str, kind: str, columns: dict[str, str]) -> None:
    """Public traces are recognised and keep every row that their manifest counts."""
    rows = {item["file"]: item["rows"] for item in json.loads((shared_data / "manifest.json").read_text())}
    table = read_trace(shared_data / name, columns=columns)
    assert (table.format, table.rows_read, table.rows_dropped) == (kind, rows[name], 0)
    assert len(table) == rows[name]
    assert table.arrival_s is None or (table.arrival_s[0] == 0 and np.all(np.diff(table.arrival_s) >= 0))


def test_unknown_options_are_refused(write: Write) -> None:
    """A misspelt option names the ones there are."""
    with pytest.raises(SpecError, match=r"limits=3 is not allowed: must be one of .*limit"):
        read_trace(write("a.csv", AZURE_2023), limits=3)
