"""What the project writes as a trace, it reads back to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.request import Request
from traces import OpenWorkload, build_workload, read_trace, write_trace
from traces.write import SUFFIXES

requests_lists = st.lists(
    st.tuples(
        st.floats(0, 1e9), st.integers(1, 10**7), st.integers(1, 10**7),
        st.lists(st.integers(0, 2**63 - 1), max_size=4).map(tuple), st.integers(-1, 2**63 - 1)),
    min_size=1, max_size=20,
).map(lambda rows: [Request(i, *row) for i, row in enumerate(sorted(rows))])


def replay(path: Path) -> list[Request]:
    """Requests of a file, at the times it has."""
    workload = build_workload({"table": None, "path": str(path), "arrivals": "replay", "rate": None,
                               "requests": None})
    assert isinstance(workload, OpenWorkload)
    return workload.requests()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, suffix: str) -> None:
    """Requests that are written and replayed are the same requests, in every container."""
    folder = tmp_path_factory.mktemp("round")

    @given(requests_lists)
    def check(requests: list[Request]) -> None:
        path = folder / f"t{suffix}"
        assert write_trace(path, reversed(requests)) == len(requests)
        assert replay(path) == requests

    check()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_requests_give_equal_bytes(tmp_path: Path, suffix: str) -> None:
    """Writing twice gives the same file, under any name."""
    requests = [Request(i, i / 3, i + 1, i + 2) for i in range(100)]
    for name in ("a", "b"):
        write_trace(tmp_path / f"{name}{suffix}", requests)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_columns_without_content_are_left_out(tmp_path: Path) -> None:
    """Sessions and prefix blocks are written only where a request has one."""
    path = tmp_path / "t.csv"
    write_trace(path, [Request(0, 0.1, 2, 3)])
    assert path.read_text() == "arrival_s,prompt_tokens,output_tokens\n0.1,2,3\n"
    table = read_trace(path)
    assert (table.session, table.prefix) == (None, None)


@pytest.mark.parametrize(("name", "count", "match"), [
    ("t.txt", 1, "ends in"), ("none/t.csv", 1, "folder that exists"), ("t.csv", 0, "at least one request"),
])
def test_bad_targets(tmp_path: Path, name: str, count: int, match: str) -> None:
    """A wrong name, a missing folder or nothing to write is refused, and leaves nothing behind."""
    with pytest.raises(SpecError, match=match):
        write_trace(tmp_path / name, [Request(0, 0.0, 1, 1)][:count])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing breaks off, the file that was there stays whole."""
    path = tmp_path / "t.jsonl"
    write_trace(path, [Request(0, 0.0, 1, 1)])
    before = path.read_bytes()

    def broken(*_: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("traces.write.json.dumps", broken)
    with pytest.raises(OSError, match="disk full"):
        write_trace(path, [Request(0, 0.0, 2, 2)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
