"""Where the devices of a cluster are on this host, and what type of number they compute in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from hetis_exec.models.architecture import ELEMENT_TYPES
from hetis_exec.places import CPU
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.errors import SpecError
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.gpus import GPUS

BFLOAT16_FROM = (8, 0)
"""First compute capability whose matrix units know bfloat16."""


def find_places(wish: Any, cluster: ClusterSpec, here: range | None = None) -> tuple[str, ...]:
    """The torch device of every device of a cluster.

    ``auto`` puts cards on the CUDA devices of this host in turn, if there are any, and all else on the
    CPU; ``cpu`` and ``cuda`` put everything there; a list names a torch device for each.

    Args:
        here: devices that are on this host, if not all are. What is said of the others is of no meaning.

    Raises:
        SpecError: another wish, or one for CUDA devices that are not there.
    """
    number = len(cluster.devices)
    if isinstance(wish, str):
        cards = cuda_devices()
        if wish == "auto":
            chosen = [cards > 0 and _is_card(device.gpu) for device in cluster.devices]
        elif wish == CPU:
            chosen = [False] * number
        elif wish == "cuda":
            _need_cuda(wish)
            chosen = [True] * number
        else:
            raise SpecError("executor.devices", wish, "auto, cpu, cuda, or a list with a torch device for "
                            "each device of the cluster")
        own = range(number) if here is None else here
        return tuple(f"cuda:{sum(chosen[own.start:n]) % cards}" if card and n in own else CPU
                     for n, card in enumerate(chosen))
    if not isinstance(wish, Sequence):
        raise SpecError("executor.devices", wish, "auto, cpu, cuda, or a list")
    if len(wish) != number:
        raise SpecError("executor.devices", list(wish), f"a list of {number} torch devices, one for each "
                        f"device of the cluster {cluster.name}")
    return tuple(_named(f"executor.devices[{n}]", place) if here is None or n in here else CPU
                 for n, place in enumerate(wish))


def find_type(wish: str, places: Sequence[str]) -> str:
    """The type of weights, activations and cache, the same on all places.

    ``auto`` is float32 where all is on the CPU, and otherwise bfloat16, or float16 if a card is too old
    for that.
    """
    if wish != "auto":
        return wish
    cards = {place for place in places if place != CPU}
    if not cards:
        return "float32"
    old = any(torch.cuda.get_device_capability(card) < BFLOAT16_FROM for card in cards)
    return "float16" if old else "bfloat16"


def torch_type(name: str) -> torch.dtype:
    """A type by its name."""
    found = getattr(torch, name)
    assert name in ELEMENT_TYPES
    assert isinstance(found, torch.dtype)
    return found


def cuda_devices() -> int:
    """CUDA devices of this host that torch can use. Does not make a context on any of them."""
    return torch.cuda.device_count()


def free_bytes(card: str) -> int:
    """Memory of a CUDA device that may still be taken."""
    free: int = torch.cuda.mem_get_info(card)[0]
    return free


def _is_card(gpu: GpuSpec) -> bool:
    """Whether it stands for a GPU rather than, say, for a core."""
    return gpu.name in GPUS or gpu.compute_capability > (0, 0)


def _need_cuda(wish: str) -> None:
    if not cuda_devices():
        why = ("torch finds none on this host" if torch.version.cuda
               else f"torch {torch.__version__} is built without CUDA")
        raise SpecError("executor.devices", wish, f"cpu or auto: there is no CUDA device ({why})")


def _named(key: str, place: Any) -> str:
    if place == CPU:
        return CPU
    found = re.fullmatch(r"cuda(?::(\d{1,3}))?", place) if isinstance(place, str) else None
    if found is None:
        raise SpecError(key, place, "cpu, cuda or cuda:N")
    _need_cuda(place)
    index = int(found[1] or 0)
    if index >= cuda_devices():
        raise SpecError(key, place, f"cuda:0 to cuda:{cuda_devices() - 1}")
    return f"cuda:{index}"
