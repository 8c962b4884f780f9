"""Which part of a model a worker has, in a pipeline or at a node of a mesh."""

from __future__ import annotations

from collections.abc import Sequence

from hetis_sim.control.engine import Engine
from hetis_sim.control.mesh.engine import MeshEngine
from hetis_sim.policies.plan import InstancePlan, MeshPlan, Plan, StagePlan

TeamPlan = InstancePlan | MeshPlan
"""Workers that serve together; the stages of a mesh are its nodes."""

AnyEngine = Engine | MeshEngine

CPU = "cpu"
"""The torch device of workers without a card."""


def stages_of(plan: TeamPlan) -> Sequence[StagePlan]:
    """The stages, or nodes."""
    return plan.nodes if isinstance(plan, MeshPlan) else plan.stages


def layers_of(plan: TeamPlan, stage: int) -> range:
    """Numbers of the layers of a stage in the model."""
    if isinstance(plan, MeshPlan):
        return range(plan.nodes[stage].first_layer, plan.nodes[stage].end_layer)
    first = sum(before.layers for before in plan.stages[:stage])
    return range(first, first + plan.stages[stage].layers)


def is_last(plan: TeamPlan, stage: int) -> bool:
    """Whether a stage ends with the model's last layer."""
    return layers_of(plan, stage).stop == plan.layers


def owned_groups(stage: StagePlan, rank: int) -> range:
    """KV groups whose weights a rank holds."""
    first = sum(stage.owned_groups[:rank])
    return range(first, first + stage.owned_groups[rank])


def units_of(engine: AnyEngine) -> dict[int, int]:
    """Units of cache of each device."""
    return dict(zip(engine.plan.devices, engine.books.ledger.capacity, strict=True))


def devices_of(plan: Plan) -> list[int]:
    """All devices of a plan."""
    teams: Sequence[TeamPlan] = plan.instances if plan.mesh is None else (plan.mesh,)
    return [device for team in teams for device in team.devices]
