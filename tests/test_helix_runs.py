"""Helix from a configuration to a run folder: the printed plan, the record, physics, and who refuses it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.report import build_report
from analysis.report.build import ReportOptions
from hetis_sim import load_run, simulate
from hetis_sim.config import compose
from hetis_sim.control.mesh.controller import MeshController
from hetis_sim.control.mesh.timing import NodeParts, NodeTimer
from hetis_sim.control.mesh.walk import NodeStep
from hetis_sim.control.step import StepKind
from hetis_sim.cost.floor import (
    decode_floor_s_per_byte,
    dense_layer_floor_s,
    head_floor_s,
    prefill_attention_floor_s,
)
from hetis_sim.metrics.checks import record_violations
from hetis_sim.policies.plan import SINK
from hetis_sim.report import print_plan
from hetis_sim.run import make_simulation, prepare
from hetis_sim.sim.mesh import Mesh
from hetis_sim.spec.errors import SpecError

WORDS = ("policy=helix", "model=llama2-13b", "cluster=a100-t4", "cost.kind=roofline", "requests=25", "rate=4",
         "policy.tp_max=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of Helix on two kinds of cards, its invariants checked after every event."""
    path: Path = tmp_path_factory.mktemp("helix") / "run"
    simulate(*WORDS, "sim.debug=true", "sim.log_decisions=true", "sim.timeline=true", output=path)
    return path


def test_the_record_is_sound_and_says_where_layers_are(folder: Path) -> None:
    """The plan has nodes and edges; cards of nodes are primaries; rows of tables agree."""
    run = load_run(folder)
    assert record_violations(run.records()) == []
    mesh = run.plan["mesh"]
    assert run.plan["instances"] == []
    assert {node["first_layer"] for node in mesh["nodes"]} >= {0}
    used = {device for node in mesh["nodes"] for device in node["devices"]}
    assert {n for n, role in enumerate(run.devices["role"]) if role == "primary"} == used
    assert (run.requests["status"] == "finished").all()
    made = int(run.requests["output_tokens"].sum())
    assert int(run.steps["decode_tokens"].sum()) == made - len(run.requests)
    assert int(run.steps["prefill_tokens"].sum()) == int(run.requests["prompt_tokens"].sum())
    assert {entry["kind"] for entry in run.decisions()} == {"path"}


def test_the_same_words_give_the_same_folder(folder: Path, tmp_path: Path) -> None:
    """Byte for byte, the decisions and the timeline included."""
    simulate(*WORDS, "sim.log_decisions=true", "sim.timeline=true", output=tmp_path)
    for file in folder.iterdir():
        if file.name in ("config.json", "manifest.json"):
            continue  # they say that the other run was checked
        same = hashlib.sha256((tmp_path / file.name).read_bytes()).hexdigest()
        assert hashlib.sha256(file.read_bytes()).hexdigest() == same, file.name


def test_a_report_can_be_made_of_it(folder: Path, tmp_path: Path) -> None:
    """The page holds the reasons of the cards."""
    page = build_report([folder], tmp_path, ReportOptions(formats=()))
    text = Path(page if isinstance(page, str | Path) else page.page).read_text(encoding="utf-8")
    assert "of 40 layers" in text


def test_the_printed_plan_shows_nodes_and_flows(capsys: pytest.CaptureFixture[str]) -> None:
    """A row for every node: its layers, its rate and where requests go on to."""
    prepared = prepare(compose(*WORDS))
    print_plan(prepared)
    text = capsys.readouterr().out
    mesh = prepared.plan.mesh
    assert mesh is not None
    for n, node in enumerate(mesh.nodes):
        row = next(line for line in text.splitlines() if line.startswith(f"{n} "))
        assert f"{node.first_layer}-{node.end_layer - 1}" in row
    assert "end: " in text
    assert "search placement" in text


def test_steps_and_messages_keep_to_physics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 13 for every step of every node, and for every message between two."""
    simulation = make_simulation(prepare(compose(*WORDS)))
    given, driver = simulation.given, simulation.instances[0]
    assert isinstance(driver, Mesh)
    cluster, model = given.cluster, given.model
    looked, parts_of = [0, 0], NodeTimer.parts

    def parts(timer: NodeTimer, step: NodeStep) -> NodeParts:
        found, node = parts_of(timer, step), timer.node
        gpu, first = cluster.devices[node.devices[0]].gpu, step.walks[0].path.first_layers[step.node]
        exact = all(walk.path.first_layers[step.node] == first for walk in step.walks)
        if exact:
            layers = node.end_layer - first
            dense = layers * dense_layer_floor_s(gpu, model, step.tokens, node.tp)
            if node.end_layer == model.layers:
                dense += head_floor_s(gpu, model, len(step.walks), node.tp)
            if step.kind == StepKind.PREFILL:
                heads = model.query_heads // node.tp
                attention = sum(prefill_attention_floor_s(gpu, model, heads, walk.tokens, 0)
                                for walk in step.walks)
            else:
                size = sum(walk.context for walk in step.walks) * model.kv_bytes_per_token_per_layer_per_group
                attention = size * max(node.owned_groups) * decode_floor_s_per_byte(gpu, model)
            assert found.dense >= dense
            assert found.attention >= layers * attention
            looked[0] += 1
        return found

    monkeypatch.setattr(NodeTimer, "parts", parts)
    send = driver._links.send

    def noted(source: int, target: int, size_bytes: float, arrived: object) -> None:
        link, begun_s = cluster.link(source, target), simulation.clock.now

        def there(alone_s: float) -> None:
            least_s = link.latency_s + size_bytes / link.bandwidth_bytes_per_s
            assert simulation.clock.now - begun_s >= min(least_s, alone_s) * (1 - 1e-9)
            assert alone_s >= least_s * (1 - 1e-9)
            looked[1] += 1
            arrived(alone_s)  # type: ignore[operator]

        send(source, target, size_bytes, there)

    driver._links.send = noted  # type: ignore[method-assign, assignment]
    simulation.run()
    assert min(looked) > 100


def test_a_high_mark_lets_more_in_than_a_low_one() -> None:
    """With the mark at a tenth, less cache is in use, and everybody is served all the same."""
    peaks = []
    for mark in (0.1, 0.9):
        words = (*WORDS, "rate=100", "requests=80", f"policy.high_water={mark}")
        result = simulate(*words)
        assert (result.requests["status"] == "finished").all()
        peaks.append(result.summary.kv_used_max)
    assert peaks[0] < 0.5 * peaks[1]


def test_edges_carry_tokens_by_their_weight() -> None:
    """Over a run, tokens at every fork are shared out as the plan's flow is, to within a prompt or two."""
    simulation = make_simulation(prepare(compose(*WORDS, "requests=200", "rate=20")))
    simulation.run()
    controller = simulation.controller
    assert isinstance(controller, MeshController)
    mesh, sent = controller.engine.plan, controller.engine.routing.sent_tokens
    forks = [edges for edges in mesh.outgoing.values() if len(edges) > 1]
    assert forks
    for edges in forks:
        total, weight = sum(sent[e] for e in edges), sum(mesh.edges[e].tokens_per_s for e in edges)
        for e in edges:
            assert sent[e] / total == pytest.approx(mesh.edges[e].tokens_per_s / weight, abs=0.05)
    assert sum(sent[n] for n, edge in enumerate(mesh.edges) if edge.target == SINK) > 0


def test_sources_bad_words_name_their_key() -> None:
    """Chunked prompts and unknown placements are refused before any work."""
    with pytest.raises(SpecError, match=r"scheduler\.chunked_prefill"):
        prepare(compose(*WORDS, "scheduler.chunked_prefill=true"))
    config = compose(*WORDS)
    with pytest.raises(SpecError, match=r"policy\.placement"):
        prepare(replace(config, policy={"name": "helix", "placement": "best"}))
