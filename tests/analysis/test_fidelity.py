"""Simulated against measured runs: readers on made-up files, statistics of errors, the command, real data."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.__main__ import main
from analysis.fidelity.case import Case, DataSet, csv_rows
from analysis.fidelity.command import DATA, SETS, compare, read_sets
from analysis.fidelity.errors import bootstrap, errors, relative, summary
from analysis.fidelity.measure.replay import early_throughput, figures, profile_words, thin
from analysis.fidelity.page import Compared, group_table, overview, page_text, pooled, scatters, write_page
from analysis.fidelity.sets import curves, helix, tgis, tgis_engine, vllm
from analysis.fidelity.sets.names import model_name
from analysis.fidelity.switches import SWITCHES, farthest, without
from analysis.paper.store import Job, Store
from hetis_sim.config import RunConfig, compose
from hetis_sim.cost.load import load_cost_model
from hetis_sim.run import prepare
from hetis_sim.spec.cluster import LinkSpec
from hetis_sim.spec.errors import HetisError, SpecError
from hetis_sim.spec.gpus import gpu
from hetis_sim.spec.links import LINKS

# -- made-up files -----------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """A file, packed where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def vllm_run(folder: Path, hardware: str = "RTX4090", tp: int = 1, replicas: int = 1) -> None:
    """Three requests, whose engine's clock is 1,000 s behind and saw them 10 ms late at best."""
    meta = {"model": "meta-llama/Llama-3.1-8B", "engine_kwargs": {
        "tensor_parallel_size": tp, "data_parallel_size": replicas, "enable_expert_parallel": replicas > 1,
        "max_num_seqs": 8, "max_num_batched_tokens": 512},
        "kv_cache": {"num_kv_tokens": 4096, "block_size": 16, "gpu_memory_utilization": 0.85}}
    config = {"link_bw": 16, "link_latency": 20000, "nodes": [{"instances": [
        {"hardware": hardware, "npu_mem": {"mem_util": 0.8}}]}]}
    rows = [{"input_toks": 100, "output_toks": n + 2, "arrival_time": 5000.0 + n,
             "queued_ts": 4000.01 + n * 1.001, "first_token_ts": 4000.51 + n, "last_token_ts": 4001.51 + n}
            for n in range(3)]
    base = folder / vllm.FOLDER / f"{hardware}_Llama"
    write(base / "meta.json", json.dumps(meta))
    write(base / "config.json", json.dumps(config))
    write(base / "requests.jsonl.gz", "\n".join(json.dumps(row) for row in rows))


TGIS_COLUMNS = ("model_key", "gpu", "tp", "users", "n_all", "in_mean", "out_mean", "lat_mean_ms",
                "lat_p50_ms", "lat_p95_ms", "lat_p99_ms", "ttft_p50_ms", "ttft_p95_ms", "itl_mean_ms",
                "error_rate", "out_tok_per_s")


def tgis_points(folder: Path, *rows: Sequence[object]) -> None:
    """Points of the closed loops."""
    lines = [TGIS_COLUMNS, *rows]
    write(folder / tgis.FOLDER / tgis.FILE, "\n".join(",".join(map(str, line)) for line in lines))


def tgis_point(model: str = "llama-7b", tp: int = 1, users: int = 1, rate: float = 0.0) -> list[object]:
    """One of them."""
    return [model, "H100", tp, users, 40, 100.0, 20.0, 200.0, 120.0, 520.0, 1020.0, 20.0, 30.0, 10.0, rate,
            95.0]


HELIX_COLUMNS = ("run", "query_id", "t_dispatch", "t_first_token", "t_last_token", "prompt_tokens",
                 "generated_tokens", "output_len", "decode_lat_mean_s")


def helix_runs(folder: Path) -> None:
    """Two machines with T4; three requests at a time, one of which never begins; a run without layout."""
    rows: list[Sequence[object]] = [
        ("real_llama30b/separate_offline/t4", 0, 0.1, 1.1, 11.1, 50, 11, 11, 1.0),
        ("real_llama30b/separate_offline/t4", 1, 0.2, 1.2, 11.2, 60, 6, 20, 2.0),
        ("real_llama30b/separate_offline/t4", 2, 0.3, 2.3, 10.3, 70, 5, 5, 2.0),
        ("real_llama30b/separate_offline/t4", 3, 10.31, "", "", 80, "", "", ""),
        ("real_llama30b/helix_online/l4", 0, 0.1, 1.1, 11.1, 50, 11, 11, 1.0)]
    base = folder / helix.FOLDER
    write(base / "requests.csv.gz", "\n".join(",".join(map(str, line)) for line in (HELIX_COLUMNS, *rows)))
    solution = "[Settings]\noffset=2\n[Solution]\ncompute_node_2=[0, 1]\ncompute_node_3=[2, 3, 4]\n"
    write(base / "placement" / "layout_llama30b__separate__t4_solution_file.ini.gz", solution)
    cluster = "[compute_node_2]\nkv_cache_capacity=2000\n[compute_node_3]\nkv_cache_capacity=2400\n"
    write(base / "placement" / "layout_llama30b__separate__t4_simulator_cluster.ini.gz", cluster)


def curve_files(folder: Path) -> None:
    """A curve of 10 tokens in the first half second, 90 in the next, and nothing more."""
    base = folder / curves.FOLDER
    write(base / curves.REQUESTS, "input_toks\toutput_toks\tarrival_time_ns\n10\t100\t500000000\n")
    for name in curves.CARDS:
        write(base / f"vllm-{name}.csv", "time duration,prompt throughput,generation throughput\n"
                                         "0,5,20\n0.5,0,180\n1,0,0\n")


def configuration(case: Case) -> RunConfig:
    """What a run is simulated with."""
    return compose(*case.words, "workload=trace", "workload.path=requests.csv")


# -- readers -----------------------------------------------------------------------------------


def test_vllm_clocks_are_aligned_and_settings_taken_over(tmp_path: Path) -> None:
    """Both clocks meet where a request was queued soonest; the run's own limits make the configuration."""
    vllm_run(tmp_path)
    (case,) = vllm.read(tmp_path).cases
    assert case.rows == [(0.0, 100, 2), (1.0, 100, 3), (2.0, 100, 4)]
    assert case.measured["mean_ttft_s"] == pytest.approx(0.5)
    assert case.measured["mean_e2el_s"] == pytest.approx(1.5)
    assert case.measured["mean_tpot_s"] == pytest.approx((1.0 + 0.5 + 1 / 3) / 3)
    assert case.measured["output_throughput"] == pytest.approx(9 / 3.5)
    config = configuration(case)
    assert config.scheduler.cache_tokens == 4096
    assert (config.scheduler.chunk_tokens, config.scheduler.max_batch_requests) == (512, 8)
    assert config.scheduler.memory_utilization == 0.85
    assert config.scheduler.joint_attention
    assert case.links == {vllm.LINK: (1 / 16e9, 2e-5)}


def test_vllm_engines_with_experts_in_common_are_one_here(tmp_path: Path) -> None:
    """Their budgets add up; a card that nobody knows leaves its run out."""
    vllm_run(tmp_path, "RTXPRO6000", replicas=2)
    vllm_run(tmp_path, "TPUv9")
    found = vllm.read(tmp_path)
    (case,) = found.cases
    config = configuration(case)
    engine = config.scheduler
    assert (config.policy["tp"], engine.chunk_tokens, engine.max_batch_requests) == (2, 1024, 16)
    assert len(found.left_out) == 1
    assert "TPUv9" in found.left_out[0]


def test_tgis_requests_are_those_of_the_records(tmp_path: Path) -> None:
    """In their order and as long as in the table; points with errors and other engines are left out."""
    tgis_points(tmp_path, tgis_point(), tgis_point(users=8), tgis_point(users=64, rate=0.01),
                tgis_point("google__flan-t5-xl"), tgis_point("bigcode__starcoder", tp=2))
    found = tgis.read(tmp_path)
    assert [case.name for case in found.cases] == ["llama-7b 1 x H100, 1 users", "llama-7b 1 x H100, 8 users"]
    assert len(found.left_out) == 2
    assert found.cases[0].measured["mean_tpot_s"] == pytest.approx(0.01)
    assert len(found.cases[0].rows) == 100
    asked = tgis.Asked.read(tgis.REQUESTS)
    rows = asked.requests(1, 702)
    assert found.cases[0].rows == rows[:100]
    # The averages that the table has for Llama-7B on one H100 with one user.
    assert np.mean([row[1] for row in rows]) == pytest.approx(121.5655, abs=1e-4)
    assert np.mean([row[2] for row in rows]) == pytest.approx(18.4615, abs=1e-4)
    assert asked.requests(1, 703)[702] == rows[0]
    with pytest.raises(HetisError, match=r"users=3.*1, 2, 4, 8"):
        asked.requests(3, 1)


def test_tgis_hosts_and_copies_go_with_the_card() -> None:
    """Copies are limited by integer arithmetic on big cards, by memory on small ones; graphs are for one."""
    assert tgis_engine.copy_rate("H100", "h100-sxm") == pytest.approx(4 * 132 * 64 * 1.98e9 / 36)
    assert tgis_engine.copy_rate("T4", "t4") == pytest.approx(0.8 * gpu("t4").memory_bandwidth_bytes_per_s)

    def values(*given: object) -> dict[str, str]:
        return dict(word.split("=") for word in tgis_engine.words(*given))  # type: ignore[arg-type]

    one, two = values("H100", "h100-sxm", 1, 1), values("H100", "h100-sxm", 2, 16)
    old = values("A100", "a100-40gb", 2, 16)
    assert (float(one["cost.cache_copies"]), float(two["cost.cache_copies"])) == (0.0, 1.7)
    graphs_s = float(one["cost.host_per_prompt_s"]) - float(two["cost.host_per_prompt_s"])
    assert graphs_s == pytest.approx(0.044 * 65e-3, rel=1e-3)
    for key in ("base_s", "per_sequence_s", "per_prompt_s", "prompt_step_s", "launch_s_per_layer"):
        ratio = float(old[f"cost.host_{key}"]) / float(two[f"cost.host_{key}"])
        assert ratio == pytest.approx(1.4, rel=1e-3)


def test_names_of_models_lose_only_what_says_nothing() -> None:
    """A suffix such as instruct goes; one that may change weights stays, and such a model is not known."""
    assert model_name("mistralai/Mixtral-8x7B-Instruct-v0.1") == "mixtral-8x7b"
    assert model_name("Qwen/Qwen3-30B-A3B-Instruct-2507") == "qwen3-30b-a3b"
    assert model_name("meta-llama/Llama-3.1-70B-Instruct") == "llama3.1-70b"
    for name in ("Qwen/Qwen3-8B-FP8", "microsoft/Phi-mini-MoE-instruct", "instruct"):
        with pytest.raises(LookupError, match=name):
            model_name(name)


def test_helix_in_flight_and_layouts(tmp_path: Path) -> None:
    """Those launched before the first has ended stay in flight; layers are where the solution has them."""
    helix_runs(tmp_path)
    found = helix.read(tmp_path)
    (case,) = found.cases
    assert "helix_online" in found.left_out[0]
    config = configuration(case)
    assert (config.workload.users, config.workload.common_queue) == (3, True)
    assert config.policy["ranges"] == [[0, 2], [2, 3]]
    assert config.scheduler.cache_tokens == 800
    assert config.scheduler.memory_utilization == 0.8
    assert case.until_s == 11.2
    assert case.measured["output_throughput"] == pytest.approx(22 / 11.2)
    assert case.measured["mean_tpot_s"] == pytest.approx(5 / 3)
    assert [row[2] for row in case.rows] == [11, 20, 5, 11]
    assert helix.in_flight([0.1, 0.2, 5.0]) == 2
    assert helix.in_flight([4.0]) == 1


def test_curves_leave_out_their_tail(tmp_path: Path) -> None:
    """90 of 100 tokens are there after half a second and 80 of 90 parts of another one."""
    curve_files(tmp_path)
    found = curves.read(tmp_path)
    assert len(found.cases) == 4
    assert found.cases[0].measured["output_throughput"] == pytest.approx(90 / (0.5 + 0.5 * 80 / 90))
    assert configuration(found.cases[0]).model.name == "opt-6.7b"
    assert [case.collectives for case in found.cases] == [{}, {}, *[{"rtx3090": "l40s"}] * 2]
    hosts = [configuration(case).cost for case in found.cases]
    assert [cost.host_base_s for cost in hosts] == [5e-3, 5e-3, 10e-3, 10e-3]
    # Output of a request by RFC 6913, and the server's share beside it.
    assert hosts[0].host_per_sequence_s == hosts[3].host_per_sequence_s
    assert hosts[0].host_per_sequence_s == pytest.approx(3.2e-3 / 31 * 62 / 29, rel=0.06)


def test_collectives_of_another_card_stand_for_those_of_one(tmp_path: Path) -> None:
    """A profile of the run has them, beside stated links; without either there is none."""
    assert profile_words(tmp_path, {}, {}) == []
    (word,) = profile_words(tmp_path, {"mine": (1e-9, 2e-5)}, {"rtx3090": "l40s"})
    paths = word.removeprefix("cost.profiles=[").removesuffix("]").split(", ")
    link, card, other = LINKS["pcie4x16"], gpu("rtx3090"), gpu("l40s")
    here, shipped = load_cost_model(profiles=paths), load_cost_model()
    size_bytes = 600_000
    seconds = here.all_reduce_s(card, link, size_bytes, 4)
    assert seconds == shipped.all_reduce_s(other, link, size_bytes, 4)
    assert seconds > 1.5 * shipped.all_reduce_s(card, link, size_bytes, 4)
    stated = LinkSpec("mine", 1e9, 2e-5)
    assert here.transfer(stated).seconds(1_000_000) == pytest.approx(1e-3 + 2e-5)


@pytest.mark.parametrize(("break_it", "says"), [
    (lambda base: (base / vllm.FOLDER / "RTX4090_Llama" / "config.json").unlink(), "config.json"),
    (lambda base: write(base / vllm.FOLDER / "RTX4090_Llama" / "requests.jsonl.gz", "{]"), "not JSON"),
    (lambda base: write(base / vllm.FOLDER / "RTX4090_Llama" / "requests.jsonl.gz", '{"input_toks": "x"}'),
     "input_toks='x'"),
    (lambda base: write(base / tgis.FOLDER / tgis.FILE, "model_key,gpu\nllama-7b,H100"), "no column tp"),
    (lambda base: write(base / curves.FOLDER / "vllm-gpt7b.csv", "a\n1"), "no column time duration")])
def test_faulty_files_are_named(tmp_path: Path, break_it: object, says: str) -> None:
    """With what is wrong in them."""
    vllm_run(tmp_path)
    tgis_points(tmp_path, tgis_point())
    curve_files(tmp_path)
    break_it(tmp_path)  # type: ignore[operator]
    with pytest.raises(HetisError, match=says):
        read_sets(tmp_path)


# -- figures -----------------------------------------------------------------------------------


def test_errors_are_relative_and_signed() -> None:
    """Median, 95th percentile, and the largest first; what is not positive has none."""
    found = errors({"a": (10.0, 11.0), "b": (10.0, 8.0), "c": (10.0, 10.5), "d": (0.0, 3.0)})
    assert found is not None
    assert (found.n, found.signed_median, found.median) == (3, pytest.approx(0.05), pytest.approx(0.1))
    assert found.p95 == pytest.approx(0.19)
    assert [name for name, _ in found.worst] == ["b", "a", "c"]
    assert found.worst[0][1] == pytest.approx(-0.2)
    low, high = found.interval
    assert 0.05 <= low <= found.median <= high <= 0.2 + 1e-12
    assert errors({}) is None
    assert relative(4.0, 5.0) == pytest.approx(0.25)
    assert summary("ttft", [1.0, 2.0, 3.0])["p50_ttft_s"] == 2.0


def test_intervals_draw_machines_not_runs() -> None:
    """Ten runs of one machine say no more of others than one of them."""
    alone = {"a, 1": 0.1, "b, 1": 0.3, "c, 1": 0.2}
    crowded = {**alone, **{f"a, {n}": 0.1 for n in range(2, 11)}}
    assert bootstrap(alone) == bootstrap({name: -error for name, error in alone.items()}) == (0.1, 0.3)
    assert bootstrap(crowded)[1] == 0.3
    assert bootstrap({f"{n}": 0.1 for n in range(9)} | {"x": 0.3})[1] < 0.3
    assert bootstrap({"a, 1": 0.1, "a, 2": 0.3}) == (pytest.approx(0.2), pytest.approx(0.2))


def test_what_had_happened_by_the_end_of_the_record_counts() -> None:
    """One request has ended, one is half through, one has not begun."""
    columns = [np.array(values) for values in ([0.0, 0.0, 0.0], [1.0, 1.0, 20.0], [5.0, 19.0, 30.0],
                                               [9.0, 19.0, 5.0])]
    found = figures(*columns, until_s=10.0, token_weighted=False)
    assert found["metrics"]["output_throughput"] == pytest.approx((9 + 10) / 10.0)
    assert found["samples"]["ttft"] == [1.0, 1.0]
    assert found["samples"]["tpot"] == pytest.approx([0.5, 1.0])
    assert found["samples"]["e2el"] == [5.0]
    weighted = figures(*columns, until_s=None, token_weighted=True)["metrics"]
    assert weighted["mean_tpot_s"] == pytest.approx((4 + 18 + 10) / (8 + 18 + 4))
    assert early_throughput(9 / 33, *columns) == pytest.approx(9 / 4.0, rel=0.25)
    assert len(thin(list(range(1000)))) == 201


# -- the command -------------------------------------------------------------------------------


def test_a_missing_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the key, the path and what is expected; so are a folder of other things and an unknown set."""
    assert main(["fidelity", "--data", str(tmp_path / "none")]) == 2
    assert f"data='{tmp_path / 'none'}' is not allowed" in capsys.readouterr().err
    assert main(["fidelity", "--data", str(tmp_path)]) == 2
    assert vllm.FOLDER in capsys.readouterr().err
    assert main(["fidelity", "--data", str(tmp_path), "--only", "tgis"]) == 2
    assert tgis.FOLDER in capsys.readouterr().err
    assert main(["fidelity", "--only", "mine"]) == 2
    assert "only='mine'" in capsys.readouterr().err
    assert main(["fidelity", "--docs", "--quick"]) == 2


def test_the_command_writes_page_tables_and_pictures(tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """All of it from made-up runs, and a second time from what was kept."""
    vllm_run(tmp_path)
    tgis_points(tmp_path, tgis_point())
    out = tmp_path / "out"
    words = ["fidelity", "--data", str(tmp_path), "--out", str(out), "--workers", "1"]
    assert main(words) == 0
    text = (out / "fidelity.md").read_text()
    assert "Simulated here against measured by others" in text
    assert "1 x H100, 1 users" in text
    assert (out / "figures" / "scatter-throughput.svg").is_file()
    document = json.loads((out / "fidelity.json").read_text())
    assert set(document) == {"vllm", "tgis"}
    assert document["vllm"]["errors"]["mean_ttft_s"]["n"] == 1
    (without_one,) = document["tgis"]["switched"].values()
    assert set(without_one) == set(SWITCHES["tgis"])
    (simulated,) = (float(row["simulated"]) for row in csv_rows(out / "points.csv", "simulated")
                    if (row["data_set"], row["metric"]) == ("tgis", "mean_tpot_s"))
    assert without_one["queueing of kernels"]["mean_tpot_s"] < 0.9 * simulated
    assert "| run | with all | without copies of the cache |" in text
    with (out / "points.csv").open() as file:
        points = list(csv.DictReader(file))
    assert {row["metric"] for row in points if row["data_set"] == "tgis"} >= {"output_throughput",
                                                                              "mean_tpot_s"}
    assert all(float(row["simulated"]) > 0 for row in points)
    capsys.readouterr()
    assert main(words) == 0
    assert ": 0 of" not in capsys.readouterr().err
    assert (out / "fidelity.md").read_text() == text


def test_many_runs_are_tabled_by_groups() -> None:
    """With the errors of each group alone, and those of all data sets together in the overview."""
    cases = [Case(f"run {n}", [], [], {"output_throughput": 10.0}, group="few" if n < 5 else "many")
             for n in range(20)]
    runs = [(case, {"metrics": {"output_throughput": 11.0 if case.group == "few" else 8.0}}, "")
            for case in cases]
    given = DataSet("x", "X", "About.", [("a", "b", "c")], cases)
    text = group_table(Compared(given, runs))
    assert "| few | 5 | 10 % (+10 %) |" in text
    assert "| many | 15 | 20 % (-20 %) |" in text
    other = Compared(DataSet("y", "Y", "About.", [], cases[:5]), runs[:5])
    everything = pooled([Compared(given, runs), other])["output_throughput"]
    assert (everything.n, everything.median) == (25, pytest.approx(0.2))
    (low, high) = everything.interval
    assert (low, high) == (pytest.approx(0.1), pytest.approx(0.2))
    assert "| all runs | 20 % [10, 20 %] (-20 %, n 25) |" in overview([Compared(given, runs), other])


def test_mechanisms_are_taken_away_from_the_runs_farthest_off() -> None:
    """The largest error of either metric counts; what is taken away replaces the words of the run."""
    first, second = {"a": (1.0, 1.1), "b": (1.0, 1.0)}, {"a": (1.0, 0.95), "b": (1.0, 0.5)}
    assert farthest([first, second], 1) == ["b"]
    assert farthest([first, second, {}], 5) == ["b", "a"]
    case = Case("x", ["cost.host_base_s=1e-2"], [], {}, collectives={"rtx3090": "l40s"})
    shorter = without(case, SWITCHES["curves"]["host time of four cards"])
    assert (shorter.words[-1], shorter.collectives) == ("cost.host_base_s=5e-3", case.collectives)
    assert without(case, SWITCHES["curves"]["collectives through the host"]) == replace(case, collectives={})
    assert set(SWITCHES) == set(SETS)


def test_a_run_that_cannot_be_simulated_is_said_so(tmp_path: Path) -> None:
    """Its reason is on the page, and the others' figures are there."""
    given = DataSet("x", "X", "About.", [("a", "b", "c")], [
        Case("too large", ["model=llama2-70b", "cluster=rtx4090", "policy=vllm"], [(0.0, 5, 5)],
             {"output_throughput": 1.0})])
    compared = compare(given, Store(tmp_path, 1))
    assert "does not fit" in compared.runs[0][2]
    text = page_text([compared], scatters([compared]), "figures", quick=True)
    assert "too large: " in text
    assert "quick run" in text
    write_page(tmp_path / "page.md", tmp_path / "figures", [compared])
    assert compared.document()["failed"]


def test_jobs_of_other_packages_have_other_keys() -> None:
    """Equal names and arguments in two packages are two jobs."""
    assert Job("replay.run").key != Job("replay.run", package="analysis.fidelity.measure").key


def test_given_ranges_of_nodes_are_checked(tmp_path: Path) -> None:
    """One range for each device, passing all layers."""
    words = ("model=llama2-13b", "cluster=a100x4", "policy=helix", "policy.tp_max=1",
             "policy.placement=given", "requests=5", "cost.kind=roofline")
    mesh = prepare(compose(*words, "policy.ranges=[[0,20],[20,20],[],[]]")).plan.mesh
    assert mesh is not None
    held = [(node.first_layer, node.layers, node.devices) for node in mesh.nodes]
    assert held == [(0, 20, (0,)), (20, 20, (1,))]
    for ranges, says in (("[[0,40]]", "one range for each of 4"), ("[[0,20],[25,15],[],[]]", "pass not all "
                                                                                             "40"),
                         ("[[0],[],[],[]]", "first layer, layers")):
        with pytest.raises(HetisError, match=says):
            prepare(compose(*words, f"policy.ranges={ranges}"))
    with pytest.raises(SpecError, match=r"policy\.ranges"):
        prepare(compose(*words))


# -- real data ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the optional folder ../shared/data is not here")
def test_real_runs_come_out_within_bounds(tmp_path: Path) -> None:
    """A guard against changes for the worse: one and a half times the errors of the day it was written."""
    store = Store(tmp_path, 1)
    bounds = {"vllm": {"output_throughput": 0.05, "mean_tpot_s": 0.07, "mean_e2el_s": 0.07},
              "helix": {"output_throughput": 0.06, "mean_tpot_s": 0.14}}
    for name, limits in bounds.items():
        found = SETS[name][0](DATA)
        compared = compare(found, store)
        for metric, limit in limits.items():
            error = compared.errors()[metric]
            assert error.median <= limit, (name, metric, error)
