"""How fast workers compute on a CUDA device: kernels, whole decode steps and a run from end to end.

    python benchmarks/exec_cuda.py --out FOLDER [--seconds 150] [--only step replay]

Each section runs in a process of its own, so that none can spoil another one's memory or device, and leaves
a JSON file in the folder. ``--tiny`` runs the same code in small on a CPU, with Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from cuda_machine import BLOCK, SHAPES, SMALL, Cache, Machine, contiguous_seconds, inputs

from hetis_exec.backend import Wanted
from hetis_exec.kernels.cuda import CudaKernels, DecodePlan, triton_kernels
from hetis_exec.kernels.reference import attention
from hetis_exec.kvcache import KvPool, TableKey
from hetis_exec.models.architecture import made_up
from hetis_exec.torch_backend import TorchBackend, operations_for
from hetis_exec.whole_steps import WholeSteps
from hetis_sim.policies.plan import InstancePlan, StagePlan
from hetis_sim.spec.architectures import MODELS
from hetis_sim.spec.model import ModelSpec

# -- the device ---------------------------------------------------------------------------------------------


def section_device(machine: Machine) -> None:
    """Names, versions, bandwidth and arithmetic rate."""
    facts, device = machine.facts, machine.device
    facts["torch"], facts["python"] = torch.__version__, sys.version.split()[0]
    if triton_kernels("paged") is not None:
        import triton

        facts["triton"] = triton.__version__
    if not machine.tiny:
        about = torch.cuda.get_device_properties(device)
        facts |= {"name": about.name, "processors": about.multi_processor_count, "cuda": torch.version.cuda,
                  "capability": list(torch.cuda.get_device_capability()),
                  "memory_gib": about.total_memory / 2**30, "l2_mib": about.L2_cache_size / 2**20}
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    size = 1 << (18 if machine.tiny else 32)
    a, b = (torch.empty(size // 4, dtype=torch.float32, device=device).fill_(n) for n in (1.0, 2.0))
    facts["copy_gb_per_s"] = 2 * size / machine.seconds(lambda: b.copy_(a)) / 1e9
    facts["read_gb_per_s"] = size / machine.seconds(a.sum) / 1e9
    side = 64 if machine.tiny else 8192
    x, y = (torch.randn(side, side, device=device, dtype=machine.dtype) for _ in range(2))
    facts["gemm_tflops"] = 2 * side**3 / machine.seconds(lambda: x @ y) / 1e12
    if not machine.tiny:
        host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        there = a.view(torch.uint8)[:1 << 28]
        for way, (to, of) in {"to_device": (there, host), "to_host": (host, there)}.items():
            seconds = machine.seconds(lambda to=to, of=of: to.copy_(of, non_blocking=True))
            facts[f"{way}_gb_per_s"] = len(host) / seconds / 1e9
    for key, value in facts.items():
        machine.add(**{key: value})


# -- decode attention ---------------------------------------------------------------------------------------


def section_kernel(machine: Machine) -> None:
    """Paged decode attention, beside torch's on contiguous cache."""
    shapes = {"small": (2, 4, 16)} if machine.tiny else SHAPES
    cases = [(1, 1024), (1, 8192), (8, 1024), (8, 8192), (32, 1024), (32, 4096), (64, 256), (64, 1024),
             (64, 4096)]
    some = {"llama2-70b": [1, 3, 5], "llama2-13b": [0, 2, 3, 4]}
    if machine.tiny:
        cases = [(2, 20)]
    for name, (groups, heads, head_dim) in shapes.items():
        for batch, context in [cases[n] for n in some[name]] if name in some and not machine.tiny else cases:
            cache = Cache(machine, batch, groups, head_dim, context)
            given, plan = inputs(machine, batch, groups, heads, head_dim), cache.plan()

            def call(cache: Cache = cache, given: Any = given, plan: DecodePlan = plan) -> None:
                for layer in range(cache.layers):
                    cache.kernels.attend(plan, layer, *given)

            seconds = machine.captured(call) / cache.layers
            error = cache.error(*given)
            layers = cache.layers
            size = cache.bytes
            del cache, call
            theirs = contiguous_seconds(machine, batch, groups, heads, head_dim, context, layers)
            machine.add(model=name, batch=batch, context=context, piece_tokens=int(plan.pieces[0, 2]),
                        us=1e6 * seconds,
                        **machine.shares(size, seconds), sdpa_us=1e6 * theirs, error=error)


def section_tune(machine: Machine) -> None:
    """Tiles, warps, stages and pieces of the decode kernel: with matrix units, and as older cards have it."""
    paged = triton_kernels("paged")
    usual, older = paged.Launch(True, 64, 4, 3), paged.Launch(False, 8, 4, 2)
    llama3, llama2 = (8, 4, 128), (40, 1, 128)
    cases: list[tuple[tuple[int, int, int], int, int, list[Any], Sequence[int]]] = [
        (llama3, 32, 1024, [usual, replace(usual, warps=2), replace(usual, tile=128, stages=2)], (1, 2, 3)),
        (llama3, 64, 1024, [usual, replace(usual, warps=2)], (1, 2)),
        (llama3, 8, 1024, [usual, replace(usual, tile=32)], (4, 8, 10)),
        (llama3, 1, 2048, [usual, replace(usual, tile=32)], (16, 32)),
        (llama2, 8, 1024, [usual, replace(usual, warps=2), replace(usual, warps=8)], (1, 2)),
        (llama3, 8, 1024,
         [replace(older, tile=tile, warps=warps, stages=stages)
          for tile, warps, stages in ((8, 4, 2), (4, 4, 2), (4, 2, 2), (8, 4, 1), (4, 4, 3))], (8,)),
        (llama2, 8, 1024, [replace(older, tile=tile, warps=warps)
                           for tile, warps in ((32, 4), (16, 4), (8, 4), (16, 2), (8, 2))], (2,))]
    if machine.tiny:
        cases = [((2, 4, 16), 2, 20, [replace(usual, tile=16), older], (1, 2))]
    for (groups, heads, head_dim), batch, context, launches, pieces in cases:
        cache = Cache(machine, batch, groups, head_dim, context)
        given = inputs(machine, batch, groups, heads, head_dim)
        for launch in launches:
            for splits in pieces:
                cut = paged.cut(cache.positions.cpu().numpy(), -(-context // splits), batch * splits)
                listed = [torch.from_numpy(part).to(machine.device) for part in cut]

                def call(cache: Cache = cache, given: list[torch.Tensor] = given, listed: Any = listed,
                         launch: Any = launch) -> None:
                    for layer in range(cache.layers):
                        paged.decode(launch, *listed, *given, cache.kernels.keys, cache.kernels.values,
                                     cache.kernels.tables.arena, cache.spans, cache.positions, layer)

                seconds = machine.captured(call, 3) / cache.layers
                machine.add(heads=heads, batch=batch, context=context, **asdict(launch), splits=splits,
                            us=1e6 * seconds, **machine.shares(cache.bytes, seconds))


# -- prefill ------------------------------------------------------------------------------------------------


def section_prefill(machine: Machine) -> None:
    """Causal attention of prompts and of their later pieces: by the kernel for all prompts, and by torch."""
    groups, heads, head_dim = (2, 4, 16) if machine.tiny else SHAPES["llama3-8b"]
    cases = ((8, 4),) if machine.tiny else ((64, 0), (256, 0), (1024, 0), (2048, 0), (8192, 0), (256, 1024),
                                            (512, 4096))
    for new, context in cases:
        total = context + new
        units = groups * (total // BLOCK + 1)
        kernels = CudaKernels(machine.device, units, BLOCK, head_dim, machine.dtype)
        pool = KvPool(units, BLOCK, kernels)
        keys = [TableKey(0, 0, g) for g in range(groups)]
        for key in keys:
            pool.open(key, 1, total // BLOCK + 1, 1)
        q, _, _ = inputs(machine, new, groups, heads, head_dim)
        k, v = (torch.randn(groups, total, head_dim, device=machine.device, dtype=machine.dtype)
                for _ in range(2))
        pool.write_groups(pool.spots(keys, 0, total), 0, k, v)
        seconds = machine.captured(lambda kernels=kernels, q=q, k=k, v=v: kernels.causal(q, k, v))
        operations = 4 * groups * heads * head_dim * (new * context + new * new / 2)
        sample = kernels.causal(q, k, v)[-2:].float().cpu()
        wanted = attention(q[-2:].float().cpu(), k.float().cpu(), v.float().cpu())
        row = {"new": new, "context": context, "torch_us": 1e6 * seconds,
               "torch_tflops": operations / seconds / 1e12,
               "torch_error": float((sample - wanted).abs().max())}
        module = triton_kernels("prompts")
        launch = kernels.prompt_launch(heads) or module.PromptLaunch(16 // heads, 16, 16, 4, 2)
        tables = [pool.table(key) for key in keys]
        spans = torch.from_numpy(kernels.tables.spans(tables)).to(machine.device)
        prompts = torch.tensor([[0, new, context]], device=machine.device)
        own = [x[:, context:].swapaxes(0, 1).contiguous() for x in (k, v)]
        launches = [launch] if machine.tiny else [
            replace(launch, rows=rows, tokens=rows // heads, warps=warps, stages=stages)
            for rows, warps, stages in ((64, 4, 2), (64, 4, 3), (128, 8, 2), (128, 4, 2))]
        for made in launches:
            blocks = torch.from_numpy(module.blocks_of(made, [new])).to(machine.device)

            def call(module: Any = module, made: Any = made, blocks: torch.Tensor = blocks,
                     kernels: CudaKernels = kernels, q: torch.Tensor = q, own: Any = own,
                     spans: torch.Tensor = spans, prompts: torch.Tensor = prompts) -> torch.Tensor:
                found: torch.Tensor = module.attend(made, q, *own, kernels.keys, kernels.values,
                                                    kernels.tables.arena, spans, prompts, blocks, 0)
                return found

            seconds = machine.captured(call)
            machine.add(**row, **asdict(made), us=1e6 * seconds, tflops=operations / seconds / 1e12,
                        error=float((call()[-2:].float().cpu() - wanted).abs().max()))


# -- whole steps --------------------------------------------------------------------------------------------


def worker_of(machine: Machine, batch: int, context: int) -> tuple[TorchBackend, InstancePlan, int]:
    """A backend, the plan of one worker, and the units that it needs."""
    spec = SMALL if machine.tiny else MODELS["llama3-8b"]
    architecture = made_up(spec, 4 if machine.tiny else 2)
    backend = TorchBackend(architecture, places=() if machine.tiny else ("cuda:0",),
                           dtype="float32" if machine.tiny else "bfloat16")
    plan = InstancePlan((StagePlan((0,), spec.layers, (spec.kv_heads,)),))
    return backend, plan, batch * spec.layers * spec.kv_heads * (context // BLOCK + 4)


def step_bytes(spec: ModelSpec, batch: int, context: int) -> float:
    """What a decode step must read: cache, and all weights but the rows of the embedding."""
    weights = spec.parameters - (0 if spec.tied_embeddings else spec.vocab * spec.hidden)
    return weights * spec.weight_bytes + batch * context * spec.kv_bytes_per_token


def section_step(machine: Machine) -> None:
    """Whole decode steps: device alone, with their host, kernel by kernel, and layer by layer."""
    cases = [(2, 20)] if machine.tiny else [(1, 512), (8, 512), (32, 512), (32, 2048), (64, 512),
                                            (64, 2048)]
    backend, plan, units = worker_of(machine, *max(cases, key=lambda case: case[0] * case[1]))
    spec = backend.architecture.spec
    began = time.perf_counter()
    shard = backend.shard(0, plan, 0, 0)
    machine.wait()
    machine.facts["weights_s"] = time.perf_counter() - began
    if machine.tiny:
        shard._operations = operations_for(backend.architecture, "cuda")
    for batch, context in cases:
        kernels = (CudaKernels(machine.device, units, BLOCK, spec.head_dim, machine.dtype) if machine.tiny
                   else backend.kernels(0, units, BLOCK))
        kernels.keys.normal_()
        kernels.values.normal_()
        pool = KvPool(units, BLOCK, kernels)
        for request in range(batch):
            for group in range(spec.kv_heads):
                pool.open(TableKey(request, 0, group), spec.layers, context // BLOCK + 3, 1)
        ids, tokens = list(range(batch)), np.arange(batch) % spec.vocab
        asked = [Wanted(request, context + 1) for request in ids]
        row: dict[str, Any] = {"batch": batch, "context": context}
        found = []
        for kind in ("graph", "kernels"):
            if kind == "graph" and machine.tiny:
                continue
            steps = WholeSteps(shard, pool, graphs=kind == "graph")
            began = time.perf_counter()
            steps.run(ids, [context] * batch, tokens, asked)
            row[f"{kind}_first_s"] = time.perf_counter() - began
            walls = []
            for n in range(1 if machine.tiny else 20):
                began = time.perf_counter()
                found.append(steps.run(ids, [context + n % 30] * batch, tokens, asked).tolist())
                walls.append(time.perf_counter() - began)
            row[f"{kind}_ms"] = 1e3 * statistics.median(walls)
            if kind == "graph":
                (step,) = steps._steps.values()
                assert step.graph is not None
                alone = machine.seconds(step.graph.replay, 10)
                row["device_ms"] = 1e3 * alone
                row |= machine.shares(step_bytes(spec, batch, context), alone)
        if not machine.tiny:
            row["same"] = float(np.mean(np.array(found[0]) == np.array(found[20])))
        machine.add(**row)
        del kernels, pool, steps
    machine.add(weights_s=machine.facts["weights_s"])


def section_layers(machine: Machine) -> None:
    """A step of the general path, which serves prompts, ranks, stages and remote heads: layer by layer."""
    from hetis_exec.crew import WorkerSpec, build_worker
    from hetis_exec.messages import Control, Open, Row, Task
    from hetis_exec.transport import InProcessTransport

    batch, context, steps = (2, 20, 2) if machine.tiny else (32, 512, 8)
    backend, plan, units = worker_of(machine, batch, context)
    object.__setattr__(backend, "cuda_graphs", False)
    spec = backend.architecture.spec
    transport = InProcessTransport()
    worker: Any = build_worker(WorkerSpec(0, plan, 0, 0, units, BLOCK, backend, timeout_s=60.0,
                                           rows_max=64, tokens_max=1024 if not machine.tiny else 16),
                               transport.endpoint(0))
    driver = transport.endpoint(-1)
    worker.cache.pool.kernels.enter()
    began = time.perf_counter()
    worker.prepare()
    machine.add(warm_up_s=time.perf_counter() - began)
    groups, blocks = tuple(range(spec.kv_heads)), context // BLOCK + 4
    opens = tuple(Open(request, 0, groups, spec.layers, blocks, 1) for request in range(batch))
    rows = [Row(request, context, 1, True, False, (0,) * len(groups), -1) for request in range(batch)]

    def do(seq: int, ops: Any, rows: tuple[Row, ...]) -> float:
        tokens = np.arange(sum(row.new_tokens for row in rows)) % spec.vocab
        driver.send(0, Control(seq, ops, units, Task(rows, tokens)))
        began = time.perf_counter()
        worker.turn()
        return 1e3 * (time.perf_counter() - began)

    walls = []
    for seq in range(1, steps + 2):
        walls.append(do(seq, opens if seq == 1 else (), tuple(rows)))
        rows = [row._replace(position=row.position + 1) for row in rows]
    times = None
    while (message := driver.receive(0.0)) is not None:
        times = getattr(message, "times", times)
    machine.add(batch=batch, context=context, wall_ms=statistics.median(walls[1:]),
                **{f"{part}_ms": 1e3 * getattr(times, f"{part}_s")
                   for part in ("dense", "attention", "head_transfer", "collective")})
    for number, tokens in enumerate((16,) if machine.tiny else (1024, 37, 100, 211, 500, 777, 1500)):
        prompt = (Row(99 + number, 0, tokens, True, True, (0,) * len(groups), -1),)
        first, again = (do(steps + 2 + 2 * number + n, (), prompt) for n in range(2))
        machine.add(prompt_tokens=tokens, first_ms=first, wall_ms=again)
    section_prompts(machine, backend)


def section_prompts(machine: Machine, layered: TorchBackend) -> None:
    """Whole steps of prompts of lengths that have not been seen before, on a worker that has prepared."""
    backend = replace(layered, cuda_graphs=True)
    spec, lengths = backend.architecture.spec, (4, 9) if machine.tiny else (37, 100, 211, 333, 500, 777, 1000)
    plan = InstancePlan((StagePlan((0,), spec.layers, (spec.kv_heads,)),))
    units = spec.layers * spec.kv_heads * (sum(lengths) // BLOCK + len(lengths))
    kernels = (CudaKernels(machine.device, units, BLOCK, spec.head_dim, machine.dtype) if machine.tiny
               else backend.kernels(0, units, BLOCK))
    pool = KvPool(units, BLOCK, kernels)
    shard = backend.shard(0, plan, 0, 0)
    steps = WholeSteps(shard, pool, graphs=not machine.tiny)
    began = time.perf_counter()
    steps.warm_up(64, 1024, time.monotonic() + 30)
    machine.add(warm_up_s=time.perf_counter() - began)
    for request, new in enumerate(lengths):
        for group in range(spec.kv_heads):
            pool.open(TableKey(request, 0, group), spec.layers, new // BLOCK + 1, 1)
        if not steps.takes_prompts([request], [new]):
            continue
        walls = []
        for _ in range(3):
            began = time.perf_counter()
            steps.run_prompts([request], [0], [new], np.arange(new) % spec.vocab, [0], [Wanted(request, new)])
            walls.append(1e3 * (time.perf_counter() - began))
        machine.add(graph_prompt_tokens=new, first_ms=walls[0], wall_ms=min(walls))


# -- from end to end ----------------------------------------------------------------------------------------


def section_replay(machine: Machine) -> None:
    """A workload under vLLM's policy, served by one worker."""
    from hetis_exec.config import compose_execution
    from hetis_exec.run import execute, prepare_execution

    if machine.tiny:
        words = ["model=smollm2-135m", "requests=3", "rate=100", "workload.output_scale=0.01",
                 "workload.prompt_scale=0.02", "executor.workers=threads"]
    else:
        cluster = "h200" if "H200" in str(machine.facts.get("name")) else "h100"
        words = ["model=llama3-8b", f"cluster={cluster}",
                 "requests=64", "rate=1000", "workload.table=fixed", "workload.prompt_tokens=512",
                 "workload.output_tokens=192", "workload.prompt_scale=1", "workload.output_scale=1",
                 "scheduler.max_batch_requests=64", "scheduler.max_batch_tokens=8192"]
    slower = ["executor.cuda_graphs=false", "requests=32", "workload.output_tokens=48"]
    for more in [[]] if machine.tiny else [[], slower]:
        began = time.perf_counter()
        execution = prepare_execution(compose_execution("policy=vllm", "output=none", *words, *more))
        measured = execute(execution)
        wall = time.perf_counter() - began
        steps = measured.result.recorder.steps()
        decode = steps[(steps["prefill_tokens"] == 0)]
        full = decode[decode["decode_tokens"] == decode["decode_tokens"].max()]
        spent = full["end_s"] - full["start_s"]
        requests = measured.result.recorder.requests()
        output = sum(len(tokens) for tokens in measured.result.tokens.values())
        lasted = float(requests["finish_s"].max() - requests["arrival_s"].min())
        machine.add(run=" ".join(more) or "all", wall_s=wall, finished=len(measured.result.tokens),
                    output_tokens_per_s=output / lasted, decode_steps=len(decode),
                    batch=int(full["decode_tokens"].max()), step_ms=1e3 * float(spent.median()),
                    device_ms=1e3 * float(full["dense_s"].median()),
                    host_ms=1e3 * float(full["host_s"].median()),
                    between_ms=1e3 * float((full["start_s"].shift(-1) - full["end_s"]).median()),
                    checked=measured.checked, error=str(measured.error))


SECTIONS: dict[str, tuple[Callable[[Machine], None], int]] = {
    "device": (section_device, 40), "kernel": (section_kernel, 60), "step": (section_step, 70),
    "layers": (section_layers, 40), "replay": (section_replay, 100), "tune": (section_tune, 60),
    "prefill": (section_prefill, 30)}
"""Sections, in order, and the seconds that each may take."""


def run_section(name: str, machine: Machine) -> int:
    """In this process."""
    try:
        SECTIONS[name][0](machine)
    except Exception as error:
        machine.write(name, repr(error))
        raise
    machine.write(name)
    return 0


def run_all(names: Sequence[str], options: argparse.Namespace) -> int:
    """Each in a process of its own, while there is time."""
    until, failed = time.monotonic() + options.seconds, []
    for name in names:
        left = min(SECTIONS[name][1], until - time.monotonic())
        if left < 5:
            print(f"== {name}: no time left", flush=True)
            continue
        print(f"== {name}", flush=True)
        began = time.monotonic()
        words = [sys.executable, __file__, "--out", str(options.out), "--section", name]
        try:
            code = subprocess.run(words + ["--tiny"] * options.tiny, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            code = -1
        print(f"== {name}: {'done' if code == 0 else f'FAILED ({code})'} in {time.monotonic() - began:.1f} s",
              flush=True)
        failed += [name] * (code != 0)
    print("failed: " + ", ".join(failed) if failed else "all sections done", flush=True)
    return 1 if failed else 0


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--section", choices=SECTIONS, help="run this one here")
    parser.add_argument("--tiny", action="store_true", help="in small on the CPU, by Triton's interpreter")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.section:
        return run_section(options.section, Machine(options.tiny, options.out))
    return run_all(options.only, options)


if __name__ == "__main__":
    sys.exit(main())
