"""Files of prompts, and runs of this project, as workloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hetis_sim.config import compose
from hetis_sim.run import simulate, write_result
from hetis_sim.spec.errors import SpecError
from traces import build_workload, read_trace
from traces.workload import OpenWorkload

RECORDS = [
    {"prompt": "x" * 40, "max_tokens": 7, "temperature": 0.5, "stop": ["\n"]},
    {"messages": [{"role": "user", "content": "y" * 20}, {"role": "assistant", "content": "z" * 19}],
     "max_completion_tokens": 9},
    {"prompt": "", "other": [1, 2]},
]


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prompts_have_lengths_and_keep_what_they_ask_for(tmp_path: Path) -> None:
    """Texts are counted, messages together; whoever names no length gets a usual one, and a note says so."""
    table = read_trace(lines(tmp_path / "p.jsonl", RECORDS))
    assert table.format == "prompts"
    assert table.prompt_tokens.tolist() == [10, 10, 1]
    assert table.output_tokens.tolist() == [7, 9, 128]
    assert table.texts is not None
    assert table.texts[0] == RECORDS[0]
    assert "other" not in table.texts[2]
    assert any("1 prompts do not say" in note for note in table.notes)


@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
def test_a_column_of_texts_will_do(tmp_path: Path, name: str) -> None:
    """With or without other columns."""
    path = tmp_path / name
    table = pa.table({"prompt": ["a, b", "c" * 12], "max_tokens": [3, 4]})
    if name.endswith("csv"):
        path.write_text('prompt,max_tokens\n"a, b",3\ncccccccccccc,4\n')
    else:
        pq.write_table(table, path)
    read = read_trace(path)
    assert read.prompt_tokens.tolist() == [1, 3]
    assert read.output_tokens.tolist() == [3, 4]
    assert read.texts is not None
    assert [row["prompt"] for row in read.texts] == ["a, b", "c" * 12]


def test_prompts_with_times_come_at_their_times(tmp_path: Path) -> None:
    """In order; texts stay with their rows."""
    records = [{"prompt": "later", "arrival_s": 2.5}, {"prompt": "first", "arrival_s": 1.0}]
    path = lines(tmp_path / "p.jsonl", records)
    with pytest.raises(SpecError, match="unsorted=sort"):
        read_trace(path)
    table = read_trace(path, unsorted="sort")
    assert table.arrival_s is not None
    assert table.arrival_s.tolist() == [1.0, 2.5]
    assert table.texts is not None
    assert [row["prompt"] for row in table.texts] == ["first", "later"]


def test_a_table_of_counts_stays_one(tmp_path: Path) -> None:
    """A column called prompt may hold anything beside counts of tokens."""
    path = tmp_path / "c.csv"
    path.write_text("prompt,prompt_tokens,output_tokens\nhello,5,6\n")
    assert read_trace(path).texts is None
    assert read_trace(path, columns={"prompt": "prompt_tokens"}).prompt_tokens.tolist() == [5]


@pytest.mark.parametrize(("record", "message"), [
    ({"prompt": 5}, r"row 1, column 'prompt'=.*must be a text"),
    ({"prompt": "a", "messages": []}, "row 1=.*one of them"),
    ({"messages": []}, "row 1, column 'messages'"),
    ({"messages": [{"role": "user"}]}, "row 1, column 'messages'"),
    ({"prompt": "a", "max_tokens": "many"}, "column 'max_tokens'"),
    ({"prompt": "a", "arrival_s": "soon"}, "column 'arrival_s'"),
])
def test_bad_records_are_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    """File, row and field."""
    with pytest.raises(SpecError, match=message):
        read_trace(lines(tmp_path / "p.jsonl", [record]))


# -- runs ------------------------------------------------------------------------------------------------

WORDS = ("model=llama2-7b", "cluster=single-a100", "policy=vllm", "rate=20", "requests=25",
         "workload.output_scale=0.2")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with requests that were turned away."""
    result = simulate(compose(*WORDS, "model.context_limit_tokens=700"))
    assert set(result.requests["status"]) == {"finished", "rejected"}
    return write_result(result, tmp_path_factory.mktemp("runs") / "run")


def test_a_run_is_a_workload(run_folder: Path) -> None:
    """Its arrivals, and the lengths that came out, of whatever has finished."""
    rows = read_trace(run_folder)
    requests = pq.read_table(run_folder / "requests.parquet").to_pandas()
    done = requests[requests["status"] == "finished"].sort_values("arrival_s")
    assert rows.format == "run"
    assert rows.arrival_s is not None
    assert rows.arrival_s.tolist() == done["arrival_s"].tolist()
    assert rows.prompt_tokens.tolist() == done["prompt_tokens"].tolist()
    assert rows.output_tokens.tolist() == done["output_tokens"].tolist()
    assert read_trace(run_folder / "requests.parquet").output_tokens.tolist() == rows.output_tokens.tolist()
    assert len(read_trace(run_folder, where={"status": "rejected"})) == len(requests) - len(done)


def test_a_run_can_be_run_again(run_folder: Path) -> None:
    """The simulator serves what came out of a run at the times at which it came."""
    words = ("workload=trace", f"workload.path={run_folder}", "model=llama2-7b", "cluster=single-a100")
    again = simulate(compose(*words, "policy=vllm"))
    before = read_trace(run_folder)
    assert again.requests["output_tokens"].tolist() == [
        before.output_tokens[n] for n in again.requests["request_id"]]
    workload = build_workload({"table": None, "path": str(run_folder), "arrivals": "replay", "rate": None,
                               "requests": None})
    assert isinstance(workload, OpenWorkload)
    assert len(workload) == len(before)


def test_a_folder_without_a_run_is_none(tmp_path: Path) -> None:
    """What is looked for is named."""
    with pytest.raises(SpecError, match=r"path=.*requests\.parquet"):
        read_trace(tmp_path)
