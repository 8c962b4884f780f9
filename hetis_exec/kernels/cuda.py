"""Cache and attention of one worker on a CUDA device.

Nothing here waits for the device, except :meth:`CudaKernels.to_wire` and what is asked to.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from hetis_exec.backend import Arrived, CacheTable, Leaving
from hetis_exec.kernels.gathered import GatheredDecode
from hetis_exec.kernels.parts import TorchJoining
from hetis_exec.kernels.tables import DeviceTables, to_device
from hetis_exec.kernels.wire import array_of, in_place, resident_of, tensor_of
from hetis_exec.messages import Array
from hetis_exec.resident import Resident
from hetis_exec.rows import in_rows
from hetis_exec.stopwatch import HostStopwatch, Stopwatch

Units = NDArray[np.int64]

URGENT = -1
"""Priority of the stream on which steps are computed."""

PROMPT_TOKENS_MAX = 1024
"""Longer prompts are computed one by one with torch: next to that work, launching it takes no time."""

NO_TABLE = -1

RECORDING = Lock()
"""Workers may be threads of one process; a device cannot be waited for while one of them records a graph."""

FLASH_FROM = (8, 0)
FLASH_HEAD_DIM = 256
"""Torch's flash attention, which takes grouped query heads as they are, knows these cards and heads."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Decode attention of a batch, for all layers, on the device.

    Attributes:
        spans: of the rows' tables, shape (rows, 2).
        positions: of the new tokens, shape (rows,).
        longest: the highest of them.
        pieces, runs: see :func:`hetis_exec.kernels.paged.cut`; nothing where that is not there.
    """

    spans: torch.Tensor
    positions: torch.Tensor
    longest: int
    pieces: torch.Tensor
    runs: torch.Tensor


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """Attention of the prompts of a step, for all layers, on the device.

    Attributes:
        launch: how they are cut up.
        spans, prompts, blocks: see :func:`hetis_exec.kernels.prompts.attend`.
    """

    launch: Any
    spans: torch.Tensor
    prompts: torch.Tensor
    blocks: torch.Tensor


class CudaKernels:
    """See :class:`hetis_exec.backend.Kernels`.

    Args:
        device: where to compute.
        capacity_units, block_tokens, head_dim, dtype: the pool, of shape (units, block_tokens, head_dim)
            for keys and for values. It is taken at once.
        poison: written over what is freed, so that tests find out who reads it.
        paged: the module with the Triton kernels; by default that of this package, where Triton is
            installed. None gathers blocks with torch.
        prompts: the same for attention of prompts.
    """

    def __init__(self, device: torch.device, capacity_units: int, block_tokens: int, head_dim: int,
                 dtype: torch.dtype, poison: float | None = None, paged: Any = "auto",
                 prompts: Any = "auto") -> None:
        self.device = device
        self.dtype = dtype
        self.block_tokens = block_tokens
        self.head_dim = head_dim
        self.paged: Any = triton_kernels("paged") if paged == "auto" else paged
        self._prompts: Any = triton_kernels("prompts") if prompts == "auto" else prompts
        self._poison = poison
        self._cuda = device.type == "cuda"
        self.capability: tuple[int, int] = torch.cuda.get_device_capability(device) if self._cuda else (0, 0)
        about: Any = torch.cuda.get_device_properties(device) if self._cuda else None
        if self._cuda:
            # It makes a plan for every length of prompt, each of which takes longer than the prompt.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self._processors = about.multi_processor_count if self._cuda else 1
        self._shared_bytes = about.shared_memory_per_multiprocessor if self._cuda else 0
        shape = (max(1, capacity_units), block_tokens, head_dim)
        # Zeros, because masked places are gathered as well: 0 times nan would be nan.
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.tables = DeviceTables(device, min(1 << 28, max(1 << 12, 2 * capacity_units)))
        self._gathered = GatheredDecode()
        self._aside = new_stream(device) if self._cuda else None
        self._last_leaving: torch.cuda.Event | None = None
        self._flash = self.capability >= FLASH_FROM and dtype != torch.float32 and head_dim <= FLASH_HEAD_DIM

    # -- arrays --------------------------------------------------------------------------------------

    def from_wire(self, array: Any) -> torch.Tensor:
        if isinstance(array, Resident):
            return in_place(array, self.device)
        tensor = tensor_of(array)
        return tensor if not self._cuda else tensor.pin_memory().to(self.device, non_blocking=True)

    def to_wire(self, tensor: torch.Tensor) -> Array:
        return self.pack((tensor,))[0]

    def pack(self, tensors: Sequence[torch.Tensor]) -> list[Array]:
        if not self._cuda:
            return [array_of(tensor) for tensor in tensors]
        copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self.wait()
        return [array_of(copy) for copy in copies]

    def host(self, tensors: Sequence[torch.Tensor]) -> list[Array] | None:
        return None if self._cuda else [array_of(tensor) for tensor in tensors]

    def keep(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        dense = [tensor.contiguous() for tensor in tensors]
        ready: Any = None
        if self._cuda:
            ready = new_event()
            ready.record(torch.cuda.current_stream(self.device))
        return [resident_of(tensor, ready) for tensor in dense]

    def concatenate(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors))

    def index(self, *axes: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return tuple(to_device(np.array(axis, dtype=np.int64), self.device) for axis in axes)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    def stopwatch(self) -> Stopwatch:
        return EventStopwatch(self.device) if self._cuda else HostStopwatch()

    def enter(self) -> None:
        """Have this thread work on the device, on a stream that goes before copies which have time."""
        if self._cuda:
            torch.cuda.set_device(self.device)
            self.synchronize()
            torch.cuda.set_stream(new_stream(self.device, URGENT))

    def working(self) -> AbstractContextManager[object]:
        """Nothing is to be prepared."""
        return nullcontext()

    def synchronize(self) -> None:
        if self._cuda:
            with RECORDING:
                torch.cuda.synchronize(self.device)

    def wait(self) -> None:
        """Until what has been asked for so far is done, other streams aside."""
        if not self._cuda:
            return
        event = new_event()
        event.record(torch.cuda.current_stream(self.device))
        event.synchronize()

    # -- cache ---------------------------------------------------------------------------------------

    def clear(self, table: CacheTable) -> None:
        self.tables.forget(table)
        if self._last_leaving is not None:
            # What is written here from now on must not overtake a copy.
            torch.cuda.current_stream(self.device).wait_event(self._last_leaving)
            if is_over(self._last_leaving):
                self._last_leaving = None
        if self._poison is not None:
            at = to_device(table.units.ravel(), self.device)
            self.keys[at] = self._poison
            self.values[at] = self._poison

    def spots(self, units: Units, offsets: Units) -> torch.Tensor:
        return to_device(units * self.block_tokens + offsets, self.device)

    def write(self, spots: torch.Tensor, layer: int | slice, keys: torch.Tensor,
              values: torch.Tensor) -> None:
        for pool, new in ((self.keys, keys), (self.values, values)):
            pool.view(-1, self.head_dim).index_copy_(0, spots[layer].flatten(), new)

    def read(self, units: Units) -> tuple[torch.Tensor, torch.Tensor]:
        at = to_device(np.ascontiguousarray(units), self.device)
        return self.keys[at].flatten(-3, -2), self.values[at].flatten(-3, -2)

    def leave(self, units: Units, tokens: slice, stay: bool = False) -> Leaving:
        if self._aside is None:
            parts = [part[..., tokens, :] for part in self.read(units)]
            return Arrived(self.keep(parts) if stay else [array_of(part) for part in parts])
        self._aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._aside):
            parts = [part[..., tokens, :] for part in self.read(units)]
            copies = ([part.contiguous() for part in parts] if stay else
                      [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in parts])
            for copy, part in zip(copies, parts, strict=True):
                if not stay:
                    copy.copy_(part, non_blocking=True)
            event = new_event()
            event.record(self._aside)
        self._last_leaving = event
        return OnTheWay(event, copies)

    # -- attention -----------------------------------------------------------------------------------

    def plan(self, tables: Sequence[CacheTable], positions: Sequence[int]) -> DecodePlan:
        spans, at = self.tables.spans(tables), np.array(positions, dtype=np.int64)
        cached = np.where(at < 0, -1 - at, at)
        pieces, runs = self.cut(cached, 1)
        if len(runs):
            pieces = pieces[:int(runs[-1].sum())]
        # Those with an odd number come last, for kernels are compiled for where their arguments begin.
        sent = to_device(np.concatenate((spans.ravel(), runs.ravel(), at, pieces.ravel())), self.device)
        a, b, c = np.cumsum((spans.size, runs.size, at.size)).tolist()
        return DecodePlan(sent[:a].view(-1, 2), sent[b:c], int(cached.max()), sent[c:].view(-1, 3),
                          sent[a:b].view(-1, 2))

    def pieces_max(self, tokens: int, groups: int) -> int:
        """Pieces that a step of so many tokens may have in each group."""
        if self.paged is None:
            return 0
        found: int = self.paged.pieces_max(tokens, groups, self._cut[1])
        return found

    def cut(self, cached: Units, groups: int, number: int | None = None) -> tuple[Units, Units]:
        """Pieces, at most so many, and runs of requests with so many tokens and a row for every group."""
        if self.paged is None:
            return np.empty((0, 3), dtype=np.int64), np.empty((0, 2), dtype=np.int64)
        if number is None:
            number = self.pieces_max(len(cached), groups)
        share = self.paged.choose_share(cached, groups, number, *self._cut)
        found: tuple[Units, Units] = self.paged.cut(cached, share, number)
        return found

    @cached_property
    def _cut(self) -> tuple[Any, int]:
        """How rows are computed, and how many programs there are at a time."""
        launch = self.paged.choose_launch(1, self.head_dim, self.dtype, self.capability)
        return launch, self.paged.resident_programs(launch, self.head_dim, self.dtype, self._processors,
                                                    self._shared_bytes)

    def decode(self, plan: DecodePlan, layer: int, queries: torch.Tensor, keys: torch.Tensor,
               values: torch.Tensor) -> torch.Tensor:
        q, k, v = in_rows(queries, 2), in_rows(keys, 1), in_rows(values, 1)
        return self.attend(plan, layer, q[:, None], k[:, None], v[:, None])[:, 0]

    def attend(self, plan: DecodePlan, layer: int, queries: torch.Tensor, keys: torch.Tensor,
               values: torch.Tensor) -> torch.Tensor:
        """The same for tokens that each have a row for every group.

        Shapes: queries (tokens, groups, G, d), keys and values (tokens, groups, d), of any strides but
        those of G and d; spans of the plan (tokens x groups, 2), positions (tokens,).
        """
        pools = self.keys, self.values, self.tables.arena, plan.spans, plan.positions, layer
        if self.paged is None:
            return self._gathered.decode(plan.longest, queries, keys, values, *pools)
        launch = self.paged.choose_launch(queries.shape[2], self.head_dim, self.dtype, self.capability)
        found: torch.Tensor = self.paged.decode(launch, plan.pieces, plan.runs, _dense(queries, 2),
                                                _dense(keys, 1), _dense(values, 1), *pools)
        return found

    def plan_parts(self, tables: Sequence[CacheTable], positions: Sequence[int]) -> DecodePlan:
        return self.plan(tables, positions)

    def decode_parts(self, plan: DecodePlan, layer: int, queries: torch.Tensor, keys: torch.Tensor,
                     values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = queries[:, None], keys[:, None], values[:, None]
        pools = self.keys, self.values, self.tables.arena, plan.spans, plan.positions, layer
        if self.paged is None:
            out, sums = self._gathered.decode_parts(plan.longest, q, k, v, *pools)
        else:
            launch = self.paged.choose_launch(queries.shape[1], self.head_dim, self.dtype, self.capability)
            out, sums = self.paged.decode_parts(launch, plan.pieces, plan.runs, _dense(q, 2), _dense(k, 1),
                                                _dense(v, 1), *pools)
        return out[:, 0], sums[:, 0]

    def joining(self, number: int, queries: torch.Tensor) -> TorchJoining:
        return TorchJoining(number, queries)

    def prompt_launch(self, heads: int) -> Any:
        """How prompts of G query heads for each KV group are cut up; None where no kernel takes them."""
        if self._prompts is None:
            return None
        return self._prompts.choose_prompt_launch(heads, self.head_dim, self.dtype, self.capability)

    def blocks_of(self, launch: Any, news: Sequence[int]) -> Units:
        """Blocks of prompts with so many new tokens; see :func:`hetis_exec.kernels.prompts.blocks_of`."""
        found: Units = self._prompts.blocks_of(launch, news)
        return found

    def plan_prompts(self, tables: Sequence[CacheTable | None], begins: Sequence[int], news: Sequence[int],
                     contexts: Sequence[int], heads: int) -> PromptPlan | None:
        launch = self.prompt_launch(heads)
        if launch is None or max(news) > PROMPT_TOKENS_MAX:
            return None
        spans = np.full((len(tables), 2), NO_TABLE, dtype=np.int64)
        spans[[n for n, table in enumerate(tables) if table is not None]] = self.tables.spans(
            [table for table in tables if table is not None])
        blocks = self.blocks_of(launch, news)
        prompts = np.stack((np.array(begins), np.array(news), np.array(contexts)), axis=1)
        # Those with an odd number come last, for kernels are compiled for where their arguments begin.
        sent = to_device(np.concatenate((spans.ravel(), blocks.ravel(), prompts.ravel())), self.device)
        a, b = spans.size, spans.size + blocks.size
        return PromptPlan(launch, sent[:a].view(-1, 2), sent[b:].view(-1, 3), sent[a:b].view(-1, 2))

    def attend_prompts(self, plan: PromptPlan, layer: int, queries: torch.Tensor, keys: torch.Tensor,
                       values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._prompts.attend(
            plan.launch, _dense(queries, 2), _dense(keys, 1), _dense(values, 1), self.keys, self.values,
            self.tables.arena, plan.spans, plan.prompts, plan.blocks, layer)
        return found

    def causal(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        new, groups, r, d = queries.shape
        total = keys.shape[1]
        q = queries.reshape(new, groups * r, d).transpose(0, 1)[None]
        k, v = keys[None], values[None]
        options: dict[str, Any] = {"is_causal": new == total and new > 1}
        if 1 < new < total:
            options = {"attn_mask": causal_lower_right(new, total)}
        if self._flash:
            options["enable_gqa"] = r > 1
        elif r > 1:
            k, v = (x[:, :, None].expand(1, groups, r, total, d).flatten(1, 2) for x in (k, v))
        out = scaled_dot_product_attention(q, k, v, **options)
        return out[0].transpose(0, 1).reshape(new, groups, r, d)


@dataclass(frozen=True, slots=True)
class OnTheWay:
    """See :class:`hetis_exec.backend.Leaving`."""

    event: torch.cuda.Event
    copies: list[torch.Tensor]

    def done(self) -> bool:
        return is_over(self.event)

    def arrays(self) -> list[Any]:
        self.event.synchronize()
        return [resident_of(copy) if copy.is_cuda else array_of(copy) for copy in self.copies]


def new_stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    """A stream; lower numbers go first."""
    make: Any = torch.cuda.Stream
    stream: torch.cuda.Stream = make(device, priority=priority)
    return stream


def is_over(event: Any) -> bool:
    """Whether what an event stands for has happened."""
    return bool(event.query())


def new_event(timing: bool = False) -> torch.cuda.Event:
    """An event of this thread's device."""
    make: Any = torch.cuda.Event
    event: torch.cuda.Event = make(enable_timing=timing)
    return event


class EventStopwatch:
    """Laps of a CUDA stream: its device works on what it was asked for while its host goes on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._parts: list[str] = []

    def start(self) -> None:
        self._parts = []
        self._record()

    def lap(self, part: str) -> None:
        self._parts.append(part)
        self._record()

    def _record(self) -> None:
        number = len(self._parts)
        if number == len(self._events):
            self._events.append(new_event(timing=True))
        self._events[number].record(torch.cuda.current_stream(self._device))

    def read(self) -> dict[str, float]:
        found: dict[str, float] = {}
        self._events[len(self._parts)].synchronize()
        for part, (a, b) in zip(self._parts, pairwise(self._events), strict=False):
            found[part] = found.get(part, 0.0) + 1e-3 * a.elapsed_time(b)
        return found


def triton_kernels(name: str) -> Any:
    """A module of Triton kernels, or None where Triton is not installed."""
    return import_module(f"hetis_exec.kernels.{name}") if find_spec("triton") is not None else None


def _dense(tensor: torch.Tensor, axes: int) -> torch.Tensor:
    """A tensor whose last axes lie close together."""
    size = 1
    for axis in range(1, axes + 1):
        if tensor.stride(-axis) != size and tensor.shape[-axis] > 1:
            return tensor.contiguous()
        size *= tensor.shape[-axis]
    return tensor
