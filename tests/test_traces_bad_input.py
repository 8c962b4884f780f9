"""A bad trace is refused with its file, row and column before any work starts."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hetis_sim.spec.errors import SpecError
from traces import read_trace
from traces.readers.files import BoundedReader, open_trace

HEADER = "arrival_s,prompt_tokens,output_tokens\n"


def refused(path: Path, match: str, **options: object) -> None:
    """Reading raises a SpecError whose text matches."""
    with pytest.raises(SpecError, match=match):
        read_trace(path, **options)


@pytest.mark.parametrize(("rows", "match"), [
    ("0,1,1\n1,nan,1\n", r"row 2, column 'prompt_tokens'='nan'"),
    ("0,1,1\n1,-5,1\n", r"row 2, column 'prompt_tokens'='-5'"),
    ("0,1,1\n1,5,-1\n", r"row 2, column 'output_tokens'='-1'"),
    ("0,1,1\n1,5,10000001\n", r"row 2, column 'output_tokens'='10000001'.*\[0, 10000000\]"),
    ("0,1,1\n1,5,inf\n", r"row 2, column 'output_tokens'='inf'"),
    ("0,1,1\n1,2.5,1\n", r"row 2, column 'prompt_tokens'='2.5'.*whole number"),
    ("0,1,1\n1,many,1\n", r"row 2, column 'prompt_tokens'='many'"),
    ("0,1,1\n1,,1\n", r"row 2, column 'prompt_tokens'=''"),
    ("0,1,1\n1,1e400,1\n", r"row 2, column 'prompt_tokens'='1e400'"),
    ("0,1,1\nnan,1,1\n", r"row 2, column 'arrival_s'='nan'"),
    ("0,1,1\ninf,1,1\n", r"row 2, column 'arrival_s'='inf'"),
    ("-1,1,1\n", r"row 1, column 'arrival_s'='-1'"),
    ("0,1,1\nsoon,1,1\n", r"row 2, column 'arrival_s'='soon'.*a number or a date"),
    ("0,1,1\n2023-11-16 18:15:46,1,1\n", r"row 2, column 'arrival_s'"),
    ("0,1,1\n2,1,1\n1,1,1\n3,1,1\n", r"row 3, column 'arrival_s'='1'.*unsorted=sort"),
    ("0,1,1\n1,1\n", r"row 2=\['1', '1'\].*3 columns"),
    ("0,1,1\n1,1,1,1\n", r"row 2=.*3 columns"),
    ("0,0,5\n1,5,0\n", r"rows=0.*at least one row with prompt and output \(2 have none\)"),
    ("", r"rows=0.*at least one row"),
])
def test_bad_csv_cells(tmp_path: Path, rows: str, match: str) -> None:
    """The first bad cell is named, with what is allowed there."""
    path = tmp_path / "bad.csv"
    path.write_text(HEADER + rows)
    refused(path, match)
    refused(path, r"bad\.csv")


@pytest.mark.parametrize(("text", "match"), [
    ('{"prompt_tokens": 1, "output_tokens": 1}\n{"prompt_tokens": 1,\n', r"line 2.*valid JSON"),
    ('{"prompt_tokens": 1, "output_tokens": 1}\n[1, 2]\n', r"line 2='list'.*a JSON object"),
    ('{"prompt_tokens": 1, "output_tokens": 1}\n\n{"prompt_tokens": 1}\n',
     r"row 2, column 'output_tokens'='missing'"),
    ('{"prompt_tokens": 1, "output_tokens": null}\n', r"row 1, column 'output_tokens'='missing'"),
    ('{"prompt_tokens": 1, "output_tokens": true}\n', r"row 1, column 'output_tokens'=True"),
    ('{"prompt_tokens": 1, "output_tokens": "3"}\n', r"row 1, column 'output_tokens'='3'"),
    ('{"prompt_tokens": NaN, "output_tokens": 3}\n', r"row 1, column 'prompt_tokens'=nan"),
    ('{"prompt_tokens": 1e9, "output_tokens": 3}\n', r"row 1, column 'prompt_tokens'=1000000000.0"),
    ('{"prompt_tokens": 1%s, "output_tokens": 3}\n' % ("0" * 400), r"row 1, column 'prompt_tokens'"),
    ('{"prompt_tokens": 1, "output_tokens": 3, "hash_ids": [1.5]}\n', r"row 1, column 'hash_ids'=\[1.5\]"),
    ('{"prompt_tokens": 1, "output_tokens": 3, "hash_ids": 7}\n', r"row 1, column 'hash_ids'=7"),
    ('{"prompt_tokens": 1, "output_tokens": 3, "time": {}}\n', r"row 1, column 'time'"),
    ('{"a": 1}\n', r"columns=\['a'\].*prompt tokens"),
    ("[]", r"rows=0"),
    ("[1, 2]", r"row 1='int'.*a JSON object"),
    ('[{"prompt_tokens": 1}', r"valid JSON"),
    ('{"prompt": {\n "a": 1}}', r"'dict'.*a list of objects"),
    ("[" * 100_000, r"nested|valid JSON"),
    ('[{"conversations": 3}]', r"row 1, column 'conversations'=3"),
    ('[{"conversations": [3]}]', r"row 1, column 'conversations'=3"),
    ('[{"conversations": [{"from": "human"}]}]', r"row 1, turn 'value'=None"),
    ('[{"conversations": [{"from": "human", "tokens": -1}]}]', r"row 1, turn 'tokens'=-1"),
    ('[{"conversations": [{"from": "human", "value": "x"}]}]', r"\(1 have none\)"),
])
def test_bad_json(tmp_path: Path, text: str, match: str) -> None:
    """The line or row of broken JSON, a wrong kind or a missing field is named."""
    path = tmp_path / "bad.json"
    path.write_text(text)
    refused(path, match)


@pytest.mark.parametrize(("data", "match"), [
    (b"", r"zero rows"),
    (b"\xef\xbb\xbf \n", r"zero rows"),
    (b"prompt_tokens,prompt_tokens,output_tokens\n1,2,3\n", r"without repeats \(prompt_tokens\)"),
    (b"prompt_tokens,input_tokens,outputs\n1,2,3\n", r"a column of output tokens"),
    (b"input_len,input_tokens,output_tokens\n1,2,3\n", r"one column for the prompt role"),
    (b"1,2\n3,4\n", r"columns=\['1', '2'\].*prompt tokens"),
    (b"prompt_tokens,output_tokens\n1,\xe9\n", r"row 1.*UTF-8"),
    (b"prompt_tokens,\xe9\n1,2\n", r"UTF-8"),
    ("prompt_tokens,output_tokens\n1,2\n".encode("utf-16"), r"UTF-16 text"),
    (b'{"prompt_tokens": 1, "output_tokens": "\xe9"}\n', r"UTF-8"),
    (bz2.compress(b"prompt_tokens,output_tokens\n1,2\n"), r"bzip2 file"),
    (b'prompt_tokens,output_tokens\n1,"2\n3,4\n', r"row 1"),
])
def test_bad_files(tmp_path: Path, data: bytes, match: str) -> None:
    """Wrong encodings, containers and headers are told apart."""
    path = tmp_path / "bad.csv"
    path.write_bytes(data)
    refused(path, match)


@pytest.mark.parametrize("keep", [15, 60, 30_000])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_truncated_gzip(tmp_path: Path, keep: int, kind: str) -> None:
    """A gzip file that ends early is refused wherever it ends."""
    rows = ([f"{i},{i * 101 % 997 + 1},{i * 7919 % 8191}" for i in range(40_000)] if kind == "csv" else
            [f'{{"input_len": {i * 7919 % 8191 + 1}, "output_len": {i + 1}}}' for i in range(40_000)])
    data = gzip.compress(((HEADER if kind == "csv" else "") + "\n".join(rows)).encode())
    assert len(data) > keep + 10_000
    path = tmp_path / "cut.gz"
    path.write_bytes(data[:keep])
    refused(path, r"cut\.gz='truncated gzip'")


def test_damaged_gzip(tmp_path: Path) -> None:
    """A gzip file with wrong bytes inside, or only the magic number right, is refused."""
    data = bytearray(gzip.compress((HEADER + "0,1,1\n" * 50_000).encode()))
    data[len(data) // 2] ^= 0xFF
    path = tmp_path / "bad.csv.gz"
    path.write_bytes(bytes(data))
    refused(path, r"intact gzip|truncated gzip|row \d+")
    path.write_bytes(b"\x1f\x8bnonsense and more of it")
    refused(path, r"intact gzip")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    """A folder or a device is no file to read, and a missing file is said to be missing."""
    refused(Path("/dev/null"), "a regular file")
    refused(tmp_path, "a file, not a folder")
    refused(tmp_path / "none.csv", "an existing file")


def test_bad_parquet(tmp_path: Path) -> None:
    """Cut-off parquet, parquet in gzip, nulls and texts in number columns are refused."""
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"prompt_tokens": [1, None], "output_tokens": [1, 2]}), path)
    refused(path, r"row 2, column 'prompt_tokens'='missing'")
    pq.write_table(pa.table({"prompt_tokens": ["1", "x"], "output_tokens": [1, 2]}), path)
    refused(path, r"row 2, column 'prompt_tokens'='x'")
    pq.write_table(pa.table({"prompt_tokens": [[1], [2]], "output_tokens": [1, 2]}), path)
    refused(path, r"row 1, column 'prompt_tokens'=\[1\]")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, r"t\.parquet")
    path.write_bytes(gzip.compress(whole))
    refused(path, "parquet inside gzip")


def test_row_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    """Rows that were skipped or filtered still count in the numbers of errors."""
    path = tmp_path / "t.csv"
    path.write_text("prompt_tokens,output_tokens,kind\n1,1,a\n2,1,b\n3,1,a\n4,1,b\n-5,1,b\n")
    refused(path, r"row 5, column 'prompt_tokens'='-5'", where={"kind": "b"}, start=1)
    refused(path, r"rows=0.*where=\{'kind': 'c'\}", where={"kind": "c"})
    refused(path, r"rows=0.*start=5", start=5)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_endless_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A line without end is refused when it is too long, not collected in memory."""
    monkeypatch.setattr("traces.readers.columns.LINE_BYTES_MAX", 5_000_000)
    path = tmp_path / name
    start = "prompt_tokens,output_tokens\n" if name == "t.csv" else '{"prompt_tokens": 1}\n'
    path.write_text(start + "1" * 9_000_000)
    refused(path, "line 2='> 5000000 bytes'", columns={} if name == "t.csv" else {"output": "prompt_tokens"})
    path.write_bytes(b"\0" * 1_000_000)
    refused(path, r"columns=.{,250}\.\.\.")


def test_row_limit(tmp_path: Path) -> None:
    """More rows than max_rows are refused unless a limit takes part of them."""
    for name, text in (("t.csv", "prompt_tokens,output_tokens\n" + "1,1\n" * 20),
                       ("t.jsonl", '{"prompt_tokens": 1, "output_tokens": 1}\n' * 20)):
        path = tmp_path / name
        path.write_text(text)
        refused(path, r"rows='> 19'.*max_rows", max_rows=19)
        assert len(read_trace(path, max_rows=20)) == 20
        assert len(read_trace(path, max_rows=19, limit=20)) == 20


def test_decompressed_bytes_are_bounded(tmp_path: Path) -> None:
    """A small gzip file that unpacks to too much is stopped on the way."""
    path = tmp_path / "bomb.csv.gz"
    path.write_bytes(gzip.compress(b"1,1\n" * 500_000))
    file = open_trace(path, max_bytes=1_000_000)
    with pytest.raises(SpecError, match="max_bytes"), file.open() as stream:
        stream.read()
    with path.open("rb") as raw, pytest.raises(SpecError, match="max_bytes"):
        BoundedReader(raw, "bomb", 10).read(100)


@pytest.mark.parametrize(("options", "match"), [
    ({"format": "excel"}, "format='excel'.*auto, azure"),
    ({"format": "azure"}, "those of format=azure"),
    ({"format": "parquet"}, "format='parquet'.*csv"),
    ({"format": "sharegpt"}, "format='sharegpt'"),
    ({"columns": {"length": "x"}}, "columns='length'"),
    ({"columns": {"prompt": "x"}}, "columns.prompt='x'.*arrival_s, prompt_tokens, output_tokens"),
    ({"where": {"x": "1"}}, "column='x'"),
    ({"time_unit": "h"}, "time_unit='h'"),
    ({"unsorted": "no"}, "unsorted='no'"),
    ({"turns": "some"}, "turns='some'"),
    ({"start": -1}, "start=-1"),
    ({"limit": 0}, "limit=0"),
    ({"max_rows": 0}, "max_rows=0"),
    ({"bytes_per_token": 0.0}, "bytes_per_token=0.0"),
])
def test_bad_options(tmp_path: Path, options: dict[str, object], match: str) -> None:
    """Options out of range name the key, the value and what is allowed."""
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "0,1,1\n")
    refused(path, match, **options)


def test_tokenizer_without_its_package_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer asks for the optional package, and for a file that it can read."""
    path = tmp_path / "s.json"
    path.write_text('[{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}]')

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", absent)
    refused(path, "pip install tokenizers", tokenizer="tokenizer.json")
