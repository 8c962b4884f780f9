"""What the sections of ``exec_cuda.py`` share: the device, how it is timed, cache and inputs of attention."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.nn.functional import scaled_dot_product_attention

from hetis_exec.kernels.cuda import CudaKernels, DecodePlan
from hetis_exec.kernels.reference import attention
from hetis_sim.spec.gpus import GPUS
from hetis_sim.spec.model import ModelSpec

BLOCK = 16
COLD_BYTES = 2 << 30
"""Cache that a kernel goes through before it reads any of it again: many times the L2."""

DATASHEETS = {"H100": GPUS["h100-sxm"], "H200": GPUS["h200"]}
SMALL = ModelSpec("small", layers=2, hidden=64, query_heads=8, kv_heads=2, head_dim=16, ffn_hidden=96,
                  vocab=97)


class Machine:
    """The device, timers on it, and what was found so far."""

    def __init__(self, tiny: bool, out: Path) -> None:
        self.tiny = tiny
        self.out = out
        self.device = torch.device("cpu" if tiny else "cuda:0")
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.facts: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        if (out / "device.json").exists():
            self.facts = json.loads((out / "device.json").read_text())["facts"]

    def add(self, **row: Any) -> None:
        """Keep a result, and show it."""
        self.rows.append(row)
        print("  " + "  ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)

    def write(self, section: str, error: str | None = None) -> None:
        """Keep all results of a section."""
        found = {"facts": self.facts, "rows": self.rows, "error": error}
        (self.out / f"{section}.json").write_text(json.dumps(found, indent=1))

    @property
    def datasheet(self) -> float:
        """Bytes/s of the device's memory by its datasheet; 0 for a device that is not known here."""
        name = str(self.facts.get("name", ""))
        return next((gpu.memory_bandwidth_bytes_per_s for key, gpu in DATASHEETS.items() if key in name), 0.0)

    def shares(self, size_bytes: float, seconds: float) -> dict[str, float]:
        """Of the measured and of the datasheet's bandwidth."""
        rate = size_bytes / seconds
        found = {"gb_per_s": rate / 1e9}
        if self.facts.get("copy_gb_per_s"):
            found["of_measured"] = rate / 1e9 / max(self.facts["copy_gb_per_s"], self.facts["read_gb_per_s"])
        if self.datasheet:
            found["of_datasheet"] = rate / self.datasheet
        return found

    def wait(self) -> None:
        """Until the device is done."""
        if not self.tiny:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], times: int = 10) -> float:
        """Median time of a call on the device; its host's part in it is hidden where that is shorter."""
        call()
        self.wait()
        if self.tiny:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        self.wait()
        return statistics.median(1e-3 * a.elapsed_time(b) for a, b in pairwise(events))

    def captured(self, call: Callable[[], object], times: int = 5) -> float:
        """The same for a graph of the call: what the device needs, whatever its host does."""
        if self.tiny:
            return self.seconds(call)
        call()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self.seconds(graph.replay, times)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Cache:
    """Full tables of a batch, in random order over a pool that is read once in many calls."""

    def __init__(self, machine: Machine, batch: int, groups: int, head_dim: int, context: int) -> None:
        rows, self.blocks = batch * groups, context // BLOCK + 1
        layer_bytes = 2 * rows * context * head_dim * machine.dtype.itemsize
        self.bytes = layer_bytes
        self.layers = 2 if machine.tiny else max(2, min(64, COLD_BYTES // layer_bytes))
        units = self.layers * rows * self.blocks
        self.kernels = CudaKernels(machine.device, units, BLOCK, head_dim, machine.dtype)
        self.kernels.keys.normal_()
        self.kernels.values.normal_()
        self.kernels.tables.arena = torch.randperm(units, device=machine.device).to(torch.int32)
        begins = torch.arange(rows, device=machine.device) * self.layers * self.blocks
        self.spans = torch.stack((begins, torch.full_like(begins, self.blocks)), dim=1)
        self.positions = torch.full((batch,), context, device=machine.device)
        self.context = context

    def plan(self) -> DecodePlan:
        """As a step would have it."""
        groups = len(self.spans) // len(self.positions)
        cut = self.kernels.cut(self.positions.cpu().numpy(), groups)
        pieces, runs = (torch.from_numpy(part).to(self.positions.device) for part in cut)
        return DecodePlan(self.spans, self.positions, self.context, pieces, runs)

    def error(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
        """Largest difference to the reference over the first and the last row of the batch."""
        out, worst, kernels = self.kernels.attend(self.plan(), 1, q, k, v), 0.0, self.kernels
        groups = q.shape[1]
        for token, group in ((0, 0), (len(q) - 1, groups - 1)):
            begin = int(self.spans[token * groups + group, 0]) + self.blocks
            units = kernels.tables.arena[begin:begin + self.blocks].long()
            held = [pool[units].flatten(0, 1)[:self.context + 1].float().cpu()[None]
                    for pool in (kernels.keys, kernels.values)]
            wanted = attention(q[token:token + 1, group:group + 1].float().cpu(), *held)[0, 0]
            worst = max(worst, float((out[token, group].float().cpu() - wanted).abs().max()))
        return worst


def inputs(machine: Machine, batch: int, groups: int, heads: int, head_dim: int) -> list[torch.Tensor]:
    """Queries, keys and values as slices of one projection."""
    packed = torch.randn(batch, groups * (heads + 2) * head_dim, device=machine.device, dtype=machine.dtype)
    q, k, v = packed.split((groups * heads * head_dim, groups * head_dim, groups * head_dim), dim=1)
    return [q.view(batch, groups, heads, head_dim), k.view(batch, groups, head_dim),
            v.view(batch, groups, head_dim)]


def contiguous_seconds(machine: Machine, batch: int, groups: int, heads: int, head_dim: int, context: int,
                       layers: int) -> float:
    """Torch's fused attention for one token each over contiguous keys and values, as torch chooses it."""
    copies = min(layers, 8)
    held = torch.randn(copies, 2, batch, groups, context, head_dim, device=machine.device,
                       dtype=machine.dtype)
    q = torch.randn(batch, groups * heads, 1, head_dim, device=machine.device, dtype=machine.dtype)

    def call() -> None:
        for keys, values in held:
            scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    # Workers do without cuDNN's: it is fast, but makes a plan for each new length.
    torch.backends.cuda.enable_cudnn_sdp(True)
    seconds = machine.captured(call) / copies
    torch.backends.cuda.enable_cudnn_sdp(False)
    return seconds


SHAPES = {"llama3-8b": (8, 4, 128), "llama2-70b": (8, 8, 128), "llama2-13b": (40, 1, 128)}
"""KV groups, query heads of each, head dimension."""
