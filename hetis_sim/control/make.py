"""The control plane that a plan asks for."""

from __future__ import annotations

from hetis_sim.control.controller import Controller
from hetis_sim.control.decisions import DecisionLog
from hetis_sim.control.mesh.controller import MeshController
from hetis_sim.control.mesh.timing import MeshTimer
from hetis_sim.control.settings import SchedulerSettings
from hetis_sim.control.timing import InstanceTimer
from hetis_sim.cost.model import CostModel
from hetis_sim.policies.base import Policy
from hetis_sim.policies.plan import Plan
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.model import ModelSpec


def make_controller(cluster: ClusterSpec, model: ModelSpec, cost: CostModel, policy: Policy, plan: Plan,
                    settings: SchedulerSettings,
                    log: DecisionLog | None = None,
                    believed: CostModel | None = None) -> Controller | MeshController:
    """A fresh control plane, with the timers that it needs: of instances with lanes, or of a mesh.

    ``believed`` are the durations of decode attention that the policy goes by while it dispatches, where
    they are not those of ``cost``. Routes through a mesh go by none.

    Raises:
        SpecError, InfeasibleError: as the two classes do.
    """
    if plan.mesh is not None:
        timer = MeshTimer(cluster, model, cost, plan.mesh)
        return MeshController(cluster, model, policy, plan, timer, settings, log)
    timers = [InstanceTimer(cluster, model, cost, instance, believed, settings.joint_attention)
              for instance in plan.instances]
    return Controller(cluster, model, policy, plan, timers, settings, log)
