"""The backend for real models: torch, on the CPU, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hetis_exec.kernels.cpu import CpuKernels
from hetis_exec.models.architecture import ELEMENT_BYTES, Architecture
from hetis_exec.models.decoder import DecoderShard, Part
from hetis_exec.models.names import model_names, tensor_shapes
from hetis_exec.models.sampling import Sampling
from hetis_exec.models.weights import FolderWeights, RandomWeights, Weights
from hetis_sim.control.engine import Engine
from hetis_sim.policies.memory import stage_weight_bytes
from hetis_sim.policies.plan import InstancePlan
from hetis_sim.spec.errors import InfeasibleError
from hetis_sim.spec.gpu import GIB

MEMORY_FILE = Path("/proc/meminfo")


@dataclass(frozen=True)
class TorchBackend:
    """Workers that compute a decoder with torch.

    Attributes:
        folder: of the weights; None draws them from ``seed``.
        poison: see :class:`CpuKernels`.
        threads: of each worker; of all workers together where they are threads of one process.
    """

    architecture: Architecture
    folder: Path | None = None
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    poison: float | None = None
    threads: int = 1
    start_s: float = 180.0

    @property
    def modules(self) -> tuple[str, ...]:
        """What is worth importing once for all worker processes."""
        return (__name__,)

    def weights(self) -> Weights:
        """The tensors of the model.

        Raises:
            SpecError: the folder does not hold them.
        """
        shapes = tensor_shapes(self.architecture)
        if self.folder is None:
            return RandomWeights(shapes, self.seed)
        # A tied head may be written down a second time.
        head = f"{model_names(self.architecture).head}.weight"
        return FolderWeights(self.folder, shapes, (head,))

    def check(self, engines: Sequence[Engine]) -> None:
        """Look whether weights can be had, and whether weights and caches fit in this host's memory.

        Raises:
            HetisError: they do not.
        """
        self.weights()
        spec = self.architecture.spec
        need = 0
        for engine in engines:
            stages = engine.plan.stages
            unit_bytes = 2 * ELEMENT_BYTES * engine.settings.limits.block_tokens * spec.head_dim
            need += unit_bytes * sum(engine.capacity_units.values())
            need += sum(stage_weight_bytes(spec, stage, rank, s == 0, s == len(stages) - 1)
                        for s, stage in enumerate(stages) for rank in range(stage.tp))
        free = free_memory_bytes()
        if free is not None and need > free:
            raise InfeasibleError(f"weights and caches of all workers take {need / GIB:.1f} GiB, this host "
                                  f"has {free / GIB:.1f} GiB free; use a smaller model, or a cluster with "
                                  "less memory")

    def kernels(self, capacity_units: int, block_tokens: int) -> CpuKernels:
        """Memory and kernels of one worker."""
        torch.set_num_threads(self.threads)
        return CpuKernels(capacity_units, block_tokens, self.architecture.spec.head_dim, self.poison)

    def shard(self, plan: InstancePlan, stage: int, rank: int) -> DecoderShard:
        """The weights of one rank."""
        return DecoderShard(self.architecture, self.weights(),
                            part_of(plan, stage, rank, self.architecture.spec.ffn_hidden), self.sampling)


def part_of(plan: InstancePlan, stage: int, rank: int, ffn_hidden: int) -> Part:
    """What a rank holds: the KV groups that the plan gives it, and an even share of the MLP."""
    here = plan.stages[stage]
    layer = sum(before.layers for before in plan.stages[:stage])
    group = sum(here.owned_groups[:rank])
    a, b = (ffn_hidden * n // here.tp for n in (rank, rank + 1))
    return Part(layers=range(layer, layer + here.layers),
                groups=tuple(range(group, group + here.owned_groups[rank])), columns=slice(a, b),
                lead=rank == 0, first=stage == 0, last=stage == len(plan.stages) - 1 and rank == 0)


def free_memory_bytes() -> int | None:
    """Memory of this host that may still be taken; None where it cannot be told."""
    try:
        lines = MEMORY_FILE.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * kilobytes[0] if kilobytes else None
