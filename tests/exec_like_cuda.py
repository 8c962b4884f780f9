"""Workers that do on CPU tensors what those of CUDA devices do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from exec_kernels import triton_kernels
from exec_models import POISON, folder, torch

from hetis_exec.backend import Shard
from hetis_exec.kernels.cuda import CudaKernels
from hetis_exec.kvcache import KvPool
from hetis_exec.models.architecture import read_architecture
from hetis_exec.models.decoder import DecoderShard
from hetis_exec.models.operations import FusedOperations
from hetis_exec.places import TeamPlan
from hetis_exec.torch_backend import TorchBackend, part_of
from hetis_exec.whole_steps import WholeSteps
from hetis_sim.policies.plan import MeshPlan

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LikeCuda(TorchBackend):
    """Workers that do all that those of CUDA devices do but graphs."""

    triton: bool = False
    whole: bool = True

    def kernels(self, device: int, capacity_units: int, block_tokens: int) -> CudaKernels:
        paged, prompts = (triton_kernels(name) if self.triton else None for name in ("paged", "prompts"))
        made = CudaKernels(CPU, capacity_units, block_tokens, self.architecture.spec.head_dim, torch.float32,
                           self.poison, paged, prompts)
        if prompts is not None:
            made.prompt_launch = lambda heads: prompts.PromptLaunch(64 // heads, 64, 64, 4, 2)
        return made

    def shard(self, device: int, plan: TeamPlan, stage: int, rank: int) -> DecoderShard:
        part = part_of(plan, stage, rank, self.architecture.spec.ffn_hidden)
        fused = FusedOperations(self.architecture, triton_kernels("fused")) if self.triton else None
        return DecoderShard(self.architecture, self.weights(), part, self.sampling, operations=fused)

    def whole_steps(self, device: int, plan: TeamPlan, shard: Shard, pool: KvPool) -> WholeSteps | None:
        assert isinstance(shard, DecoderShard)
        if not self.whole or isinstance(plan, MeshPlan) or len(plan.stages) > 1 or plan.stages[0].tp > 1:
            return None
        return WholeSteps(shard, pool, graphs=False)


def like_cuda(name: str, **settings: Any) -> dict[str, Any]:
    """What :func:`exec_toys.given` takes.

    With ``triton`` only where that interprets its kernels: on a machine with a card they would run there.
    """
    if settings.get("triton") and torch.cuda.is_available():
        pytest.skip("Triton compiles its kernels for the CUDA device that is here; test_cuda.py runs them")
    settings = {"warm": False, **settings}
    made = LikeCuda(read_architecture(folder(name)), folder(name), poison=POISON, **settings)
    return {"model": made.architecture.spec, "backend": made, "timeout_s": 60.0}
