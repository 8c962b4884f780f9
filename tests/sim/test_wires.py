"""What every wire carries: bytes follow from tokens, layers and heads, and nothing is left out."""

from __future__ import annotations

import pytest

from hetis_sim import compose
from hetis_sim.control.timing import DecodeLines, InstanceTimer
from hetis_sim.metrics import Summary
from hetis_sim.metrics.load import load_run
from hetis_sim.metrics.summary import summarize
from hetis_sim.run import Result, prepare, run_prepared, simulate, write_result
from hetis_sim.sim.network import Network
from hetis_sim.sim.traffic import InstanceTraffic, WireBytes

SMALL = ("model=llama3-8b", "requests=40", "rate=8", "cost.kind=roofline")
TP2 = ("cluster.hosts=[{gpus:{a100-80gb:2},link:pcie4x16}]", "cluster.name=pair")
TWO_HOSTS = ("cluster.hosts=[{gpus:{a100-80gb:1},link:pcie4x16},{gpus:{t4:1},link:pcie3x16}]",
             "cluster.name=two")


def computed_tokens(result: Result) -> int:
    """Prompt and decoded tokens of all steps."""
    return int(result.steps["prefill_tokens"].sum() + result.steps["decode_tokens"].sum())


def carried(summary: Summary, kind: str) -> dict[str, float]:
    """Bytes of a kind by wire, wires without any left out."""
    return {wire.name: wire.size_bytes[kind] for wire in summary.wires if wire.size_bytes[kind]}


def test_all_reduces_load_every_card_of_a_group() -> None:
    """Two a layer; in a ring of two each card sends half of a message twice."""
    result = simulate(*SMALL, *TP2, "policy=vllm", "policy.tp=2")
    model = result.prepared.model
    size = 2 * model.layers * computed_tokens(result) * model.hidden * model.activation_bytes
    found = carried(result.summary, "collectives")
    assert len(found) == 4
    assert list(found.values()) == [pytest.approx(size)] * 4
    assert carried(result.summary, "heads") == carried(result.summary, "activations") == {}


def test_activations_cross_the_wires_between_stages() -> None:
    """Every token once, out of one host and into the next; the share of time follows from the bandwidth."""
    result = simulate(*SMALL, *TWO_HOSTS, "policy=vllm_all")
    (instance,) = result.prepared.plan.instances
    assert len(instance.stages) == 2
    model = result.prepared.model
    size = computed_tokens(result) * model.hidden * model.activation_bytes
    found = carried(result.summary, "activations")
    assert {name for name in found if name.startswith("host")} == {"host0 out", "host1 in"}
    assert all(value == pytest.approx(size) for value in found.values())
    wire = next(wire for wire in result.summary.wires if wire.name == "host0 out")
    duration_s = result.summary.whole_run.duration_s
    assert wire.busy_share == pytest.approx(sum(wire.size_bytes.values())
                                            / wire.bandwidth_bytes_per_s / duration_s)


def test_heads_away_from_home_load_both_ways() -> None:
    """So many groups, iterations and layers; what goes out has keys and values besides."""
    prepared = prepare(compose(*SMALL, *TWO_HOSTS, "policy=hetis", "policy.delta=100"))
    (instance,) = prepared.plan.instances
    assert instance.attention_workers
    model = prepared.model
    timer = InstanceTimer(prepared.cluster, model, prepared.cost, instance)
    remote = next(position for position in instance.positions if position.remote)
    network = Network(None, prepared.cluster, prepared.cost, dict, print)  # type: ignore[arg-type]
    sums, traffic = InstanceTraffic(timer), WireBytes()
    held = ((0, 5, 70), (remote.index, 3, 40))
    sums.add(DecodeLines((), ((1.0, 0.0),), held), 11, 7)
    sums.add(DecodeLines((), ((1.0, 0.0),), (), ((remote.index, 2, 0, 0),)), 0, 1)
    sums.add_to(traffic, network, model)
    rows = {name: size_bytes["heads"] for _, name, size_bytes in traffic.rows(prepared.cluster)}
    groups = (3 * 7 + 2) * remote.layers
    head = model.heads_per_group * model.head_dim * model.activation_bytes
    key_and_value = model.kv_bytes_per_token_per_layer_per_group
    assert rows["host0 out"] == rows["host1 in"] == pytest.approx(groups * (head + key_and_value))
    assert rows["host1 out"] == rows["host0 in"] == pytest.approx(groups * head)


@pytest.mark.parametrize("policy", ["hetis", "splitwise", "infinite", "helix"])
def test_what_wires_carry_does_not_depend_on_how_steps_are_told(policy: str) -> None:
    """One step for many iterations or one each; cache is what the transfers say; no wire is overfull."""
    # Long prompts fill the A100, so that heads go away from it.
    words = (*SMALL, "cluster=a100-t4", f"policy={policy}",
             *(("policy.delta=100", "workload=longbench", "rate=20") if policy == "hetis" else ()))
    whole, single = (simulate(*words, f"scheduler.collapse={collapse}") for collapse in ("true", "false"))
    assert whole.summary.wires
    mine, other = ({wire.name: wire.size_bytes for wire in result.summary.wires}
                   for result in (whole, single))
    assert mine.keys() == other.keys()
    for name, size_bytes in mine.items():
        assert size_bytes == pytest.approx(other[name], rel=1e-6)
    assert all(0.0 < wire.busy_share < 1.0 for wire in whole.summary.wires)
    sent = whole.recorder.transfers()["size_bytes"].sum()
    assert max(carried(whole.summary, "cache").values(), default=0.0) <= sent * (1 + 1e-12)
    assert (sent > 0) == bool(carried(whole.summary, "cache"))


def test_a_run_folder_keeps_what_wires_have_carried(tmp_path: object) -> None:
    """Summed up anew, the figures are the same."""
    result = simulate(*SMALL, *TWO_HOSTS, "policy=vllm_all")
    folder = write_result(result, f"{tmp_path}/run")
    again = summarize(load_run(folder).records(), slo=result.prepared.config.slo.slo())
    assert again.wires == result.summary.wires
    assert run_prepared(result.prepared).summary.wires == result.summary.wires
