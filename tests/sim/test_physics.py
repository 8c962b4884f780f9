"""Invariant 13: nothing is faster than its FLOPs over the peak or its bytes over the bandwidth."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import yaml
from support import ScaledCost
from support_policies import WanderPolicy
from support_runs import assert_sound

from hetis_sim.control.engine import Engine
from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.control.step import Step
from hetis_sim.cost.floor import (
    all_reduce_floor_s,
    decode_floor_s_per_byte,
    dense_layer_floor_s,
    head_floor_s,
    prefill_attention_floor_s,
)
from hetis_sim.cost.roofline import RooflineCost
from hetis_sim.policies.base import EngineLimits
from hetis_sim.policies.plan import InstancePlan, Plan, StagePlan
from hetis_sim.sim.simulation import Simulation, SimulationInput
from hetis_sim.spec.architectures import model
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.parse import cluster_from_mapping
from hetis_sim.spec.request import Request

MODEL = model("llama2-70b")
WORKERS = (8, 9, 10, 11)
PLANS = {
    "one stage": InstancePlan((StagePlan((0, 1, 2, 3), 80, (2, 2, 2, 2)),), WORKERS),
    "three stages": InstancePlan((StagePlan((0, 1, 2, 3), 64, (2, 2, 2, 2)), StagePlan((4, 5), 8, (4, 4)),
                                  StagePlan((6, 7), 8, (4, 4))), WORKERS),
}


@dataclass
class Floors:
    """Physical bounds of every step of a run, part by part, from what the step really did."""

    simulation: Simulation
    rows: list[dict[str, float]] = field(default_factory=list)

    @property
    def cluster(self) -> ClusterSpec:
        return self.simulation.given.cluster

    def gpu(self, device: int) -> GpuSpec:
        return self.cluster.devices[device].gpu

    def bandwidth(self, a: int, b: int) -> float:
        return self.cluster.link(a, b).bandwidth_bytes_per_s

    def look(self, instance: int, lane: int) -> None:
        """Called when a step of a lane is recorded, before its batch changes."""
        engine = self.simulation.controller.engines[instance]
        engine.sync()
        step = engine.lanes[lane].step
        assert step is not None
        tokens = step.prefill_tokens + step.decoding
        row = {"dense": self._dense(engine, step, tokens), "collective": self._collective(engine, tokens),
               "hop": self._hop(engine, tokens), "prefill": self._prefill(engine, step)}
        row = {part: step.issued * seconds for part, seconds in row.items()}
        row["decode"] = sum(self._decode(engine, step, ahead) for ahead in range(step.issued)) \
            if step.decoding else 0.0
        self.rows.append(row)

    def _dense(self, engine: Engine, step: Step, tokens: int) -> float:
        last = engine.plan.stages[-1]
        sampled = step.decoding + sum(chunk.last for chunk in step.chunks)
        seconds = head_floor_s(self.gpu(last.devices[0]), MODEL, max(1, sampled), last.tp)
        for stage in engine.plan.stages:
            gpu = self.gpu(stage.devices[0])
            seconds += stage.layers * dense_layer_floor_s(gpu, MODEL, tokens, stage.tp)
        return seconds

    def _collective(self, engine: Engine, tokens: int) -> float:
        size = tokens * MODEL.hidden * MODEL.activation_bytes
        links = [self.cluster.slowest_link(stage.devices) for stage in engine.plan.stages]
        return sum(2 * stage.layers * all_reduce_floor_s(link, size, stage.tp)
                   for stage, link in zip(engine.plan.stages, links, strict=True) if link is not None)

    def _hop(self, engine: Engine, tokens: int) -> float:
        size = tokens * MODEL.hidden * MODEL.activation_bytes
        ends = [(a.devices[-1], b.devices[0]) for a, b in pairwise(engine.plan.stages)]
        return sum(size / self.bandwidth(*pair) for pair in ends)

    def _prefill(self, engine: Engine, step: Step) -> float:
        total = 0.0
        for stage in engine.plan.stages:
            slowest = 0.0
            for device, owned in zip(stage.devices, stage.owned_groups, strict=True):
                heads = owned * MODEL.heads_per_group
                rank = sum(prefill_attention_floor_s(self.gpu(device), MODEL, heads, chunk.new_tokens,
                                                     chunk.context_tokens) for chunk in step.chunks)
                slowest = max(slowest, rank)
            total += stage.layers * slowest
        return total

    def _decode(self, engine: Engine, step: Step, ahead: int) -> float:
        """Of the iteration ``ahead`` ones before the last: the slowest device of each stage."""
        lane, total, kv_bytes = engine.lanes[step.lane], 0.0, MODEL.kv_bytes_per_token_per_layer_per_group
        for stage, positions in zip(engine.plan.stages, engine.plan.stage_positions, strict=True):
            slowest = 0.0
            for p in positions:
                position = engine.plan.positions[p]
                shapes = [(state.shape, lane.cached_tokens(state) - ahead)
                          for state in lane.members.values() if state.shape is not None]
                read = sum(shape.group_tokens(tokens)[p] for shape, tokens in shapes) * kv_bytes
                seconds = read * decode_floor_s_per_byte(self.gpu(position.device), MODEL)
                if position.remote:
                    sent = sum(MODEL.remote_bytes_per_token(shape.placement[p] * MODEL.heads_per_group)
                               for shape, _ in shapes)
                    # A range has the query of all heads sent to it and sends as much back, at least.
                    still = sum(shape.groups[p] - shape.placement[p] for shape, _ in shapes)
                    sent += 2 * still * MODEL.heads_per_group * MODEL.head_dim * MODEL.activation_bytes
                    seconds += sent / self.bandwidth(stage.devices[0], position.device)
                slowest = max(slowest, seconds)
            total += stage.layers * slowest
        return total


def run(name: str, chunked: bool, project_root: Path, factor: float = 1.0,
        ranges: float = 0.0) -> tuple[Simulation, Floors]:
    """Llama-2-70B on the paper's cluster for a short while, heads and moves at random."""
    cluster = cluster_from_mapping(yaml.safe_load((project_root / "conf/cluster/paper.yaml").read_text()))
    random = Random(3)
    requests, now_s = [], 0.0
    for i in range(40):
        now_s += random.expovariate(4.0)
        requests.append(Request(i, now_s, random.randint(10, 900), random.randint(1, 60)))
    settings = SchedulerSettings(EngineLimits(), chunked, 256, rebalance_interval=8)
    cost = ScaledCost(RooflineCost(), factor)
    given = SimulationInput(cluster, MODEL, cost, WanderPolicy(1, kv_heads=MODEL.kv_heads, ranges=ranges),
                            Plan((PLANS[name],)), requests, settings, 10**6)
    simulation = Simulation(given)
    floors = Floors(simulation)
    record = simulation.recorder.step

    def watched(instance: int, lane: int, *rest: float) -> None:
        floors.look(instance, lane)
        record(instance, lane, *rest)

    simulation.recorder.step = watched  # type: ignore[method-assign,assignment]
    simulation.run()
    return simulation, floors


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_no_step_beats_physics(name: str, chunked: bool, project_root: Path) -> None:
    """Each part of each step takes at least its FLOPs and bytes, and the step takes all its parts."""
    simulation, floors = run(name, chunked, project_root)
    assert_sound(simulation.recorder.records(), 40)
    assert too_fast(simulation, floors) == {}
    for part in ("dense", "collective", "prefill", "decode"):
        assert sum(row[part] for row in floors.rows) > 0
    assert (sum(row["hop"] for row in floors.rows) > 0) == (name == "three stages")


@pytest.mark.parametrize("name", PLANS)
def test_no_step_with_token_ranges_beats_physics(name: str, project_root: Path) -> None:
    """The same where tokens of a request are divided as well: every holder gets the queries of all heads."""
    simulation, floors = run(name, False, project_root, ranges=0.8)
    assert_sound(simulation.recorder.records(), 40)
    assert too_fast(simulation, floors) == {}


def too_fast(simulation: Simulation, floors: Floors) -> dict[str, int]:
    """Number of steps that beat their bound, by part."""
    steps = simulation.recorder.records().steps
    assert len(floors.rows) == len(steps) > 50
    bound = {part: np.array([row[part] for row in floors.rows]) for part in floors.rows[0]}
    taken = {"dense": steps["dense_s"], "collective": steps["collective_s"], "hop": steps["hop_s"],
             "attention": steps["attention_s"] + steps["head_transfer_s"],
             "whole": steps["end_s"] - steps["start_s"]}
    bound["attention"] = bound.pop("prefill") + bound.pop("decode")
    bound["whole"] = np.sum(list(bound.values()), axis=0)
    counts = {part: int((taken[part] < bound[part] * (1 - 1e-9)).sum()) for part in taken}
    return {part: count for part, count in counts.items() if count}


def test_a_cost_model_that_beats_physics_is_noticed(project_root: Path) -> None:
    """The bounds are tight enough to catch durations that are five times too short."""
    caught = too_fast(*run("three stages", False, project_root, factor=0.2))
    assert set(caught) == {"dense", "collective", "hop", "attention", "whole"}


@pytest.mark.parametrize("name", PLANS)
def test_no_transfer_beats_its_link(name: str, project_root: Path) -> None:
    """Cache takes at least its bytes over the slowest link, alone and together on one interface."""
    simulation, floors = run(name, False, project_root)
    transfers = simulation.recorder.records().transfers
    assert len(transfers) > 20
    assert {"push", "move"} <= {transfers.categories["kind"][code] for code in transfers["kind"]}
    devices = floors.cluster.devices
    duration_s = transfers["end_s"] - transfers["start_s"]
    ends = list(zip(transfers["source"].tolist(), transfers["target"].tolist(), strict=True))
    bandwidth = np.array([floors.bandwidth(source, target) for source, target in ends])
    assert (duration_s >= transfers["size_bytes"] / bandwidth * (1 - 1e-9)).all()
    leaving = np.array([devices[a].host_id == 0 != devices[b].host_id for a, b in ends])
    span_s = transfers["end_s"][leaving].max() - transfers["start_s"][leaving].min()
    assert transfers["size_bytes"][leaving].sum() <= span_s * floors.cluster.network.bandwidth_bytes_per_s


def test_simulated_time_holds_no_host_time(project_root: Path) -> None:
    """Nothing that decides or simulates reads a clock of the machine."""
    clocks = {"time", "datetime", "timeit"}
    found = []
    for room in ("spec", "cost", "control", "sim"):
        for path in (project_root / "hetis_sim" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found += [f"{path.name} imports {name}" for name in names if name.partition(".")[0] in clocks]
    assert found == []
