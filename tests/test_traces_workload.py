"""Settings become workloads that are the same under every policy."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.request import Request
from traces import ClosedLoopWorkload, OpenWorkload, WorkloadConfig, build_workload

ROWS = [(0.0, 100, 10), (1.0, 200, 20), (1.0, 300, 30), (4.0, 5000, 40), (9.0, 500, 50)]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """A trace of five rows over nine seconds."""
    path = tmp_path / "t.csv"
    rows = "\n".join(",".join(map(str, row)) for row in ROWS)
    path.write_text(f"timestamp,prompt_tokens,output_tokens\n{rows}\n")
    return str(path)


def build(context: int | None = None, **settings: Any) -> OpenWorkload:
    """An open workload from settings."""
    workload = build_workload(settings, context)
    assert isinstance(workload, OpenWorkload)
    return workload


def from_trace(path: str, context: int | None = None, **settings: Any) -> OpenWorkload:
    """A replay of the trace, unless the settings say otherwise."""
    base = {"table": None, "path": path, "arrivals": "replay", "rate": None, "requests": None}
    return build(context, **(base | settings))


def closed(**settings: Any) -> ClosedLoopWorkload:
    """A closed loop from settings."""
    workload = build_workload({"arrivals": "closed", "rate": None} | settings)
    assert isinstance(workload, ClosedLoopWorkload)
    return workload


def test_open_requests() -> None:
    """Ids count up in order of arrival, and every value is a plain Python number."""
    requests = build(requests=500, rate=3.0).requests()
    assert [r.request_id for r in requests] == list(range(500))
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(requests))
    assert {type(r.arrival_s) for r in requests} == {float}
    assert {type(v) for r in requests for v in (r.prompt_tokens, r.output_tokens)} == {int}


def test_rate_and_lengths_are_independent() -> None:
    """Another rate or arrival process leaves lengths as they are, another table the arrivals."""
    base = build(requests=300)
    for other in (build(requests=300, rate=40.0), build(requests=300, arrivals="gamma"),
                  build(requests=300, arrivals="onoff")):
        assert np.array_equal(other.lengths.prompt_tokens, base.lengths.prompt_tokens)
        assert np.array_equal(other.lengths.output_tokens, base.lengths.output_tokens)
        assert not np.array_equal(other.arrival_s, base.arrival_s)
    assert np.array_equal(build(requests=300, table="humaneval").arrival_s, base.arrival_s)
    assert not np.array_equal(build(requests=300, seed=1).arrival_s, base.arrival_s)


def test_more_requests_begin_with_the_same_ones() -> None:
    """A longer run starts as the shorter one does."""
    assert build(requests=1000).requests()[:100] == build(requests=100).requests()


def test_duration_limits_open_arrivals() -> None:
    """All arrivals lie before the duration; with a count as well, whichever comes first."""
    whole = build(requests=None, duration_s=100.0, rate=5.0)
    assert whole.arrival_s[-1] < 100.0
    assert abs(len(whole) - 500) <= 4 * np.sqrt(500)
    assert len(build(requests=50, duration_s=100.0, rate=5.0)) == 50
    both = build(requests=5000, duration_s=100.0, rate=5.0)
    assert np.array_equal(both.arrival_s, whole.arrival_s)


def test_replay_keeps_times_and_breaks_ties_by_row(trace: str) -> None:
    """Recorded times are kept bit for bit, equal times in file order."""
    workload = from_trace(trace)
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in workload.requests()] == ROWS
    assert workload.rate_rps == pytest.approx(4 / 9)


def test_replay_at_a_rate(trace: str) -> None:
    """A rate stretches the times evenly, over the rows that are left."""
    workload = from_trace(trace, rate=2.0)
    assert workload.rate_rps == pytest.approx(2.0, rel=1e-12)
    assert workload.arrival_s / workload.arrival_s[-1] == pytest.approx(np.array([0, 1, 1, 4, 9]) / 9)
    fewer = from_trace(trace, 4096, rate=2.0, over_context="drop")
    assert (len(fewer), fewer.rate_rps) == (4, pytest.approx(2.0, rel=1e-12))


def test_replay_of_a_part(trace: str) -> None:
    """Rows can be skipped and cut by count and by time."""
    assert from_trace(trace, start=1, limit=3).arrival_s.tolist() == [0.0, 0.0, 3.0]
    assert len(from_trace(trace, requests=2)) == 2
    part = from_trace(trace, duration_s=4.0)
    assert (part.arrival_s.tolist(), part.notes) == ([0.0, 1.0, 1.0], ())
    assert from_trace(trace, duration_s=60.0).notes == ("the trace ended at 9 s, before duration_s=60",)
    with pytest.raises(SpecError, match=r"workload.requests=9 .*at most the 5 usable rows"):
        from_trace(trace, requests=9)


def test_own_times_start_where_they_were_recorded(tmp_path: Path) -> None:
    """A recorded run keeps its first arrival; a part of it starts at 0."""
    path = tmp_path / "own.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0.3,1,1\n0.7,1,1\n1.9,1,1\n")
    assert from_trace(str(path)).arrival_s.tolist() == [0.3, 0.7, 1.9]
    assert from_trace(str(path), start=1).arrival_s.tolist() == [0.0, 1.9 - 0.7]


def test_trace_lengths_with_other_arrivals(trace: str) -> None:
    """Lengths of a trace go with generated arrivals, at its own mean rate by default."""
    workload = from_trace(trace, arrivals="constant")
    assert workload.rate_rps == pytest.approx(4 / 9)
    assert workload.lengths.prompt_tokens.tolist() == [100, 200, 300, 5000, 500]
    with pytest.raises(SpecError, match=r"usable rows of the trace.*bootstrap"):
        from_trace(trace, arrivals="poisson", requests=6)
    many = from_trace(trace, arrivals="poisson", requests=600, order="bootstrap")
    assert set(many.lengths.prompt_tokens.tolist()) == {100, 200, 300, 5000, 500}
    short = from_trace(trace, arrivals="constant", rate=1.0, duration_s=50.0)
    assert (len(short), len(short.notes)) == (5, 1)


def test_traces_without_times(tmp_path: Path) -> None:
    """Lengths alone cannot be replayed and have no rate of their own."""
    path = tmp_path / "l.csv"
    path.write_text("prompt_tokens,output_tokens\n1,2\n3,4\n")
    with pytest.raises(SpecError, match=r"workload.arrivals='replay'.*has no times"):
        from_trace(str(path))
    with pytest.raises(SpecError, match=r"workload.rate=None"):
        from_trace(str(path), arrivals="poisson")
    assert len(from_trace(str(path), arrivals="poisson", rate=1.0)) == 2


@pytest.mark.parametrize(("policy", "lengths", "counts"), [
    ("reject", [(5000, 40)], {"over_context_to_reject": 1}),
    ("clamp", [(4056, 40)], {"over_context_clamped": 1}),
    ("drop", [], {"over_context_dropped": 1}),
])
def test_over_context(
    trace: str, policy: str, lengths: list[tuple[int, int]], counts: dict[str, int],
) -> None:
    """A request beyond the model's context is kept, shortened or dropped, and counted."""
    workload = from_trace(trace, 4096, over_context=policy)
    large = [(r.prompt_tokens, r.output_tokens) for r in workload.requests() if r.prompt_tokens > 500]
    assert (large, workload.counts, len(workload)) == (lengths, counts, 4 + len(lengths))


def test_counts_are_of_what_arrives(trace: str) -> None:
    """Rows beyond the end of the run are not counted."""
    assert from_trace(trace, 4096, requests=3).counts == {}
    with pytest.raises(SpecError, match="context of 4096 tokens"):
        from_trace(trace, 4096, over_context="error")


def test_output_alone_beyond_context_is_cut(trace: str) -> None:
    """Clamping leaves room for a prompt of one token."""
    workload = from_trace(trace, 16, over_context="clamp")
    assert [(r.prompt_tokens, r.output_tokens) for r in workload.requests()] == [
        (6, 10), (1, 15), (1, 15), (1, 15), (1, 15)]


def test_ranges_and_scales(trace: str) -> None:
    """Lengths are scaled first, then kept in range by clamping, dropping or an error."""
    clamped = from_trace(trace, prompt_scale=0.5, prompt_tokens_max=200, output_tokens_min=25)
    assert clamped.lengths.prompt_tokens.tolist() == [50, 100, 150, 200, 200]
    assert clamped.lengths.output_tokens.tolist() == [25, 25, 30, 40, 50]
    assert clamped.counts == {"prompt_tokens_clamped": 2, "output_tokens_clamped": 2}
    dropped = from_trace(trace, prompt_tokens_max=300, output_tokens_min=15, out_of_range="drop")
    assert dropped.lengths.prompt_tokens.tolist() == [200, 300]
    assert dropped.counts == {"prompt_tokens_dropped": 2, "output_tokens_dropped": 1}
    with pytest.raises(SpecError, match=r"request 3, prompt_tokens=5000.*\[1, 300\]"):
        from_trace(trace, prompt_tokens_max=300, out_of_range="error")
    with pytest.raises(SpecError, match="at least one"):
        from_trace(trace, prompt_tokens_min=6000, out_of_range="drop")


def test_generated_lengths_are_redrawn_when_dropped() -> None:
    """Dropping from a table still gives the number of requests asked for."""
    workload = build(requests=400, prompt_tokens_max=100, out_of_range="drop")
    assert (len(workload), workload.lengths.prompt_tokens.max() <= 100) == (400, True)
    assert workload.counts["prompt_tokens_dropped"] > 0
    fewer = build(requests=50, prompt_tokens_max=100, out_of_range="drop")
    assert fewer.requests() == workload.requests()[:50]
    with pytest.raises(SpecError, match="1 in 1000"):
        build(requests=5, prompt_tokens_min=4000, out_of_range="drop")


def test_prefix_blocks_follow_the_prompt(tmp_path: Path) -> None:
    """A shortened prompt keeps the blocks that it still reaches into; sessions come along."""
    path = tmp_path / "m.jsonl"
    rows = [{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]},
            {"timestamp": 1, "input_length": 100, "output_length": 5, "hash_ids": [4]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [r.prefix_hashes for r in from_trace(str(path)).requests()] == [(1, 2, 3), (4,)]
    shortened = from_trace(str(path), prompt_tokens_max=600).requests()
    assert [r.prefix_hashes for r in shortened] == [(1, 2), (4,)]
    rows[0]["session"] = rows[1]["session"] = 8
    path.write_text("\n".join(map(json.dumps, rows)))
    shortened = from_trace(str(path), prompt_tokens_max=600).requests()
    assert [(r.prefix_hashes, r.session) for r in shortened] == [((1,), 8), ((4,), 8)]


def test_fixed_lengths() -> None:
    """The fixed table gives every request the same lengths."""
    lengths = {"table": "fixed", "prompt_tokens": 7, "output_tokens": 3}
    workload = build(requests=4, arrivals="constant", rate=2.0, **lengths)
    assert workload.requests() == [Request(i, i / 2.0, 7, 3) for i in range(4)]


def test_description_identifies_the_workload() -> None:
    """The description is JSON, and its hash changes with arrivals, lengths and nothing else."""
    base = build(requests=200).describe()
    assert json.loads(json.dumps(base)) == base
    assert base["n"] == 200
    assert base["prompt_tokens"]["p50"] <= base["prompt_tokens"]["p95"]
    assert build(requests=200, name="other").describe()["sha256"] == base["sha256"]
    for change in ({"rate": 5.0}, {"seed": 1}, {"output_scale": 2.0}, {"requests": 199}):
        assert build(**({"requests": 200} | change)).describe()["sha256"] != base["sha256"]


def test_closed_loop_start() -> None:
    """Every user asks once after a think time; ids and times go up together."""
    first = closed(users=50, think_time_s=2.0, requests=1000).begin().initial()
    assert [r.request_id for r in first] == list(range(50))
    assert sorted(r.session for r in first) == list(range(50))
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(first))
    assert len({r.arrival_s for r in first}) == 50
    assert {r.arrival_s for r in closed(users=9).begin().initial()} == {0.0}


def test_closed_loop_goes_on_until_its_limits() -> None:
    """A user asks again a think time after the answer, until the count or the duration is reached."""
    run = closed(users=2, think="constant", think_time_s=1.5, requests=5).begin()
    assert [r.arrival_s for r in run.initial()] == [1.5, 1.5]
    again = run.next_request(1, 10.0)
    assert again is not None
    assert (again.request_id, again.arrival_s, again.session) == (2, 11.5, 1)
    assert [run.next_request(0, 12.0) is None for _ in range(3)] == [False, False, True]
    assert run.issued == 5
    timed = closed(users=1, think="constant", think_time_s=1.0, requests=None, duration_s=5.0).begin()
    assert len(timed.initial()) == 1
    assert timed.next_request(0, 3.5) is not None
    assert timed.next_request(0, 4.0) is None
    assert len(closed(users=10, requests=3).begin().initial()) == 3


def test_closed_loop_users_ask_the_same_in_any_order() -> None:
    """The k-th request of a user does not depend on how fast the others are served."""
    workload = closed(users=3, think_time_s=1.0, requests=3000)

    def history(order: list[int]) -> dict[int, list[tuple[int, int, float]]]:
        run = workload.begin()
        asked: dict[int, list[tuple[int, int, float]]] = {r.session: [] for r in run.initial()}
        for user in order:
            request = run.next_request(user, 0.0)
            assert request is not None
            asked[user].append((request.prompt_tokens, request.output_tokens, request.arrival_s))
        return asked

    assert history([0] * 600 + [1, 2] * 600) == history([2, 1] * 600 + [0] * 600)


def test_closed_loop_runs_repeat_and_describe_themselves() -> None:
    """Two runs of one workload are equal, and the description does not depend on a run."""
    workload = closed(users=4, think_time_s=1.0)
    before = workload.describe()
    runs = [workload.begin() for _ in range(2)]
    assert runs[0].initial() == runs[1].initial()
    for step in range(2000):
        assert runs[0].next_request(step % 4, float(step)) == runs[1].next_request(step % 4, float(step))
    assert workload.describe() == before == closed(users=4, think_time_s=1.0).describe()
    assert json.loads(json.dumps(before)) == before
    assert (before["closed"], before["n"]) == (True, 1000)


def test_closed_loop_with_a_common_queue(trace: str) -> None:
    """Whoever asks gets the next row, and users begin one after the other."""
    settings = {"table": None, "path": trace, "users": 3, "requests": 8, "stagger_s": 0.5}
    rows = [(r.prompt_tokens, r.output_tokens) for r in closed(**settings).begin().initial()]
    run = closed(**settings, common_queue=True).begin()
    first = run.initial()
    assert [r.arrival_s for r in first] == [0.0, 0.5, 1.0]
    assert [(r.prompt_tokens, r.output_tokens) for r in first] == rows
    later = [run.next_request(2, 4.0), run.next_request(2, 5.0), run.next_request(0, 6.0)]
    own = closed(**settings).begin()
    own.initial()
    expected = [own.next_request(user, 4.0) for user in (0, 1, 2)]
    assert [(r.prompt_tokens, r.output_tokens) for r in later if r] == [
        (r.prompt_tokens, r.output_tokens) for r in expected if r]
    with pytest.raises(SpecError, match=r"workload\.common_queue"):
        closed(**settings, common_queue=True, think_time_s=1.0)
    same = closed(**settings, common_queue=True, think_time_s=2.0, think="constant").begin()
    assert [r.arrival_s for r in same.initial()] == [2.0, 2.5, 3.0]
    after = [same.next_request(2, 4.0), same.next_request(2, 9.0)]
    assert [(r.arrival_s, r.prompt_tokens) for r in after if r] == [
        (6.0, later[0].prompt_tokens if later[0] else 0), (11.0, later[1].prompt_tokens if later[1] else 0)]


def test_closed_loop_over_a_trace(trace: str) -> None:
    """A trace is gone round again by the users of a closed loop."""
    run = closed(table=None, path=trace, users=2, requests=8).begin()
    prompts = {r.session: [r.prompt_tokens] for r in run.initial()}
    for user in (0, 0, 0, 1, 1):
        request = run.next_request(user, 1.0)
        assert request is not None
        prompts[user].append(request.prompt_tokens)
    assert prompts == {0: [100, 300, 500, 200], 1: [200, 5000, 100]}


@pytest.mark.parametrize(("user", "now_s"), [(-1, 0.0), (2, 0.0), (0, float("nan")), (0, -1.0)])
def test_closed_loop_refuses_wrong_calls(user: int, now_s: float) -> None:
    """A user or a time that cannot be is an error of the driver."""
    with pytest.raises(SpecError):
        closed(users=2).begin().next_request(user, now_s)


@pytest.mark.parametrize(("settings", "match"), [
    ({"rate": 0.0}, "workload.rate=0.0"),
    ({"rate": -1.0}, "workload.rate=-1.0"),
    ({"rate": float("nan")}, "workload.rate=nan"),
    ({"rate": float("inf")}, "workload.rate=inf"),
    ({"rate": "4"}, "workload.rate='4'"),
    ({"rate": None}, "workload.rate=None"),
    ({"rates": 4.0}, "workload.rates=4.0.*one of the keys name, table"),
    ({"table": None}, "workload.table=None"),
    ({"path": "x.csv"}, "workload.table='sharegpt'.*x.csv"),
    ({"table": None, "path": "none.csv"}, "workload.path='none.csv'.*an existing file"),
    ({"table": "sharegtp"}, "workload.table='sharegtp'.*sharegpt"),
    ({"subset": ["x"]}, "workload.subset='x'"),
    ({"table": "fixed", "prompt_tokens": 1, "output_tokens": 1, "subset": ["x"]}, "workload.subset"),
    ({"table": "fixed"}, "workload.prompt_tokens=None"),
    ({"table": "fixed", "prompt_tokens": 0, "output_tokens": 1}, "workload.prompt_tokens=0"),
    ({"prompt_tokens": 5}, "workload.prompt_tokens=5.*null unless table=fixed"),
    ({"arrivals": "uniform"}, "workload.arrivals='uniform'.*poisson, gamma"),
    ({"arrivals": "replay"}, "workload.arrivals='replay'"),
    ({"arrivals": "closed"}, "workload.rate=4.0.*null for a closed loop"),
    ({"arrivals": "closed", "rate": None, "requests": None}, "workload.requests=None"),
    ({"arrivals": "closed", "rate": None, "users": 0}, "workload.users=0"),
    ({"arrivals": "onoff", "on_s": 1e-9}, "workload.on_s=1e-09"),
    ({"requests": 0}, "workload.requests=0"),
    ({"requests": 2.5}, "workload.requests=2.5"),
    ({"requests": 10**8}, "workload.requests=100000000"),
    ({"requests": None}, "workload.requests=None"),
    ({"duration_s": 0.0}, "workload.duration_s=0.0"),
    ({"duration_s": 1e-9}, "workload.duration_s=1e-09.*one arrival"),
    ({"cv": 0.0}, "workload.cv=0.0"),
    ({"cv": 1000.0}, "workload.cv=1000.0"),
    ({"off_share": 1.0}, "workload.off_share=1.0"),
    ({"think_time_s": -1.0}, "workload.think_time_s=-1.0"),
    ({"think": "long"}, "workload.think='long'"),
    ({"seed": -1}, "workload.seed=-1"),
    ({"seed": 2**64}, "workload.seed"),
    ({"prompt_scale": 0.0}, "workload.prompt_scale=0.0"),
    ({"prompt_tokens_min": 0}, "workload.prompt_tokens_min=0"),
    ({"prompt_tokens_min": 9, "prompt_tokens_max": 8}, "workload.prompt_tokens_max=8"),
    ({"out_of_range": "ignore"}, "workload.out_of_range='ignore'"),
    ({"over_context": "ignore"}, "workload.over_context='ignore'"),
    ({"order": "random"}, "workload.order='random'"),
    ({"format": "excel"}, "workload.format='excel'"),
    ({"columns": {"x": "y"}}, "workload.columns='x'"),
])
def test_bad_settings(settings: dict[str, Any], match: str) -> None:
    """Settings out of range name key, value and what is allowed."""
    with pytest.raises(SpecError, match=match):
        build_workload(settings)


def test_bad_context() -> None:
    """A context that holds no request is refused."""
    with pytest.raises(SpecError, match="context_limit_tokens=1"):
        build_workload({}, 1)


def groups(project_root: Path) -> dict[str, Path]:
    """Files of the configuration group by name."""
    return {path.stem: path for path in (project_root / "conf" / "workload").glob("*.yaml")}


def test_every_group_builds(project_root: Path, trace: str) -> None:
    """Each YAML of conf/workload fits the schema, opens with an example, and builds."""
    found = groups(project_root)
    assert {"sharegpt", "humaneval", "longbench", "azure_conv", "azure_code", "mooncake_conv", "trace",
            "closed"} <= set(found)
    for name, path in found.items():
        text = path.read_text()
        assert text.startswith("#")
        if name == "prompts":  # texts, for measured runs
            assert f"python -m hetis_exec replay model.path=... workload={name}" in text
            continue
        assert f"python -m hetis_sim run workload={name}" in text
        settings = OmegaConf.merge(OmegaConf.structured(WorkloadConfig), OmegaConf.create(text))
        if name == "trace":
            settings.path = trace
        config = OmegaConf.to_object(settings)
        assert isinstance(config, WorkloadConfig)
        assert build_workload(config, 4096).describe() == build_workload(settings, 4096).describe()


def test_defaults_are_the_sharegpt_group(project_root: Path) -> None:
    """The dataclass and the default group say the same."""
    settings = OmegaConf.to_container(OmegaConf.load(groups(project_root)["sharegpt"]))
    assert dataclasses.replace(WorkloadConfig(), **settings) == WorkloadConfig()


def test_real_traces_replay_without_loss(shared_data: Path) -> None:
    """Every row of the public traces becomes a request at its own time."""
    folder = shared_data / "traces"
    for path, rows, rate in (
        (folder / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.csv.gz", 19366, 5.53),
        (folder / "mooncake" / "conversation_trace.jsonl.gz", 12031, 3.40),
    ):
        workload = from_trace(str(path), 131072)
        assert (len(workload.requests()), workload.notes) == (rows, ())
        assert workload.rate_rps == pytest.approx(rate, abs=0.01)
