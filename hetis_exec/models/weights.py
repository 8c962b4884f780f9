"""Where weights come from: a folder of safetensors, or a seed."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from hetis_exec.models.names import Shapes
from hetis_sim.spec.errors import SpecError

INDEX = "model.safetensors.index.json"
INDEX_LIMIT_BYTES = 1 << 26
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOATS = ("F32", "F16", "BF16", "F64")
NAMES_SHOWN = 5
# Constants that older versions of transformers kept with the weights.
NOT_WEIGHTS = ("rotary_emb.inv_freq",)


CPU = torch.device("cpu")


class Weights(Protocol):
    """The tensors of a model, by name."""

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, of the type and on the device that were asked for."""


class RandomWeights:
    """Weights drawn from a seed, each tensor by its name alone: the same however the model is split.

    Matrices have variance 1 / columns, norms lie around 1, biases around 0. A CUDA device draws for
    itself, and other numbers than a CPU does.
    """

    def __init__(self, shapes: Shapes, seed: int, dtype: torch.dtype = torch.float32,
                 device: torch.device = CPU) -> None:
        self._shapes = shapes
        self._seed = seed
        self._dtype = dtype
        self._device = device

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor."""
        shape = self._shapes[name]
        stream = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed}:{name}".encode()))
        drawn = torch.randn(shape, generator=stream, device=self._device)
        if len(shape) == 2:
            drawn = drawn.div_(math.sqrt(shape[1]))
        else:
            drawn = 0.1 * drawn + (1.0 if "norm" in name and name.endswith(".weight") else 0.0)
        return drawn.to(self._dtype)


class FolderWeights:
    """Weights of a Hugging Face folder. Files are mapped into memory: what is not used is not read.

    Raises:
        SpecError: no safetensors there, an unreadable file, or tensors that are missing, not
            expected, of another shape, or not floating-point numbers.
    """

    def __init__(self, folder: str | Path, shapes: Shapes, optional: Collection[str] = (),
                 dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> None:
        self._dtype = dtype
        self._device = device
        self._folder = Path(folder).expanduser()
        self._files = [_open(path) for path in _files(self._folder)]
        self._where: dict[str, Any] = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118
        self._check(shapes, optional)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor."""
        found: torch.Tensor = self._where[name].get_tensor(name)
        return found.to(self._device, self._dtype)

    def _check(self, shapes: Shapes, optional: Collection[str]) -> None:
        known = {*shapes, *optional}
        missing = [name for name in shapes if name not in self._where]
        unexpected = [name for name in self._where if name not in known and not name.endswith(NOT_WEIGHTS)]
        if missing:
            raise self._error(f"{_listed(missing)} missing", "all tensors that config.json implies"
                              + (f" (not expected: {_listed(unexpected)})" if unexpected else ""))
        if unexpected:
            raise self._error(f"{_listed(unexpected)} not expected", "tensors that config.json implies only")
        for name, shape in shapes.items():
            view = self._where[name].get_slice(name)
            if tuple(view.get_shape()) != shape:
                raise self._error(f"{name} of shape {list(view.get_shape())}", f"{list(shape)}")
            if view.get_dtype() not in FLOATS:
                raise self._error(f"{name} of type {view.get_dtype()}", f"one of {', '.join(FLOATS)}")

    def _error(self, what: str, allowed: str) -> SpecError:
        return SpecError(f"model.path={self._folder}: tensors", what, allowed)


def _listed(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, those of its index where it has one."""
    if (folder / INDEX).is_file():
        return _indexed(folder)
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if pickles:
        raise SpecError("model.path", str(folder), f"a folder with safetensors: {_listed(pickles)} may run "
                        "code when loaded and is never opened; convert it with safetensors first")
    raise SpecError("model.path", str(folder), "a folder with *.safetensors files")


def _indexed(folder: Path) -> list[Path]:
    file = folder / INDEX
    try:
        if file.stat().st_size > INDEX_LIMIT_BYTES:
            raise ValueError(f"more than {INDEX_LIMIT_BYTES} bytes")
        names = set(_values(json.loads(file.read_text(encoding="utf-8"))["weight_map"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SpecError("model.path", str(file), f"an index with a weight_map ({error})") from error
    for name in sorted(names):
        if Path(name).name != name or not (folder / name).is_file():
            raise SpecError("model.path", str(file), f"an index of files of its folder ({name!r} is none)")
    return [folder / name for name in sorted(names)]


def _values(mapping: Any) -> list[str]:
    if not isinstance(mapping, dict) or not all(isinstance(value, str) for value in mapping.values()):
        raise TypeError("weight_map does not map names to files")
    return list(mapping.values())


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise SpecError("model.path", str(path), f"a safetensors file ({error})") from error
