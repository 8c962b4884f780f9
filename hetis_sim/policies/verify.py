"""Whether a plan fits the model and the cluster it is made for."""

from __future__ import annotations

from hetis_sim.policies.plan import MeshPlan, Plan
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.errors import require
from hetis_sim.spec.model import ModelSpec


def check_plan(plan: Plan, model: ModelSpec, cluster: ClusterSpec) -> None:
    """Refuse a plan that would compute another model or use what is not there.

    Raises:
        SpecError: layers or KV groups do not sum to the model's, a device is unknown, or
            instances that only prefill and such that only decode do not come together.
    """
    if plan.mesh is not None:
        _check_mesh(plan.mesh, model, cluster)
        return
    for number, instance in enumerate(plan.instances):
        key = f"plan.instances[{number}]"
        require(instance.layers == model.layers, f"{key}.layers", instance.layers,
                f"the model's {model.layers}")
        for stage in instance.stages:
            require(sum(stage.owned_groups) == model.kv_heads, f"{key}.owned_groups", stage.owned_groups,
                    f"a split of the model's {model.kv_heads} KV heads")
        unknown = [device for device in instance.devices if not 0 <= device < len(cluster.devices)]
        require(not unknown, f"{key}.devices", unknown, f"between 0 and {len(cluster.devices) - 1}")
    roles = {instance.role for instance in plan.instances}
    require(("prefill" in roles) == ("decode" in roles), "plan.roles", sorted(roles),
            "both, or prefill together with decode")


def _check_mesh(mesh: MeshPlan, model: ModelSpec, cluster: ClusterSpec) -> None:
    require(mesh.layers == model.layers, "plan.mesh.layers", mesh.layers, f"the model's {model.layers}")
    for number, node in enumerate(mesh.nodes):
        key = f"plan.mesh.nodes[{number}]"
        require(sum(node.owned_groups) == model.kv_heads, f"{key}.owned_groups", node.owned_groups,
                f"a split of the model's {model.kv_heads} KV heads")
        unknown = [device for device in node.devices if not 0 <= device < len(cluster.devices)]
        require(not unknown, f"{key}.devices", unknown, f"between 0 and {len(cluster.devices) - 1}")
        hosts = {cluster.devices[device].host_id for device in node.devices}
        require(len(hosts) == 1, f"{key}.devices", node.devices, "GPUs of one host")
        linked = bool(mesh.outgoing[number]) and any(edge.target == number for edge in mesh.edges)
        require(linked, f"{key}.edges", [], "at least one that leads there and one that leads on")
