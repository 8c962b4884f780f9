"""The backend for real models: torch, on CPUs and CUDA devices."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hetis_exec.backend import Kernels, Shard
from hetis_exec.backend import WholeSteps as Steps
from hetis_exec.devices import free_bytes, torch_type
from hetis_exec.heap import keep_freed_memory
from hetis_exec.hugepages import use_huge_pages
from hetis_exec.kernels.cpu import CpuKernels
from hetis_exec.kernels.cuda import CudaKernels, triton_kernels
from hetis_exec.kvcache import KvPool
from hetis_exec.models.architecture import ELEMENT_TYPES, Architecture
from hetis_exec.models.decoder import DecoderShard, Part
from hetis_exec.models.names import model_names, tensor_shapes
from hetis_exec.models.operations import FusedOperations, Operations, TorchOperations
from hetis_exec.models.sampling import Sampling
from hetis_exec.models.weights import FolderWeights, RandomWeights, Weights
from hetis_exec.places import (
    CPU,
    AnyEngine,
    TeamPlan,
    is_last,
    layers_of,
    owned_groups,
    stages_of,
    units_of,
)
from hetis_exec.warm_up import warm_up_for
from hetis_exec.whole_steps import WholeSteps
from hetis_sim.policies.memory import stage_weight_bytes
from hetis_sim.policies.plan import InstancePlan
from hetis_sim.spec.errors import InfeasibleError
from hetis_sim.spec.gpu import GIB
from hetis_sim.spec.model import ModelSpec

MEMORY_FILE = Path("/proc/meminfo")

HUGE_FROM_BYTES = 256 << 10
"""Matrices of a processor from which huge pages are worth while: smaller ones stay in its caches."""


@dataclass(frozen=True)
class TorchBackend:
    """Workers that compute a decoder with torch.

    Attributes:
        folder: of the weights; None draws them from ``seed``.
        poison: see :class:`CpuKernels`.
        threads: of each worker; of all workers together where they are threads of one process.
        places: a torch device for every device of the cluster; none means that all are the CPU.
        dtype: of weights, activations and cache.
        cuda_graphs: replay steps of whole models from CUDA graphs.
        warm: prepare CUDA devices for all sizes of steps, and take memory for a processor's cache, before the
            first request.
    """

    architecture: Architecture
    folder: Path | None = None
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    poison: float | None = None
    threads: int = 1
    start_s: float = 180.0
    places: tuple[str, ...] = ()
    dtype: str = "float32"
    cuda_graphs: bool = True
    warm: bool = True

    def place(self, device: int) -> str:
        """The torch device of a device of the cluster."""
        return self.places[device] if self.places else CPU

    @property
    def modules(self) -> tuple[str, ...]:
        """What is worth importing once for all worker processes."""
        return (__name__,)

    def weights(self, place: str = CPU) -> Weights:
        """The tensors of the model, on a torch device.

        Raises:
            SpecError: the folder does not hold them.
        """
        shapes = tensor_shapes(self.architecture)
        dtype, device = torch_type(self.dtype), torch.device(place)
        if self.folder is None:
            return RandomWeights(shapes, self.seed, dtype, device)
        # A tied head may be written down a second time.
        head = f"{model_names(self.architecture).head}.weight"
        return FolderWeights(self.folder, shapes, (head,), dtype, device)

    def check(self, engines: Sequence[AnyEngine], here: Container[int] | None = None) -> None:
        """Look whether weights can be had, and whether weights and caches fit where they are to be.

        Raises:
            HetisError: they do not.
        """
        self.weights()
        for place, need in sorted(self.need_bytes(engines, here).items()):
            free = free_memory_bytes() if place == CPU else free_bytes(place)
            if free is not None and need > free:
                where = "this host" if place == CPU else place
                raise InfeasibleError(f"weights and caches of the workers there take {need / GIB:.1f} GiB, "
                                      f"{where} has {free / GIB:.1f} GiB free; use a smaller model, or a "
                                      "cluster with less memory")

    def need_bytes(self, engines: Sequence[AnyEngine], here: Container[int] | None = None) -> dict[str, int]:
        """Weights and caches of all workers, or of those here, on each torch device.

        On cards room for activations as well: what does not fit there ends a run in the middle of it.
        """
        spec = self.architecture.spec
        need: dict[str, int] = {}
        for engine in engines:
            plan = engine.plan
            stages = stages_of(plan)
            unit_bytes = (2 * ELEMENT_TYPES[self.dtype] * engine.settings.limits.block_tokens * spec.head_dim)
            parts = [(device, unit_bytes * units) for device, units in units_of(engine).items()]
            parts += [(device, stage_weight_bytes(spec, stage, rank, layers_of(plan, s).start == 0,
                                           is_last(plan, s)))
                      for s, stage in enumerate(stages) for rank, device in enumerate(stage.devices)]
            parts += [(device, spec.vocab * spec.hidden * ELEMENT_TYPES[self.dtype])
                      for device in tied_heads(spec, plan) if self.place(device) == CPU]
            limits = engine.settings.limits
            parts += [(device, activation_bytes(spec, limits.max_batch_tokens, limits.max_batch_requests,
                                                stage.tp, ELEMENT_TYPES[self.dtype]))
                      for stage in stages for device in stage.devices if self.place(device) != CPU]
            for device, size_bytes in parts:
                if here is not None and device not in here:
                    continue
                place = self.place(device)
                need[place] = need.get(place, 0) + size_bytes
        return need

    def kernels(self, device: int, capacity_units: int, block_tokens: int) -> CpuKernels | CudaKernels:
        """Memory and kernels of one worker."""
        torch.set_num_threads(self.threads)
        place = self.place(device)
        if place != CPU:
            torch.cuda.set_device(place)
            return CudaKernels(torch.device(place), capacity_units, block_tokens,
                               self.architecture.spec.head_dim, torch_type(self.dtype), self.poison)
        keep_freed_memory()
        return CpuKernels(capacity_units, block_tokens, self.architecture.spec.head_dim, self.poison,
                          dtype=torch_type(self.dtype))

    def shard(self, device: int, plan: TeamPlan, stage: int, rank: int) -> DecoderShard:
        """The weights of one rank."""
        place, architecture = self.place(device), self.architecture
        shard = DecoderShard(architecture, self.weights(place),
                             part_of(plan, stage, rank, architecture.spec.ffn_hidden), self.sampling,
                             torch.device(place), operations_for(architecture, place))
        if place != CPU:
            # Whole matrices have been there of which parts are kept, and such as were drawn in float32.
            torch.cuda.empty_cache()
        else:
            use_huge_pages(span for span in shard.spans if span[1] >= HUGE_FROM_BYTES)
        return shard

    def whole_steps(self, device: int, plan: TeamPlan, shard: Shard, pool: KvPool) -> WholeSteps | None:
        """Decode steps in one piece, for a worker with a whole model on a CUDA device."""
        alone = isinstance(plan, InstancePlan) and len(plan.stages) == 1 and plan.stages[0].tp == 1
        if not (alone and self.cuda_graphs and isinstance(pool.kernels, CudaKernels) and pool.kernels.paged):
            return None
        assert isinstance(shard, DecoderShard)
        return WholeSteps(shard, pool)

    def warm_up(self, kernels: Kernels, shard: Shard | None, steps: Steps | None, rows_max: int,
                tokens_max: int) -> Callable[[], None] | None:
        """What happens only once on a CUDA device, and memory of a processor's cache."""
        if not self.warm:
            return None
        if isinstance(kernels, CpuKernels):
            return kernels.touch
        heads = self.architecture.spec.heads_per_group
        return warm_up_for(kernels, shard, steps, heads, rows_max, tokens_max)


def operations_for(architecture: Architecture, place: str) -> Operations:
    """What a shard computes between its matrix products, on a torch device."""
    fused = None if place == CPU else triton_kernels("fused")
    return TorchOperations(architecture) if fused is None else FusedOperations(architecture, fused)


def tied_heads(spec: ModelSpec, plan: TeamPlan) -> list[int]:
    """Devices whose LM head is the embedding once more: products are by weights in a layout of their own."""
    return [stages_of(plan)[s].devices[0] for s in range(len(stages_of(plan)))
            if spec.tied_embeddings and layers_of(plan, s).start == 0 and is_last(plan, s)]


def activation_bytes(spec: ModelSpec, tokens: int, rows: int, tp: int, element_bytes: int) -> int:
    """What one rank holds at a time besides weights and cache, in the largest step.

    Of the MLP both projections and their product, heads before and after attention, some activations of the
    width of the model; and at the end logits in two types.
    """
    heads = (spec.query_heads + 2 * spec.kv_heads) * spec.head_dim
    of_token = 3 * spec.ffn_hidden // tp + 2 * heads // tp + 4 * spec.hidden
    return tokens * of_token * element_bytes + rows * spec.vocab * (element_bytes + 4)


def part_of(plan: TeamPlan, stage: int, rank: int, ffn_hidden: int) -> Part:
    """What a rank holds: the KV groups that the plan gives it, and an even share of the MLP."""
    here, layers = stages_of(plan)[stage], layers_of(plan, stage)
    a, b = (ffn_hidden * n // here.tp for n in (rank, rank + 1))
    return Part(layers=layers, groups=tuple(owned_groups(here, rank)), columns=slice(a, b), lead=rank == 0,
                first=layers.start == 0, last=is_last(plan, stage) and rank == 0)


def free_memory_bytes() -> int | None:
    """Memory of this host that may still be taken; None where it cannot be told."""
    try:
        lines = MEMORY_FILE.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * kilobytes[0] if kilobytes else None
