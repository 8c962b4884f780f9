"""Runs of the executor on small meshes; the same for all backends."""

from __future__ import annotations

from typing import Any

from exec_toys import MODEL, given, workload
from support_mesh import MeshPolicy, Ranges, mesh_plan

from hetis_exec.driver import ExecutorInput
from hetis_exec.messages import Passing
from hetis_exec.transport import Delay
from hetis_sim.policies.plan import Plan

# First layer and number of layers of each node.
WHOLE: Ranges = ((0, 4),)
CHAIN: Ranges = ((0, 1), (1, 2), (3, 1))
DIAMOND: Ranges = ((0, 2), (2, 1), (2, 1), (3, 1))
FORK: Ranges = ((0, 2), (0, 3), (0, 4))
OVERLAP: Ranges = ((0, 2), (1, 2), (0, 3), (2, 2), (3, 1))

SHORT = workload(10)
LONG = workload(10, (8, 30), (10, 24), gap_s=0.0)


def meshed(ranges: Ranges, requests: list[Any] = SHORT, *, tp: int = 1, blocks: int = 400, seed: int = 1,
           **changes: Any) -> ExecutorInput:
    """A run; every rank has room for so many blocks of contexts in all its layers."""
    mesh = mesh_plan(ranges, tp, MODEL.kv_heads)
    units = {device: blocks * owned * node.layers for node in mesh.nodes
             for device, owned in zip(node.devices, node.owned_groups, strict=True)}
    return given(Plan((), mesh=mesh), MeshPolicy(seed), requests, units, **changes)


def slow_activations(seconds: float) -> Delay:
    """Activations take their time, so that nodes go on with others meanwhile."""
    return lambda sender, target, message: seconds if isinstance(message, Passing) else 0.0
