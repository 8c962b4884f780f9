"""Whether decode attention takes longer while another core works, and what that core does then.

    python benchmarks/exec_contention.py [--rows 12 48] [--context 256] [--rounds 40]

A process on one core attends, in all layers of a model, to rows of (request, KV group) of the shape of
SmolLM2-135M: as a primary or an attention worker does, but with nobody to wait for. A second, independent
process on another core meanwhile sleeps, multiplies matrices that its own cache holds, attends to as many
rows of its own, or reads memory as fast as it can; these take turns in every round. Printed are medians, and
over the rounds the median ratio to the time beside a process that sleeps, with an interval that holds it in
95 of 100 resamplings.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch
from exec_heads import interval

from hetis_exec.kernels.cpu import CpuKernels
from hetis_exec.kvcache import KvPool, TableKey

LAYERS, HEADS, HEAD_DIM, BLOCK = 30, 3, 64, 16
OTHERS = ("sleeps", "multiplies", "attends", "reads")
SETTLE_S = 3e-3
SMALL = 96
"""Rows and columns of matrices that the first two caches of a core hold."""

LARGE = 32 << 20
"""Numbers that no cache holds, of four bytes each."""


def attention(rows: int, context: int) -> Callable[[], None]:
    """Attends in one layer after another to rows of their own tokens; the next layer at each call."""
    blocks = context // BLOCK + 1
    kernels = CpuKernels(rows * LAYERS * blocks, BLOCK, HEAD_DIM)
    pool = KvPool(rows * LAYERS * blocks, BLOCK, kernels)
    keys = [TableKey(n, 0, 0) for n in range(rows)]
    for key in keys:
        pool.open(key, LAYERS, blocks, 0)
        for layer in range(LAYERS):
            pool.write(key, layer, 0, *torch.randn(2, context, HEAD_DIM))
    plan = kernels.plan([pool.table(key) for key in keys], [context - 1] * rows)
    queries, new = torch.randn(rows, HEADS, HEAD_DIM), torch.randn(2, rows, HEAD_DIM)
    layer = 0

    def attend() -> None:
        nonlocal layer
        kernels.decode(plan, layer, queries, *new)
        layer = (layer + 1) % LAYERS

    return attend


def multiply() -> None:
    """Products in the core's own cache."""
    matrix = np.ones((SMALL, SMALL), dtype=np.float32)
    for _ in range(20):
        np.matmul(matrix, matrix)


def keep_busy(orders: Connection, core: int, rows: int, context: int) -> None:
    """Life of the other process: it does what it was told last."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    numbers = np.ones(LARGE, dtype=np.float32)
    works: dict[str, Callable[[], object]] = {"multiplies": multiply, "attends": attention(rows, context),
                                              "reads": numbers.sum}
    orders.send("ready")
    order = "sleeps"
    with torch.inference_mode():
        while order != "end":
            if order == "sleeps" or orders.poll():
                order = orders.recv()
            else:
                works[order]()


def measure(rows: int, context: int, rounds: int, cores: list[int]) -> str:
    """Lines of the table for one size."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=keep_busy, daemon=True,
                                                           args=(there, cores[1], rows, context))
    process.start()
    there.close()
    attend = attention(rows, context)
    found: dict[str, list[float]] = {other: [] for other in OTHERS}
    here.recv()
    with torch.inference_mode():
        for _ in range(rounds):
            for other in OTHERS:
                here.send(other)
                time.sleep(SETTLE_S)
                begun_s = time.perf_counter()
                for _ in range(LAYERS):
                    attend()
                found[other].append(time.perf_counter() - begun_s)
    here.send("end")
    process.join()
    lines = []
    for other in OTHERS:
        ratios = np.array(found[other]) / np.array(found["sleeps"])
        low, high = interval(ratios)
        lines.append(f"{rows:5} {other:11} {1e3 * np.median(found[other]):8.2f} {np.median(ratios):7.2f} "
                     f"[{low:.2f}, {high:.2f}]")
    return "\n".join(lines)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        parser.error("two cores are needed")
    os.sched_setaffinity(0, {cores[0]})
    torch.set_num_threads(1)
    print(" rows the other      ms    ratio")
    for rows in options.rows:
        print(measure(rows, options.context, options.rounds, cores), flush=True)


if __name__ == "__main__":
    main()
